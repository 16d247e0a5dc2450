// How a matrix lies that is packed for products: panels.h has these.
#pragma once

#include "core/numeric.h"

namespace veneer {

// A matrix (o, i) lies in panels of 64 outputs, four blocks of 16, which follow each other in memory: a pass over it is one
// stream, which a CPU reads nearly twice as fast as four. The last panel has as many blocks as it needs, the last block is
// filled up with zeros. A panel of c blocks is [depth][c][16] in float32 and float16. In bfloat16 it is [depth / 2][c][16][2],
// neighbours in i side by side, depth being even: so it is a right operand of dot products of pairs, and where depth is a
// multiple of 32 also of AMX tiles, as it lies. Beyond i there are zeros.
// In codes (packed/coded.h) it is another layout, whose values are rounded to `dtype`.

// Meaning of the codes of a matrix, in the order of veneer.ops.packed_codes: its numbers, how their scales are stored, the
// formula that makes values of them, and the dtype that these are rounded to.
struct Coding {
  enum Numbers : int {
    none = 0, nf4, fp4, int8, signed4, unsigned4, iq4, e2m1, signed8, unsigned8, e4m3, e5m2,
    signed2, unsigned2, signed3, unsigned3
  };
  enum Scales : int { float32 = 0, bfloat16, float16, e8m0 };
  // number * scale; number * scale + beside; (number - beside) * scale, for whole numbers; and the same with the difference
  // rounded too.
  enum Formula : int { scaled = 0, added, less_zero, apart };

  Numbers numbers = none;
  Scales scales = float32;
  Formula formula = scaled;
  Dtype rounding = Dtype::float32;

  Coding() = default;
  explicit Coding(int64_t parts)
      : numbers(Numbers(parts & 15)), scales(Scales(parts >> 4 & 15)), formula(Formula(parts >> 8 & 15)),
        rounding(Dtype(parts >> 12 & 15)) {}
};

struct PanelMatrix {
  int64_t o, i, depth;
  Dtype dtype;
  void* values;
  Coding coding = Coding();
  int64_t unit = 0;  // inputs of an output that share a scale
};

namespace {

constexpr int64_t panel_block = 16, panel_blocks = 4;

inline int64_t blocks_of(int64_t o) { return (o + panel_block - 1) / panel_block; }
inline int64_t values_of(const PanelMatrix& m) { return blocks_of(m.o) * panel_block * m.depth; }

// The panel in which a block of outputs lies: where it starts, its outputs, and the first of the block among them.
struct Panel {
  int64_t start, across, first;
};
inline Panel panel_of(const PanelMatrix& m, int64_t block) {
  const int64_t before = block / panel_blocks * panel_blocks, left = blocks_of(m.o) - before;
  return {before * panel_block * m.depth, (left < panel_blocks ? left : panel_blocks) * panel_block,
          (block - before) * panel_block};
}

// Where (k, j) of a right operand lies whose rows are `across` wide; of bfloat16, pairs of rows side by side.
template <class T>
inline int64_t place(int64_t across, int64_t k, int64_t j) { return k * across + j; }
template <>
inline int64_t place<bf16>(int64_t across, int64_t k, int64_t j) { return k / 2 * 2 * across + 2 * j + k % 2; }

}  // namespace
}  // namespace veneer
