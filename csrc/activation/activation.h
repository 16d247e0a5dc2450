// Activations without a gate. The specification is veneer/ops/reference/activation.py.
#pragma once

#include <cstdint>

#include "core/activations.h"
#include "core/isa.h"
#include "core/numeric.h"
#include "core/rows.h"

namespace veneer {

struct ActivationSizes {
  int64_t n, d;
  Dtype dtype;  // float32 or bfloat16
  Activation activation;
};

struct ActivationKernels {
  void (*forward)(const ActivationSizes& sizes, const Rows& x, const Rows& y);  // y may be x's memory
  void (*backward)(const ActivationSizes& sizes, const Rows& dy, const Rows& x, const Rows& dx);
};

VENEER_KERNELS(ActivationKernels, activation)

}  // namespace veneer
