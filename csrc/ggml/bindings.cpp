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
  const auto matrix = [](uintptr_t blocks, int64_t stride, uintptr_t order, int64_t o, int64_t i) {
    return GgmlMatrix{reinterpret_cast<const uint8_t*>(blocks), stride, reinterpret_cast<const int32_t*>(order), o, i};
  };
  m.def(
      "ggml_decode",
      [matrix](uintptr_t blocks, int64_t stride, uintptr_t order, int64_t o, int64_t i, int kind, int dtype, uintptr_t out) {
        ggml_kernels().decode(matrix(blocks, stride, order, o, i), GgmlKind(kind), Dtype(dtype), reinterpret_cast<void*>(out));
      },
      release());
  m.def(
      "ggml_multiply",
      [matrix](uintptr_t blocks, int64_t stride, uintptr_t order, int64_t o, int64_t i, int kind, uintptr_t x, int64_t rows,
               uintptr_t out) {
        ggml_kernels().multiply(matrix(blocks, stride, order, o, i), GgmlKind(kind), reinterpret_cast<const float*>(x), rows,
                                reinterpret_cast<float*>(out));
      },
      release());
}

}  // namespace veneer
