// Eight-bit blockwise codes over a sorted table of 256. The specification is veneer/ops/reference/blockwise.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"

namespace veneer {

struct BlockwiseKernels {
  // x: n values of dtype -> n codes, absmax one float a block (NaN or infinity where the block holds one).
  void (*quantize)(const void* x, Dtype dtype, int64_t n, int64_t block_size, const float* code, uint8_t* codes,
                   float* absmax);
  void (*dequantize)(const uint8_t* codes, const float* absmax, int64_t n, int64_t block_size, const float* code,
                     Dtype dtype, void* out);
};

VENEER_KERNELS(BlockwiseKernels, blockwise)

}  // namespace veneer
