// Rows through the experts chosen for them. It calls the kernels of the families and is compiled once: nothing here computes.
#pragma once

#include <vector>

#include "core/activations.h"
#include "experts/experts.h"
#include "packed/packed.h"
#include "pairs/pairs.h"

namespace veneer {

// A linear layer of every expert: panels of the first one, those of the next lie so many bytes behind. The biases are in the dtype
// of the rows.
struct ExpertStack {
  PanelMatrix first;
  int64_t bytes;
  char* bias;  // (experts, o), or null

  PanelMatrix of(int64_t expert) const {
    PanelMatrix m = first;
    m.values = static_cast<char*>(m.values) + expert * bytes;
    return m;
  }
};

// `numbers`: o, i, depth, address of the first expert's panels, bytes to the next one's, coding, unit and address of the biases.
ExpertStack stack_at(Dtype dtype, const std::vector<int64_t>& numbers);

struct Mixture {
  int64_t n_experts, k;
  ExpertStack inner, down;  // inner: gate and up, one below the other, or row by row where the activation is swiglu_oai
  Activation activation;
};

// A low-rank pair of every expert at one stack, in the dtype of its weights: the factors of one expert behind those of another,
// as PairsSegment has them. Rank 0: there are none.
struct ExpertPairs {
  const char* factors = nullptr;
  int64_t rank = 0;
};

// Rows [start, stop) take the pairs of one adapter.
struct MixtureSegment {
  int64_t start, stop;
  ExpertPairs inner, down;
};

struct MixtureRows {
  int64_t n;
  Dtype dtype;  // float32 or bfloat16
  Rows x;
  const int64_t* ids;    // (n, k)
  const float* weights;  // (n, k)
  Rows shared, shared_gate, y;  // as CombinedRows has them
  std::vector<MixtureSegment> segments;  // one behind the other; rows of none take no pairs
};

int64_t mixture_bytes(const Mixture& mixture, const MixtureRows& rows);  // of scratch
void run_mixture(const Mixture& mixture, const MixtureRows& rows, char* scratch);

}  // namespace veneer
