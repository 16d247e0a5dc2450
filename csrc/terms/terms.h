// Terms of a record other than pairs and scales: linear maps of rows, computed in float. Packed ones map rows that are served,
// each by itself; forms map the many rows of a training step, and have gradients. The specification is
// veneer/ops/reference/terms.py.
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

// Numbers of a `records.terms.form.Form`, all contiguous: of a map with blocks, a sparse one, a Kronecker product, or factors
// that multiply a weight. Places of a sparse matrix may come in any order, each once.
struct FormAt {
  TermKind kind;
  int64_t sizes[4];
  const float *values, *second;
  const int64_t* places;
  int64_t n_places;
};

// y = M x, or y += M x, n rows, with M or its transpose. y may be x where there are blocks, and else not.
struct MapCall {
  const FormAt& form;
  bool transposed;
  int64_t n;
  Dtype dtype;
  Rows x, y;
  bool add;
  void* scratch;
};

// Gradients in the form's numbers, of y = M x, from that in y.
struct MapGradients {
  const FormAt& form;
  int64_t n;
  Dtype dtype;
  Rows dy, x;
  float *values, *second;
  void* scratch;
};

// Of a form that multiplies a weight entry by entry: ``W ⊙ (B A)`` row by row without gaps, computed in float and rounded once.
struct EntriesCall {
  const FormAt& form;
  Dtype dtype;
  Rows weight;
  void *out, *scratch;
};

// Gradients in A (`values`) and B (`second`), from that in `EntriesCall`'s result.
struct EntryGradients {
  const FormAt& form;
  Dtype dtype;
  Rows weight, gradient;
  float *values, *second;
  void* scratch;
};

struct TermKernels {
  int64_t (*scratch_bytes)(const Term& term);
  void (*apply)(const TermCall& call);
  // Panels of ``W ⊙ (B A)`` for a hadamard term, from those of a weight in float32 or bfloat16 that is not in codes. Beside
  // bfloat16 the factors are rounded to it, and their products summed in float.
  int64_t (*make_bytes)(const Term& term);
  void (*make)(const Term& term, const PanelMatrix& weight, void* panels, void* scratch);
  int64_t (*map_bytes)(const FormAt& form);
  void (*map)(const MapCall& call);
  int64_t (*gradient_bytes)(const FormAt& form, int64_t n);
  void (*gradients)(const MapGradients& call);
  int64_t (*entries_bytes)(const FormAt& form);
  void (*entries)(const EntriesCall& call);
  int64_t (*entry_gradient_bytes)(const FormAt& form);
  void (*entry_gradients)(const EntryGradients& call);
};

VENEER_KERNELS(TermKernels, terms)

}  // namespace veneer
