// Low-rank products where rows have pairs of their own. The specification is veneer/ops/reference/grouped_low_rank.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"

namespace veneer {

constexpr int64_t low_rank_block = 64;          // rows of one adapter that are worked on at a time
constexpr int64_t low_rank_tile = 64;           // columns of an output at a time: their sums stay in the first-level cache
constexpr int64_t low_rank_outer_columns = 128; // columns of a factor's gradient at a time

struct LowRankUnits {  // what sizes are padded to, and the bytes of an element, in the products of one element type
  int64_t rows, columns, depth, element;
};

struct RowsView {  // (n, features), the last axis contiguous
  char* data;
  int64_t stride;  // in values
};

// The pair of one adapter on one layer: a (rank, i), b (o, rank), both contiguous. rank 0: it has none there.
struct LowRankPair {
  const void *a, *b;
  float *da, *db;
  int64_t rank;
  float scale;
  int64_t first;          // its first column among those of the adapter
  char* packed;     // forward: scale * bᵀ, backward: scale * b
  uint64_t key;     // of the mask of x in front of a; see csrc/core/philox.h
  uint32_t threshold;  // 0: there is none
  const int64_t* ids;  // of the mask's rows
};

struct LowRankAdapter {
  int64_t first_block, n_blocks;
  int64_t columns;  // the ranks of all layers, each padded to units.depth
  char* joined;     // packed: forward aᵀ of all layers side by side, backward a of all below one another
  char *u_t, *du_t; // backward: (columns, n_blocks * low_rank_block), and what a unit of rows reads past it
  bool masked;      // on one layer at least
};

struct LowRankBlock {
  int64_t adapter, n_rows;
  const int64_t* rows;
  bool together;  // its rows follow each other
};

struct LowRankOuter {  // some columns of the gradient in a, of one layer or (-1) of all whose x is the same, or in b
  int64_t adapter, layer, column;
  bool of_a;
};

struct LowRankCall {
  Dtype dtype, factor_dtype, y_dtype;
  int64_t in_features, n_layers, n_adapters, n_blocks, n_outers;
  const int64_t* out_features;
  LowRankPair* pairs;  // (layers, adapters)
  LowRankAdapter* adapters;
  const LowRankBlock* blocks;
  const LowRankOuter* outers;
  RowsView x;
  const RowsView* ys;  // forward: added to; backward: the gradients in them, of x's dtype
  RowsView dx;         // data null: not wanted
  char* u;             // (blocks * low_rank_block, u_columns) elements
  int64_t u_columns;
  char* scratch;       // thread_bytes for each thread
  int64_t thread_bytes;
  int n_threads;
};


struct GroupedLowRankKernels {
  LowRankUnits (*units)(Dtype dtype);
  void (*forward)(const LowRankCall& call);
  void (*backward)(const LowRankCall& call);
};

VENEER_KERNELS(GroupedLowRankKernels, grouped_low_rank)

}  // namespace veneer
