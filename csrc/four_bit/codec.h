// Sixteen values at a time between packed codes and numbers, in the instruction set that the file is compiled for.
#pragma once

#include "four_bit/four_bit.h"

namespace veneer {
namespace {

// ---- absmax -------------------------------------------------------------------------------------------------------

// The largest magnitude as its bits: magnitudes sort like integers, and a NaN is above infinity, so neither is lost.
template <class T>
inline uint32_t max_magnitude(const T* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t m = bit_cast<uint32_t>(to_float(x[i])) & 0x7fffffffu;
    most = m > most ? m : most;
  }
  return most;
}

#if defined(__AVX512F__)
inline __m512 load16(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 load16(const bf16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 load16(const fp16* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
#endif

// ---- quantizing ---------------------------------------------------------------------------------------------------

inline uint8_t nearest(float scaled, const FourBitCode& code) {
  int rank = 0;
  for (int half = 8; half > 0; half /= 2) rank += scaled > code.midpoints[rank + half - 1] ? half : 0;
  return code.ranked[rank];
}

// n values, n even or the last of all, times `factor` -> packed.
template <class T>
inline void quantize_scalar(const T* x, int64_t n, float factor, const FourBitCode& code, uint8_t* packed) {
  for (int64_t i = 0; i < n; i += 2) {
    const uint8_t high = nearest(to_float(x[i]) * factor, code);
    const uint8_t low = i + 1 < n ? nearest(to_float(x[i + 1]) * factor, code) : nearest(0.0f, code);
    packed[i / 2] = static_cast<uint8_t>(high << 4 | low);
  }
}

#if defined(__AVX512F__)
template <class T>
inline void quantize_run(const T* x, int64_t n, float factor, const FourBitCode& code, uint8_t* packed) {
  const __m512 scale = _mm512_set1_ps(factor);
  const __m512 midpoints = _mm512_maskz_loadu_ps(0x7fff, code.midpoints), middle = _mm512_set1_ps(code.midpoints[7]);
  const __m512i ranked = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(code.ranked)));
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 v = _mm512_mul_ps(load16(x + i), scale);
    // A binary search for the number of midpoints below v; `at` is the midpoint to compare with next.
    __m512i at = _mm512_mask_mov_epi32(_mm512_set1_epi32(3), _mm512_cmp_ps_mask(v, middle, _CMP_GT_OQ), _mm512_set1_epi32(11));
    const auto step = [&](int up, int down) {
      const __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(at, midpoints), _CMP_GT_OQ);
      at = _mm512_add_epi32(at, _mm512_mask_mov_epi32(_mm512_set1_epi32(-down), above, _mm512_set1_epi32(up)));
    };
    step(2, 2);
    step(1, 1);
    step(1, 0);
    const __m512i codes = _mm512_permutexvar_epi32(at, ranked);
    const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(codes, 4), _mm512_srli_epi64(codes, 32));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(packed + i / 2), _mm512_cvtepi64_epi8(pairs));
  }
  quantize_scalar(x + i, n - i, factor, code, packed + i / 2);
}
#else
template <class T>
inline void quantize_run(const T* x, int64_t n, float factor, const FourBitCode& code, uint8_t* packed) {
  quantize_scalar(x, n, factor, code, packed);
}
#endif

// ---- dequantizing -------------------------------------------------------------------------------------------------

// The 16 values of one block, already scaled and rounded: what a code is worth there. Scaling the table rather than the
// values is 16 multiplications a block and gives the same bits.
template <class T>
struct alignas(64) BlockTable {
  T value[16];
};

template <class T>
inline BlockTable<T> block_table(const FourBitCode& code, float absmax) {
  BlockTable<T> t;
  for (int i = 0; i < 16; ++i) t.value[i] = from_float<T>(code.table[i] * absmax);
  return t;
}

#if defined(__AVX512F__)
inline __m512 scaled_table(const FourBitCode& code, float absmax) {
  return _mm512_mul_ps(_mm512_loadu_ps(code.table), _mm512_set1_ps(absmax));
}

template <>
inline BlockTable<float> block_table<float>(const FourBitCode& code, float absmax) {
  BlockTable<float> t;
  _mm512_store_ps(t.value, scaled_table(code, absmax));
  return t;
}

