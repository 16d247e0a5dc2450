#include <nanobind/nanobind.h>

#include "ggml/ggml.h"

namespace nb = nanobind;

namespace veneer {

void bind_ggml(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "ggml_quantize",
      [](uintptr_t data, int dtype, int64_t rows, int64_t columns, uintptr_t importance, uintptr_t scratch, int kind,
         uintptr_t out) {
        const GgmlRows given{reinterpret_cast<const void*>(data), Dtype(dtype), rows, columns,
                             reinterpret_cast<const float*>(importance), reinterpret_cast<float*>(scratch)};
        return ggml_kernels().quantize(given, GgmlKind(kind), reinterpret_cast<uint8_t*>(out));
      },
      release());
}

}  // namespace veneer
