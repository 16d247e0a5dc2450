#include <nanobind/nanobind.h>

#include "cross_entropy/cross_entropy.h"

namespace nb = nanobind;

namespace veneer {

void bind_cross_entropy(nb::module_& m) {
  m.def(
      "softmax_cross_entropy",
      [](uintptr_t logits, int64_t stride, int64_t n, int64_t v, int dtype, uintptr_t labels, float softcap,
         bool write_grad, uintptr_t losses) {
        cross_entropy_kernels().softmax({reinterpret_cast<void*>(logits), stride, n, v, Dtype(dtype)},
                                        reinterpret_cast<const int64_t*>(labels), softcap, write_grad,
                                        reinterpret_cast<float*>(losses));
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace veneer
