#include <nanobind/nanobind.h>

#include <new>

#include "core/workspace.h"
#include "packed/packed.h"

namespace nb = nanobind;

namespace veneer {
namespace {

PanelMatrix matrix_at(int dtype, int64_t o, int64_t i, int64_t depth, uintptr_t panels) {
  return {o, i, depth, Dtype(dtype), reinterpret_cast<void*>(panels)};
}

}  // namespace

void bind_packed(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "packed_pack",
      [](int dtype, int64_t o, int64_t i, int64_t depth, uintptr_t rows, int64_t stride, uintptr_t panels) {
        packed_kernels().pack(matrix_at(dtype, o, i, depth, panels), reinterpret_cast<const void*>(rows), stride);
      },
      release());
  m.def(
      "packed_unpack",
      [](int dtype, int64_t o, int64_t i, int64_t depth, uintptr_t panels, uintptr_t rows) {
        packed_kernels().unpack(matrix_at(dtype, o, i, depth, panels), reinterpret_cast<void*>(rows));
      },
      release());
  m.def(
      "packed_matmul",
      [](int dtype, int64_t o, int64_t i, int64_t depth, uintptr_t panels, int64_t n, uintptr_t x, int64_t x_stride, int x_dtype,
         uintptr_t out, int64_t out_stride, int out_dtype, uintptr_t onto, int64_t onto_stride) {
        PackedProduct product{matrix_at(dtype, o, i, depth, panels), n,
                              {reinterpret_cast<void*>(x), x_stride, Dtype(x_dtype)},
                              {reinterpret_cast<void*>(out), out_stride, Dtype(out_dtype)},
                              {reinterpret_cast<void*>(onto), onto_stride, Dtype(out_dtype)}, nullptr};
        product.scratch = workspace(packed_kernels().scratch_bytes(product));
        if (product.scratch == nullptr) throw std::bad_alloc();
        packed_kernels().matmul(product);
      },
      release());
}

}  // namespace veneer
