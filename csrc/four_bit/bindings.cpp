#include <nanobind/nanobind.h>

#include <new>

#include "core/workspace.h"
#include "four_bit/four_bit.h"

namespace nb = nanobind;

namespace veneer {
namespace {

FourBitCode make_code(const float (&table)[16], const uint8_t (&ranked)[16]) {
  FourBitCode code{};
  for (int i = 0; i < 16; ++i) {
    code.table[i] = table[i];
    code.ranked[i] = ranked[i];
  }
  for (int i = 0; i < 15; ++i) code.midpoints[i] = (table[ranked[i]] + table[ranked[i + 1]]) / 2.0f;
  return code;
}

constexpr float nf4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                           -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                           0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                           0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
constexpr float fp4[16] = {0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12,
                           -0.0f, -0.0625f / 12, -8.0f / 12, -1.0f, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12};

FourBitMatrix matrix(uintptr_t packed, uintptr_t absmax, int64_t block_size, int quant_type, int64_t o, int64_t i) {
  int shift = 0;
  while (int64_t{1} << shift < block_size) ++shift;
  return {reinterpret_cast<const uint8_t*>(packed), reinterpret_cast<const float*>(absmax), &four_bit_code(quant_type),
          shift, o, i};
}

bool is_few(int64_t rows, int64_t i, int64_t block_size, bool transposed) {
  // From three rows on tiles are faster; without them, decoding W whole for torch pays only with many rows.
  const int64_t most = four_bit_kernels().multiply != nullptr ? 2 : 24;
  return four_bit_kernels().multiply_few != nullptr && !transposed && rows > 0 && rows <= most && i % 64 == 0 && block_size >= 64;
}

}  // namespace

const FourBitCode& four_bit_code(int quant_type) {
  static const FourBitCode codes[2] = {
      make_code(nf4, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}),
      // The two zeros (codes 0 and 8) are neighbours, the positive one first.
      make_code(fp4, {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3}),
  };
  return codes[quant_type];
}

void bind_four_bit(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "four_bit_quantize",
      [](uintptr_t x, int dtype, int64_t n, int64_t block_size, int quant_type, uintptr_t packed, uintptr_t absmax) {
        four_bit_kernels().quantize(reinterpret_cast<const void*>(x), Dtype(dtype), n, block_size,
                                    four_bit_code(quant_type), reinterpret_cast<uint8_t*>(packed),
                                    reinterpret_cast<float*>(absmax));
      },
      release());
  m.def(
      "four_bit_dequantize",
      [](uintptr_t packed, uintptr_t absmax, int64_t n, int64_t block_size, int quant_type, int dtype, uintptr_t out) {
        four_bit_kernels().dequantize(reinterpret_cast<const uint8_t*>(packed), reinterpret_cast<const float*>(absmax),
                                      n, block_size, four_bit_code(quant_type), Dtype(dtype),
                                      reinterpret_cast<void*>(out));
      },
      release());
  m.def("four_bit_has_product", [](int64_t rows, int64_t i, int64_t block_size, bool transposed) {
    return four_bit_kernels().multiply != nullptr || is_few(rows, i, block_size, transposed);
  });
  m.def(
      "four_bit_multiply",
      [](uintptr_t packed, uintptr_t absmax, int64_t block_size, int quant_type, int64_t o, int64_t i, uintptr_t x,
         int64_t rows, bool transposed, uintptr_t out) {
        const FourBitMatrix w = matrix(packed, absmax, block_size, quant_type, o, i);
        if (is_few(rows, i, block_size, transposed)) {
          void* split = workspace(rows * i * 2);
          if (split == nullptr) throw std::bad_alloc();
          return four_bit_kernels().multiply_few(w, reinterpret_cast<const bf16*>(x), rows, reinterpret_cast<bf16*>(out), split);
        }
        void* scratch = workspace(four_bit_kernels().product_scratch(w, rows, transposed));
        if (scratch == nullptr) throw std::bad_alloc();
        four_bit_kernels().multiply(w, reinterpret_cast<const bf16*>(x), rows, transposed, reinterpret_cast<bf16*>(out),
                                    scratch);
      },
      release());
}

}  // namespace veneer
