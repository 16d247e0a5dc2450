// Rotary position embedding. The specification is veneer/ops/reference/rotary.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"

namespace veneer {

struct RotaryView {  // (batch, heads, t, d), strides in values, the last axis contiguous
  void* data;
  int64_t batch_stride, head_stride, t_stride;
};

struct RotaryTables {  // (batch or 1, t, half), float, contiguous
  const float* cos;
  const float* sin;
  int64_t batch_stride, half;  // batch_stride is 0 for a shared table
};

struct RotarySizes {
  int64_t batch, heads, t, d;
};

struct RotaryKernels {
  // x and out may be the same memory.
  void (*rotate)(const RotarySizes& sizes, const RotaryView& x, const RotaryView& out, const RotaryTables& tables,
                 Dtype dtype, bool interleaved);
};

VENEER_KERNELS(RotaryKernels, rotary)

}  // namespace veneer
