#include "rotary/rotary.h"

#include "core/lanes.h"
#include "core/parallel.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t grain_values = 1 << 14;

template <class T>
void turn_halves(const T* x, T* out, const float* cos, const float* sin, int64_t half) {
  each_register(half, [=](int64_t c, int64_t n) {
    const lanes first = take(x + c, n), second = take(x + half + c, n), co = take(cos + c, n), si = take(sin + c, n);
    put(out + c, first * co - second * si, n);
    put(out + half + c, second * co + first * si, n);
  });
}

template <class T>
void turn_pairs(const T* x, T* out, const float* cos, const float* sin, int64_t half) {
  for (int64_t c = 0; c < half; ++c) {
    const float first = to_float(x[2 * c]), second = to_float(x[2 * c + 1]);
    out[2 * c] = from_float<T>(first * cos[c] - second * sin[c]);
    out[2 * c + 1] = from_float<T>(second * cos[c] + first * sin[c]);
  }
}

template <class T>
void rotate_typed(const RotarySizes& sizes, const RotaryView& x, const RotaryView& out, const RotaryTables& tables,
                  bool interleaved) {
  const int64_t values = sizes.heads * sizes.d, half = tables.half;
  parallel_for(sizes.batch * sizes.t, (grain_values + values - 1) / values, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / sizes.t, t = row % sizes.t;
      const float* cos = tables.cos + b * tables.batch_stride + t * half;
      const float* sin = tables.sin + b * tables.batch_stride + t * half;
      for (int64_t h = 0; h < sizes.heads; ++h) {
        const T* from = static_cast<const T*>(x.data) + b * x.batch_stride + h * x.head_stride + t * x.t_stride;
        T* to = static_cast<T*>(out.data) + b * out.batch_stride + h * out.head_stride + t * out.t_stride;
        interleaved ? turn_pairs(from, to, cos, sin, half) : turn_halves(from, to, cos, sin, half);
        if (from != to)
          for (int64_t c = 2 * half; c < sizes.d; ++c) to[c] = from[c];
      }
    }
  });
}

void rotate(const RotarySizes& sizes, const RotaryView& x, const RotaryView& out, const RotaryTables& tables,
            Dtype dtype, bool interleaved) {
  if (dtype == Dtype::float32) return rotate_typed<float>(sizes, x, out, tables, interleaved);
  rotate_typed<bf16>(sizes, x, out, tables, interleaved);
}

}  // namespace

const RotaryKernels rotary = {rotate};

}  // namespace VENEER_ISA
}  // namespace veneer
