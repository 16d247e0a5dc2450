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

// coding 0 is none; see veneer.ops.packed_codes.
PanelMatrix coded_at(int dtype, int64_t o, int64_t i, int64_t depth, uintptr_t panels, int coding, int64_t unit) {
  return {o, i, depth, Dtype(dtype), reinterpret_cast<void*>(panels), Coding(coding), unit};
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
      "packed_pack_codes",
      [](int64_t o, int64_t i, int64_t depth, uintptr_t panels, int coding, int64_t unit, uintptr_t codes, uintptr_t absmax,
         int64_t block_size) {
        packed_kernels().pack_codes(coded_at(0, o, i, depth, panels, coding, unit), reinterpret_cast<const void*>(codes),
                                    reinterpret_cast<const float*>(absmax), block_size);
      },
      release());
  m.def(
      "packed_unpack_codes",
      [](int64_t o, int64_t i, int64_t depth, uintptr_t panels, int coding, int64_t unit, uintptr_t codes) {
        packed_kernels().unpack_codes(coded_at(0, o, i, depth, panels, coding, unit), reinterpret_cast<void*>(codes));
      },
      release());
  m.def(
      "packed_dequantize",
      [](int dtype, int64_t o, int64_t i, int64_t depth, uintptr_t panels, int coding, int64_t unit, uintptr_t rows) {
        packed_kernels().dequantize(coded_at(dtype, o, i, depth, panels, coding, unit), reinterpret_cast<void*>(rows));
      },
      release());
  m.def(
      "packed_matmul",
      [](int dtype, int64_t o, int64_t i, int64_t depth, uintptr_t panels, int coding, int64_t unit, int64_t n, uintptr_t x, int64_t x_stride, int x_dtype,
         uintptr_t out, int64_t out_stride, int out_dtype, uintptr_t onto, int64_t onto_stride) {
        PackedProduct product{coded_at(dtype, o, i, depth, panels, coding, unit), n,
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
