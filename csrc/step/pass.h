// A pass through a program: its rows, registers and pages, and the memory that it takes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/numeric.h"
#include "core/rows.h"
#include "paged_attention/paged_attention.h"

namespace veneer {

// Memory that grows and is kept, so that a step takes no fresh pages from the system.
class Memory {
 public:
  ~Memory();
  char* at_least(int64_t bytes);  // throws bad_alloc

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;
};

// A scratch and rows for each thread, where threads go through parts of a pass by themselves.
class ThreadMemory {
 public:
  struct Own {
    Memory scratch, rows;
  };
  Own& of(size_t thread) {
    while (owned_.size() <= thread) owned_.push_back(std::make_unique<Own>());
    return *owned_[thread];
  }

 private:
  std::vector<std::unique_ptr<Own>> owned_;
};

struct VersionRun {  // rows [start, stop) take a version; all others are the base's
  int64_t version, start, stop;
};

struct TurnTable {  // (n, half): cosines and sines of each row
  const float *cos, *sin;
};

struct Block;

struct Pass {
  int64_t n;
  Dtype dtype;            // of all rows
  const Rows* registers;  // by number
  PagedStore store;
  PagedBatch batch;
  const TurnTable* turns;
  const VersionRun* runs;
  int64_t n_runs;
  const Block* blocks;  // of versions, by number
  const int64_t* ids;     // of tokens, where they are embedded
  const int64_t* picked;  // rows whose likeliest token is asked for
  int64_t n_picked;
  int64_t* tokens;        // takes them; -1 where a logit is not finite
  Memory &scratch, &rows;  // of kernels; of rows that have no register
  ThreadMemory& threads;
  char* windows = nullptr;  // of short convolutions, in pages of their own with the numbers of those in the store
  int64_t window_layers = 0;
  float* states = nullptr;  // of scans, in pages as well
  int64_t state_layers = 0;

  int64_t bytes() const { return dtype == Dtype::float32 ? 4 : 2; }  // of a value
  Rows from_row(const Rows& rows_, int64_t r) const {
    return {static_cast<char*>(rows_.data) + r * rows_.stride * bytes(), rows_.stride};
  }
};

}  // namespace veneer
