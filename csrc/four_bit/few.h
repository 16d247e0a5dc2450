// W x for a handful of rows: dot products straight from the codes, each code read once, no tile in between.
#pragma once

#include "core/parallel.h"
#include "four_bit/codec.h"

#if defined(__AVX512BF16__)

namespace veneer {
namespace {

constexpr int64_t few_rows = 4, dot_values = 64;

// A high nibble is the even one of two neighbours: x in chunks of 64 as its 32 even values, then its 32 odd ones.
inline void split_pairs(const bf16* x, int64_t n, uint16_t* out) {
  const __m512i even = _mm512_set1_epi32(0xffff);
  for (int64_t c = 0; c < n; c += dot_values) {
    const __m512i a = _mm512_loadu_si512(x + c), b = _mm512_loadu_si512(x + c + 32);
    const auto narrow = [](__m512i words) { return _mm512_cvtepi32_epi16(words); };
    const auto join = [](__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); };
    _mm512_storeu_si512(out + c, join(narrow(_mm512_and_si512(a, even)), narrow(_mm512_and_si512(b, even))));
    _mm512_storeu_si512(out + c + 32, join(narrow(_mm512_srli_epi32(a, 16)), narrow(_mm512_srli_epi32(b, 16))));
  }
}

// Rows [row, row + n_w) of W times n_x rows of x. Two sums for each pair: the CPU adds one product to a sum in six cycles.
template <int n_w, int n_x>
inline void dot_rows(const FourBitMatrix& w, int64_t row, const uint16_t* x, bf16* out) {
  const __m512 table = _mm512_loadu_ps(w.code->table);
  const int64_t n = w.i;
  const int shift = w.block_shift;
  const uint8_t* packed = w.packed + row * n / 2;
  const float* absmax = w.absmax;
  __m512 even[n_w][n_x], odd[n_w][n_x];
  for (int r = 0; r < n_w; ++r)
    for (int m = 0; m < n_x; ++m) even[r][m] = odd[r][m] = _mm512_setzero_ps();
  for (int64_t c = 0; c < n; c += dot_values)
    for (int r = 0; r < n_w; ++r) {
      const __m512 scaled = _mm512_mul_ps(table, _mm512_set1_ps(absmax[((row + r) * n + c) >> shift]));
      const __m512i values = (__m512i)_mm512_cvtne2ps_pbh(scaled, scaled);
      const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + (r * n + c) / 2)));
      // Bit 4 of an index is noise that the doubled table ignores.
      const __m512i high = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), values);
      const __m512i low = _mm512_permutexvar_epi16(codes, values);
      for (int m = 0; m < n_x; ++m) {
        const uint16_t* at = x + m * n + c;
        even[r][m] = _mm512_dpbf16_ps(even[r][m], (__m512bh)high, (__m512bh)_mm512_loadu_si512(at));
        odd[r][m] = _mm512_dpbf16_ps(odd[r][m], (__m512bh)low, (__m512bh)_mm512_loadu_si512(at + 32));
      }
    }
  for (int r = 0; r < n_w; ++r)
    for (int m = 0; m < n_x; ++m)
      out[m * w.o + row + r] = from_float<bf16>(_mm512_reduce_add_ps(_mm512_add_ps(even[r][m], odd[r][m])));
}

template <int n_x>
inline void multiply_rows(const FourBitMatrix& w, const uint16_t* x, bf16* out) {
  constexpr int at_once = n_x > 1 ? 2 : 4;
  const int64_t grain = ((int64_t{1} << 17) + w.i - 1) / w.i;
  parallel_for((w.o + at_once - 1) / at_once, grain / at_once + 1, [=, &w](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = p * at_once;
      if (row + at_once <= w.o)
        dot_rows<at_once, n_x>(w, row, x, out);
      else
        for (int64_t r = row; r < w.o; ++r) dot_rows<1, n_x>(w, r, x, out);
    }
  });
}

// rows: at most few_rows. Rows of W are whole chunks of 64 values, each within a block. scratch: rows * w.i values.
inline void multiply_few(const FourBitMatrix& w, const bf16* x, int64_t rows, bf16* out, void* scratch) {
  uint16_t* split = static_cast<uint16_t*>(scratch);
  for (int64_t m = 0; m < rows; ++m) split_pairs(x + m * w.i, w.i, split + m * w.i);
  switch (rows) {
    case 1: return multiply_rows<1>(w, split, out);
    case 2: return multiply_rows<2>(w, split, out);
    case 3: return multiply_rows<3>(w, split, out);
    case 4: return multiply_rows<4>(w, split, out);
  }
}

}  // namespace
}  // namespace veneer
#endif
