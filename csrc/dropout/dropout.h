// Dropout with masks of a counter-based generator. The specification is veneer/ops/reference/dropout.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"
#include "core/rows.h"

namespace veneer {

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
  void (*drop)(const DropoutSizes& sizes, const DropoutMask& mask, const Rows& x, const Rows& y);
};

VENEER_KERNELS(DropoutKernels, dropout)

}  // namespace veneer
