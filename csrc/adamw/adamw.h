// One step of AdamW with moments in 8 bits. The specification is veneer/ops/reference/adamw.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"

namespace veneer {

// Codes as a function of the magnitude: straight lines, one a decade of the map. A magnitude's bits >> 24 name one of 16
// bins, which holds at most one border between lines; entry `bin` is the line up to that edge, entry 16 + bin the one after.
// slope * magnitude + offset, at most top, is 512 + code + 2^-14: the 14 lowest bits of that float tell how far it is from
// the next code, and below 4 it is too close to say. For a signed map it is half a code less than the distance from zero's
// code, to be mirrored and put on 639.5 + 2^-14.
struct CodeLines {
  float edge[16], slope[32], offset[32], top[32];
};

struct AdamWMoment {
  uint8_t* codes;      // one a parameter
  float* absmax;       // one a block of 256
  const float* table;  // the value of each of the 256 codes
  // For every value that a bfloat16 can start with, from 2^-23 to 1: threshold << 8 | code, where the code is that of the
  // bin's smallest magnitude, and one further from zero once the lower 16 bits exceed the threshold. A signed moment has
  // the bins of negative values after those of the positive ones.
  const int32_t* bins;
  const CodeLines* lines;
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
