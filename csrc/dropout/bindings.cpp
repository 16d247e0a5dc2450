#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include "dropout/dropout.h"

namespace nb = nanobind;

namespace veneer {
namespace {

using Mask = std::tuple<uint64_t, uint32_t, uintptr_t, int64_t>;

DropoutMask mask_of(const Mask& m) {
  return {std::get<0>(m), std::get<1>(m), reinterpret_cast<const int64_t*>(std::get<2>(m)), std::get<3>(m)};
}

}  // namespace

void bind_dropout(nb::module_& m) {
  m.def(
      "dropout_drop",
      [](int64_t n, int64_t d, int dtype, Mask mask, uintptr_t x, int64_t x_stride, uintptr_t y, int64_t y_stride) {
        dropout_kernels().drop({n, d, Dtype(dtype)}, mask_of(mask), rows_at(x, x_stride), rows_at(y, y_stride));
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace veneer
