// Experts of a mixture: which of them a row goes through, and the weighted sum of what they give. The specification is
// veneer/ops/reference/experts.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"
#include "core/rows.h"

namespace veneer {

struct Router {
  int64_t n_experts, k;
  bool by_sigmoid;                // otherwise the values are a softmax
  bool normalized;                // weights are divided by their sum
  int64_t n_groups, kept_groups;  // only experts of the best groups are chosen; 1, 1: there are none
  float scale;                    // of the weights
  const float* bias;              // (n_experts,) added to the values by which experts are chosen; null: nothing
};

struct RouteRows {
  int64_t n;
  Dtype dtype;  // of the scores: float32 or bfloat16
  Rows scores;  // (n, n_experts)
  int64_t* ids;    // (n, k), the best first
  float* weights;  // (n, k)
};

// y = sum over j of weights[j] * rows[places[j]] in the order of j, + sigmoid(shared_gate) * shared; rounded once.
struct CombinedRows {
  int64_t n, d, k;
  Dtype dtype;  // float32 or bfloat16
  const void* rows;
  const int64_t* places;  // (n, k), as the weights
  const float* weights;
  Rows shared, shared_gate, y;  // without data: nothing is added, and its factor is 1
};

struct ExpertsKernels {
  void (*route)(const Router& router, const RouteRows& rows);
  void (*combine)(const CombinedRows& rows);
};

VENEER_KERNELS(ExpertsKernels, experts)

}  // namespace veneer
