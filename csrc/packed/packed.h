// Products with a frozen matrix that was packed once. The specification is veneer/ops/reference/packed.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"

namespace veneer {

// A matrix (o, i) lies in panels of 64 outputs, four blocks of 16, which follow each other in memory: a pass over it is one
// stream, which a CPU reads nearly twice as fast as four. The last panel has as many blocks as it needs, the last block is
// filled up with zeros. A panel of c blocks is [i][c][16] in float32 and float16. In bfloat16 it is [depth / 2][c][16][2],
// neighbours in i side by side, depth being i filled up with zeros to a multiple of 32: so it is a right operand of dot
// products of pairs, and of AMX tiles, as it lies.
constexpr int64_t packed_block = 16, packed_blocks = 4, packed_depth_unit = 32;

namespace {
inline int64_t packed_all_blocks(int64_t o) { return (o + packed_block - 1) / packed_block; }
inline int64_t packed_depth(int64_t i, Dtype dtype) {
  return dtype == Dtype::bfloat16 ? (i + packed_depth_unit - 1) / packed_depth_unit * packed_depth_unit : i;
}
}  // namespace

struct PackedMatrix {
  int64_t o, i;
  Dtype dtype;
  void* panels;
};

struct PackedRows {  // the last axis contiguous
  void* data;
  int64_t stride;  // in values
  Dtype dtype;     // float32 or bfloat16
};

struct PackedProduct {
  PackedMatrix weight;
  int64_t n;
  PackedRows x, out;
  PackedRows onto;  // of out's dtype, added before the one rounding; data null: nothing is. May be out's memory
  void* scratch;
};

struct PackedKernels {
  void (*pack)(const PackedMatrix& weight, const void* rows, int64_t stride);
  void (*unpack)(const PackedMatrix& weight, void* rows);
  int64_t (*scratch_bytes)(const PackedProduct& product);
  void (*matmul)(const PackedProduct& product);
};

VENEER_KERNELS(PackedKernels, packed)

}  // namespace veneer
