// Row-wise int8. The specification is veneer/ops/reference/int8.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"

namespace veneer {

struct Int8Kernels {
  // w: o rows of i values of dtype -> codes, absmax one float a row (NaN or infinity where the row holds one).
  void (*quantize)(const void* w, Dtype dtype, int64_t o, int64_t i, int8_t* codes, float* absmax);
  void (*dequantize)(const int8_t* codes, const float* absmax, int64_t o, int64_t i, Dtype dtype, void* out);
};

VENEER_KERNELS(Int8Kernels, int8)

}  // namespace veneer
