// Numbers of 4 bits whose values are rounded to halves: GPTQ's, AWQ's and HQQ's. A CPU without arithmetic of halves takes longer
// to round a value than to look it up. So the sixteen values of an output are made once a unit, and codes find theirs.
#pragma once

#include "packed/groups.h"

namespace veneer {
namespace {

#if defined(__AVX512BF16__)
constexpr int64_t least_tabled = 32;  // inputs of a unit: of fewer, making each value is as quick

// Sixteen values in bf16 of each of sixteen outputs, their lower and their upper bytes. Register q has outputs q, 4 + q, 8 + q
// and 12 + q. Four registers of dwords are turned into rows of sixteen outputs in that order.
struct ValueBytes {
  __m512i lower[4], upper[4];

  // numbers: of the sixteen codes. scale, beside: of the outputs.
  template <class Formula>
  void fill(lanes numbers, const float* scale, const float* beside) {
    alignas(64) uint8_t places[64];
    for (int l = 0; l < 64; ++l) places[l] = static_cast<uint8_t>(2 * l);
    const __m512i even = _mm512_load_si512(places), odd = _mm512_add_epi8(even, _mm512_set1_epi8(1));
    const auto of = [=](int o) __attribute__((always_inline)) { return (__m512)Formula::of(numbers, splat(scale[o]), splat(beside[o])); };
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const __m512i first = (__m512i)_mm512_cvtne2ps_pbh(of(4 + q), of(q)), last = (__m512i)_mm512_cvtne2ps_pbh(of(12 + q), of(8 + q));
      lower[q] = _mm512_permutex2var_epi8(first, even, last);
      upper[q] = _mm512_permutex2var_epi8(first, odd, last);
    }
  }
};

// Four rows of four dwords in each quarter of a register, turned.
inline void turn_dwords(__m512i (&rows)[4]) {
  const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpacklo_epi32(rows[2], rows[3]);
  const __m512i c = _mm512_unpackhi_epi32(rows[0], rows[1]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
  rows[0] = _mm512_unpacklo_epi64(a, b);
  rows[1] = _mm512_unpackhi_epi64(a, b);
  rows[2] = _mm512_unpacklo_epi64(c, d);
  rows[3] = _mm512_unpackhi_epi64(c, d);
}

// Places of the bytes of outputs 0, 1, 4, 5, … among the codes of sixteen. Even and odd outputs take turns, and become
// neighbours. Bytes of outputs 2, 3, 6, 7, … lie 16 behind them.
inline __m512i byte_places() {
  alignas(64) uint8_t places[64];
  for (int l = 0; l < 64; ++l) places[l] = static_cast<uint8_t>(l / 16 * 32 + l % 16 / 8 * 8 + l % 8 / 2 + l % 2 * 4);
  return _mm512_load_si512(places);
}

template <class Formula, class T>
void decode_tables(const PanelMatrix& m, int64_t begin, int64_t end, int64_t from, int64_t to, T* out, int64_t own) {
  const Panel panel = panel_of(m, begin);
  const int64_t blocks = end - begin, step = panel.across * FourBits::group_bytes;
  const lanes numbers = load(table_of(m));
  const __m512i places = byte_places(), kept = _mm512_set1_epi8(15);
  ValueBytes values[panel_blocks];
  each_unit<UnitHead>(m, begin, from, to, FourBits::group_bytes, [&](int64_t start, int64_t stop, const char* at, const UnitHead& head) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t output = panel.first + b * panel_block;
      values[b].fill<Formula>(numbers, head.scale + output, head.beside + output);
    }
    // Blocks take turns: the sums of one are a chain.
    for (int64_t k = start; k < stop; k += group, at += step)
      for (int64_t b = 0; b < blocks; ++b) {
        const char* codes = at + (panel.first + b * panel_block) * FourBits::group_bytes;
        const __m512i first = _mm512_loadu_si512(codes), last = _mm512_loadu_si512(codes + 64);
        __m512i even[4], odd[4];  // pairs 0, 2, 4, 6 and 1, 3, 5, 7 of inputs
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m512i both = _mm512_permutex2var_epi8(first, _mm512_add_epi8(places, _mm512_set1_epi8(static_cast<char>(16 * half))), last);
          const __m512i low = _mm512_and_si512(both, kept), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), kept);
#pragma GCC unroll 2
          for (int q = 2 * half; q < 2 * half + 2; ++q) {
            const __m512i index = q % 2 ? _mm512_unpackhi_epi64(low, high) : _mm512_unpacklo_epi64(low, high);
            const __m512i lower = _mm512_shuffle_epi8(values[b].lower[q], index), upper = _mm512_shuffle_epi8(values[b].upper[q], index);
            even[q] = _mm512_unpacklo_epi8(lower, upper);
            odd[q] = _mm512_unpackhi_epi8(lower, upper);
          }
        }
        turn_dwords(even);
        turn_dwords(odd);
        PairSink<T> sink(out, own, k - from, b * panel_block);
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
          sink.put(2 * p, even[p]);
          sink.put(2 * p + 1, odd[p]);
        }
        sink.finish();
      }
  });
}

template <class T>
Decode<T> tables_of(const PanelMatrix& m) {
  if (m.coding.formula == Coding::scaled) return decode_tables<Scaled<PlainHalf>, T>;
  return m.coding.formula == Coding::apart ? decode_tables<Apart<PlainHalf>, T> : decode_tables<Added<PlainHalf>, T>;
}
#endif

}  // namespace
}  // namespace veneer
