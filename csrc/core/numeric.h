// bfloat16 and half in memory, float in registers. Everything here is internal to each kernels.cpp (an unnamed namespace):
// a shared inline function would let the linker keep the copy built for the widest instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace veneer {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// How Python names an element type; see veneer.ops.cpu.DTYPES.
enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

namespace {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
inline float to_float(fp16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  return static_cast<float>(bit_cast<__fp16>(x.bits));
#else
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = uint32_t{x.bits & 0x7fffu} << 13;
  if (rest >= 0x0f800000u) return bit_cast<float>(sign | 0x70000000u | rest);  // infinity, NaN
  // The exponent is off by 112; a multiplication mends it and makes subnormals normal.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest) * 0x1p112f));
#endif
}

// Round to nearest, ties to even, as torch does; NaN stays NaN.
template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) { return x; }

template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fc0};
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline fp16 from_float<fp16>(float x) {
#if defined(__F16C__)
  return fp16{static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
#elif defined(__aarch64__)
  return bit_cast<fp16>(static_cast<__fp16>(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return fp16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return fp16{static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 lets the addition do the rounding, at a unit of 2^-24.
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return fp16{static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return fp16{static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

}  // namespace
}  // namespace veneer
