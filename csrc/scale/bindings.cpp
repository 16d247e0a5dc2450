#include <nanobind/nanobind.h>

#include "scale/scale.h"

namespace nb = nanobind;

namespace veneer {
namespace {

float* floats(uintptr_t data) { return reinterpret_cast<float*>(data); }

}  // namespace

void bind_scale(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "scale_forward",
      [](int64_t n, int64_t d, int dtype, uintptr_t z, int64_t z_stride, uintptr_t scale, uintptr_t bias, uintptr_t y,
         int64_t y_stride) {
        scale_kernels().forward({n, d, Dtype(dtype)}, rows_at(z, z_stride), floats(scale), floats(bias),
                                rows_at(y, y_stride));
      },
      release());
  m.def(
      "scale_backward",
      [](int64_t n, int64_t d, int dtype, uintptr_t dy, int64_t dy_stride, uintptr_t z, int64_t z_stride,
         uintptr_t scale, uintptr_t dz, int64_t dz_stride, uintptr_t dscale, uintptr_t dbias) {
        scale_kernels().backward({n, d, Dtype(dtype)}, rows_at(dy, dy_stride), rows_at(z, z_stride), floats(scale),
                                 rows_at(dz, dz_stride), floats(dscale), floats(dbias));
      },
      release());
}

}  // namespace veneer
