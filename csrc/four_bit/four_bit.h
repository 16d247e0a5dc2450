// NF4 and FP4: codec and products. The specification is veneer/ops/reference/four_bit.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"

namespace veneer {

struct FourBitCode {
  float table[16];       // the value of each code
  float midpoints[15];   // between neighbouring table values, rising
  uint8_t ranked[16];    // the code of each interval between midpoints
};
const FourBitCode& four_bit_code(int quant_type);  // 0 nf4, 1 fp4

// A quantized matrix (o, i), its values flattened row by row.
struct FourBitMatrix {
  const uint8_t* packed;
  const float* absmax;
  const FourBitCode* code;
  int block_shift;  // a block holds 1 << block_shift values
  int64_t o, i;
};

struct FourBitKernels {
  // x: n values of dtype -> packed (n+1)/2 bytes, absmax one float a block (NaN or infinity where the block holds one).
  void (*quantize)(const void* x, Dtype dtype, int64_t n, int64_t block_size, const FourBitCode& code, uint8_t* packed,
                   float* absmax);
  // out: n values of dtype.
  void (*dequantize)(const uint8_t* packed, const float* absmax, int64_t n, int64_t block_size, const FourBitCode& code,
                     Dtype dtype, void* out);
  // x, out: rows of bf16; out = W x a row, or transpose(W) x. Null where this build has no product: decode, and let torch
  // multiply. scratch: product_scratch() bytes.
  void (*multiply)(const FourBitMatrix& w, const bf16* x, int64_t rows, bool transposed, bf16* out, void* scratch);
  int64_t (*product_scratch)(const FourBitMatrix& w, int64_t rows, bool transposed);
  // W x for a few rows, where a row of W is a multiple of 64 values and a block at least 64; null as above.
  // scratch: rows of w.i values of bf16.
  void (*multiply_few)(const FourBitMatrix& w, const bf16* x, int64_t rows, bf16* out, void* scratch);
};

VENEER_KERNELS(FourBitKernels, four_bit)

}  // namespace veneer
