// Gated linear units. The specification is veneer/ops/reference/glu.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"

namespace veneer {

enum class Activation : int { silu = 0, gelu = 1, gelu_tanh = 2 };

struct GluRows {  // n rows of d values, `stride` values apart
  void* data;
  int64_t stride;
};

struct GluSizes {
  int64_t n, d;
  Dtype dtype;
  Activation activation;
};

struct GluKernels {
  void (*forward)(const GluSizes& sizes, const GluRows& gate, const GluRows& up, const GluRows& h);
  // Outputs may be the inputs' memory, each its own.
  void (*backward)(const GluSizes& sizes, const GluRows& dh, const GluRows& gate, const GluRows& up,
                   const GluRows& dgate, const GluRows& dup, const GluRows& h);
};

VENEER_KERNELS(GluKernels, glu)

}  // namespace veneer
