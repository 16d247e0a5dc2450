// Factors packed as right operands B (depth, columns): everything past (k, n) is zero.
// Where B is wide its tiles of columns lie one after the other: rows of B far apart would share lines of the cache.
// Internal to each kernels.cpp, for the reason that numeric.h gives.
#pragma once

#include <cstring>

#include "core/engine.h"

namespace veneer {
namespace {

// A register of columns of rows t and t + 1 of a right operand that is `depth` deep.
template <class Engine>
void put_rows(typename Engine::Element* b, int64_t ldb, int64_t t, int64_t c, int64_t depth, const lanes (&two)[2]) {
  if (Engine::depth_unit == 1 && t + 1 == depth) return Engine::put_a(b + t * ldb + c, two[0]);
  Engine::put_b(b, ldb, t, c, two[0], two[1]);
}

// n values from p on, times scale, where n may be more or less than `width`.
template <class F>
lanes scaled(const F* p, int64_t n, float scale) {
  return n >= width ? load(p) * scale : n > 0 ? load_some(p, n) * scale : lanes{};
}
#if defined(__AVX512F__)
inline lanes scaled(const float* p, int64_t n, float scale) {  // most factors are narrow: one load each
  const __mmask16 present = n >= width ? 0xffff : n > 0 ? static_cast<__mmask16>((1u << n) - 1u) : 0;
  return (lanes)_mm512_maskz_loadu_ps(present, p) * scale;
}
#endif

// B (depth, ldb) = scale * f, with f (k, n), its rows `stride` apart.
template <class Engine, class F>
void pack_rows(typename Engine::Element* b, int64_t ldb, const F* f, int64_t stride, int64_t k, int64_t n, int64_t depth,
               float scale) {
  for (int64_t row = 0; row < depth; row += 2)
    for (int64_t c = 0; c < ldb; c += width) {
      lanes two[2];
      for (int64_t i = 0; i < 2; ++i) two[i] = row + i < k ? scaled(f + (row + i) * stride + c, n - c, scale) : lanes{};
      put_rows<Engine>(b, ldb, row, c, depth, two);
    }
}

// Columns [0, columns) of B (depth, ldb) = scale * fᵀ, with f (n, k).
template <class Engine, class F>
void pack_columns(typename Engine::Element* b, int64_t ldb, const F* f, int64_t n, int64_t k, int64_t columns,
                  int64_t depth, float scale) {
  using E = typename Engine::Element;
  constexpr int64_t unit = Engine::depth_unit == 1 ? 1 : 2;  // values of a column that lie side by side
  for (int64_t c = 0; c < columns; c += width) {
    const int64_t count = columns - c < width ? columns - c : width;
    for (int64_t l = 0; l < depth; l += width) {
      const int64_t deep = depth - l < width ? depth - l : width;
      E rows[width][width];
      for (int64_t i = 0; i < count; ++i)
        Engine::put_a(rows[i], c + i < n ? scaled(f + (c + i) * k + l, k - l, scale) : lanes{});
      for (int64_t j = 0; j < deep; j += unit) {
        E* to = Engine::column(b + (l + j) * ldb, c);
        for (int64_t i = 0; i < count; ++i) std::memcpy(static_cast<void*>(to + unit * i), rows[i] + j, unit * sizeof(E));
      }
    }
  }
}

}  // namespace
}  // namespace veneer
