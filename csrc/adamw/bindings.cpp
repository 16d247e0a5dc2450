#include <nanobind/nanobind.h>

#include <cmath>

#include "adamw/adamw.h"

namespace nb = nanobind;

namespace veneer {
namespace {

AdamWMoment moment(uintptr_t codes, uintptr_t absmax, uintptr_t table, uintptr_t bins, uintptr_t lines) {
  return {reinterpret_cast<uint8_t*>(codes), reinterpret_cast<float*>(absmax), reinterpret_cast<const float*>(table),
          reinterpret_cast<const int32_t*>(bins), reinterpret_cast<const CodeLines*>(lines)};
}

AdamWStep hyper(double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step) {
  const double n = static_cast<double>(step);
  const double correction1 = 1 - std::pow(beta1, n), correction2 = 1 - std::pow(beta2, n);
  return {float(beta1), float(1 - beta1), float(beta2), float(1 - beta2), float(1 / std::sqrt(correction2)),
          float(eps),   float(1 - lr * weight_decay), float(lr / correction1)};
}

}  // namespace

void bind_adamw(nb::module_& m) {
  m.def(
      "adamw_8bit",
      [](uintptr_t param, int param_dtype, uintptr_t grad, int grad_dtype, int64_t n, uintptr_t codes1, uintptr_t absmax1,
         uintptr_t table1, uintptr_t bins1, uintptr_t lines1, uintptr_t codes2, uintptr_t absmax2, uintptr_t table2,
         uintptr_t bins2, uintptr_t lines2,
         double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step) {
        return adamw_kernels().step(
            {reinterpret_cast<void*>(param), reinterpret_cast<const void*>(grad), Dtype(param_dtype), Dtype(grad_dtype), n,
             moment(codes1, absmax1, table1, bins1, lines1), moment(codes2, absmax2, table2, bins2, lines2)},
            hyper(lr, beta1, beta2, eps, weight_decay, step));
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace veneer
