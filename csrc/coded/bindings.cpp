#include <nanobind/nanobind.h>

#include "coded/coded.h"

namespace nb = nanobind;

namespace veneer {

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct Rows {
  uintptr_t order;
  int64_t first, o, i;
};

ScaledMatrix scaled(Rows rows, uintptr_t codes, int64_t stride, int64_t bits, int numbers, uintptr_t scales, int scales_stored,
                    uintptr_t zeros, int zeros_stored, float zero, uintptr_t overall, bool divides, int64_t height,
                    int64_t group, int rounding) {
  return {at<const uint8_t>(codes), stride, bits, Numbers(numbers), at<const void>(scales), Stored(scales_stored),
          at<const void>(zeros), Stored(zeros_stored), zero, at<const float>(overall), divides, height, group,
          (rows.i + group - 1) / group, Dtype(rounding), at<const int32_t>(rows.order), rows.first, rows.o, rows.i};
}

// out, o and i; what the kernel reads besides; then the matrix as `scaled` takes it.
template <class... Matrix>
void decode(uintptr_t out, int64_t o, int64_t i, int64_t first, uintptr_t order, Matrix... w) {
  coded_kernels().decode_scaled(scaled({order, first, o, i}, w...), at<float>(out));
}
template <class... Matrix>
void multiply(uintptr_t out, int64_t o, int64_t i, uintptr_t x, int64_t rows, Matrix... w) {
  coded_kernels().multiply_scaled(scaled({0, 0, o, i}, w...), at<const float>(x), rows, at<float>(out));
}
template <class... Matrix>
void bind(nb::module_& m, ScaledMatrix (*)(Rows, Matrix...)) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def("scaled_decode", decode<Matrix...>, release());
  m.def("scaled_multiply", multiply<Matrix...>, release());
}

}  // namespace

void bind_coded(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  const auto blocks = [](uintptr_t blocks, int64_t stride, uintptr_t order, int64_t o, int64_t i, int kind) {
    return GgmlMatrix{at<const uint8_t>(blocks), stride, at<const int32_t>(order), o, i, GgmlKind(kind)};
  };
  m.def(
      "ggml_decode",
      [blocks](uintptr_t data, int64_t stride, uintptr_t order, int64_t o, int64_t i, int kind, uintptr_t out) {
        coded_kernels().decode_ggml(blocks(data, stride, order, o, i, kind), at<float>(out));
      },
      release());
  m.def(
      "ggml_multiply",
      [blocks](uintptr_t data, int64_t stride, uintptr_t order, int64_t o, int64_t i, int kind, uintptr_t x, int64_t rows,
               uintptr_t out) {
        coded_kernels().multiply_ggml(blocks(data, stride, order, o, i, kind), at<const float>(x), rows, at<float>(out));
      },
      release());
  bind(m, scaled);
}

}  // namespace veneer
