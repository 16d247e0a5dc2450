#include <nanobind/nanobind.h>

#include <vector>

#include "norm/norm.h"

namespace nb = nanobind;

namespace veneer {
namespace {

NormRows rows_at(uintptr_t x, int64_t stride, int64_t n, int64_t d, int dtype, uintptr_t mean, uintptr_t rstd) {
  return {reinterpret_cast<const void*>(x), stride,       n, d, Dtype(dtype), reinterpret_cast<float*>(mean),
          reinterpret_cast<float*>(rstd)};
}

std::vector<float> widened(uintptr_t values, int dtype, int64_t d, float offset) {
  std::vector<float> wide(values ? d : 0);
  for (size_t c = 0; c < wide.size(); ++c)
    wide[c] = offset + (Dtype(dtype) == Dtype::float32 ? reinterpret_cast<const float*>(values)[c]
                                                       : to_float(reinterpret_cast<const bf16*>(values)[c]));
  return wide;
}

}  // namespace

void bind_norm(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "norm_forward",
      [](uintptr_t x, int64_t stride, int64_t n, int64_t d, int dtype, uintptr_t mean, uintptr_t rstd, uintptr_t weight,
         uintptr_t bias, int weight_dtype, float offset, float eps, uintptr_t y) {
        const std::vector<float> wide = widened(weight, weight_dtype, d, offset);
        const std::vector<float> wide_bias = widened(bias, weight_dtype, d, 0.0f);
        norm_kernels().forward(rows_at(x, stride, n, d, dtype, mean, rstd),
                               {wide.data(), bias ? wide_bias.data() : nullptr}, eps, reinterpret_cast<void*>(y));
      },
      release());
  m.def(
      "norm_backward",
      [](uintptr_t x, int64_t stride, int64_t n, int64_t d, int dtype, uintptr_t mean, uintptr_t rstd, uintptr_t weight,
         int weight_dtype, float offset, uintptr_t dy, int64_t dy_stride, uintptr_t dx) {
        const std::vector<float> wide = widened(weight, weight_dtype, d, offset);
        norm_kernels().backward(rows_at(x, stride, n, d, dtype, mean, rstd), {wide.data(), nullptr},
                                reinterpret_cast<const void*>(dy), dy_stride, reinterpret_cast<void*>(dx));
      },
      release());
  m.def(
      "norm_weight_grad",
      [](uintptr_t x, int64_t stride, int64_t n, int64_t d, int dtype, uintptr_t mean, uintptr_t rstd, uintptr_t dy,
         int64_t dy_stride, uintptr_t dweight, uintptr_t dbias) {
        norm_kernels().weight_grad(rows_at(x, stride, n, d, dtype, mean, rstd), reinterpret_cast<const void*>(dy),
                                   dy_stride, reinterpret_cast<float*>(dweight), reinterpret_cast<float*>(dbias));
      },
      release());
}

}  // namespace veneer
