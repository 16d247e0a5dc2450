// Scan of the gated delta rule over whole sequences, in chunks, and its backward pass. The specification is
// veneer/ops/reference/scan.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"
#include "core/rows.h"

namespace veneer {

struct ScanSizes {
  int64_t k_heads, heads, k_width, v_width;
  const int64_t* bounds;  // of the sequences, one more than there are
  int64_t n_sequences;
  Dtype dtype;  // of values, outputs and their gradients; all else is float

  int64_t group() const { return heads / k_heads; }
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t s = 0; s < n_sequences; ++s) most = bounds[s + 1] - bounds[s] > most ? bounds[s + 1] - bounds[s] : most;
    return most;
  }
};

struct ScanPart {
  Rows rows;
  int64_t apart;  // values from one head to the next
};

struct ScanRows {
  ScanPart q, k, v, log_decay, beta;
};

struct ScanKernels {
  // Bytes of scratch that one thread needs, for the longest sequence.
  int64_t (*scratch_bytes)(const ScanSizes& sizes, bool backward);
  // `scratch` holds that many bytes, aligned to 64, for each of `n_threads`.
  void (*forward)(const ScanSizes& sizes, const ScanRows& given, const ScanPart& y, char* scratch, int n_threads);
  void (*backward)(const ScanSizes& sizes, const ScanRows& given, const ScanPart& dy, const ScanRows& gradients, char* scratch,
                   int n_threads);
};

VENEER_KERNELS(ScanKernels, scan)

}  // namespace veneer
