#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <vector>

#include "core/workspace.h"
#include "terms/terms.h"

namespace nb = nanobind;

namespace veneer {

void bind_terms(nb::module_& m) {
  m.def(
      "terms_apply",
      [](int kind, const std::vector<int64_t>& sizes, uintptr_t values, uintptr_t index, int64_t n, int dtype, uintptr_t x, int64_t x_stride,
         uintptr_t y, int64_t y_stride, bool add) {
        Term term{TermKind(kind), {}, reinterpret_cast<const float*>(values), reinterpret_cast<const int32_t*>(index)};
        for (size_t i = 0; i < sizes.size() && i < 4; ++i) term.sizes[i] = sizes[i];
        void* scratch = workspace(terms_kernels().scratch_bytes(term));
        if (scratch == nullptr) throw std::bad_alloc();
        terms_kernels().apply({term, n, Dtype(dtype), rows_at(x, x_stride), rows_at(y, y_stride), add, scratch});
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "terms_make",
      [](const std::vector<int64_t>& sizes, uintptr_t values, int dtype, int64_t depth, uintptr_t weight, uintptr_t panels) {
        const Term term{TermKind::hadamard, {sizes[0], sizes[1], sizes[2], 0}, reinterpret_cast<const float*>(values), nullptr};
        terms_kernels().make(term, {sizes[0], sizes[1], depth, Dtype(dtype), reinterpret_cast<void*>(weight)}, reinterpret_cast<void*>(panels));
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace veneer
