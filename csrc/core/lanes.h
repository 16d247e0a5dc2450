// As many floats at a time as a register holds, in the compiler's own vector types. (Wider ones would be legal, but GCC
// keeps them in memory: with two AVX2 registers to a vector, attention took many times as long.)
// Internal to each kernels.cpp, for the reason that numeric.h gives.
#pragma once

#include "core/numeric.h"

namespace veneer {
namespace {

#if defined(__AVX512F__)
constexpr int64_t width = 16;
#elif defined(__AVX__)
constexpr int64_t width = 8;
#else
constexpr int64_t width = 4;
#endif

typedef float lanes __attribute__((vector_size(width * 4)));
typedef int32_t int_lanes __attribute__((vector_size(width * 4)));
typedef uint32_t bit_lanes __attribute__((vector_size(width * 4)));
typedef uint16_t half_lanes __attribute__((vector_size(width * 2)));

inline lanes splat(float x) { return x - lanes{}; }  // which compilers leave out; they keep 0 + x, for -0

inline lanes load(const float* p) { lanes x; std::memcpy(&x, p, sizeof x); return x; }
inline lanes load(const bf16* p) {
  half_lanes bits;
  std::memcpy(&bits, p, sizeof bits);
  return (lanes)(__builtin_convertvector(bits, bit_lanes) << 16);
}

inline void store(float* p, lanes x) { std::memcpy(p, &x, sizeof x); }
inline bit_lanes bf16_bits(lanes x) {  // in the low half; round to nearest, ties to even; NaN stays NaN
  const bit_lanes bits = (bit_lanes)x;
  const bit_lanes rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x == x ? rounded : bit_lanes{} + 0x7fc0u;
}
inline void store(bf16* p, lanes x) {
  const half_lanes out = __builtin_convertvector(bf16_bits(x), half_lanes);
  std::memcpy(p, &out, sizeof out);
}

// The first n of a register; the rest reads as `fill`.
template <class T>
inline lanes load_some(const T* p, int64_t n, float fill = 0.0f) {
  float wide[width];
  for (int64_t i = 0; i < width; ++i) wide[i] = i < n ? to_float(p[i]) : fill;
  return load(wide);
}
template <class T>
inline void store_some(T* p, lanes x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(x[i]);
}

inline lanes load(const fp16* p) {
#if defined(__AVX512F__)
  return (lanes)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (lanes)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return load_some(p, width);
#endif
}
inline void store(fp16* p, lanes x) { store_some(p, x, width); }

inline lanes from_half(half_lanes bits) {
#if defined(__AVX512F__)
  return (lanes)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
  return (lanes)_mm256_cvtph_ps((__m128i)bits);
#else
  lanes out{};
  for (int64_t i = 0; i < width; ++i) out[i] = to_float(fp16{bits[i]});
  return out;
#endif
}
// Rounded to the nearest half, ties to even. Without conversions: a number whose unit is that of the half is added and taken away.
inline lanes half_rounded(lanes x) {
#if defined(__AVX512F__)
  return (lanes)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return (lanes)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const bit_lanes bits = (bit_lanes)x;
  const lanes power = (lanes)(bits & 0x7f800000u), large = 0x1.8p13f * (power > 0x1p-14f ? power : splat(0x1p-14f));
  const lanes rounded = (lanes)((bit_lanes)((x + large) - large) | (bits & 0x80000000u));
  return (lanes)(bits & 0x7fffffffu) >= 65520.0f ? x * __builtin_inff() : rounded;
#endif
}

// f(column, n) for every register of a row; n is less than `width` at its short end.
template <class F>
inline void each_register(int64_t n, const F& f) {
  int64_t c = 0;
  for (; c + width <= n; c += width) f(c, width);
  if (c < n) f(c, n - c);
}
template <class T>
inline lanes take(const T* p, int64_t n, float fill = 0.0f) { return n == width ? load(p) : load_some(p, n, fill); }
template <class T>
inline void put(T* p, lanes x, int64_t n) { n == width ? store(p, x) : store_some(p, x, n); }

inline float sum(lanes x) {
#if defined(__AVX512F__)
  return 0.0f + _mm512_reduce_add_ps((__m512)x);  // the same pairs as below
#else
  float total = 0.0f;
  for (int64_t half = width / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) x[i] += x[i + half];
  return total + x[0];
#endif
}
inline lanes larger(lanes a, lanes b) {
#if defined(__AVX512F__)
  return (lanes)_mm512_max_ps((__m512)a, (__m512)b);  // what compilers make of the line below is a comparison and a choice
#else
  return a > b ? a : b;
#endif
}
inline float largest(lanes x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  for (int64_t half = width / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  return x[0];
#endif
}

// e^x to 2 units in the last place; 0 below -87.3, and NaN stays NaN. The polynomial is a minimax fit over ±ln 2 / 2.
inline lanes exp(lanes x) {
  const lanes capped = x > 88.7f ? splat(88.7f) : x;
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const lanes shifted = capped * 1.44269504f + magic;
  const lanes n = shifted - magic;
  const lanes r = (capped - n * 0.693359375f) + n * 2.12194440e-4f;
  lanes p = splat(0.00138367700856179f);
  p = p * r + 0.008374898694455624f;
  p = p * r + 0.041668232530355453f;
  p = p * r + 0.16666419804096222f;
  p = p * r + 0.49999991059303284f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const bit_lanes power = ((bit_lanes)shifted) << 23;  // unsigned: far below -87.3 it wraps, and is not used
  const lanes scaled = (lanes)((bit_lanes)p + power);
  return x < -87.3f ? lanes{} : scaled;
}

// e^x for weights that become bfloat16: to a relative 3e-6; 0 below -87.3, and NaN stays NaN. The polynomial is a minimax fit
// of 2^r over ±1/2.
inline lanes coarse_exp(lanes x) {
#if defined(__AVX512F__)
  const __m512 y = (__m512)(x * 1.44269504f);
  const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const lanes r = (lanes)y - (lanes)n;
  lanes p = splat(9.5827006e-3f);
  p = p * r + 5.59068767e-2f;
  p = p * r + 0.240241042f;
  p = p * r + 0.693124107f;
  p = p * r + 1.0f;
  return (lanes)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(y, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), (__m512)p, n);
#else
  return exp(x);
#endif
}

// 1 / (1 + e^-x), and what it lacks to 1, neither by a difference.
struct Sigmoid {
  lanes value, rest;
};
inline Sigmoid sigmoid(lanes x) {
  const lanes e = exp(-x), value = 1.0f / (1.0f + e);
  return {value, e * value};
}

inline lanes tanh(lanes x) {
  const lanes z = x * x;
  lanes p = splat(-0.006062234286218882f);
  p = p * z + 0.020975016057491302f;
  p = p * z - 0.05384669452905655f;
  p = p * z + 0.13332746922969818f;
  p = p * z - 0.333333283662796f;
  const lanes small = x + x * z * p;
  const lanes big = 1.0f - 2.0f / (exp(2.0f * x) + 1.0f);
  return z < 0.39f ? small : big;
}

// The normal distribution function, from a fit of erfc(a) e^(a²) over t = 1 / (1 + a/2).
inline lanes normal_cdf(lanes x) {
  const lanes a = (x < 0.0f ? -x : x) * 0.70710678f;
  const lanes t = 1.0f / (1.0f + 0.5f * a);
  lanes p = splat(-0.05118606239557266f);
  p = p * t + 0.2451072335243225f;
  p = p * t - 0.4029485583305359f;
  p = p * t + 0.17812579870224f;
  p = p * t + 0.04527141898870468f;
  p = p * t + 0.17063648998737335f;
  p = p * t + 0.25173231959342957f;
  p = p * t + 0.28109481930732727f;
  p = p * t + 0.2821665406227112f;
  const lanes tail = 0.5f * t * p * exp(-0.5f * x * x);
  return x < 0.0f ? tail : 1.0f - tail;
}

}  // namespace
}  // namespace veneer
