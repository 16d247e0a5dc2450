// Softmax, cross-entropy and its gradient. The specification is veneer/ops/reference/cross_entropy.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"

namespace veneer {

struct LogitRows {  // n rows of v classes, `stride` values apart
  void* data;
  int64_t stride, n, v;
  Dtype dtype;
};

struct CrossEntropyKernels {
  // softcap 0: none. With write_grad each row becomes softmax - one-hot (times the slope of the cap).
  void (*softmax)(const LogitRows& logits, const int64_t* labels, float softcap, bool write_grad, float* losses);
};

VENEER_KERNELS(CrossEntropyKernels, cross_entropy)

}  // namespace veneer
