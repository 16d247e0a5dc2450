// W x for a handful of rows: dot products straight from the codes, each code read once, no tile in between.
#pragma once

#include "core/parallel.h"
#include "four_bit/codec.h"

#if defined(__AVX512BF16__)

namespace veneer {
namespace {

constexpr int64_t few_rows = 8, dot_values = 64;

// A high nibble is the even one of two neighbours: each chunk of 64 values of x becomes its 32 even values, then its 32 odd
// ones. The chunks of all rows that lie above each other follow each other.
inline void split_pairs(const bf16* x, int64_t rows, int64_t n, uint16_t* out) {
  const __m512i even = _mm512_set1_epi32(0xffff);
  const auto narrow = [](__m512i words) { return _mm512_cvtepi32_epi16(words); };
  const auto join = [](__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); };
  for (int64_t c = 0; c < n; c += dot_values)
    for (int64_t m = 0; m < rows; ++m, out += dot_values) {
      const __m512i a = _mm512_loadu_si512(x + m * n + c), b = _mm512_loadu_si512(x + m * n + c + 32);
      _mm512_storeu_si512(out, join(narrow(_mm512_and_si512(a, even)), narrow(_mm512_and_si512(b, even))));
      _mm512_storeu_si512(out + 32, join(narrow(_mm512_srli_epi32(a, 16)), narrow(_mm512_srli_epi32(b, 16))));
    }
}

// One chunk of a row of W: the values of its high nibbles, and those of its low ones.
inline void decode_chunk(const uint8_t* packed, __m512 table, float absmax, __m512bh& high, __m512bh& low) {
  const __m512i values = doubled_table(table, absmax);
  const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
  // What is above the low four bits of an index is noise that the doubled table ignores.
  high = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), values);
  low = (__m512bh)_mm512_permutexvar_epi16(codes, values);
}

// The sum of each of sixteen registers.
inline __m512 sums_of(const __m512 (&v)[16]) {
  __m512 quarter[4], pair[2];
  for (int j = 0; j < 4; ++j) {
    const auto halved = [&](int a, int b) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(v[a], v[b], 0x44), _mm512_shuffle_f32x4(v[a], v[b], 0xee));
    };
    const __m512 first = halved(j, j + 4), second = halved(j + 8, j + 12);
    quarter[j] = _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
  }
  for (int j = 0; j < 2; ++j)
    pair[j] = _mm512_add_ps(_mm512_unpacklo_ps(quarter[2 * j], quarter[2 * j + 1]),
                            _mm512_unpackhi_ps(quarter[2 * j], quarter[2 * j + 1]));
  const __m512d a = _mm512_castps_pd(pair[0]), b = _mm512_castps_pd(pair[1]);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}

// Rows [row, row + n_w) of W times n_x rows of x. Few pairs have two sums each: the CPU adds to a sum in six cycles.
template <int n_w, int n_x>
inline void dot_rows(const FourBitMatrix& w, int64_t row, const uint16_t* x, bf16* out) {
  constexpr int sums = n_w * n_x < 8 ? 2 : 1;
  const __m512 table = _mm512_loadu_ps(w.code->table);
  const int64_t n = w.i, first = row * n;
  const int shift = w.block_shift;
  const uint8_t* packed = w.packed + first / 2;
  __m512 sum[n_w][n_x][sums];
  for (int r = 0; r < n_w; ++r)
    for (int m = 0; m < n_x; ++m)
      for (int s = 0; s < sums; ++s) sum[r][m][s] = _mm512_setzero_ps();
  for (int64_t c = 0; c < n; c += dot_values, x += n_x * dot_values) {
    __m512bh high[n_w], low[n_w];
    for (int r = 0; r < n_w; ++r)
      decode_chunk(packed + (r * n + c) / 2, table, w.absmax[(first + r * n + c) >> shift], high[r], low[r]);
    for (int m = 0; m < n_x; ++m) {
      const __m512bh even = (__m512bh)_mm512_loadu_si512(x + m * dot_values);
      for (int r = 0; r < n_w; ++r) sum[r][m][0] = _mm512_dpbf16_ps(sum[r][m][0], high[r], even);
    }
    for (int m = 0; m < n_x; ++m) {
      const __m512bh odd = (__m512bh)_mm512_loadu_si512(x + m * dot_values + 32);
      for (int r = 0; r < n_w; ++r) sum[r][m][sums - 1] = _mm512_dpbf16_ps(sum[r][m][sums - 1], low[r], odd);
    }
  }
  __m512 total[16];
  for (int j = 0; j < 16; ++j) total[j] = _mm512_setzero_ps();
  for (int m = 0; m < n_x; ++m)
    for (int r = 0; r < n_w; ++r)
      total[m * n_w + r] = sums > 1 ? _mm512_add_ps(sum[r][m][0], sum[r][m][sums - 1]) : sum[r][m][0];
  alignas(32) bf16 rounded[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(rounded), (__m256i)_mm512_cvtneps_pbh(sums_of(total)));
  for (int m = 0; m < n_x; ++m) std::memcpy(out + m * w.o + row, rounded + m * n_w, n_w * sizeof(bf16));
}

// n_x rows of x with rows [begin, end) of W, as many of W at a time as registers hold sums for.
template <int n_x>
inline void dot_range(const FourBitMatrix& w, int64_t begin, int64_t end, const uint16_t* x, bf16* out) {
  constexpr int at_once = n_x > 4 ? 2 : 4;
  int64_t row = begin;
  for (; row + at_once <= end; row += at_once) dot_rows<at_once, n_x>(w, row, x, out);
  for (; row < end; ++row) dot_rows<1, n_x>(w, row, x, out);
}

inline void dot_some(const FourBitMatrix& w, int64_t begin, int64_t end, int64_t n_x, const uint16_t* x, bf16* out) {
  switch (n_x) {
    case 1: return dot_range<1>(w, begin, end, x, out);
    case 2: return dot_range<2>(w, begin, end, x, out);
    case 3: return dot_range<3>(w, begin, end, x, out);
    case 4: return dot_range<4>(w, begin, end, x, out);
    case 5: return dot_range<5>(w, begin, end, x, out);
    case 6: return dot_range<6>(w, begin, end, x, out);
    case 7: return dot_range<7>(w, begin, end, x, out);
    default: return dot_range<8>(w, begin, end, x, out);
  }
}

// Rows of W are whole chunks of 64 values, each within a block. scratch: rows * w.i values.
inline void multiply_few(const FourBitMatrix& w, const bf16* x, int64_t rows, bf16* out, void* scratch) {
  uint16_t* split = static_cast<uint16_t*>(scratch);
  for (int64_t m = 0; m < rows; m += few_rows)
    split_pairs(x + m * w.i, rows - m < few_rows ? rows - m : few_rows, w.i, split + m * w.i);
  const int64_t grain = ((int64_t{1} << 17) / (rows < few_rows ? rows : few_rows) + w.i - 1) / w.i;
  parallel_for(w.o, grain, [=, &w](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < rows; m += few_rows)
      dot_some(w, begin, end, rows - m < few_rows ? rows - m : few_rows, split + m * w.i, out + m * w.o);
  });
}

}  // namespace
}  // namespace veneer
#endif
