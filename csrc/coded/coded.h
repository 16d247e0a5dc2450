// Frozen matrices in codes: rows decoded, and W x for a few rows of x. The specifications are veneer/ops/reference/ggml.py
// and veneer/ops/reference/scaled.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"
#include "ggml/ggml.h"

namespace veneer {

// Rows in ggml's blocks, `stride` bytes apart: row r is that at order[r], or at r without an order.
struct GgmlMatrix {
  const uint8_t* blocks;
  int64_t stride;
  const int32_t* order;
  int64_t o, i;  // i: a multiple of the kind's block
  GgmlKind kind;
};

// Meaning of a code; see veneer.ops.scaled.CODINGS.
enum class Numbers : int { whole = 0, e2m1 = 1, e4m3 = 2, e5m2 = 3 };
// How scales and zeros are stored; see veneer.ops.scaled.STORED.
enum class Stored : int { float32 = 0, bfloat16 = 1, float16 = 2, e8m0 = 3, e4m3 = 4, uint8 = 5 };

// (number - zero) * scale, the difference and the product rounded to `rounding`. Codes are packed row by row, the lowest bits
// first. A scale and a zero hold for `group` inputs of `height` outputs. `overall` multiplies or divides all scales.
struct ScaledMatrix {
  const uint8_t* codes;
  int64_t stride, bits;  // bytes of a row, bits of a code
  Numbers numbers;
  const void* scales;
  Stored scales_stored;
  const void* zeros;  // null: every zero is `zero`
  Stored zeros_stored;
  float zero;
  const float* overall;  // or null
  bool divides;
  int64_t height, group, groups;  // groups: of a row
  Dtype rounding;
  const int32_t* order;  // row r is order[r], or first + r without an order
  int64_t first, o, i;
};

struct CodedKernels {
  // out: (o, i).
  void (*decode_ggml)(const GgmlMatrix& w, float* out);
  void (*decode_scaled)(const ScaledMatrix& w, float* out);
  // out (rows, o) = W x a row.
  void (*multiply_ggml)(const GgmlMatrix& w, const float* x, int64_t rows, float* out);
  void (*multiply_scaled)(const ScaledMatrix& w, const float* x, int64_t rows, float* out);
};

VENEER_KERNELS(CodedKernels, coded)

}  // namespace veneer
