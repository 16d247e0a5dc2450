// One step of AdamW with moments in 8 bits. The specification is veneer/ops/reference/adamw.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"

namespace veneer {

struct AdamWMoment {
  uint8_t* codes;      // one a parameter
  float* absmax;       // one a block of 256
  const float* table;  // the value of each of the 256 codes
  // For every value that a bfloat16 can start with, from 2^-23 to 1: threshold << 8 | code, where the code is that of the
  // bin's smallest magnitude, and one further from zero once the lower 16 bits exceed the threshold. A signed moment has
  // the bins of negative values after those of the positive ones.
  const int32_t* bins;
};

struct AdamWStep {
  float beta1, rest1, beta2, rest2;  // rest = 1 - beta
  float root_scale, eps;             // 1 / sqrt(1 - beta2^step)
  float keep, rate;                  // 1 - lr * weight_decay, lr / (1 - beta1^step)
};

struct AdamWTensors {
  void* param;
  const void* grad;
  Dtype param_dtype, grad_dtype;
  int64_t n;
  AdamWMoment first, second;
};

struct AdamWKernels {
  // False where a moment came out NaN or infinite.
  bool (*step)(const AdamWTensors& tensors, const AdamWStep& hyper);
};

VENEER_KERNELS(AdamWKernels, adamw)

}  // namespace veneer
