// Keys and values in pages, and attention to them. The specification is veneer/ops/reference/paged_attention.py.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "core/isa.h"
#include "core/numeric.h"
#include "core/parallel.h"

namespace veneer {

// Pages lie one after the other, and in a page [layer][key head][K, V]. The K of `block` tokens is [d][block], their V
// [block][d]; in bfloat16 [d / 2][block][2] and [block / 2][d][2], pairs side by side: right operands of the products
// with queries and with probabilities. d is filled up with zeros to a multiple of 16; block is such a multiple.
struct PagedStore {
  char* data;
  Dtype dtype;  // float32 or bfloat16
  int64_t block, layers, kv_heads, head_dim;
};

// Rows of a step, sequence by sequence: of sequence s rows [first_row[s], first_row[s + 1]), which follow each other from
// position[s] on, and its pages [first_page[s], …) in `pages`.
struct PagedBatch {
  int64_t n_sequences;
  const int64_t *pages, *first_page, *first_row, *position;
};

struct PagedRows {  // (n, heads, head_dim), the last axis contiguous, of the store's dtype
  char* data;
  int64_t row_stride, head_stride;  // in values
};

struct PagedOptions {
  float scale;
  int64_t window;  // 0: none
  float softcap;   // 0: none
  // A bias of each position, by query head: a score's is that of the key less that of the query. A row has `positions`
  // values, a multiple of 16. Null: none; it excludes a cap.
  const float* bias;
  int64_t positions;
  // A logit of each query head that is one more term of the softmax's sum, without a value. Null: none.
  const float* sinks;
};

struct PagedCall {
  PagedStore store;
  int64_t layer;
  PagedBatch batch;
  int64_t q_heads;
  PagedRows q, out;
  int64_t q_of_key;  // from the first query head of a key head to that of the next, in values of q
  PagedOptions options;
  char* scratch;
  int n_threads;
};

namespace {

// The threads that are worth waking for a call.
inline int threads_for(const PagedCall& call) {
  constexpr int64_t least_work = 1 << 12;  // scores, some 15 us of one thread
  int64_t scores = 0;
  for (int64_t s = 0; s < call.batch.n_sequences; ++s) {
    const int64_t rows = call.batch.first_row[s + 1] - call.batch.first_row[s];
    scores += rows * (call.batch.position[s] + rows);
  }
  return scores * call.q_heads >= least_work ? max_threads() : 1;
}

}  // namespace

// Throws out_of_range if a row's position has no bias.
inline void require_bias(const PagedOptions& options, const PagedBatch& b) {
  for (int64_t s = 0; options.bias != nullptr && s < b.n_sequences; ++s)
    if (b.position[s] + b.first_row[s + 1] - b.first_row[s] > options.positions)
      throw std::out_of_range("a position is beyond those that have a bias");
}

struct PagedAttentionKernels {
  void (*append)(const PagedStore& store, int64_t layer, const PagedBatch& batch, const PagedRows& k, const PagedRows& v);
  int64_t (*scratch_bytes)(const PagedCall& call);
  void (*attend)(const PagedCall& call);
};

VENEER_KERNELS(PagedAttentionKernels, paged_attention)

}  // namespace veneer
