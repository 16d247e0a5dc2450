// Sums into the stream of rows that a decoder's blocks read and write. The specification is torch's own addition.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"
#include "core/rows.h"

namespace veneer {

struct StreamSizes {
  int64_t n, d;
  Dtype dtype;  // float32 or bfloat16
};

struct StreamKernels {
  // h += multiplier * half, the product rounded before it is added.
  void (*add)(const StreamSizes& sizes, float multiplier, const Rows& half, const Rows& h);
};

VENEER_KERNELS(StreamKernels, stream)

}  // namespace veneer
