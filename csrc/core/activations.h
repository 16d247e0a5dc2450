// Activations and their slopes, by number; the computation is internal to each kernels.cpp, for the reason that numeric.h gives.
#pragma once

#include "core/lanes.h"

namespace veneer {

// The first three and the last have gated units; the first five stand in feed-forward parts without a gate, all of them in bottlenecks.
enum class Activation : int {
  silu = 0, gelu = 1, gelu_tanh = 2, relu = 3, relu_squared = 4, tanh = 5, sigmoid = 6, leaky_relu = 7, identity = 8, swiglu_oai = 9
};

namespace {

struct ValueAndSlope {
  lanes value, slope;
};

struct Silu {
  static ValueAndSlope at(lanes x) {
    const Sigmoid s = sigmoid(x);
    return {x * s.value, s.value * (1.0f + x * s.rest)};
  }
};

struct Gelu {
  static ValueAndSlope at(lanes x) {
    const lanes cdf = normal_cdf(x);
    return {x * cdf, cdf + x * exp(-0.5f * x * x) * 0.3989422804f};
  }
};

struct GeluTanh {
  static ValueAndSlope at(lanes x) {
    constexpr float inner = 0.7978845608f, cubic = 0.044715f;
    // (1 + tanh u) / 2 is sigmoid(2 u), which keeps its precision where tanh nears -1.
    const lanes square = x * x;
    const Sigmoid s = sigmoid(2.0f * inner * x * (1.0f + cubic * square));
    return {x * s.value, s.value + 2.0f * inner * x * s.value * s.rest * (1.0f + 3.0f * cubic * square)};
  }
};

struct Relu {
  static ValueAndSlope at(lanes x) { return {x <= 0.0f ? lanes{} : x, x > 0.0f ? splat(1.0f) : lanes{}}; }
};

struct ReluSquared {
  static ValueAndSlope at(lanes x) {
    const lanes r = Relu::at(x).value;
    return {r * r, 2.0f * r};
  }
};

struct Tanh {
  static ValueAndSlope at(lanes x) {
    const lanes value = tanh(x);
    return {value, 1.0f - value * value};
  }
};

struct Logistic {
  static ValueAndSlope at(lanes x) {
    const Sigmoid s = sigmoid(x);
    return {s.value, s.value * s.rest};
  }
};

struct LeakyRelu {
  static ValueAndSlope at(lanes x) {
    constexpr float below = 0.01f;  // torch's own
    return {x > 0.0f ? x : x * below, x > 0.0f ? splat(1.0f) : splat(below)};
  }
};

struct Identity {
  static ValueAndSlope at(lanes x) { return {x, splat(1.0f)}; }
};

// f(activation), a type.
template <class F>
inline auto with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::silu: return f(Silu{});
    case Activation::gelu: return f(Gelu{});
    case Activation::gelu_tanh: return f(GeluTanh{});
    case Activation::relu: return f(Relu{});
    case Activation::relu_squared: return f(ReluSquared{});
    case Activation::tanh: return f(Tanh{});
    case Activation::sigmoid: return f(Logistic{});
    case Activation::leaky_relu: return f(LeakyRelu{});
    default: return f(Identity{});
  }
}

}  // namespace
}  // namespace veneer
