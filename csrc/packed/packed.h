// Products with a frozen matrix that was packed once. The specification is veneer/ops/reference/packed.py, and for matrices in
// codes packed_codes.py beside it.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/panels.h"

namespace veneer {

struct PackedRows {  // the last axis contiguous
  void* data;
  int64_t stride;  // in values
  Dtype dtype;     // float32 or bfloat16
};

struct PackedProduct {
  PanelMatrix weight;
  int64_t n;
  PackedRows x, out;
  PackedRows onto;  // of out's dtype, added before the one rounding; data null: nothing is. May be out's memory
  void* scratch;
  const PanelMatrix* after = nullptr;  // what is multiplied next: of dense weights each thread fetches where its part may begin
};

struct PackedKernels {
  void (*pack)(const PanelMatrix& weight, const void* rows, int64_t stride);
  void (*unpack)(const PanelMatrix& weight, void* rows);
  // Codes as csrc/four_bit and csrc/int8 write them, row by row, with one absmax a block of 4-bit codes or a row of int8.
  void (*pack_codes)(const PanelMatrix& weight, const void* codes, const float* absmax, int64_t block_size);
  void (*unpack_codes)(const PanelMatrix& weight, void* codes);
  void (*dequantize)(const PanelMatrix& weight, void* rows);  // of the weight's dtype
  int64_t (*scratch_bytes)(const PackedProduct& product);
  void (*matmul)(const PackedProduct& product);
};

VENEER_KERNELS(PackedKernels, packed)

}  // namespace veneer
