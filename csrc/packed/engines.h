// How a register of a panel's outputs is multiplied by one row's values: in float, or by dot products of bfloat16 pairs.
// Every sum is one chain over the inputs in their order, whatever the tile: so a row's result is the same in any batch.
#pragma once

#include "core/lanes.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace veneer {
namespace {

constexpr int64_t vectors = 16 / width;  // registers across a block of outputs

// One rounding where the CPU has such an instruction, said explicitly: two tiles must not differ in what is contracted.
inline lanes multiply_add(lanes a, lanes b, lanes sum) {
#if defined(__AVX512F__)
  return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
  return (lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
  return (lanes)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + sum;
#endif
}

// Register `v` of the outputs of a panel at input k; outputs of one input are `across` many.
inline lanes weights_at(const float* panel, int64_t across, int64_t k, int64_t v) {
  return load(panel + k * across + v * width);
}
inline lanes weights_at(const fp16* panel, int64_t across, int64_t k, int64_t v) {
  const fp16* p = panel + k * across + v * width;
#if defined(__AVX512F__)
  return (lanes)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (lanes)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  float16x4_t half;
  std::memcpy(&half, p, sizeof half);
  return (lanes)vcvt_f32_f16(half);
#else
  return load(p);
#endif
}
inline lanes weights_at(const bf16* panel, int64_t across, int64_t k, int64_t v) {
  bit_lanes pairs;
  std::memcpy(&pairs, panel + k / 2 * 2 * across + v * 2 * width, sizeof pairs);
  return (lanes)(k % 2 ? pairs & 0xffff0000u : pairs << 16);
}

// Weights of any type times float32, in float32.
template <class T>
struct FloatEngine {
  using W = T;
  using X = float;
  static constexpr int64_t depth_unit = 1;

  struct Weights {
    lanes value;
  };
  static Weights weights(const T* panel, int64_t across, int64_t k, int64_t v) {
    return {weights_at(panel, across, k, v)};
  }
  struct Values {
    lanes value;
  };
  static Values values(const float* x) { return {splat(*x)}; }
  static lanes add(lanes sum, Values x, Weights w) { return multiply_add(x.value, w.value, sum); }
};

#if defined(__AVX512BF16__)
struct PairEngine {
  using W = bf16;
  using X = bf16;
  static constexpr int64_t depth_unit = 2;

  struct Weights {
    __m512bh value;
  };
  static Weights weights(const bf16* panel, int64_t across, int64_t k, int64_t v) {
    return {(__m512bh)_mm512_loadu_si512(panel + k * across + v * 32)};
  }
  struct Values {
    __m512bh value;
  };
  static Values values(const bf16* x) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return {(__m512bh)_mm512_set1_epi32(pair)};
  }
  static lanes add(lanes sum, Values x, Weights w) { return (lanes)_mm512_dpbf16_ps((__m512)sum, x.value, w.value); }
};
#endif

// What a tile may hold in registers: rows times blocks of sums, the weights beside them and one value of x.
#if defined(__AVX512F__)
constexpr int most_rows = 6;
constexpr int blocks_beside(int) { return 4; }
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int most_rows = 6;
constexpr int blocks_beside(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
#else
constexpr int most_rows = 2;
constexpr int blocks_beside(int rows) { return rows == 1 ? 2 : 1; }
#endif

}  // namespace
}  // namespace veneer
