#include <nanobind/nanobind.h>

#include "int8/int8.h"

namespace nb = nanobind;

namespace veneer {

void bind_int8(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "int8_quantize",
      [](uintptr_t w, int dtype, int64_t o, int64_t i, uintptr_t codes, uintptr_t absmax) {
        int8_kernels().quantize(reinterpret_cast<const void*>(w), Dtype(dtype), o, i, reinterpret_cast<int8_t*>(codes),
                                reinterpret_cast<float*>(absmax));
      },
      release());
  m.def(
      "int8_dequantize",
      [](uintptr_t codes, uintptr_t absmax, int64_t o, int64_t i, int dtype, uintptr_t out) {
        int8_kernels().dequantize(reinterpret_cast<const int8_t*>(codes), reinterpret_cast<const float*>(absmax), o, i,
                                  Dtype(dtype), reinterpret_cast<void*>(out));
      },
      release());
}

}  // namespace veneer
