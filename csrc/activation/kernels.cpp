#include "activation/activation.h"

#include "core/lanes.h"
#include "core/parallel.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t grain_values = 1 << 13;

// f(row, column, n) for every register of all rows.
template <class F>
void each_value(const ActivationSizes& sizes, const F& f) {
  parallel_for(sizes.n, (grain_values + sizes.d - 1) / (sizes.d + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) each_register(sizes.d, [=, &f](int64_t c, int64_t n) { f(r, c, n); });
  });
}

template <class T, class Act>
void forward_typed(const ActivationSizes& sizes, const Rows& x, const Rows& y) {
  each_value(sizes, [&](int64_t r, int64_t c, int64_t n) {
    put(row_of<T>(y, r) + c, Act::at(take(row_of<const T>(x, r) + c, n)).value, n);
  });
}

template <class T, class Act>
void backward_typed(const ActivationSizes& sizes, const Rows& dy, const Rows& x, const Rows& dx) {
  each_value(sizes, [&](int64_t r, int64_t c, int64_t n) {
    const lanes slope = Act::at(take(row_of<const T>(x, r) + c, n)).slope;
    put(row_of<T>(dx, r) + c, take(row_of<const T>(dy, r) + c, n) * slope, n);
  });
}

void forward(const ActivationSizes& sizes, const Rows& x, const Rows& y) {
  with_activation(sizes.activation, [&](auto act) {
    if (sizes.dtype == Dtype::float32) return forward_typed<float, decltype(act)>(sizes, x, y);
    forward_typed<bf16, decltype(act)>(sizes, x, y);
  });
}

void backward(const ActivationSizes& sizes, const Rows& dy, const Rows& x, const Rows& dx) {
  with_activation(sizes.activation, [&](auto act) {
    if (sizes.dtype == Dtype::float32) return backward_typed<float, decltype(act)>(sizes, dy, x, dx);
    backward_typed<bf16, decltype(act)>(sizes, dy, x, dx);
  });
}

}  // namespace

const ActivationKernels activation = {forward, backward};

}  // namespace VENEER_ISA
}  // namespace veneer
