#include "blockwise/blockwise.h"

#include "core/parallel.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

int64_t grain_blocks(int64_t block_size) { return ((1 << 14) + block_size - 1) / block_size; }

// How many of the 255 midpoints lie below the value: the index of the nearest table value, the lower one on a tie.
inline uint8_t nearest(float value, const float (&midpoints)[256]) {
  int rank = 0;
  for (int half = 128; half > 0; half /= 2) rank += value > midpoints[rank + half - 1] ? half : 0;
  return static_cast<uint8_t>(rank);
}

template <class T>
void quantize_block(const T* x, int64_t n, const float (&midpoints)[256], uint8_t* codes, float* absmax) {
  uint32_t most = 0;  // magnitudes sort like integers, NaN above all
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t m = bit_cast<uint32_t>(to_float(x[i])) & 0x7fffffffu;
    most = m > most ? m : most;
  }
  const float scale = bit_cast<float>(most), factor = scale > 0.0f ? 1.0f / scale : 0.0f;
  *absmax = scale;
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    alignas(64) float values[16];
    for (int j = 0; j < 16; ++j) values[j] = to_float(x[i + j]) * factor;
    const __m512 v = _mm512_load_ps(values);
    __m512i rank = _mm512_setzero_si512();
    for (int half = 128; half > 0; half /= 2) {
      const __m512i at = _mm512_add_epi32(rank, _mm512_set1_epi32(half - 1));
      const __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_i32gather_ps(at, midpoints, 4), _CMP_GT_OQ);
      rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(half));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(rank));
  }
#endif
  for (; i < n; ++i) codes[i] = nearest(to_float(x[i]) * factor, midpoints);
}

template <class T>
void quantize_typed(const T* x, int64_t n, int64_t block_size, const float* code, uint8_t* codes, float* absmax) {
  float midpoints[256];
  for (int i = 0; i < 255; ++i) midpoints[i] = (code[i] + code[i + 1]) / 2.0f;
  midpoints[255] = 0.0f;  // never compared with
  parallel_for((n + block_size - 1) / block_size, grain_blocks(block_size), [=, &midpoints](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block_size, size = first + block_size <= n ? block_size : n - first;
      quantize_block(x + first, size, midpoints, codes + first, absmax + b);
    }
  });
}

void quantize(const void* x, Dtype dtype, int64_t n, int64_t block_size, const float* code, uint8_t* codes,
              float* absmax) {
  switch (dtype) {
    case Dtype::float32: return quantize_typed(static_cast<const float*>(x), n, block_size, code, codes, absmax);
    case Dtype::bfloat16: return quantize_typed(static_cast<const bf16*>(x), n, block_size, code, codes, absmax);
    case Dtype::float16: return quantize_typed(static_cast<const fp16*>(x), n, block_size, code, codes, absmax);
  }
}

template <class T>
void dequantize_typed(const uint8_t* codes, const float* absmax, int64_t n, int64_t block_size, const float* code, T* out) {
  parallel_for((n + block_size - 1) / block_size, grain_blocks(block_size), [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block_size, last = first + block_size <= n ? first + block_size : n;
      const float scale = absmax[b];
#pragma omp simd
      for (int64_t i = first; i < last; ++i) out[i] = from_float<T>(code[codes[i]] * scale);
    }
  });
}

void dequantize(const uint8_t* codes, const float* absmax, int64_t n, int64_t block_size, const float* code, Dtype dtype,
                void* out) {
  switch (dtype) {
    case Dtype::float32: return dequantize_typed(codes, absmax, n, block_size, code, static_cast<float*>(out));
    case Dtype::bfloat16: return dequantize_typed(codes, absmax, n, block_size, code, static_cast<bf16*>(out));
    case Dtype::float16: return dequantize_typed(codes, absmax, n, block_size, code, static_cast<fp16*>(out));
  }
}

}  // namespace

const BlockwiseKernels blockwise = {quantize, dequantize};

}  // namespace VENEER_ISA
}  // namespace veneer
