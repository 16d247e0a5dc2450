// Dropout with masks of a counter-based generator. The specification is veneer/ops/reference/dropout.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"

namespace veneer {

struct DropoutRows {  // n rows of d values, `stride` values apart
  void* data;
  int64_t stride;
};

struct DropoutMask {
  uint64_t key;
  uint32_t threshold;   // draws of 16 bits below it drop
  const int64_t* rows;  // the id of each row; null: they count up from first_row
  int64_t first_row;
};

struct DropoutSizes {
  int64_t n, d;
  Dtype dtype;
};

struct DropoutKernels {
  // y may be x's memory.
  void (*drop)(const DropoutSizes& sizes, const DropoutMask& mask, const DropoutRows& x, const DropoutRows& y);
  void (*add_dropped)(const DropoutSizes& sizes, const DropoutMask& mask, const DropoutRows& g, const DropoutRows& onto);
};

VENEER_KERNELS(DropoutKernels, dropout)

}  // namespace veneer
