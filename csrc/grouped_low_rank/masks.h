// The masks in front of an adapter's A: rows of a block through a pair's mask.
// Internal to each kernels.cpp, for the reason that numeric.h gives.
#pragma once

#include "core/philox.h"
#include "grouped_low_rank/operands.h"

namespace veneer {
namespace {

constexpr int64_t block = low_rank_block;

template <class T>
struct Bits { using type = uint16_t; };
template <>
struct Bits<float> { using type = float; };

constexpr int64_t in_order[block] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                     22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
                                     44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};

// f(t, column, draws) for the rows of a block and each 64 of some columns, the first of them a multiple of 64.
template <class F>
void each_draw(const LowRankPair& pair, const LowRankBlock& at, int64_t first, int64_t columns, const F& f) {
  const PhiloxKeys keys(pair.key);
  RowPart rows[block];
  for (int64_t t = 0; t < at.n_rows; ++t) rows[t] = RowPart(pair.ids[at.rows[t]], keys);
  for (int64_t c = 0; c < columns; c += draw_group) {
    const ColumnPart column(first + c, keys);
    for (int64_t t = 0; t < at.n_rows; ++t) {
      alignas(64) uint16_t draws[draw_group];
      draw(column, rows[t], keys, draws);
      f(t, c, draws);
    }
  }
}

// Some columns of the rows of a block through a pair's mask, the rows `stride` apart.
template <class T>
void masked_rows(const RowsView& view, const LowRankPair& pair, const LowRankBlock& at, int64_t first, int64_t columns,
                 T* to, int64_t stride) {
  using B = typename Bits<T>::type;
  each_draw(pair, at, first, columns, [&](int64_t t, int64_t c, const uint16_t* draws) {
    const int64_t left_over = columns - c;
    drop_some(reinterpret_cast<const B*>(row_of<T>(view, at.rows[t])) + first + c, reinterpret_cast<B*>(to) + t * stride + c,
              draws, pair.threshold, left_over < draw_group ? left_over : draw_group);
  });
}

}  // namespace
}  // namespace veneer
