#include "dropout/dropout.h"

#include "core/lanes.h"
#include "core/parallel.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t grain_values = 1 << 14, group = 64, counters_per_group = 8;
constexpr int rounds = 7;
constexpr uint32_t multipliers[2] = {0xD2511F53u, 0xCD9E8D57u}, key_steps[2] = {0x9E3779B9u, 0xBB67AE85u};

// A counter to a lane of 64 bits: its words in four registers, each in the low half of its lane, the high half anything.
constexpr int64_t counters = width / 2, passes = counters_per_group / counters;
typedef uint64_t wide_lanes __attribute__((vector_size(width * 4)));
typedef uint16_t short_lanes __attribute__((vector_size(width * 4)));

inline wide_lanes splat_wide(uint64_t x) { return wide_lanes{} + x; }

// The low halves, multiplied to 64 bits.
inline wide_lanes product(wide_lanes a, wide_lanes b) {
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
struct Keys {
  wide_lanes low[rounds], high[rounds];
};
inline Keys keys_of(uint64_t key) {
  Keys keys;
  for (int r = 0; r < rounds; ++r) {
    keys.low[r] = splat_wide(static_cast<uint32_t>(key) + r * key_steps[0]);
    keys.high[r] = splat_wide(static_cast<uint32_t>(key >> 32) + r * key_steps[1]);
  }
  return keys;
}

// After two rounds a counter (j, row) is still what its column gives, or that and what its row gives exclusively: the
// words are (column.first ^ row.first, column.second, column.third ^ row.third, row.fourth).
struct ColumnPart {
  wide_lanes first, second, third;
};
struct RowPart {
  wide_lanes first, third, fourth;
};

inline ColumnPart column_part(int64_t first_counter, const Keys& keys) {
  wide_lanes j;
  for (int64_t lane = 0; lane < counters; ++lane) j[lane] = first_counter + lane;
  const wide_lanes a = product(j, splat_wide(multipliers[0]));
  const wide_lanes b = product(a >> 32 ^ keys.high[0], splat_wide(multipliers[1]));
  return {b >> 32 ^ keys.low[1], b, a ^ keys.high[1]};
}

inline RowPart row_part(uint64_t id, const Keys& keys) {
  const uint64_t b = (id >> 32) * multipliers[1];
  const uint64_t a = static_cast<uint32_t>(b >> 32 ^ id ^ keys.low[0][0]) * uint64_t{multipliers[0]};
  return {splat_wide(b), splat_wide(a >> 32), splat_wide(a)};
}

// The draws of one register of counters: those of four columns to a lane, in the group's first and second half.
struct Draws {
  wide_lanes first, second;
};
inline Draws draw(const ColumnPart& column, const RowPart& row, const Keys& keys) {
  const wide_lanes m0 = splat_wide(multipliers[0]), m1 = splat_wide(multipliers[1]);
  wide_lanes first = column.first ^ row.first, second = column.second;
  wide_lanes third = column.third ^ row.third, fourth = row.fourth;
#pragma GCC unroll 8
  for (int r = 2; r < rounds - 1; ++r) {
    const wide_lanes a = product(first, m0), b = product(third, m1);
    first = b >> 32 ^ second ^ keys.low[r], second = b;
    third = a >> 32 ^ fourth ^ keys.high[r], fourth = a;
  }
  const wide_lanes a = product(first, m0), b = product(third, m1);
  return {b ^ (second ^ keys.low[rounds - 1]) << 32, a ^ (fourth ^ keys.high[rounds - 1]) << 32};
}

// f(row, column, n, draws) for every group of every row; n is less than 64 at a row's short end.
// What columns give is kept for a tile of them, and rows pass over it.
template <class F>
void each_group(const DropoutSizes& sizes, const DropoutMask& mask, const F& f) {
  constexpr int64_t tile = 16 * group;
  parallel_for(sizes.n, (grain_values + sizes.d - 1) / sizes.d, [=](int64_t begin, int64_t end) {
    const Keys keys = keys_of(mask.key);
    const F apply = f;  // in this frame, where no store to a tensor can reach it
    ColumnPart columns[tile / group * passes];
    for (int64_t start = 0; start < sizes.d; start += tile) {
      const int64_t stop = start + tile < sizes.d ? start + tile : sizes.d;
      for (int64_t k = 0; k < (stop - start + group - 1) / group * passes; ++k)
        columns[k] = column_part(start / group * counters_per_group + k * counters, keys);
      for (int64_t r = begin; r < end; ++r) {
        const RowPart row = row_part(mask.rows ? mask.rows[r] : mask.first_row + r, keys);
        const ColumnPart* column = columns;
        for (int64_t c = start; c < stop; c += group) {
          alignas(64) uint16_t draws[group];
          for (int64_t pass = 0; pass < passes; ++pass) {
            const Draws drawn = draw(*column++, row, keys);
            std::memcpy(draws + pass * counters * 4, &drawn.first, sizeof drawn.first);
            std::memcpy(draws + group / 2 + pass * counters * 4, &drawn.second, sizeof drawn.second);
          }
          apply(r, c, stop - c < group ? stop - c : group, draws);
        }
      }
    }
  });
}

template <class T>
inline T* row_of(const DropoutRows& rows, int64_t r) { return static_cast<T*>(rows.data) + r * rows.stride; }

template <class V, class T>
inline V bits_at(const T* p) {
  V bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}
inline bit_lanes draws_at(const uint16_t* p) { return __builtin_convertvector(bits_at<half_lanes>(p), bit_lanes); }

inline void drop_group(const uint16_t* x, uint16_t* y, const uint16_t* draws, uint32_t threshold) {
  const short_lanes limit = short_lanes{} + static_cast<uint16_t>(threshold);
  for (int64_t c = 0; c < group; c += 2 * width) {
    const short_lanes values = bits_at<short_lanes>(draws + c) >= limit ? bits_at<short_lanes>(x + c) : short_lanes{};
    std::memcpy(y + c, &values, sizeof values);
  }
}
inline void drop_group(const float* x, float* y, const uint16_t* draws, uint32_t threshold) {
  for (int64_t c = 0; c < group; c += width)
    store(y + c, draws_at(draws + c) >= threshold ? load(x + c) : lanes{});
}

template <class T>
inline void add_group(const T* g, T* onto, const uint16_t* draws, uint32_t threshold) {
  for (int64_t c = 0; c < group; c += width) {
    const lanes before = load(onto + c);
    store(onto + c, draws_at(draws + c) >= threshold ? before + load(g + c) : before);
  }
}
// Two to a lane, the low halves and the high ones added as floats where they lie.
inline void add_group(const bf16* g, bf16* onto, const uint16_t* draws, uint32_t threshold) {
  const short_lanes limit = short_lanes{} + static_cast<uint16_t>(threshold);
  for (int64_t c = 0; c < group; c += 2 * width) {
    const bit_lanes before = bits_at<bit_lanes>(onto + c), more = bits_at<bit_lanes>(g + c);
    const lanes low = (lanes)(before << 16) + (lanes)(more << 16);
    const lanes high = (lanes)(before & 0xffff0000u) + (lanes)(more & 0xffff0000u);
    const short_lanes after = (short_lanes)(bf16_bits(low) | bf16_bits(high) << 16);
    const short_lanes values = bits_at<short_lanes>(draws + c) >= limit ? after : (short_lanes)before;
    std::memcpy(onto + c, &values, sizeof values);
  }
}

// The n values of a row's short end in a group of their own.
template <class T>
struct Padded {
  T values[group] = {};
  Padded(const T* p, int64_t n) { std::memcpy(values, p, n * sizeof(T)); }
};

template <class T>
void drop_typed(const DropoutSizes& sizes, const DropoutMask& mask, const DropoutRows& x, const DropoutRows& y) {
  const uint32_t threshold = mask.threshold;
  each_group(sizes, mask, [=](int64_t r, int64_t c, int64_t n, const uint16_t* draws) {
    const T* from = row_of<const T>(x, r) + c;
    T* to = row_of<T>(y, r) + c;
    if (n == group) return drop_group(from, to, draws, threshold);
    Padded<T> end(from, n);
    drop_group(end.values, end.values, draws, threshold);
    std::memcpy(to, end.values, n * sizeof(T));
  });
}

void drop(const DropoutSizes& sizes, const DropoutMask& mask, const DropoutRows& x, const DropoutRows& y) {
  if (sizes.dtype == Dtype::float32) return drop_typed<float>(sizes, mask, x, y);
  drop_typed<uint16_t>(sizes, mask, x, y);
}

template <class T>
void add_typed(const DropoutSizes& sizes, const DropoutMask& mask, const DropoutRows& g, const DropoutRows& onto) {
  const uint32_t threshold = mask.threshold;
  each_group(sizes, mask, [=](int64_t r, int64_t c, int64_t n, const uint16_t* draws) {
    const T* from = row_of<const T>(g, r) + c;
    T* to = row_of<T>(onto, r) + c;
    if (n == group) return add_group(from, to, draws, threshold);
    Padded<T> added(from, n), end(to, n);
    add_group(added.values, end.values, draws, threshold);
    std::memcpy(to, end.values, n * sizeof(T));
  });
}

void add_dropped(const DropoutSizes& sizes, const DropoutMask& mask, const DropoutRows& g, const DropoutRows& onto) {
  switch (sizes.dtype) {
    case Dtype::float32: return add_typed<float>(sizes, mask, g, onto);
    case Dtype::bfloat16: return add_typed<bf16>(sizes, mask, g, onto);
    case Dtype::float16: return add_typed<fp16>(sizes, mask, g, onto);
  }
}

}  // namespace

const DropoutKernels dropout = {drop, add_dropped};

}  // namespace VENEER_ISA
}  // namespace veneer
