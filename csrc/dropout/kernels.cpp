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
inline void add_group(const T* g, T* onto, const uint16_t* draws, uint32_t threshold) {
  for (int64_t c = 0; c < draw_group; c += width) {
    const lanes before = load(onto + c);
    store(onto + c, draws_at(draws + c) >= threshold ? before + load(g + c) : before);
  }
}
// Two to a lane, the low halves and the high ones added as floats where they lie.
inline void add_group(const bf16* g, bf16* onto, const uint16_t* draws, uint32_t threshold) {
  const short_lanes limit = short_lanes{} + static_cast<uint16_t>(threshold);
  for (int64_t c = 0; c < draw_group; c += 2 * width) {
    const bit_lanes before = bits_at<bit_lanes>(onto + c), more = bits_at<bit_lanes>(g + c);
    const lanes low = (lanes)(before << 16) + (lanes)(more << 16);
    const lanes high = (lanes)(before & 0xffff0000u) + (lanes)(more & 0xffff0000u);
    const short_lanes after = (short_lanes)(bf16_bits(low) | bf16_bits(high) << 16);
    const short_lanes values = bits_at<short_lanes>(draws + c) >= limit ? after : (short_lanes)before;
    std::memcpy(onto + c, &values, sizeof values);
  }
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

template <class T>
void add_typed(const DropoutSizes& sizes, const DropoutMask& mask, const Rows& g, const Rows& onto) {
  const uint32_t threshold = mask.threshold;
  each_group(sizes, mask, [=](int64_t r, int64_t c, int64_t n, const uint16_t* draws) {
    const T* from = row_of<const T>(g, r) + c;
    T* to = row_of<T>(onto, r) + c;
    if (n == draw_group) return add_group(from, to, draws, threshold);
    Padded<T> added(from, n), end(to, n);
    add_group(added.values, end.values, draws, threshold);
    std::memcpy(to, end.values, n * sizeof(T));
  });
}

void add_dropped(const DropoutSizes& sizes, const DropoutMask& mask, const Rows& g, const Rows& onto) {
  switch (sizes.dtype) {
    case Dtype::float32: return add_typed<float>(sizes, mask, g, onto);
    case Dtype::bfloat16: return add_typed<bf16>(sizes, mask, g, onto);
    case Dtype::float16: return add_typed<fp16>(sizes, mask, g, onto);
  }
}

}  // namespace

const DropoutKernels dropout = {drop, add_dropped};

}  // namespace VENEER_ISA
}  // namespace veneer
