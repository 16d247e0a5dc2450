#include "norm/norm.h"

#include <math.h>

#include "core/lanes.h"
#include "core/parallel.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t grain_values = 1 << 14;

int64_t grain_rows(int64_t d) { return d > 0 ? (grain_values + d - 1) / d : grain_values; }

template <class T, class F>
inline float row_sum(const T*, int64_t d, const F& f) {
  lanes total{};
  each_register(d, [&](int64_t c, int64_t n) { total += f(c, n); });
  return sum(total);
}

// What is past the end of a row must add nothing to a sum.
inline lanes only(lanes x, int64_t n) {
  if (n < width)
    for (int64_t i = n; i < width; ++i) x[i] = 0.0f;
  return x;
}

template <class T>
void forward_row(const T* x, int64_t d, const float* weight, const float* bias, float eps, float* mean, float* rstd,
                 T* y) {
  const float centre = mean ? row_sum(x, d, [=](int64_t c, int64_t n) { return take(x + c, n); }) / d : 0.0f;
  const float square = row_sum(x, d, [=](int64_t c, int64_t n) {
    const lanes off = only(take(x + c, n) - centre, n);
    return off * off;
  });
  const float scale = 1.0f / sqrtf(square / d + eps);
  each_register(d, [=](int64_t c, int64_t n) {
    const lanes normed = (take(x + c, n) - centre) * scale * take(weight + c, n);
    put(y + c, bias ? normed + take(bias + c, n) : normed, n);
  });
  if (mean) *mean = centre;
  *rstd = scale;
}

template <class T>
void forward_typed(const NormRows& rows, const NormWeights& weights, float eps, T* y) {
  parallel_for(rows.n, grain_rows(rows.d), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      forward_row(static_cast<const T*>(rows.x) + r * rows.stride, rows.d, weights.weight, weights.bias, eps, rows.mean ? rows.mean + r : nullptr, rows.rstd + r,
                  y + r * rows.d);
  });
}

template <class T>
void backward_row(const T* dy, const T* x, int64_t d, const float* weight, const float* mean, float rstd, T* dx) {
  const float centre = mean ? *mean : 0.0f;
  lanes along{}, level{};
  each_register(d, [&](int64_t c, int64_t n) {
    const lanes dnormed = take(dy + c, n) * take(weight + c, n);
    along += dnormed * (take(x + c, n) - centre);
    level += dnormed;
  });
  const float slope = sum(along) * rstd * rstd / d, shift = mean ? sum(level) / d : 0.0f;
  each_register(d, [=](int64_t c, int64_t n) {
    const lanes dnormed = take(dy + c, n) * take(weight + c, n);
    put(dx + c, (dnormed - shift - (take(x + c, n) - centre) * slope) * rstd, n);
  });
}

template <class T>
void backward_typed(const NormRows& rows, const NormWeights& weights, const T* dy, int64_t dy_stride, T* dx) {
  parallel_for(rows.n, grain_rows(rows.d), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      backward_row(dy + r * dy_stride, static_cast<const T*>(rows.x) + r * rows.stride, rows.d, weights.weight,
                   rows.mean ? rows.mean + r : nullptr, rows.rstd[r], dx + r * rows.d);
  });
}

// A thread takes columns, not rows, so that a sum does not depend on how many threads there are.
template <class T>
void weight_grad_typed(const NormRows& rows, const T* dy, int64_t dy_stride, float* dweight, float* dbias) {
  const int64_t columns = (rows.d + width - 1) / width;
  parallel_for(columns, grain_rows(rows.n * width), [&](int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; ++column) {
      const int64_t c = column * width, n = c + width <= rows.d ? width : rows.d - c;
      lanes weight_sum{}, bias_sum{};
      for (int64_t r = 0; r < rows.n; ++r) {
        const lanes gradient = take(dy + r * dy_stride + c, n);
        const float centre = rows.mean ? rows.mean[r] : 0.0f;
        weight_sum += gradient * (take(static_cast<const T*>(rows.x) + r * rows.stride + c, n) - centre) * rows.rstd[r];
        bias_sum += gradient;
      }
      put(dweight + c, weight_sum, n);
      if (dbias) put(dbias + c, bias_sum, n);
    }
  });
}

void forward(const NormRows& rows, const NormWeights& weights, float eps, void* y) {
  if (rows.dtype == Dtype::float32) return forward_typed(rows, weights, eps, static_cast<float*>(y));
  forward_typed(rows, weights, eps, static_cast<bf16*>(y));
}

void backward(const NormRows& rows, const NormWeights& weights, const void* dy, int64_t dy_stride, void* dx) {
  if (rows.dtype == Dtype::float32)
    return backward_typed(rows, weights, static_cast<const float*>(dy), dy_stride, static_cast<float*>(dx));
  backward_typed(rows, weights, static_cast<const bf16*>(dy), dy_stride, static_cast<bf16*>(dx));
}

void weight_grad(const NormRows& rows, const void* dy, int64_t dy_stride, float* dweight, float* dbias) {
  if (rows.dtype == Dtype::float32)
    return weight_grad_typed(rows, static_cast<const float*>(dy), dy_stride, dweight, dbias);
  weight_grad_typed(rows, static_cast<const bf16*>(dy), dy_stride, dweight, dbias);
}

}  // namespace

const NormKernels norm = {forward, backward, weight_grad};

}  // namespace VENEER_ISA
}  // namespace veneer
