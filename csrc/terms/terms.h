// Terms of a record other than pairs and scales, for rows that are served: a linear map of each row by itself, computed in
// float. The specification is veneer/ops/reference/terms.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/numeric.h"
#include "core/panel_layout.h"
#include "core/rows.h"

namespace veneer {

enum class TermKind : int { blocks = 0, sparse = 1, kronecker = 2, circulant = 3, hadamard = 4 };

// Sizes, and the floats of each kind. Rows of values are padded to multiples of 16.
//   blocks     k, b            (k, b, b+): transposed blocks on the diagonal
//   sparse     o, i            (n); index: o + 1 starts, then n columns
//   kronecker  o1, i1, o2, i2  (o1, i1), padded as a whole, then (i2, o2+): the second factor transposed
//   circulant  m, n, b         (m, n, 2 b+ + 16): at s the kernel's value at -s, both counted mod b
//   hadamard   o, i, r         (r, i padded to 32), then (o / 16, r, 16): the factors of what the frozen weight is multiplied by
struct Term {
  TermKind kind;
  int64_t sizes[4];
  const float* values;
  const int32_t* index;
};

// y = term(x), or y += term(x), n rows. y may be x where the term has blocks, and else not.
struct TermCall {
  const Term& term;
  int64_t n;
  Dtype dtype;
  Rows x, y;
  bool add;
  void* scratch;
};

struct TermKernels {
  int64_t (*scratch_bytes)(const Term& term);
  void (*apply)(const TermCall& call);
  // Panels of ``W ⊙ (B A)`` for a hadamard term, from those of a weight in float32 or bfloat16 that is not in codes.
  void (*make)(const Term& term, const PanelMatrix& weight, void* panels);
};

VENEER_KERNELS(TermKernels, terms)

}  // namespace veneer
