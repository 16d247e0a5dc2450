#include <nanobind/nanobind.h>

#include "glu/glu.h"

namespace nb = nanobind;

namespace veneer {
void bind_glu(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "glu_forward",
      [](int64_t n, int64_t d, int dtype, int activation, uintptr_t gate, int64_t gate_stride, uintptr_t up,
         int64_t up_stride, uintptr_t h, int64_t h_stride) {
        glu_kernels().forward({n, d, Dtype(dtype), Activation(activation)}, rows_at(gate, gate_stride),
                              rows_at(up, up_stride), rows_at(h, h_stride));
      },
      release());
  m.def(
      "glu_backward",
      [](int64_t n, int64_t d, int dtype, int activation, uintptr_t dh, int64_t dh_stride, uintptr_t gate,
         int64_t gate_stride, uintptr_t up, int64_t up_stride, uintptr_t dgate, int64_t dgate_stride, uintptr_t dup,
         int64_t dup_stride, uintptr_t h, int64_t h_stride) {
        glu_kernels().backward({n, d, Dtype(dtype), Activation(activation)}, rows_at(dh, dh_stride),
                               rows_at(gate, gate_stride), rows_at(up, up_stride), rows_at(dgate, dgate_stride),
                               rows_at(dup, dup_stride), rows_at(h, h_stride));
      },
      release());
  m.def(
      "glu_clamped_forward",
      [](int64_t n, int64_t d, int dtype, uintptr_t inner, int64_t inner_stride, uintptr_t h, int64_t h_stride) {
        glu_kernels().clamped_forward({n, d, Dtype(dtype), Activation::swiglu_oai}, rows_at(inner, inner_stride), rows_at(h, h_stride));
      },
      release());
  m.def(
      "glu_clamped_backward",
      [](int64_t n, int64_t d, int dtype, uintptr_t dh, int64_t dh_stride, uintptr_t inner, int64_t inner_stride, uintptr_t dinner,
         int64_t dinner_stride, uintptr_t h, int64_t h_stride) {
        glu_kernels().clamped_backward({n, d, Dtype(dtype), Activation::swiglu_oai}, rows_at(dh, dh_stride), rows_at(inner, inner_stride),
                                       rows_at(dinner, dinner_stride), rows_at(h, h_stride));
      },
      release());
}

}  // namespace veneer
