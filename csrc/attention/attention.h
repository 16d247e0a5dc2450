// Causal attention over packed sequences. The specification is veneer/ops/reference/attention.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"

namespace veneer {

struct HeadsView {  // (n, heads, d): strides in values, the last axis contiguous
  void* data;
  int64_t token_stride, head_stride;
};

struct AttentionSizes {
  int64_t n_sequences, q_heads, kv_heads, d;
  const int64_t* bounds;  // n_sequences + 1, from 0 to n
  Dtype dtype;
};

struct AttentionOptions {
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none
};

struct AttentionForward {
  HeadsView q, k, v, out;
  float* lse;  // (q_heads, n)
};

struct AttentionBackward {
  HeadsView q, k, v, out, dout, dq, dk, dv;
  const float* lse;
};

struct AttentionKernels {
  // Bytes of scratch that one thread needs, for the longest sequence.
  int64_t (*scratch_bytes)(const AttentionSizes& sizes, bool backward);
  // `scratch` holds that many bytes, aligned to 64, for each of `n_threads`.
  void (*forward)(const AttentionSizes& sizes, const AttentionOptions& options, const AttentionForward& tensors,
                  char* scratch, int n_threads);
  void (*backward)(const AttentionSizes& sizes, const AttentionOptions& options, const AttentionBackward& tensors,
                   char* scratch, int n_threads);
};

VENEER_KERNELS(AttentionKernels, attention)

}  // namespace veneer
