// Sums of products of a few rows with registers of a matrix, in float.
// Internal to each kernels.cpp, for the reason that numeric.h gives.
#pragma once

#include "core/lanes.h"

namespace veneer {
namespace {

constexpr int64_t padding = 16;

template <int64_t n>
struct Number {
  static constexpr int64_t value = n;
};

int64_t padded(int64_t n) { return (n + padding - 1) / padding * padding; }

// Rows that are mapped at once, so that a value of the term is read once for all of them. A row's sums are the same in any company.
#if defined(__AVX512F__)
constexpr int64_t most_rows = 4;
#else
constexpr int64_t most_rows = 2;
#endif

// Stretches of x and of w, and how far apart they are.
struct Stretches {
  int64_t n, x_step, w_step;
};

// Calls f(row, first column, values, sum) for each of R rows x, which are `apart` values apart. A sum is that of x[j] times the
// registers at w + j * stride over all j and stretches. Sums of even and of odd j are added at the end. The sums are local and
// their loops unrolled. Compilers store sums behind a pointer after each addition, as x and w could point to them. They keep
// arrays of longer loops in memory.
template <int64_t R, int64_t C, class F>
void sums_of(const float* x, int64_t apart, int64_t n, const float* w, int64_t stride, int64_t columns, const Stretches& parts, const F& f) {
  lanes even[R][C], odd[R][C];
#pragma GCC unroll 4
  for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int64_t c = 0; c < C; ++c) even[r][c] = odd[r][c] = lanes{};
  const auto step = [=](const float* x, const float* w, lanes (&to)[R][C]) __attribute__((always_inline)) {
    for (int64_t c = 0; c < C; ++c) {
      const lanes right = load(w + c * width);
      for (int64_t r = 0; r < R; ++r) to[r][c] += x[r * apart] * right;
    }
  };
  for (int64_t p = 0; p < parts.n; ++p, x += parts.x_step, w += parts.w_step) {
    int64_t j = 0;
    for (; j + 2 <= n; j += 2) {
      step(x + j, w + j * stride, even);
      step(x + j + 1, w + (j + 1) * stride, odd);
    }
    if (j < n) step(x + j, w + j * stride, even);
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int64_t c = 0; c < C; ++c) {
      const int64_t left = columns - c * width;
      if (left > 0) f(r, c * width, left < width ? left : width, even[r][c] + odd[r][c]);
    }
}

// f(row, column, values, sum) for all columns of `rows` rows.
template <class F>
void each_sum(const float* x, int64_t apart, int64_t rows, int64_t n, const float* w, int64_t stride, int64_t columns, const Stretches& parts,
              const F& f) {
  for (int64_t c = 0; c < columns; c += 2 * width) {
    const int64_t left = columns - c;
    const auto part = [&](int64_t first, auto size) {
      const auto put_at = [&](int64_t r, int64_t column, int64_t m, lanes sum) { f(first + r, c + column, m, sum); };
      const float* from = x + first * apart;
      if (left > width) sums_of<size.value, 2>(from, apart, n, w + c, stride, left < 2 * width ? left : 2 * width, parts, put_at);
      else sums_of<size.value, 1>(from, apart, n, w + c, stride, left, parts, put_at);
    };
    int64_t r = 0;
    for (; r + most_rows <= rows; r += most_rows) part(r, Number<most_rows>{});
    for (; r < rows; ++r) part(r, Number<1>{});
  }
}

// The first n values of a register, and those of memory as one that is zero beyond them.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline lanes take_first(const float* p, int64_t n) { return (lanes)_mm512_maskz_loadu_ps(first(n), p); }
inline lanes take_first(const bf16* p, int64_t n) {
  return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)), 16);
}
inline void put_first(float* p, lanes x, int64_t n) { _mm512_mask_storeu_ps(p, first(n), (__m512)x); }
inline void put_first(bf16* p, lanes x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtepi32_epi16((__m512i)bf16_bits(x)));
}
#else
template <class T>
inline lanes take_first(const T* p, int64_t n) { return take(p, n); }
template <class T>
inline void put_first(T* p, lanes x, int64_t n) { put(p, x, n); }
#endif
inline lanes take_first(const fp16* p, int64_t n) { return take(p, n); }
inline void put_first(fp16* p, lanes x, int64_t n) { put(p, x, n); }

// Rows become columns: as many of both as a register has.
inline void turn(lanes (&rows)[width]) {
  for (int64_t step = 1; step < width; step *= 2) {
#if defined(__AVX512F__)
    alignas(64) int32_t low[16], high[16];
    for (int32_t l = 0; l < 16; ++l) {
      low[l] = l & step ? 16 + l - static_cast<int32_t>(step) : l;
      high[l] = l & step ? 16 + l : l + static_cast<int32_t>(step);
    }
    const __m512i of_low = _mm512_load_si512(low), of_high = _mm512_load_si512(high);
#endif
    for (int64_t i = 0; i < width; ++i) {
      if (i & step) continue;
      const lanes a = rows[i], b = rows[i + step];
#if defined(__AVX512F__)
      rows[i] = (lanes)_mm512_permutex2var_ps((__m512)a, of_low, (__m512)b);
      rows[i + step] = (lanes)_mm512_permutex2var_ps((__m512)a, of_high, (__m512)b);
#else
      for (int64_t l = 0; l < width; ++l) {
        rows[i][l] = l & step ? b[l - step] : a[l];
        rows[i + step][l] = l & step ? b[l] : a[l + step];
      }
#endif
    }
  }
}

// C (m, n) += Aᵀ B in tiles of R rows and C registers, with A (k, m) and B (k, n); rows of C and B are whole registers.
template <int64_t R, int64_t C>
void outer_tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, float* c, int64_t ldc) {
  lanes sums[R][C];
  for (int64_t r = 0; r < R; ++r)
    for (int64_t s = 0; s < C; ++s) sums[r][s] = load(c + r * ldc + s * width);
  for (int64_t l = 0; l < k; ++l)
    for (int64_t s = 0; s < C; ++s) {
      const lanes right = load(b + l * ldb + s * width);
      for (int64_t r = 0; r < R; ++r) sums[r][s] += a[l * lda + r] * right;
    }
  for (int64_t r = 0; r < R; ++r)
    for (int64_t s = 0; s < C; ++s) store(c + r * ldc + s * width, sums[r][s]);
}

inline void add_outer(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, int64_t m, int64_t n, float* c, int64_t ldc) {
  const auto columns = [&](int64_t row, auto size) {
    int64_t j = 0;
    for (; j + 2 * width <= n; j += 2 * width) outer_tile<size.value, 2>(a + row, lda, b + j, ldb, k, c + row * ldc + j, ldc);
    for (; j < n; j += width) outer_tile<size.value, 1>(a + row, lda, b + j, ldb, k, c + row * ldc + j, ldc);
  };
  int64_t row = 0;
  for (; row + most_rows <= m; row += most_rows) columns(row, Number<most_rows>{});
  for (; row < m; ++row) columns(row, Number<1>{});
}

}  // namespace
}  // namespace veneer
