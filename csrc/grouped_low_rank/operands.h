// The rows of a block as operands of products.
// Internal to each kernels.cpp, for the reason that numeric.h gives.
#pragma once

#include "core/scratch.h"
#include "grouped_low_rank/factors.h"
#include "grouped_low_rank/grouped_low_rank.h"

namespace veneer {
namespace {

template <class A, class B>
struct Same { static constexpr bool value = false; };
template <class A>
struct Same<A, A> { static constexpr bool value = true; };

// Sixteen or fewer values rounded to T, by the engine where it has an instruction for that.
template <class T, class Engine>
inline void put_rounded(T* to, lanes values, int64_t n) {
  if constexpr (Same<T, typename Engine::Element>::value) {
    if (n == width) return Engine::put_a(to, values);
  }
  put(to, values, n);
}

template <class T>
inline const T* row_of(const RowsView& view, int64_t row) {
  return reinterpret_cast<const T*>(view.data) + row * view.stride;
}

template <class E>
struct Operand {
  const E* data;
  int64_t stride;
};

// The rows of a block as a left operand: where they lie if nothing has to be padded, else copied.
template <class T, class Engine>
Operand<typename Engine::Element> left(const RowsView& view, int64_t features, const LowRankBlock& at,
                                       typename Engine::Element* copy) {
  using E = typename Engine::Element;
  if constexpr (Same<T, E>::value) {
    if (at.together && at.n_rows % Engine::row_unit == 0 && features % Engine::depth_unit == 0)
      return {row_of<T>(view, at.rows[0]), view.stride};
  }
  const int64_t stride = up_to(features, Engine::depth_unit > width ? Engine::depth_unit : width);
  for (int64_t t = 0; t < up_to(at.n_rows, Engine::row_unit); ++t)
    for (int64_t c = 0; c < stride; c += width) {
      Engine::put_a(copy + t * stride + c, t < at.n_rows ? scaled(row_of<T>(view, at.rows[t]) + c, features - c, 1.0f) : lanes{});
    }
  return {copy, stride};
}

#if defined(__AVX512BF16__)
// Two rows of 32 values, value by value side by side.
inline void interleave(const bf16* first, const bf16* second, bf16* to) {
  alignas(64) static constexpr uint16_t order[64] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
                                                     16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                     24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __m512i one = _mm512_loadu_si512(first), two = _mm512_loadu_si512(second);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(one, _mm512_load_si512(order), two));
  _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(one, _mm512_load_si512(order + 32), two));
}
#endif

// `columns` columns of the rows of a block as a right operand, the rows its depth.
template <class T, class Engine>
void right(const RowsView& view, int64_t first, int64_t features, const LowRankBlock& at, int64_t columns, int64_t depth,
           typename Engine::Element* b) {
  for (int64_t t = 0; t < depth; t += 2) {
    int64_t c = 0;
#if defined(__AVX512BF16__)
    if constexpr (Same<T, bf16>::value) {
      if (t + 1 < at.n_rows) {
        const T *one = row_of<T>(view, at.rows[t]) + first, *two = row_of<T>(view, at.rows[t + 1]) + first;
        for (; c + 32 <= columns && c + 32 <= features - first; c += 32) interleave(one + c, two + c, b + t * columns + 2 * c);
      }
    }
#endif
    for (; c < columns; c += width) {
      lanes two[2];
      for (int64_t i = 0; i < 2; ++i) {
        const bool there = t + i < at.n_rows;
        two[i] = there ? scaled(row_of<T>(view, at.rows[t + i]) + first + c, features - first - c, 1.0f) : lanes{};
      }
      put_rows<Engine>(b, columns, t, c, depth, two);
    }
  }
}

}  // namespace
}  // namespace veneer
