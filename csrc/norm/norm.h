// RMSNorm and LayerNorm. The specification is veneer/ops/reference/norm.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"

namespace veneer {

struct NormWeights {  // d values each, any offset already added; bias may be null
  const float* weight;
  const float* bias;
};

// Rows of d values, `stride` values apart. mean and rstd hold one float a row; mean is null for RMSNorm.
struct NormRows {
  const void* x;
  int64_t stride, n, d;
  Dtype dtype;
  float* mean;
  float* rstd;
};

struct NormKernels {
  void (*forward)(const NormRows& rows, const NormWeights& weights, float eps, void* y);
  void (*backward)(const NormRows& rows, const NormWeights& weights, const void* dy, int64_t dy_stride, void* dx);
  // Sums over rows of dy * normalized x, and of dy (null for none).
  void (*weight_grad)(const NormRows& rows, const void* dy, int64_t dy_stride, float* dweight, float* dbias);
};

VENEER_KERNELS(NormKernels, norm)

}  // namespace veneer
