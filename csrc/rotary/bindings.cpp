#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include "rotary/rotary.h"

namespace nb = nanobind;

namespace veneer {
namespace {

using Strides = std::tuple<int64_t, int64_t, int64_t>;

RotaryView view_at(uintptr_t data, const Strides& strides) {
  return {reinterpret_cast<void*>(data), std::get<0>(strides), std::get<1>(strides), std::get<2>(strides)};
}

}  // namespace

void bind_rotary(nb::module_& m) {
  m.def(
      "rotary_rotate",
      [](uintptr_t x, Strides x_strides, uintptr_t out, Strides out_strides, int64_t batch, int64_t heads, int64_t t,
         int64_t d, uintptr_t cos, uintptr_t sin, int64_t table_stride, int64_t half, int dtype, bool interleaved) {
        const RotaryTables tables{reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin),
                                  table_stride, half};
        rotary_kernels().rotate({batch, heads, t, d}, view_at(x, x_strides), view_at(out, out_strides), tables,
                                Dtype(dtype), interleaved);
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace veneer
