#include "int8/int8.h"

#include "core/parallel.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr float inverse_127 = 7.874015718698502e-3f;
constexpr float round_to_even = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction below 2^22

int64_t grain_rows(int64_t i) { return ((1 << 15) + i) / (i + 1); }

template <class T>
void quantize_typed(const T* w, int64_t o, int64_t i, int8_t* codes, float* absmax) {
  parallel_for(o, grain_rows(i), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = w + r * i;
      int8_t* out = codes + r * i;
      int32_t most = 0;  // magnitudes sort like integers, NaN above all
#pragma omp simd reduction(max : most)
      for (int64_t c = 0; c < i; ++c) {
        const int32_t m = bit_cast<int32_t>(to_float(row[c])) & 0x7fffffff;
        most = m > most ? m : most;
      }
      const float scale = bit_cast<float>(most);
      absmax[r] = scale;
      // Two roundings, as torch divides a number by a tensor. A row that is not finite is refused by the caller; its codes
      // must only not be undefined behaviour.
      const float factor = most > 0 && most < 0x7f800000 ? 1.0f / scale * 127.0f : 0.0f;
#pragma omp simd
      for (int64_t c = 0; c < i; ++c) {
        const float scaled = to_float(row[c]) * factor;
        out[c] = static_cast<int8_t>(bit_cast<int32_t>(scaled + round_to_even) & 0xff);
      }
    }
  });
}

void quantize(const void* w, Dtype dtype, int64_t o, int64_t i, int8_t* codes, float* absmax) {
  switch (dtype) {
    case Dtype::float32: return quantize_typed(static_cast<const float*>(w), o, i, codes, absmax);
    case Dtype::bfloat16: return quantize_typed(static_cast<const bf16*>(w), o, i, codes, absmax);
    case Dtype::float16: return quantize_typed(static_cast<const fp16*>(w), o, i, codes, absmax);
  }
}

template <class T>
void dequantize_typed(const int8_t* codes, const float* absmax, int64_t o, int64_t i, T* out) {
  parallel_for(o, grain_rows(i), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float scale = absmax[r];
#pragma omp simd
      for (int64_t c = r * i; c < (r + 1) * i; ++c)
        out[c] = from_float<T>(static_cast<float>(codes[c]) * scale * inverse_127);
    }
  });
}

void dequantize(const int8_t* codes, const float* absmax, int64_t o, int64_t i, Dtype dtype, void* out) {
  switch (dtype) {
    case Dtype::float32: return dequantize_typed(codes, absmax, o, i, static_cast<float*>(out));
    case Dtype::bfloat16: return dequantize_typed(codes, absmax, o, i, static_cast<bf16*>(out));
    case Dtype::float16: return dequantize_typed(codes, absmax, o, i, static_cast<fp16*>(out));
  }
}

}  // namespace

const Int8Kernels int8 = {quantize, dequantize};

}  // namespace VENEER_ISA
}  // namespace veneer
