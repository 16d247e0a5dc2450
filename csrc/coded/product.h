// Rows of a matrix in any codes, decoded; and W x for a few rows of x: rows of W are decoded a piece at a time into the
// first-level cache, and multiplied there by all rows of x. A format gives nothing but the values of a piece of a row.
#pragma once

#include "core/lanes.h"
#include "core/parallel.h"

namespace veneer {
namespace {

constexpr int64_t decode_grain = 1 << 14;  // values, worth a thread
constexpr int64_t piece_values = 768;      // of a row of W at a time, a multiple of every block
constexpr int64_t piece_rows = 8;          // of W at a time
constexpr int64_t few_rows = 16;           // of x at a time
constexpr int64_t tile_rows = 4;           // of W whose sums are in registers

// Rows of codes. decode: values [from, from + n) of a row, where `from` is a multiple of piece_values, and n too except at the
// end of a row.
struct CodedRows {
  const void* matrix;
  int64_t o, i;
  void (*decode)(const void* matrix, int64_t row, int64_t from, int64_t n, float* out);

  int64_t grain() const { return (decode_grain + i - 1) / i; }
};

void decode_rows(const CodedRows& w, float* out) {
  parallel_for(w.o, w.grain(), [=, &w](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) w.decode(w.matrix, r, 0, w.i, out + r * w.i);
  });
}

inline lanes multiply_add(lanes a, lanes b, lanes c) {
#if defined(__AVX512F__)
  return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t at_once = 2;  // rows of x whose sums are in registers
#else
constexpr int64_t at_once = 1;
#endif

// The sum of a row of W and one of x is two registers, whatever the tile that it is part of: so a row's result is the same in
// any batch of few rows.
struct PieceSums {
  lanes of[few_rows][piece_rows][2];
};

// n values of tile_rows rows of W, decoded, times n_x rows of x from row m.
template <int n_x>
inline void multiply_tile(const float* piece, int64_t n, const float* x, int64_t stride, int64_t m, int64_t r, PieceSums& sums) {
  lanes total[n_x][tile_rows][2];
  for (int64_t a = 0; a < n_x; ++a)
    for (int64_t b = 0; b < tile_rows; ++b)
      for (int64_t half = 0; half < 2; ++half) total[a][b][half] = sums.of[m + a][r + b][half];
  const float *w = piece + r * piece_values, *from = x + m * stride;
  int64_t k = 0;
  for (; k + 2 * width <= n; k += 2 * width)
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t at = k + half * width;
      lanes weights[tile_rows];
      for (int64_t b = 0; b < tile_rows; ++b) weights[b] = load(w + b * piece_values + at);
      for (int64_t a = 0; a < n_x; ++a) {
        const lanes value = load(from + a * stride + at);
        for (int64_t b = 0; b < tile_rows; ++b) total[a][b][half] = multiply_add(value, weights[b], total[a][b][half]);
      }
    }
  for (int64_t half = 0; k < n; k += width, ++half) {
    const int64_t left = n - k < width ? n - k : width;
    for (int64_t a = 0; a < n_x; ++a)
      for (int64_t b = 0; b < tile_rows; ++b)
        total[a][b][half] = multiply_add(take(from + a * stride + k, left), take(w + b * piece_values + k, left), total[a][b][half]);
  }
  for (int64_t a = 0; a < n_x; ++a)
    for (int64_t b = 0; b < tile_rows; ++b)
      for (int64_t half = 0; half < 2; ++half) sums.of[m + a][r + b][half] = total[a][b][half];
}

// Rows [row, row + n_w) of W, at most piece_rows, times n_x rows of x, at most few_rows.
// Places of a piece behind its last row hold the values of an earlier piece: nobody reads their sums.
inline void multiply_some(const CodedRows& w, int64_t row, int64_t n_w, const float* x, int64_t n_x, float* piece,
                          PieceSums& sums, float* out) {
  for (int64_t m = 0; m < n_x; ++m)
    for (int64_t r = 0; r < piece_rows; ++r) sums.of[m][r][0] = sums.of[m][r][1] = lanes{};
  for (int64_t c = 0; c < w.i; c += piece_values) {
    const int64_t n = w.i - c < piece_values ? w.i - c : piece_values;
    for (int64_t r = 0; r < n_w; ++r) w.decode(w.matrix, row + r, c, n, piece + r * piece_values);
    for (int64_t r = 0; r < n_w; r += tile_rows) {
      int64_t m = 0;
      for (; m + at_once <= n_x; m += at_once) multiply_tile<at_once>(piece, n, x + c, w.i, m, r, sums);
      for (; m < n_x; ++m) multiply_tile<1>(piece, n, x + c, w.i, m, r, sums);
    }
  }
  for (int64_t m = 0; m < n_x; ++m)
    for (int64_t r = 0; r < n_w; ++r) out[m * w.o + row + r] = sum(sums.of[m][r][0] + sums.of[m][r][1]);
}

void multiply_rows(const CodedRows& w, const float* x, int64_t rows, float* out) {
  parallel_for(w.o, w.grain(), [=, &w](int64_t begin, int64_t end) {
    alignas(64) float piece[piece_rows * piece_values] = {};
    PieceSums sums;
    for (int64_t m = 0; m < rows; m += few_rows)
      for (int64_t r = begin; r < end; r += piece_rows)
        multiply_some(w, r, end - r < piece_rows ? end - r : piece_rows, x + m * w.i, rows - m < few_rows ? rows - m : few_rows,
                      piece, sums, out + m * w.o);
  });
}

}  // namespace
}  // namespace veneer
