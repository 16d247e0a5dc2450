// Gated delta rule with states in pages. The specification is veneer/ops/reference/delta.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"
#include "core/rows.h"
#include "paged_attention/paged_attention.h"

namespace veneer {

struct DeltaSizes {
  int64_t k_heads, v_heads, k_width, v_width, kernel;
  Dtype dtype;  // of all rows
  float eps, beta_scale;
};

struct DeltaWeights {
  const float *kernel, *conv_bias;  // a row for the token itself, for the token before it, …; the bias may be null
  const float *norm, *rate, *bias;  // of a head's values; of each head
};

// A page holds for each layer the matrices of all heads, then kernel - 1 inputs of the convolution.
struct DeltaStates {
  float* data;
  int64_t layers, block, layer;
};

struct DeltaPart {  // of each row and key head
  Rows rows;
  int64_t apart;  // values from one key head to the next
};

struct DeltaRows {
  DeltaPart q, k, v, z, b, a;  // v and z: of all value heads of a key head, as b and a
};

struct DeltaKernels {
  int64_t (*scratch_bytes)(const DeltaSizes& sizes);
  void (*in_pages)(const DeltaSizes& sizes, const DeltaWeights& weights, const DeltaStates& states, const PagedBatch& batch,
                   const DeltaRows& given, const Rows& y, char* scratch);
};

VENEER_KERNELS(DeltaKernels, delta)

}  // namespace veneer
