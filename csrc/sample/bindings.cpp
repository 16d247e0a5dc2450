#include <nanobind/nanobind.h>

#include "sample/sample.h"

namespace nb = nanobind;

namespace veneer {

void bind_sample(nb::module_& m) {
  m.def(
      "sample_likeliest",
      [](int64_t n, int64_t d, int dtype, uintptr_t logits, int64_t stride, uintptr_t values, uintptr_t columns) {
        sample_kernels().likeliest({n, d, 0, Dtype(dtype), rows_at(logits, stride), 1.0f},
                                   {reinterpret_cast<float*>(values), reinterpret_cast<int64_t*>(columns)});
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace veneer
