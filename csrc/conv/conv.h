// Short causal convolutions, a kernel of its own for each channel. The specification is veneer/ops/reference/conv.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"
#include "core/rows.h"
#include "paged_attention/paged_attention.h"

namespace veneer {

constexpr int64_t longest_conv = 16;  // tokens

struct ConvSizes {
  int64_t n, d, kernel;
  Dtype dtype;
  bool silu;
  const int32_t* previous;  // the row before each row in its sequence, a smaller number; -1 for none
  const float* weight;      // kernel rows of d values: that of the row itself, of the row before it, …
  const float* bias;        // d values, or null
};

struct GatedRows {  // the gate before the convolution, its input, the gate after it; gates may have no data
  Rows before, x, after;
};

// The convolutions' inputs of all tokens, in pages that lie one after the other; in a page [layer][token][d].
struct ConvWindows {
  char* data;
  int64_t layers, block, layer;
};

struct ConvKernels {
  void (*forward)(const ConvSizes& sizes, const GatedRows& given, const Rows& y);
  // The same for the rows of a step, which see the tokens before them in their pages, and whose inputs are written there.
  void (*windowed)(const ConvSizes& sizes, const ConvWindows& windows, const PagedBatch& batch, const GatedRows& given, const Rows& y);
  // The gradients may lie in the memory of what is given, and y in that of dy. `sums` are n rows of d values.
  void (*backward)(const ConvSizes& sizes, const Rows& dy, const GatedRows& given, float* sums, const GatedRows& gradients, const Rows& y);
};

VENEER_KERNELS(ConvKernels, conv)

}  // namespace veneer
