// The draws of dropout's masks: Philox4x32 of seven rounds, 64 columns of a row at a time. The specification is
// veneer/ops/reference/dropout.py. Internal to each kernels.cpp, for the reason that numeric.h gives.
#pragma once

#include "core/lanes.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace veneer {
namespace {

constexpr int64_t draw_group = 64;  // columns
constexpr int philox_rounds = 7;
constexpr uint32_t philox_multipliers[2] = {0xD2511F53u, 0xCD9E8D57u}, philox_key_steps[2] = {0x9E3779B9u, 0xBB67AE85u};

// A counter to a lane of 64 bits: its words in four registers, each in the low half of its lane, the high half anything.
constexpr int64_t counters = width / 2, counters_per_group = 8, draw_passes = counters_per_group / counters;
typedef uint64_t wide_lanes __attribute__((vector_size(width * 4)));
typedef uint16_t short_lanes __attribute__((vector_size(width * 4)));

inline wide_lanes splat_wide(uint64_t x) { return wide_lanes{} + x; }

// The low halves, multiplied to 64 bits.
inline wide_lanes low_product(wide_lanes a, wide_lanes b) {
#if defined(__AVX512F__)
  return (wide_lanes)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (wide_lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (wide_lanes)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (wide_lanes)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  const wide_lanes low = splat_wide(0xffffffffu);
  return (a & low) * (b & low);
#endif
}

// The keys of each round, in every lane.
struct PhiloxKeys {
  wide_lanes low[philox_rounds], high[philox_rounds];

  explicit PhiloxKeys(uint64_t key) {
    for (int r = 0; r < philox_rounds; ++r) {
      low[r] = splat_wide(static_cast<uint32_t>(key) + r * philox_key_steps[0]);
      high[r] = splat_wide(static_cast<uint32_t>(key >> 32) + r * philox_key_steps[1]);
    }
  }
};

// After two rounds a counter (j, row) is still what its column gives, or that and what its row gives exclusively: the
// words are (column.first ^ row.first, column.second, column.third ^ row.third, row.fourth).
struct ColumnPart {
  wide_lanes first[draw_passes], second[draw_passes], third[draw_passes];

  ColumnPart() = default;
  ColumnPart(int64_t column, const PhiloxKeys& keys) {  // column: the first of a group
    for (int64_t pass = 0; pass < draw_passes; ++pass) {
      wide_lanes j;
      for (int64_t lane = 0; lane < counters; ++lane) j[lane] = column / counters_per_group + pass * counters + lane;
      const wide_lanes a = low_product(j, splat_wide(philox_multipliers[0]));
      const wide_lanes b = low_product(a >> 32 ^ keys.high[0], splat_wide(philox_multipliers[1]));
      first[pass] = b >> 32 ^ keys.low[1], second[pass] = b, third[pass] = a ^ keys.high[1];
    }
  }
};
struct RowPart {
  wide_lanes first, third, fourth;

  RowPart() = default;
  RowPart(uint64_t id, const PhiloxKeys& keys) {
    const uint64_t b = (id >> 32) * philox_multipliers[1];
    const uint64_t a = static_cast<uint32_t>(b >> 32 ^ id ^ keys.low[0][0]) * uint64_t{philox_multipliers[0]};
    first = splat_wide(b), third = splat_wide(a >> 32), fourth = splat_wide(a);
  }
};

// The 64 draws of a group: a register of counters gives those of four columns to a lane, in either half of the group.
inline void draw(const ColumnPart& column, const RowPart& row, const PhiloxKeys& keys, uint16_t* draws) {
  const wide_lanes m0 = splat_wide(philox_multipliers[0]), m1 = splat_wide(philox_multipliers[1]);
  constexpr int last = philox_rounds - 1;
  for (int64_t pass = 0; pass < draw_passes; ++pass) {
    wide_lanes first = column.first[pass] ^ row.first, second = column.second[pass];
    wide_lanes third = column.third[pass] ^ row.third, fourth = row.fourth;
#pragma GCC unroll 8
    for (int r = 2; r < last; ++r) {
      const wide_lanes a = low_product(first, m0), b = low_product(third, m1);
      first = b >> 32 ^ second ^ keys.low[r], second = b;
      third = a >> 32 ^ fourth ^ keys.high[r], fourth = a;
    }
    const wide_lanes a = low_product(first, m0), b = low_product(third, m1);
    const wide_lanes halves[2] = {b ^ (second ^ keys.low[last]) << 32, a ^ (fourth ^ keys.high[last]) << 32};
    for (int64_t half = 0; half < 2; ++half)
      std::memcpy(draws + half * draw_group / 2 + pass * counters * 4, &halves[half], sizeof halves[half]);
  }
}

template <class V, class T>
inline V bits_at(const T* p) {
  V bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}
inline bit_lanes draws_at(const uint16_t* p) { return __builtin_convertvector(bits_at<half_lanes>(p), bit_lanes); }

// The values of a group whose draws are not below the threshold, and zeros.
inline void drop_group(const uint16_t* x, uint16_t* y, const uint16_t* draws, uint32_t threshold) {
  const short_lanes limit = short_lanes{} + static_cast<uint16_t>(threshold);
  for (int64_t c = 0; c < draw_group; c += 2 * width) {
    const short_lanes values = bits_at<short_lanes>(draws + c) >= limit ? bits_at<short_lanes>(x + c) : short_lanes{};
    std::memcpy(y + c, &values, sizeof values);
  }
}
inline void drop_group(const float* x, float* y, const uint16_t* draws, uint32_t threshold) {
  for (int64_t c = 0; c < draw_group; c += width)
    store(y + c, draws_at(draws + c) >= threshold ? load(x + c) : lanes{});
}

// The n values of a row's short end in a group of their own.
template <class T>
struct Padded {
  T values[draw_group] = {};
  Padded(const T* p, int64_t n) { std::memcpy(values, p, n * sizeof(T)); }
};

// The same for the first n of a group. T: float, or the bits of a type of 16.
template <class T>
inline void drop_some(const T* x, T* y, const uint16_t* draws, uint32_t threshold, int64_t n) {
  if (threshold > 0xffffu) return static_cast<void>(std::memset(y, 0, n * sizeof(T)));
  if (n == draw_group) return drop_group(x, y, draws, threshold);
  Padded<T> end(x, n);
  drop_group(end.values, end.values, draws, threshold);
  std::memcpy(y, end.values, n * sizeof(T));
}

}  // namespace
}  // namespace veneer
