// Products of a chunk: four rows of C (m, n) = factor C + A B at a time. A is read by rows or by columns, B row by row, and
// the depth of a triangle depends on the row. Internal to each kernels.cpp, for the reason that core/numeric.h gives.
#pragma once

#include "core/lanes.h"
#include "core/square.h"

namespace veneer {
namespace {

constexpr int64_t few = 4;  // rows of a product at a time

struct Left {
  const float* data;
  int64_t row, depth;  // values from one row, and from one column, to the next
};

struct Matrix {
  float* data;
  int64_t stride;

  float* operator[](int64_t row) const { return data + row * stride; }
  Left left() const { return {data, stride, 1}; }
  Left turned() const { return {data, 1, stride}; }
};

struct Depth {
  int64_t from, to;
};

template <int columns>
inline void corner(float* c, int64_t ldc, const Left& a, const float* b, int64_t ldb, const Depth& k, float factor) {
  lanes total[few][columns];
  for (int r = 0; r < few; ++r)
    for (int s = 0; s < columns; ++s) total[r][s] = factor == 0.0f ? lanes{} : factor * load(c + r * ldc + s * width);
  for (int64_t l = k.from; l < k.to; ++l) {
    lanes right[columns];
    for (int s = 0; s < columns; ++s) right[s] = load(b + l * ldb + s * width);
    const float* left = a.data + l * a.depth;
    for (int r = 0; r < few; ++r) {
      const float x = left[r * a.row];
      for (int s = 0; s < columns; ++s) total[r][s] += x * right[s];
    }
  }
  for (int r = 0; r < few; ++r)
    for (int s = 0; s < columns; ++s) store(c + r * ldc + s * width, total[r][s]);
}

// m and n are multiples of `few` and of a register; depth(i) belongs to rows i to i + 3. With a factor of 0, C is not read.
template <class F>
inline void multiply(const Matrix& c, const Left& a, const Matrix& b, int64_t m, int64_t n, float factor, const F& depth) {
  int64_t j = 0;
  const auto left = [&](int64_t i) { return Left{a.data + i * a.row, a.row, a.depth}; };
  for (; j + 2 * width <= n; j += 2 * width)
    for (int64_t i = 0; i < m; i += few) corner<2>(c[i] + j, c.stride, left(i), b.data + j, b.stride, depth(i), factor);
  for (; j < n; j += width)
    for (int64_t i = 0; i < m; i += few) corner<1>(c[i] + j, c.stride, left(i), b.data + j, b.stride, depth(i), factor);
}

inline void multiply(const Matrix& c, const Left& a, const Matrix& b, int64_t m, int64_t n, int64_t k, float factor) {
  multiply(c, a, b, m, n, factor, [k](int64_t) { return Depth{0, k}; });
}

// `to` = `from` (rows, columns) on its side; both are multiples of a register.
inline void turn(const Matrix& to, const Matrix& from, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += width)
    for (int64_t c = 0; c < columns; c += width) {
      lanes square[width];
      for (int64_t i = 0; i < width; ++i) square[i] = load(from[r + i] + c);
      transpose(square);
      for (int64_t i = 0; i < width; ++i) store(to[c + i] + r, square[i]);
    }
}

// Of n values, a multiple of a register.
inline float dot(const float* x, const float* y, int64_t n) {
  lanes total{};
  for (int64_t c = 0; c < n; c += width) total += load(x + c) * load(y + c);
  return sum(total);
}

}  // namespace
}  // namespace veneer
