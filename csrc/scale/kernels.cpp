#include "scale/scale.h"

#include "core/lanes.h"
#include "core/parallel.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t grain_values = 1 << 14;

template <class T, class F>
void each_row(const ScaleSizes& sizes, const Rows& z, const Rows& y, const F& f) {
  parallel_for(sizes.n, (grain_values + sizes.d - 1) / sizes.d, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* from = row_of<const T>(z, r);
      T* to = row_of<T>(y, r);
      each_register(sizes.d, [=](int64_t c, int64_t n) { put(to + c, f(take(from + c, n), c, n), n); });
    }
  });
}

template <class T>
void forward_typed(const ScaleSizes& sizes, const Rows& z, const float* scale, const float* bias,
                   const Rows& y) {
  if (!bias)
    return each_row<T>(sizes, z, y, [=](lanes x, int64_t c, int64_t n) { return x * take(scale + c, n); });
  if (!scale)
    return each_row<T>(sizes, z, y, [=](lanes x, int64_t c, int64_t n) { return x + take(bias + c, n); });
  each_row<T>(sizes, z, y,
              [=](lanes x, int64_t c, int64_t n) { return x * take(scale + c, n) + take(bias + c, n); });
}

void forward(const ScaleSizes& sizes, const Rows& z, const float* scale, const float* bias, const Rows& y) {
  switch (sizes.dtype) {
    case Dtype::float32: return forward_typed<float>(sizes, z, scale, bias, y);
    case Dtype::bfloat16: return forward_typed<bf16>(sizes, z, scale, bias, y);
    case Dtype::float16: return forward_typed<fp16>(sizes, z, scale, bias, y);
  }
}

constexpr int64_t rows_a_sum = 64;  // sums of as many rows are added to the total: less is lost than row by row

struct Sums {
  float *scale, *bias;  // null where not asked for
};

template <class T, bool scaled, bool with_scale, bool with_bias>
void backward_columns(const Rows& dy, const Rows& z, const float* scale, const Rows& dz, const Sums& sums,
                      int64_t first, int64_t last, int64_t c, int64_t n) {
  const lanes factor = scaled ? take(scale + c, n) : lanes{};
  lanes scale_sum{}, bias_sum{};
  for (int64_t r = first; r < last; ++r) {
    const lanes gradient = take(row_of<const T>(dy, r) + c, n);
    if (with_scale) scale_sum += gradient * take(row_of<const T>(z, r) + c, n);
    if (with_bias) bias_sum += gradient;
    if (scaled) put(row_of<T>(dz, r) + c, gradient * factor, n);
  }
  if (with_scale) put(sums.scale + c, take(sums.scale + c, n) + scale_sum, n);
  if (with_bias) put(sums.bias + c, take(sums.bias + c, n) + bias_sum, n);
}

// A thread takes columns, not rows, so that a sum does not depend on how many threads there are.
template <class T, bool scaled, bool with_scale, bool with_bias>
void backward_typed(const ScaleSizes& sizes, const Rows& dy, const Rows& z, const float* scale,
                    const Rows& dz, const Sums& sums) {
  const int64_t registers = (sizes.d + width - 1) / width;
  parallel_for(registers, (grain_values + sizes.n * width - 1) / (sizes.n * width), [=](int64_t begin, int64_t end) {
    const int64_t stop = end * width < sizes.d ? end * width : sizes.d;
    for (int64_t c = begin * width; c < stop; ++c) {
      if (with_scale) sums.scale[c] = 0.0f;
      if (with_bias) sums.bias[c] = 0.0f;
    }
    for (int64_t first = 0; first < sizes.n; first += rows_a_sum) {
      const int64_t last = first + rows_a_sum < sizes.n ? first + rows_a_sum : sizes.n;
      for (int64_t c = begin * width; c < stop; c += width)
        backward_columns<T, scaled, with_scale, with_bias>(dy, z, scale, dz, sums, first, last, c,
                                                           c + width <= stop ? width : stop - c);
    }
  });
}

template <class T>
void backward_of(const ScaleSizes& sizes, const Rows& dy, const Rows& z, const float* scale,
                 const Rows& dz, const Sums& sums) {
  if (!scale) return backward_typed<T, false, false, true>(sizes, dy, z, scale, dz, sums);
  if (sums.scale && sums.bias) return backward_typed<T, true, true, true>(sizes, dy, z, scale, dz, sums);
  if (sums.scale) return backward_typed<T, true, true, false>(sizes, dy, z, scale, dz, sums);
  if (sums.bias) return backward_typed<T, true, false, true>(sizes, dy, z, scale, dz, sums);
  backward_typed<T, true, false, false>(sizes, dy, z, scale, dz, sums);
}

void backward(const ScaleSizes& sizes, const Rows& dy, const Rows& z, const float* scale,
              const Rows& dz, float* dscale, float* dbias) {
  const Sums sums{dscale, dbias};
  switch (sizes.dtype) {
    case Dtype::float32: return backward_of<float>(sizes, dy, z, scale, dz, sums);
    case Dtype::bfloat16: return backward_of<bf16>(sizes, dy, z, scale, dz, sums);
    case Dtype::float16: return backward_of<fp16>(sizes, dy, z, scale, dz, sums);
  }
}

}  // namespace

const ScaleKernels scale = {forward, backward};

}  // namespace VENEER_ISA
}  // namespace veneer
