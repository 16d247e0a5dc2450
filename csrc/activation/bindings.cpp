#include <nanobind/nanobind.h>

#include "activation/activation.h"

namespace nb = nanobind;

namespace veneer {
void bind_activation(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "activation_forward",
      [](int64_t n, int64_t d, int dtype, int kind, uintptr_t x, int64_t x_stride, uintptr_t y, int64_t y_stride) {
        activation_kernels().forward({n, d, Dtype(dtype), Activation(kind)}, rows_at(x, x_stride), rows_at(y, y_stride));
      },
      release());
  m.def(
      "activation_backward",
      [](int64_t n, int64_t d, int dtype, int kind, uintptr_t dy, int64_t dy_stride, uintptr_t x, int64_t x_stride,
         uintptr_t dx, int64_t dx_stride) {
        activation_kernels().backward({n, d, Dtype(dtype), Activation(kind)}, rows_at(dy, dy_stride), rows_at(x, x_stride),
                                      rows_at(dx, dx_stride));
      },
      release());
}

}  // namespace veneer
