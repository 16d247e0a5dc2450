// Low-rank pairs of many adapters, packed once. The specification is veneer/ops/reference/pairs.py.
#pragma once

#include <cstdint>

#include "core/activations.h"
#include "core/isa.h"
#include "core/panels.h"
#include "core/parallel.h"

namespace veneer {

// What there is between the two products, u = act(core * A x + bias), and behind the second, out_scale * B u + out_bias. Vectors
// hold what belongs to all layers one behind the other, those between with a place for each of the ranks filled up; null: nothing.
struct PairsMiddle {
  bool shares_a;  // all layers, of one rank, read one a
  bool scales_y;  // out_scale * (y + B u) + out_bias, of layers without a pair too
  const float *core, *bias;
  Activation activation;
  const float *out_scale, *out_bias;
};

// Rows [start, stop) take the pairs of one adapter at layers that share their input. `factors` holds first the a of all
// layers below one another, a matrix in panels, then of each layer scale * b, one too. Ranks and depths are even in
// bfloat16, where what is missing is zero; the inputs of a are filled up to an even number alike. Rank 0: no pair there.
struct PairsSegment {
  const char* factors;
  const int64_t* ranks;
  int64_t start, stop;
  const PairsMiddle* middle;  // null: nothing between the two products, nor behind them
};

struct PairsRows {  // the last axis contiguous
  char* data;
  int64_t stride;  // in values
};

struct PairsCall {
  Dtype dtype, x_dtype, y_dtype;  // of the factors, of x, of the outputs; float32 or bfloat16
  int64_t in_features, n_layers, n_segments;
  const int64_t* out_features;
  const PairsSegment* segments;
  PairsRows x;
  const PairsRows* ys;   // added to
  int64_t rows_at_once;  // of a segment
  char* scratch;
  int n_threads;
};

// A factor, or the a of one layer among those that lie below one another: rows of i values, in panels times `scale`. What `to` has
// beside them is left as it is.
struct PairsFactor {
  const void* rows;
  int64_t stride;  // in values
  Dtype dtype;     // of the rows, float32, bfloat16 or float16
  int64_t n, i;
  float scale;
  PanelMatrix to;  // of float32 or bfloat16
  int64_t first;   // of its outputs that the rows are
};

namespace {

// From numbers: 1, with 2 where the layers share one a and 4 where outputs are scaled; addresses of core and bias, activation,
// addresses of out_scale and out_bias.
inline PairsMiddle middle_at(const int64_t* s) {
  const auto vector = [](int64_t address) { return reinterpret_cast<const float*>(static_cast<uintptr_t>(address)); };
  return {(s[0] & 2) != 0, (s[0] & 4) != 0, vector(s[1]), vector(s[2]), Activation(s[3]), vector(s[4]), vector(s[5])};
}

// Bytes of the factors of one layer's pair.
inline int64_t pair_bytes(Dtype dtype, int64_t out_features, int64_t in_features, int64_t rank) {
  const bool narrow = dtype == Dtype::bfloat16;
  const auto even = [=](int64_t n) { return narrow ? n + n % 2 : n; };
  const PanelMatrix a{even(rank), in_features, even(in_features), dtype, nullptr}, b{out_features, rank, even(rank), dtype, nullptr};
  return (values_of(a) + values_of(b)) * (narrow ? 2 : 4);
}

// Sets how many threads share the rows, and how many rows of a segment one of them takes at once.
inline void share_out(PairsCall& call) {
  constexpr int64_t least_values = 1 << 16;  // of factors, read; fewer are not worth waking a thread
  constexpr int64_t fewest_rows = 6, most_rows_of_a_task = 48;
  int64_t rows = 0, values = 0;
  for (int64_t s = 0; s < call.n_segments; ++s) {
    rows += call.segments[s].stop - call.segments[s].start;
    for (int64_t l = 0; l < call.n_layers; ++l) values += call.segments[s].ranks[l] * (call.in_features + call.out_features[l]);
  }
  call.n_threads = values * (1 + rows / 16) >= least_values ? max_threads() : 1;
  const int64_t share = (rows + 2 * call.n_threads - 1) / (2 * call.n_threads);
  call.rows_at_once = share < fewest_rows ? fewest_rows : share > most_rows_of_a_task ? most_rows_of_a_task : share;
}

}  // namespace

struct PairsKernels {
  int64_t (*scratch_bytes)(const PairsCall& call);
  void (*add)(const PairsCall& call);
  void (*pack)(const PairsFactor* factors, int64_t n);
};

VENEER_KERNELS(PairsKernels, pairs)

}  // namespace veneer
