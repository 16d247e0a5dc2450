#include "dropout/dropout.h"

#include "core/parallel.h"
#include "core/philox.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t grain_values = 1 << 14;

// f(row, column, n, draws) for every group of every row; n is less than 64 at a row's short end.
// What columns give is kept for a tile of them, and rows pass over it.
template <class F>
void each_group(const DropoutSizes& sizes, const DropoutMask& mask, const F& f) {
  constexpr int64_t groups = 16, tile = groups * draw_group;
  parallel_for(sizes.n, (grain_values + sizes.d - 1) / sizes.d, [=](int64_t begin, int64_t end) {
    const PhiloxKeys keys(mask.key);
    const F apply = f;  // in this frame, where no store to a tensor can reach it
    ColumnPart columns[groups];
    for (int64_t start = 0; start < sizes.d; start += tile) {
      const int64_t stop = start + tile < sizes.d ? start + tile : sizes.d;
      for (int64_t c = start; c < stop; c += draw_group) columns[(c - start) / draw_group] = ColumnPart(c, keys);
      for (int64_t r = begin; r < end; ++r) {
        const RowPart row(mask.rows ? mask.rows[r] : mask.first_row + r, keys);
        const ColumnPart* column = columns;
        for (int64_t c = start; c < stop; c += draw_group) {
          alignas(64) uint16_t draws[draw_group];
          draw(*column++, row, keys, draws);
          apply(r, c, stop - c < draw_group ? stop - c : draw_group, draws);
        }
      }
    }
  });
}

template <class T>
void drop_typed(const DropoutSizes& sizes, const DropoutMask& mask, const Rows& x, const Rows& y) {
  const uint32_t threshold = mask.threshold;
  each_group(sizes, mask, [=](int64_t r, int64_t c, int64_t n, const uint16_t* draws) {
    drop_some(row_of<const T>(x, r) + c, row_of<T>(y, r) + c, draws, threshold, n);
  });
}

void drop(const DropoutSizes& sizes, const DropoutMask& mask, const Rows& x, const Rows& y) {
  if (sizes.dtype == Dtype::float32) return drop_typed<float>(sizes, mask, x, y);
  drop_typed<uint16_t>(sizes, mask, x, y);
}

}  // namespace

const DropoutKernels dropout = {drop};

}  // namespace VENEER_ISA
}  // namespace veneer
