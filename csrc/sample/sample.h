// The choice of tokens from rows of logits. The specification is veneer/ops/reference/sample.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"
#include "core/rows.h"

namespace veneer {

// Columns [first, first + d) of n rows of logits.
struct LogitColumns {
  int64_t n, d, first;
  Dtype dtype;  // float32 or bfloat16
  Rows rows;
  float scale;  // positive; of each logit before it is compared
};

// Of each row the largest logit of the columns so far and the column in which it is, the first of equal ones. They begin as
// minus infinity and -1; a value that is no number stays.
struct Likeliest {
  float* values;
  int64_t* columns;
};

struct SampleKernels {
  void (*likeliest)(const LogitColumns& logits, const Likeliest& found);
};

VENEER_KERNELS(SampleKernels, sample)

}  // namespace veneer
