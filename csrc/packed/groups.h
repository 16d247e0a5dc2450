// Parts that all weights in groups share: the scales of a unit, the formulas of their values, and the walk over units.
#pragma once

#include "packed/coded.h"

namespace veneer {
namespace {

constexpr int64_t panel_outputs = panel_block * panel_blocks;

// ---- numbers of 4 bits ----------------------------------------------------------------------------------------------------

constexpr float number_tables[4][16] = {
    {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113},
    {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f},
};
inline const float* table_of(const PanelMatrix& m) {
  const int first = Coding::signed4, at = m.coding.numbers - first;
  return number_tables[at < 4 ? at : 0];
}

// ---- scales -------------------------------------------------------------------------------------------------------------

inline void widen_scales(Coding::Scales stored, const char* at, int64_t n, float* out) {
  const auto each = [&](const auto* from) {
    for (int64_t j = 0; j < n; j += width) store(out + j, load(from + j));
  };
  switch (stored) {
    case Coding::bfloat16: return each(reinterpret_cast<const bf16*>(at));
    case Coding::float16: return each(reinterpret_cast<const fp16*>(at));
    case Coding::e8m0: {
      const uint8_t* bytes = reinterpret_cast<const uint8_t*>(at);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) out[j] = bit_cast<float>(static_cast<uint32_t>(bytes[j]) << 23);
      return;
    }
    default: std::memcpy(out, at, static_cast<size_t>(n) * sizeof(float));
  }
}

// The scales of a unit, for all outputs of a panel, and the numbers beside them.
struct UnitHead {
  alignas(64) float scale[panel_outputs], beside[panel_outputs];

  void load(const PanelMatrix& m, const char* at, int64_t across) {
    widen_scales(m.coding.scales, at, across, scale);
    if (m.coding.numbers == Coding::e4m3) {  // whose numbers are read as halves, 2^-8 as large
#pragma omp simd
      for (int64_t j = 0; j < across; ++j) scale[j] *= 0x1p8f;
    }
    if (m.coding.formula == Coding::scaled) return;
    widen_scales(m.coding.scales, at + across * scale_bytes(m.coding.scales), across, beside);
    if (m.coding.formula == Coding::less_zero) {  // a zero of 8 bits times a scale of 16 is exact, and so is the sum
#pragma omp simd
      for (int64_t j = 0; j < across; ++j) beside[j] = -(beside[j] * scale[j]);
    }
  }
};

// ---- formulas -------------------------------------------------------------------------------------------------------------

// Halves made of whole numbers and halves, whose rounding only cuts off bits. Below the normal numbers all are exact. A matrix that
// may have infinite ones is not packed. So two subtractions take the place of two conversions (Veltkamp 1968; Dekker 1971,
// 10.1007/BF01397083). Ties go to even: tests/unit/ops/test_packed_halves.py has every scale and every zero.
struct PlainHalf {};
template <>
inline lanes rounded<PlainHalf>(lanes x) {
  const lanes large = x * 8193.0f;  // 2^13 + 1
  return large - (large - x);
}

template <class Round>
struct Scaled {
  static lanes of(lanes number, lanes scale, lanes) { return rounded<Round>(number * scale); }
};
template <class Round>
struct Added {  // the products are exact in all formats: so it does not matter whether they are rounded
  static lanes of(lanes number, lanes scale, lanes beside) { return rounded<Round>(multiply_add(number, scale, beside)); }
};
template <class Round>
struct Apart {
  static lanes of(lanes number, lanes scale, lanes beside) { return rounded<Round>(rounded<Round>(number - beside) * scale); }
};
template <>
struct Apart<PlainHalf> {  // a difference may be so small that its product with a scale is subnormal
  static lanes of(lanes number, lanes scale, lanes beside) { return rounded<fp16>(rounded<PlainHalf>(number - beside) * scale); }
};

// ---- decoding -------------------------------------------------------------------------------------------------------------

// Inputs [from, to) of blocks [begin, end) of one panel, as a right operand whose rows are `own` outputs wide. from: a multiple
// of 16; to: too, or the last input. T: what the values are stored as, or RowSums, which take them up at once.
template <class T>
using Decode = void (*)(const PanelMatrix& m, int64_t begin, int64_t end, int64_t from, int64_t to, T* out, int64_t own);

// f(k, end, codes of the inputs from k, head of their unit) for the inputs [k, end) of each unit; of codes the panel's first.
template <class Head, class F>
inline void each_unit(const PanelMatrix& m, int64_t begin, int64_t from, int64_t to, int64_t group_bytes, const F& f) {
  const Panel panel = panel_of(m, begin);
  const char* first = coded_panel(m, begin);
  Head head;
  for (int64_t k = from, stop; k < to; k = stop) {
    const int64_t unit = k / m.unit, end = (unit + 1) * m.unit;
    stop = end < to ? end : to;
    const char* at = first + unit * panel.across * unit_bytes(m);
    head.load(m, at, panel.across);
    f(k, stop, at + panel.across * (head_bytes(m) + (k - unit * m.unit) / group * group_bytes), head);
  }
}
// f(k, codes of the sixteen inputs from k, head of their unit)
template <class F>
inline void each_group(const PanelMatrix& m, int64_t begin, int64_t from, int64_t to, int64_t group_bytes, const F& f) {
  const int64_t step = panel_of(m, begin).across * group_bytes;
  each_unit<UnitHead>(m, begin, from, to, group_bytes, [&](int64_t k, int64_t stop, const char* at, const UnitHead& head) {
    for (; k < stop; k += group, at += step) f(k, at, head);
  });
}

#if defined(__AVX512BF16__)
struct RowSums {  // of one row of x, which begins with the first input that is decoded, and the blocks
  const bf16* x;
  lanes sums[panel_blocks] = {};
};

// Where the pairs of sixteen inputs of a block go: to input k and output j of a right operand, or into the sums.
template <class T>
struct PairSink;
template <>
struct PairSink<bf16> {
  bf16* to;
  int64_t own;
  PairSink(bf16* out, int64_t across, int64_t k, int64_t j) : to(out + k * across + 2 * j), own(across) {}
  void put(int p, __m512i pairs) { _mm512_storeu_si512(to + 2 * p * own, pairs); }
  void finish() const {}
};
template <>
struct PairSink<RowSums> {
  const bf16* x;
  lanes &kept, sum;
  PairSink(RowSums* row, int64_t, int64_t k, int64_t j) : x(row->x + k), kept(row->sums[j / panel_block]), sum(kept) {}
  void put(int p, __m512i pairs) { sum = PairEngine::add(sum, PairEngine::values(x + 2 * p), {(__m512bh)pairs}); }
  void finish() const { kept = sum; }
};
#endif

}  // namespace
}  // namespace veneer
