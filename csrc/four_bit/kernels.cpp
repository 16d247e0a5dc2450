#include "core/parallel.h"
#include "four_bit/codec.h"
#include "four_bit/few.h"
#include "four_bit/product.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t grain_values = 1 << 15;  // less than this is not worth waking a thread

int64_t grain_blocks(int64_t block_size) { return (grain_values + block_size - 1) / block_size; }

constexpr float smallest_absmax = 1e-38f;  // keeps the reciprocal finite

// The last block, where it is short, divides and keeps at least smallest_absmax; the others multiply by the reciprocal.
template <class T>
void quantize_short(const T* x, int64_t n, const FourBitCode& code, uint8_t* packed, float* absmax) {
  const float most = bit_cast<float>(max_magnitude(x, n));
  const float scale = most < smallest_absmax ? smallest_absmax : most;
  *absmax = scale;
  for (int64_t i = 0; i < n; i += 2) {
    const float pair[2] = {to_float(x[i]) / scale, i + 1 < n ? to_float(x[i + 1]) / scale : 0.0f};
    quantize_scalar(pair, 2, 1.0f, code, packed + i / 2);
  }
}

template <class T>
void quantize_typed(const T* x, int64_t n, int64_t block_size, const FourBitCode& code, uint8_t* packed, float* absmax) {
  const int64_t full = n / block_size;
  parallel_for(full, grain_blocks(block_size), [=, &code](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const T* block = x + b * block_size;
      const float most = bit_cast<float>(max_magnitude(block, block_size));
      absmax[b] = most;
      const float factor = 1.0f / (most < smallest_absmax ? smallest_absmax : most);
      quantize_run(block, block_size, factor, code, packed + b * block_size / 2);
    }
  });
  const int64_t done = full * block_size;
  if (done < n) quantize_short(x + done, n - done, code, packed + done / 2, absmax + full);
}

void quantize(const void* x, Dtype dtype, int64_t n, int64_t block_size, const FourBitCode& code, uint8_t* packed,
              float* absmax) {
  switch (dtype) {
    case Dtype::float32: return quantize_typed(static_cast<const float*>(x), n, block_size, code, packed, absmax);
    case Dtype::bfloat16: return quantize_typed(static_cast<const bf16*>(x), n, block_size, code, packed, absmax);
    case Dtype::float16: return quantize_typed(static_cast<const fp16*>(x), n, block_size, code, packed, absmax);
  }
}

template <class T>
void dequantize_typed(const uint8_t* packed, const float* absmax, int64_t n, int64_t block_size,
                      const FourBitCode& code, T* out) {
  const int64_t full = n / block_size;
  parallel_for(full, grain_blocks(block_size), [=, &code](int64_t begin, int64_t end) {
    const int64_t first = begin * block_size;
    dequantize_blocks(packed + first / 2, absmax + begin, end - begin, block_size, code, out + first);
  });
  const int64_t done = full * block_size;
  if (done < n) dequantize_run(packed + done / 2, n - done, block_table<T>(code, absmax[full]), out + done);
}

void dequantize(const uint8_t* packed, const float* absmax, int64_t n, int64_t block_size, const FourBitCode& code,
                Dtype dtype, void* out) {
  switch (dtype) {
    case Dtype::float32: return dequantize_typed(packed, absmax, n, block_size, code, static_cast<float*>(out));
    case Dtype::bfloat16: return dequantize_typed(packed, absmax, n, block_size, code, static_cast<bf16*>(out));
    case Dtype::float16: return dequantize_typed(packed, absmax, n, block_size, code, static_cast<fp16*>(out));
  }
}

#if defined(__AMX_BF16__)
void product(const FourBitMatrix& w, const bf16* x, int64_t rows, bool transposed, bf16* out, void* scratch) {
  const uint16_t* from = reinterpret_cast<const uint16_t*>(x);
  uint16_t *to = reinterpret_cast<uint16_t*>(out), *tiles = static_cast<uint16_t*>(scratch);
  transposed ? multiply_transposed(w, from, rows, to, tiles) : multiply(w, from, rows, to, tiles);
}

int64_t scratch_size(const FourBitMatrix& w, int64_t rows, bool transposed) {
  const int64_t values = transposed ? w.o : w.i, at_once = rows_at_once(values);
  const int64_t x_rows = round_up(rows < at_once ? rows : at_once, 32);
  return (x_rows + 32 * max_threads()) * round_up(values, tile_depth) * 2;
}
#else
constexpr decltype(FourBitKernels::multiply) product = nullptr;
constexpr decltype(FourBitKernels::product_scratch) scratch_size = nullptr;
#endif

#if defined(__AVX512BF16__)
constexpr decltype(FourBitKernels::multiply_few) few = multiply_few;
#else
constexpr decltype(FourBitKernels::multiply_few) few = nullptr;
#endif

}  // namespace

const FourBitKernels four_bit = {quantize, dequantize, product, scratch_size, few};

}  // namespace VENEER_ISA
}  // namespace veneer
