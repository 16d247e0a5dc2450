#include <nanobind/nanobind.h>

#include "blockwise/blockwise.h"

namespace nb = nanobind;

namespace veneer {

void bind_blockwise(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "blockwise_quantize",
      [](uintptr_t x, int dtype, int64_t n, int64_t block_size, uintptr_t code, uintptr_t codes, uintptr_t absmax) {
        blockwise_kernels().quantize(reinterpret_cast<const void*>(x), Dtype(dtype), n, block_size,
                                     reinterpret_cast<const float*>(code), reinterpret_cast<uint8_t*>(codes),
                                     reinterpret_cast<float*>(absmax));
      },
      release());
  m.def(
      "blockwise_dequantize",
      [](uintptr_t codes, uintptr_t absmax, int64_t n, int64_t block_size, uintptr_t code, int dtype, uintptr_t out) {
        blockwise_kernels().dequantize(reinterpret_cast<const uint8_t*>(codes), reinterpret_cast<const float*>(absmax), n,
                                       block_size, reinterpret_cast<const float*>(code), Dtype(dtype),
                                       reinterpret_cast<void*>(out));
      },
      release());
}

}  // namespace veneer
