#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <vector>

#include "core/workspace.h"
#include "terms/terms.h"

namespace nb = nanobind;

namespace veneer {
namespace {

// Kind, sizes, addresses of the values, of the second factor and of the places, and how many places there are.
FormAt form_at(const std::vector<int64_t>& numbers) {
  const int64_t* n = numbers.data();
  return {TermKind(n[0]), {n[1], n[2], n[3], n[4]}, reinterpret_cast<const float*>(n[5]), reinterpret_cast<const float*>(n[6]),
          reinterpret_cast<const int64_t*>(n[7]), n[8]};
}

void* memory_of(int64_t n) {
  void* found = workspace(n);
  if (found == nullptr) throw std::bad_alloc();
  return found;
}

}  // namespace

void bind_terms(nb::module_& m) {
  m.def(
      "terms_apply",
      [](int kind, const std::vector<int64_t>& sizes, uintptr_t values, uintptr_t index, int64_t n, int dtype, uintptr_t x, int64_t x_stride,
         uintptr_t y, int64_t y_stride, bool add) {
        Term term{TermKind(kind), {}, reinterpret_cast<const float*>(values), reinterpret_cast<const int32_t*>(index)};
        for (size_t i = 0; i < sizes.size() && i < 4; ++i) term.sizes[i] = sizes[i];
        void* scratch = memory_of(terms_kernels().scratch_bytes(term));
        terms_kernels().apply({term, n, Dtype(dtype), rows_at(x, x_stride), rows_at(y, y_stride), add, scratch});
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "terms_make",
      [](const std::vector<int64_t>& sizes, uintptr_t values, int dtype, int64_t depth, uintptr_t weight, uintptr_t panels) {
        const Term term{TermKind::hadamard, {sizes[0], sizes[1], sizes[2], 0}, reinterpret_cast<const float*>(values), nullptr};
        void* scratch = memory_of(terms_kernels().make_bytes(term));
        terms_kernels().make(term, {sizes[0], sizes[1], depth, Dtype(dtype), reinterpret_cast<void*>(weight)},
                             reinterpret_cast<void*>(panels), scratch);
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "terms_map",
      [](const std::vector<int64_t>& form, bool transposed, int64_t n, int dtype, uintptr_t x, int64_t x_stride, uintptr_t y,
         int64_t y_stride, bool add) {
        const FormAt f = form_at(form);
        void* scratch = memory_of(terms_kernels().map_bytes(f));
        terms_kernels().map({f, transposed, n, Dtype(dtype), rows_at(x, x_stride), rows_at(y, y_stride), add, scratch});
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "terms_gradients",
      [](const std::vector<int64_t>& form, int64_t n, int dtype, uintptr_t dy, int64_t dy_stride, uintptr_t x, int64_t x_stride,
         uintptr_t values, uintptr_t second) {
        const FormAt f = form_at(form);
        void* scratch = memory_of(terms_kernels().gradient_bytes(f, n));
        terms_kernels().gradients({f, n, Dtype(dtype), rows_at(dy, dy_stride), rows_at(x, x_stride), reinterpret_cast<float*>(values),
                                   reinterpret_cast<float*>(second), scratch});
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "terms_entries",
      [](const std::vector<int64_t>& form, int dtype, uintptr_t weight, int64_t weight_stride, uintptr_t out) {
        const FormAt f = form_at(form);
        void* scratch = memory_of(terms_kernels().entries_bytes(f));
        terms_kernels().entries({f, Dtype(dtype), rows_at(weight, weight_stride), reinterpret_cast<void*>(out), scratch});
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "terms_entry_gradients",
      [](const std::vector<int64_t>& form, int dtype, uintptr_t weight, int64_t weight_stride, uintptr_t gradient, int64_t gradient_stride,
         uintptr_t values, uintptr_t second) {
        const FormAt f = form_at(form);
        void* scratch = memory_of(terms_kernels().entry_gradient_bytes(f));
        terms_kernels().entry_gradients({f, Dtype(dtype), rows_at(weight, weight_stride), rows_at(gradient, gradient_stride),
                                         reinterpret_cast<float*>(values), reinterpret_cast<float*>(second), scratch});
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace veneer