// Rounding by integers rather than by the CPU's own conversion, which flushes subnormal numbers.
template <>
inline BlockTable<bf16> block_table<bf16>(const FourBitCode& code, float absmax) {
  const __m512 scaled = scaled_table(code, absmax);
  const __m512i bits = _mm512_castps_si512(scaled), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(scaled, scaled, _CMP_UNORD_Q);
  BlockTable<bf16> t;
  _mm256_store_si256(reinterpret_cast<__m256i*>(t.value),
                     _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0))));
  return t;
}

template <>
inline BlockTable<fp16> block_table<fp16>(const FourBitCode& code, float absmax) {
  BlockTable<fp16> t;
  _mm256_store_si256(reinterpret_cast<__m256i*>(t.value),
                     _mm512_cvtps_ph(scaled_table(code, absmax), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return t;
}
#endif

// n values that start on a byte.
template <class T>
inline void dequantize_scalar(const uint8_t* packed, int64_t n, const BlockTable<T>& t, T* out) {
  for (int64_t i = 0; i + 1 < n; i += 2) {
    out[i] = t.value[packed[i / 2] >> 4];
    out[i + 1] = t.value[packed[i / 2] & 15];
  }
  if (n % 2) out[n - 1] = t.value[packed[n / 2] >> 4];
}

#if defined(__AVX512F__)
// 8 bytes -> 16 indices in 32-bit lanes; only the low four bits of a lane count for a permutation.
inline __m512i unpack16(const uint8_t* packed) {
  const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
  return _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
}

// 16 bytes -> 32 indices in 16-bit lanes; the low four bits count, what is above is noise that a doubled table ignores.
inline __m512i unpack32(const uint8_t* packed) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
#if defined(__AVX512VBMI__) && !defined(__AMX_BF16__)  // CPUs with tiles have one unit for this and all permutations
  return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0020002400000004), bytes);
#else
  return _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
#endif
}

inline void dequantize_run(const uint8_t* packed, int64_t n, const BlockTable<float>& t, float* out) {
  const __m512 values = _mm512_load_ps(t.value);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(unpack16(packed + i / 2), values));
  dequantize_scalar(packed + i / 2, n - i, t, out + i);
}

template <class T>  // bf16, fp16
inline void dequantize_run(const uint8_t* packed, int64_t n, const BlockTable<T>& t, T* out) {
  const __m512i values = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(t.value)));
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(unpack32(packed + i / 2), values));
  dequantize_scalar(packed + i / 2, n - i, t, out + i);
}
#else
template <class T>
inline void dequantize_run(const uint8_t* packed, int64_t n, const BlockTable<T>& t, T* out) {
  dequantize_scalar(packed, n, t, out);
}
#endif

#if defined(__AVX512BF16__)
// The table of a block, twice over, as unpack32's indices need it; made with the CPU's own rounding.
inline __m512i doubled_table(__m512 table, float absmax) {
  const __m512 scaled = _mm512_mul_ps(table, _mm512_set1_ps(absmax));
  return (__m512i)_mm512_cvtne2ps_pbh(scaled, scaled);
}

// Whether the CPU's own rounding gives the bits of integer rounding for every value of a block: it flushes subnormal
// numbers, and writes another NaN.
inline bool rounds_alike(float absmax) { return absmax > 1e-30f && absmax < 1e30f; }

// Whole blocks, a table in a register each.
inline void dequantize_blocks(const uint8_t* packed, const float* absmax, int64_t blocks, int64_t block_size,
                              const FourBitCode& code, bf16* out) {
  const __m512 table = _mm512_loadu_ps(code.table);
  for (int64_t b = 0; b < blocks; ++b, packed += block_size / 2, out += block_size) {
    if (__builtin_expect(!rounds_alike(absmax[b]), 0)) {
      dequantize_run(packed, block_size, block_table<bf16>(code, absmax[b]), out);
      continue;
    }
    const __m512i values = doubled_table(table, absmax[b]);
    for (int64_t i = 0; i < block_size; i += 32)
      _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(unpack32(packed + i / 2), values));
  }
}
#endif
template <class T>
inline void dequantize_blocks(const uint8_t* packed, const float* absmax, int64_t blocks, int64_t block_size,
                              const FourBitCode& code, T* out) {
  for (int64_t b = 0; b < blocks; ++b)
    dequantize_run(packed + b * block_size / 2, block_size, block_table<T>(code, absmax[b]), out + b * block_size);
}

}  // namespace
}  // namespace veneer
