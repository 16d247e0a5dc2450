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

// Clamped gated unit of gpt-oss: (up + 1) · gate · sigmoid(alpha · gate), gate at most `limit`, up within ± `limit`.
constexpr float alpha = 1.702f, limit = 7.0f;

struct Alternating {
  lanes even, odd;
};

// Of 2 n values.
template <class T>
inline Alternating take_alternating(const T* from, int64_t n) {
  const int64_t first = 2 * n < width ? 2 * n : width;
  float values[2 * width], even[width], odd[width];
  store(values, take(from, first));
  store(values + width, first < 2 * n ? take(from + width, 2 * n - width) : lanes{});
  for (int64_t i = 0; i < width; ++i) {
    even[i] = values[2 * i];
    odd[i] = values[2 * i + 1];
  }
  return {load(even), load(odd)};
}

template <class T>
inline void put_alternating(T* to, const Alternating& x, int64_t n) {
  float values[2 * width], even[width], odd[width];
  store(even, x.even);
  store(odd, x.odd);
  for (int64_t i = 0; i < width; ++i) {
    values[2 * i] = even[i];
    values[2 * i + 1] = odd[i];
  }
  const int64_t first = 2 * n < width ? 2 * n : width;
  put(to, load(values), first);
  if (first < 2 * n) put(to + width, load(values + width), 2 * n - width);
}

inline Alternating clamped(const Alternating& x) {
  const lanes gate = x.even > limit ? splat(limit) : x.even, up = x.odd > limit ? splat(limit) : x.odd;
  return {gate, up < -limit ? splat(-limit) : up};
}

template <class T>
void clamped_forward_typed(const GluSizes& sizes, const Rows& inner, const Rows& h) {
  parallel_for(sizes.n, (grain_values + sizes.d - 1) / sizes.d, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* in = row_of<const T>(inner, r);
      T* out = row_of<T>(h, r);
      each_register(sizes.d, [=](int64_t c, int64_t n) {
        const Alternating x = clamped(take_alternating(in + 2 * c, n));
        put(out + c, (x.odd + 1.0f) * x.even * sigmoid(alpha * x.even).value, n);
      });
    }
  });
}

template <class T>
void clamped_backward_typed(const GluSizes& sizes, const Rows& dh, const Rows& inner, const Rows& dinner, const Rows& h) {
  parallel_for(sizes.n, (grain_values + sizes.d - 1) / sizes.d, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T *dout = row_of<const T>(dh, r), *in = row_of<const T>(inner, r);
      T *din = row_of<T>(dinner, r), *out = row_of<T>(h, r);
      each_register(sizes.d, [=](int64_t c, int64_t n) {
        const Alternating given = take_alternating(in + 2 * c, n), x = clamped(given);
        const lanes gradient = take(dout + c, n);
        const Sigmoid s = sigmoid(alpha * x.even);
        const lanes value = x.even * s.value, slope = s.value * (1.0f + alpha * x.even * s.rest);
        const lanes dgate = gradient * (x.odd + 1.0f) * slope, dup = gradient * value;
        put_alternating(din + 2 * c, {given.even > limit ? lanes{} : dgate, (given.odd > limit) | (given.odd < -limit) ? lanes{} : dup}, n);
        put(out + c, (x.odd + 1.0f) * value, n);
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

void clamped_forward(const GluSizes& sizes, const Rows& inner, const Rows& h) {
  sizes.dtype == Dtype::float32 ? clamped_forward_typed<float>(sizes, inner, h) : clamped_forward_typed<bf16>(sizes, inner, h);
}

void clamped_backward(const GluSizes& sizes, const Rows& dh, const Rows& inner, const Rows& dinner, const Rows& h) {
  sizes.dtype == Dtype::float32 ? clamped_backward_typed<float>(sizes, dh, inner, dinner, h)
                                : clamped_backward_typed<bf16>(sizes, dh, inner, dinner, h);
}

}  // namespace

const GluKernels glu = {forward, backward, clamped_forward, clamped_backward};

}  // namespace VENEER_ISA
}  // namespace veneer
