// The elementwise part of a record: columns of rows are scaled and shifted. The specification is
// veneer/ops/reference/scale.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"
#include "core/rows.h"

namespace veneer {

struct ScaleSizes {
  int64_t n, d;
  Dtype dtype;
};

struct ScaleKernels {
  // scale and bias: d values each, or null. y may be z's memory.
  void (*forward)(const ScaleSizes& sizes, const Rows& z, const float* scale, const float* bias,
                  const Rows& y);
  // dz (may be dy's memory) where there is a scale; dscale where it is not null, which reads z; dbias where not null.
  void (*backward)(const ScaleSizes& sizes, const Rows& dy, const Rows& z, const float* scale,
                   const Rows& dz, float* dscale, float* dbias);
};

VENEER_KERNELS(ScaleKernels, scale)

}  // namespace veneer
