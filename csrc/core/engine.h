// Small dense products C (m, n) = or += A (m, k) B (k, n): in float, by dot products of bfloat16 pairs, or on AMX tiles.
// m, n and k are multiples of row_unit, column_unit and depth_unit. A is row by row. B is row by row in float, and in bfloat16
// in pairs of rows: B[k], B[k+1] side by side, column by column.
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "core/amx.h"
#include "core/lanes.h"

namespace veneer {
namespace {

struct PlainEngine {
  using Element = float;
  static constexpr int64_t row_unit = 4, column_unit = width, depth_unit = 1;

  static void begin() {}
  static void end() {}

  static void product(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m,
                      int64_t n, int64_t k, bool add) {
    for (int64_t i = 0; i < m; i += row_unit) {
      int64_t j = 0;
      for (; j + 2 * width <= n; j += 2 * width) corner<2>(c + i * ldc + j, ldc, a + i * lda, lda, b + j, ldb, k, add);
      if (j < n) corner<1>(c + i * ldc + j, ldc, a + i * lda, lda, b + j, ldb, k, add);
    }
  }
  template <int64_t columns>
  static void corner(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, bool add) {
    lanes total[row_unit][columns];
    for (int64_t r = 0; r < row_unit; ++r)
      for (int64_t s = 0; s < columns; ++s) total[r][s] = add ? load(c + r * ldc + s * width) : lanes{};
    for (int64_t l = 0; l < k; ++l)
      for (int64_t s = 0; s < columns; ++s) {
        const lanes right = load(b + l * ldb + s * width);
        for (int64_t r = 0; r < row_unit; ++r) total[r][s] += a[r * lda + l] * right;
      }
    for (int64_t r = 0; r < row_unit; ++r)
      for (int64_t s = 0; s < columns; ++s) store(c + r * ldc + s * width, total[r][s]);
  }

  // Where column j of B starts.
  static float* column(float* b, int64_t j) { return b + j; }
  // A register of columns of a row of A, and of two neighbouring rows of B.
  static void put_a(float* a, lanes values) { store(a, values); }
  static void put_b(float* b, int64_t ldb, int64_t row, int64_t column, lanes first, lanes second) {
    store(b + row * ldb + column, first);
    store(b + (row + 1) * ldb + column, second);
  }
  // B from n padded rows (n, d): B = rows, and B = rowsᵀ.
  static void pack_rows(float* b, const float* rows, int64_t n, int64_t d) { std::memcpy(b, rows, n * d * sizeof(float)); }
  static void pack_columns(float* b, const float* rows, int64_t n, int64_t d) {
    for (int64_t t = 0; t < n; ++t)
      for (int64_t c = 0; c < d; ++c) b[c * n + t] = rows[t * d + c];
  }
};

#if defined(__AVX512BF16__)
struct PairLayout {
  using Element = bf16;

  static void put_a(bf16* a, lanes values) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)values);
    std::memcpy(static_cast<void*>(a), &rounded, sizeof rounded);
  }
  static void put_b(bf16* b, int64_t ldb, int64_t row, int64_t column, lanes first, lanes second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
    _mm512_storeu_si512(b + row * ldb + 2 * column, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static bf16* column(bf16* b, int64_t j) { return b + 2 * j; }
  static void pack_rows(bf16* b, const bf16* rows, int64_t n, int64_t d) {
    for (int64_t t = 0; t < n; t += 2)
      for (int64_t c = 0; c < d; c += width) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(rows + t * d + c)));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(rows + (t + 1) * d + c)));
        _mm512_storeu_si512(b + t * d + 2 * c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
  }
  static void pack_columns(bf16* b, const bf16* rows, int64_t n, int64_t d) {
    for (int64_t t = 0; t < n; ++t)
      for (int64_t c = 0; c < d; c += 2) std::memcpy(b + c * n + 2 * t, rows + t * d + c, 4);
  }
};

struct PairEngine : PairLayout {
  // 16 sums hide the latency of a dot product, and leave registers for the operands.
  static constexpr int64_t row_unit = 8, column_unit = width, depth_unit = 2;

  static void begin() {}
  static void end() {}

  static void product(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* b, int64_t ldb, int64_t m,
                      int64_t n, int64_t k, bool add) {
    for (int64_t i = 0; i < m; i += row_unit) {
      int64_t j = 0;
      for (; j + 2 * width <= n; j += 2 * width)
        corner<2>(c + i * ldc + j, ldc, a + i * lda, lda, b + 2 * j, ldb, k, add);
      if (j < n) corner<1>(c + i * ldc + j, ldc, a + i * lda, lda, b + 2 * j, ldb, k, add);
    }
  }
  template <int64_t columns>
  static void corner(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* b, int64_t ldb, int64_t k, bool add) {
    __m512 total[row_unit][columns];
    for (int64_t r = 0; r < row_unit; ++r)
      for (int64_t s = 0; s < columns; ++s)
        total[r][s] = add ? _mm512_loadu_ps(c + r * ldc + s * width) : _mm512_setzero_ps();
    for (int64_t l = 0; l < k; l += 2) {
      __m512bh right[columns];
      for (int64_t s = 0; s < columns; ++s) right[s] = (__m512bh)_mm512_loadu_si512(b + l * ldb + 2 * s * width);
      for (int64_t r = 0; r < row_unit; ++r) {
        int32_t pair;
        std::memcpy(&pair, a + r * lda + l, sizeof pair);
        const __m512bh spread = (__m512bh)_mm512_set1_epi32(pair);
        for (int64_t s = 0; s < columns; ++s) total[r][s] = _mm512_dpbf16_ps(total[r][s], spread, right[s]);
      }
    }
    for (int64_t r = 0; r < row_unit; ++r)
      for (int64_t s = 0; s < columns; ++s) _mm512_storeu_ps(c + r * ldc + s * width, total[r][s]);
  }
};
#endif

#if defined(__AMX_BF16__)
struct TileEngine : PairLayout {
  static constexpr int64_t row_unit = 32, column_unit = 32, depth_unit = 32;

  static void begin() { amx_begin(); }
  static void end() { amx_end(); }

  static void product(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* b, int64_t ldb, int64_t m,
                      int64_t n, int64_t k, bool add) {
    amx_fence();
    for (int64_t i = 0; i < m; i += 32)
      for (int64_t j = 0; j < n; j += 32) {
        float* corner = c + i * ldc + j;
        if (add) {
          _tile_loadd(0, corner, ldc * 4);
          _tile_loadd(1, corner + 16, ldc * 4);
          _tile_loadd(2, corner + 16 * ldc, ldc * 4);
          _tile_loadd(3, corner + 16 * ldc + 16, ldc * 4);
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        for (int64_t l = 0; l < k; l += 32) {
          _tile_loadd(4, a + i * lda + l, lda * 2);
          _tile_loadd(6, b + l * ldb + 2 * j, ldb * 4);
          _tile_loadd(7, b + l * ldb + 2 * j + 32, ldb * 4);
          _tile_loadd(5, a + (i + 16) * lda + l, lda * 2);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, corner, ldc * 4);
        _tile_stored(1, corner + 16, ldc * 4);
        _tile_stored(2, corner + 16 * ldc, ldc * 4);
        _tile_stored(3, corner + 16 * ldc + 16, ldc * 4);
      }
    amx_fence();
  }
};
#endif

// What multiplies bfloat16: the widest that this build has.
#if defined(__AMX_BF16__)
using HalfEngine = TileEngine;
#elif defined(__AVX512BF16__)
using HalfEngine = PairEngine;
#else
using HalfEngine = PlainEngine;
#endif

}  // namespace
}  // namespace veneer
