#include "glu/glu.h"

#include "core/lanes.h"
#include "core/parallel.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t grain_values = 1 << 13;

template <class T, class Act>
void forward_typed(const GluSizes& sizes, const Rows& gate, const Rows& up, const Rows& h) {
  parallel_for(sizes.n, (grain_values + sizes.d - 1) / sizes.d, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T *g = row_of<const T>(gate, r), *u = row_of<const T>(up, r);
      T* out = row_of<T>(h, r);
      each_register(sizes.d, [=](int64_t c, int64_t n) { put(out + c, Act::at(take(g + c, n)).value * take(u + c, n), n); });
    }
  });
}

template <class T, class Act>
void backward_typed(const GluSizes& sizes, const Rows& dh, const Rows& gate, const Rows& up,
                    const Rows& dgate, const Rows& dup, const Rows& h) {
  parallel_for(sizes.n, (grain_values + sizes.d - 1) / sizes.d, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T *dout = row_of<const T>(dh, r), *g = row_of<const T>(gate, r), *u = row_of<const T>(up, r);
      T *dg = row_of<T>(dgate, r), *du = row_of<T>(dup, r), *out = row_of<T>(h, r);
      each_register(sizes.d, [=](int64_t c, int64_t n) {
        const lanes gradient = take(dout + c, n), upper = take(u + c, n);
        const ValueAndSlope act = Act::at(take(g + c, n));
        put(dg + c, gradient * upper * act.slope, n);
        put(du + c, gradient * act.value, n);
        put(out + c, act.value * upper, n);
      });
    }
  });
}

template <class F>
void with_types(const GluSizes& sizes, const F& f) {
  const bool wide = sizes.dtype == Dtype::float32;
  switch (sizes.activation) {
    case Activation::gelu: return wide ? f(float{}, Gelu{}) : f(bf16{}, Gelu{});
    case Activation::gelu_tanh: return wide ? f(float{}, GeluTanh{}) : f(bf16{}, GeluTanh{});
    default: return wide ? f(float{}, Silu{}) : f(bf16{}, Silu{});
  }
}

void forward(const GluSizes& sizes, const Rows& gate, const Rows& up, const Rows& h) {
  with_types(sizes, [&](auto t, auto act) { forward_typed<decltype(t), decltype(act)>(sizes, gate, up, h); });
}

void backward(const GluSizes& sizes, const Rows& dh, const Rows& gate, const Rows& up, const Rows& dgate,
              const Rows& dup, const Rows& h) {
  with_types(sizes, [&](auto t, auto act) {
    backward_typed<decltype(t), decltype(act)>(sizes, dh, gate, up, dgate, dup, h);
  });
}

}  // namespace

const GluKernels glu = {forward, backward};

}  // namespace VENEER_ISA
}  // namespace veneer
