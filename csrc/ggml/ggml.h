// ggml's types of tensors, written with the bytes of ggml's own quantizers. The specification is
// veneer/ops/reference/ggml.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"

namespace veneer {

enum class GgmlKind : int {  // ggml's own numbers
  q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, q2_k = 10, q3_k = 11, q4_k = 12, q5_k = 13, q6_k = 14,
  iq4_nl = 20, iq4_xs = 23, mxfp4 = 39
};

struct GgmlRows {  // contiguous
  const void* data;
  Dtype dtype;
  int64_t rows, columns;    // a multiple of the kind's block
  const float* importance;  // one a column, or null
  float* scratch;           // one a row where there is importance
};

struct GgmlKernels {
  // Returns the first row that holds NaN or infinity or needs a scale beyond half precision; -1 without one.
  int64_t (*quantize)(const GgmlRows& rows, GgmlKind kind, uint8_t* out);
};

VENEER_KERNELS(GgmlKernels, ggml)

}  // namespace veneer
