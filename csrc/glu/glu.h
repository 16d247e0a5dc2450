// Gated linear units. The specification is veneer/ops/reference/glu.py.
#pragma once

#include <cstdint>

#include "core/activations.h"
#include "core/isa.h"
#include "core/numeric.h"
#include "core/rows.h"

namespace veneer {

struct GluSizes {
  int64_t n, d;
  Dtype dtype;
  Activation activation;  // silu, gelu or gelu_tanh
};

struct GluKernels {
  void (*forward)(const GluSizes& sizes, const Rows& gate, const Rows& up, const Rows& h);
  // Outputs may be the inputs' memory, each its own.
  void (*backward)(const GluSizes& sizes, const Rows& dh, const Rows& gate, const Rows& up,
                   const Rows& dgate, const Rows& dup, const Rows& h);
  // Clamped units, whatever the activation of the sizes: gate and up alternate in rows of 2 d values.
  void (*clamped_forward)(const GluSizes& sizes, const Rows& inner, const Rows& h);
  // dinner may be the memory of inner, and h that of dh.
  void (*clamped_backward)(const GluSizes& sizes, const Rows& dh, const Rows& inner, const Rows& dinner, const Rows& h);
};

VENEER_KERNELS(GluKernels, glu)

}  // namespace veneer
