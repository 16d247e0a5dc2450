// A block a lane: as many blocks as a register has lanes are turned on their side, and from there on the code reads like
// ggml's scalar one with `lanes` for `float`. Every sum runs within its lane, from the first value to the last, so that no
// bit depends on the instruction set. Internal to each kernels.cpp, for the reason that core/numeric.h gives.
#pragma once

#include "core/lanes.h"
#include "core/square.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace veneer {
namespace {

template <int Block>
struct Tile {
  lanes x[Block];   // value i of every block
  lanes qw[Block];  // its importance, where there is one
  lanes variance;   // mean square of the block's row, where simple types ask for it
};

// n values (a multiple of `width`) at each of `width` places, value by value.
template <class T>
inline void turn(const T* const (&places)[width], int64_t n, lanes* turned) {
  for (int64_t first = 0; first < n; first += width) {
    lanes square[width];
    for (int64_t r = 0; r < width; ++r) square[r] = load(places[r] + first);
    transpose(square);
    for (int64_t i = 0; i < width; ++i) turned[first + i] = square[i];
  }
}

// The first n_bytes behind `skip` of each lane's words, n lanes of them, one block after the other.
template <int Words>
inline void emit(const bit_lanes (&words)[Words], int64_t skip, int64_t n_bytes, int64_t n, uint8_t* out) {
  constexpr int64_t padded = (Words + width - 1) / width * width;
  alignas(64) float bytes[width][padded];
  for (int64_t first = 0; first < padded; first += width) {
    lanes square[width];
    for (int64_t i = 0; i < width; ++i) square[i] = first + i < Words ? (lanes)words[first + i] : lanes{};
    transpose(square);
    for (int64_t r = 0; r < width; ++r) store(bytes[r] + first, square[r]);
  }
  for (int64_t r = 0; r < n; ++r)
    std::memcpy(out + r * n_bytes, reinterpret_cast<const uint8_t*>(bytes[r]) + skip, static_cast<size_t>(n_bytes));
}

inline lanes root(lanes v) {
#if defined(__AVX512F__)
  return (lanes)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX__)
  return (lanes)_mm256_sqrt_ps((__m256)v);
#elif defined(__SSE2__)
  return (lanes)_mm_sqrt_ps((__m128)v);
#else
  for (int64_t i = 0; i < width; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// a < b ? a : b and a > b ? a : b, which compilers do not always see as one instruction; b where one is NaN.
inline lanes lesser(lanes a, lanes b) {
#if defined(__AVX512F__)
  return (lanes)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (lanes)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (lanes)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
inline lanes greater(lanes a, lanes b) {
#if defined(__AVX512F__)
  return (lanes)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (lanes)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (lanes)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

inline lanes magnitude(lanes v) { return (lanes)((bit_lanes)v & 0x7fffffffu); }
inline lanes clip(lanes v, float low, float high) { return greater(lesser(v, splat(high)), splat(low)); }
inline bool any(int_lanes mask) {
  int32_t all = 0;
  for (int64_t i = 0; i < width; ++i) all |= mask[i];
  return all != 0;
}

// ggml's nearest whole number, ties to even: the low bits of v + 1.5 * 2^23. Beyond ±4194303 it wraps, which its searches
// run into, so the exponent is overwritten rather than trusted.
inline lanes whole(lanes v) {
  constexpr float magic = 12582912.0f;
  return (lanes)(((bit_lanes)(v + magic) & 0x7fffffu) | 0x4b000000u) - magic;
}

inline int_lanes to_int(lanes v) { return __builtin_convertvector(v, int_lanes); }
inline bit_lanes to_bits(lanes whole_numbers) { return (bit_lanes)to_int(whole_numbers); }
inline lanes to_lanes(bit_lanes v) { return __builtin_convertvector((int_lanes)v, lanes); }

// The bits of halves, in the low half of each lane, and the floats that they stand for.
inline bit_lanes half_bits(lanes v) {
#if defined(__AVX512F__)
  return (bit_lanes)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return (bit_lanes)_mm256_cvtepu16_epi32(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  bit_lanes out;
  for (int64_t i = 0; i < width; ++i) out[i] = from_float<fp16>(v[i]).bits;
  return out;
#endif
}
inline lanes from_half(bit_lanes bits) {
  lanes out;
  for (int64_t i = 0; i < width; ++i) out[i] = to_float(fp16{static_cast<uint16_t>(bits[i])});
  return out;
}

inline int_lanes beyond_half(bit_lanes bits) { return (int_lanes)((bits & 0x7c00u) == 0x7c00u); }

// Runs of `Run` levels, each over the one before, `Bits` bits each: byte l of 8 / Bits runs is L[l + Run k]. Of each level
// the bits from `from` up are taken; levels that have no others need no mask.
template <int Run, int Bits, bool Masked = true>
inline bit_lanes* pack(const bit_lanes* levels, int n, int from, bit_lanes* words) {
  constexpr int per_byte = 8 / Bits;
  constexpr uint32_t mask = Masked ? (1u << Bits) - 1u : ~0u;
  for (int first = 0; first < n; first += per_byte * Run)
    for (int l = 0; l < Run; l += 4) {
      bit_lanes word = {};
      for (int b = 0; b < 4; ++b)
        for (int k = 0; k < per_byte; ++k)
          word |= ((levels[first + l + b + k * Run] >> from) & mask) << (8 * b + Bits * k);
      *words++ = word;
    }
  return words;
}

}  // namespace
}  // namespace veneer
