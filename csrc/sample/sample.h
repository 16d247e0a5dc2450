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

// How the token of one row is drawn, in the order of its effects. Empty lists have no effect.
struct RowRule {
  const uint32_t* allowed[2];  // a bit an id; null: all
  const int32_t* banned;
  int64_t n_banned;
  const int32_t* biased;
  const float* biases;
  int64_t n_biased;
  const int32_t* seen;
  int64_t n_seen;
  const int32_t* counted;
  const int32_t* counts;
  int64_t n_counted;
  float repetition, frequency, presence;
  double temperature;  // 0: the likeliest token
  double min_p;
  int64_t top_k;  // 0: all
  double top_p;
  uint64_t key[2], place;
  int64_t target;       // the token, if it is given; -1: drawn
  int64_t n_likeliest;  // of which log-probabilities are asked for; -1: of none, not even of the token
};

constexpr int64_t not_finite = -1, none_allowed = -2;  // in the place of a token

// Of each row its token, that one's log-probability and rank, and, one row behind the other, the likeliest ids with theirs.
struct Draws {
  int64_t* tokens;
  double* logprobs;
  int64_t* ranks;
  int64_t* likeliest;
  double* likeliest_logprobs;
};

struct SampleKernels {
  void (*likeliest)(const LogitColumns& logits, const Likeliest& found);
  int64_t (*scratch_bytes)(int64_t d);  // of `draw`, a thread
  // Whole rows: `first` is 0. A scratch for each of so many threads.
  void (*draw)(const LogitColumns& logits, const RowRule* rules, const Draws& found, char* scratch, int n_threads);
};

VENEER_KERNELS(SampleKernels, sample)

}  // namespace veneer
