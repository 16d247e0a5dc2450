// Rows of a matrix in ggml's blocks, decoded; and W x for a few rows, decoded in a tile and multiplied while it is in the
// first-level cache.
#pragma once

#include "core/parallel.h"
#include "ggml/decode.h"
#include "ggml/ggml.h"

namespace veneer {
namespace {

constexpr int64_t decode_grain = 1 << 14;  // values, worth a thread
constexpr int64_t tile_values = 1024;      // of a row of W at a time
constexpr int64_t few_rows = 8;            // of x at a time

// Row r of the matrix, wherever it lies.
inline const uint8_t* row_of(const GgmlMatrix& w, int64_t r) {
  return w.blocks + (w.order == nullptr ? r : w.order[r]) * w.stride;
}

template <class Format, class T>
void decode_rows(const GgmlMatrix& w, T* out) {
  const int64_t grain = (decode_grain + w.i - 1) / w.i;
  parallel_for(w.o, grain, [=, &w](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) decode_run<Format>(row_of(w, r), w.i, out + r * w.i);
  });
}

inline lanes multiply_add(lanes a, lanes b, lanes c) {
#if defined(__AVX512F__)
  return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The products of a tile with n_x rows of x, added to their sums.
template <int n_x>
inline void multiply_tile(const float* tile, int64_t n, const float* x, int64_t stride, lanes (&total)[n_x][2]) {
  for (int64_t k = 0; k < n; k += 2 * width) {
    const lanes first = load(tile + k), second = load(tile + k + width);
    for (int m = 0; m < n_x; ++m) {
      const float* row = x + m * stride + k;
      total[m][0] = multiply_add(first, load(row), total[m][0]);
      total[m][1] = multiply_add(second, load(row + width), total[m][1]);
    }
  }
}

template <class Format, int n_x>
inline void multiply_range(const GgmlMatrix& w, int64_t begin, int64_t end, const float* x, float* out) {
  float tile[tile_values];
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* blocks = row_of(w, r);
    lanes total[n_x][2] = {};
    for (int64_t c = 0; c < w.i; c += tile_values) {
      const int64_t n = w.i - c < tile_values ? w.i - c : tile_values;
      decode_run<Format>(blocks + c / Format::values * Format::bytes, n, tile);
      multiply_tile<n_x>(tile, n, x + c, w.i, total);
    }
    for (int m = 0; m < n_x; ++m) out[m * w.o + r] = sum(total[m][0] + total[m][1]);
  }
}

template <class Format>
inline void multiply_some(const GgmlMatrix& w, int64_t begin, int64_t end, int64_t n_x, const float* x, float* out) {
  switch (n_x) {
    case 1: return multiply_range<Format, 1>(w, begin, end, x, out);
    case 2: return multiply_range<Format, 2>(w, begin, end, x, out);
    case 3: return multiply_range<Format, 3>(w, begin, end, x, out);
    case 4: return multiply_range<Format, 4>(w, begin, end, x, out);
    case 5: return multiply_range<Format, 5>(w, begin, end, x, out);
    case 6: return multiply_range<Format, 6>(w, begin, end, x, out);
    case 7: return multiply_range<Format, 7>(w, begin, end, x, out);
    default: return multiply_range<Format, 8>(w, begin, end, x, out);
  }
}

template <class Format>
void multiply_rows(const GgmlMatrix& w, const float* x, int64_t rows, float* out) {
  const int64_t grain = (decode_grain + w.i - 1) / w.i;
  parallel_for(w.o, grain, [=, &w](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < rows; m += few_rows)
      multiply_some<Format>(w, begin, end, rows - m < few_rows ? rows - m : few_rows, x + m * w.i, out + m * w.o);
  });
}

// f.template run<Format>() for the format of a kind.
template <class F>
void with_format(GgmlKind kind, const F& f) {
  switch (kind) {
    case GgmlKind::q4_0: return f.template run<DecodeQ40>();
    case GgmlKind::q4_1: return f.template run<DecodeQ41>();
    case GgmlKind::q5_0: return f.template run<DecodeQ50>();
    case GgmlKind::q5_1: return f.template run<DecodeQ51>();
    case GgmlKind::q2_k: return f.template run<DecodeQ2K>();
    case GgmlKind::q3_k: return f.template run<DecodeQ3K>();
    case GgmlKind::q4_k: return f.template run<DecodeQ4K>();
    case GgmlKind::q5_k: return f.template run<DecodeQ5K>();
    case GgmlKind::q6_k: return f.template run<DecodeQ6K>();
    case GgmlKind::iq4_nl: return f.template run<DecodeIQ4NL>();
    case GgmlKind::iq4_xs: return f.template run<DecodeIQ4XS>();
    default: return f.template run<DecodeQ80>();
  }
}

struct Decoding {
  const GgmlMatrix& w;
  Dtype dtype;
  void* out;
  template <class Format>
  void run() const {
    switch (dtype) {
      case Dtype::bfloat16: return decode_rows<Format>(w, static_cast<bf16*>(out));
      case Dtype::float16: return decode_rows<Format>(w, static_cast<fp16*>(out));
      default: return decode_rows<Format>(w, static_cast<float*>(out));
    }
  }
};

struct Multiplying {
  const GgmlMatrix& w;
  const float* x;
  int64_t rows;
  float* out;
  template <class Format>
  void run() const { multiply_rows<Format>(w, x, rows, out); }
};

void decode(const GgmlMatrix& w, GgmlKind kind, Dtype dtype, void* out) { with_format(kind, Decoding{w, dtype, out}); }

void multiply(const GgmlMatrix& w, GgmlKind kind, const float* x, int64_t rows, float* out) {
  with_format(kind, Multiplying{w, x, rows, out});
}

}  // namespace
}  // namespace veneer
