#include <nanobind/nanobind.h>

#include "stream/stream.h"

namespace nb = nanobind;

namespace veneer {

void bind_stream(nb::module_& m) {
  m.def(
      "stream_add",
      [](int64_t n, int64_t d, int dtype, float multiplier, uintptr_t half, int64_t half_stride, uintptr_t h, int64_t h_stride) {
        stream_kernels().add({n, d, Dtype(dtype)}, multiplier, rows_at(half, half_stride), rows_at(h, h_stride));
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace veneer
