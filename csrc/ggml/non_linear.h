// IQ4_NL, IQ4_XS and MXFP4: levels are indices into sixteen values.
#pragma once

#include <limits>

#include "ggml/k_quants.h"
#include "ggml/mxfp4.h"
#include "ggml/simple.h"

namespace veneer {
namespace {

constexpr float lowest = -127.0f;
constexpr float values[16] = {lowest, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// The value nearest to v, on a tie the upper one; the last for NaN.
inline lanes nearest_value(lanes v) {
  lanes found = splat(lowest);
  for (int i = 1; i < 16; ++i) {
    const float middle = (values[i - 1] + values[i]) / 2.0f;
    found = v < middle ? found : splat(values[i]);
  }
  return found;
}
inline bit_lanes nearest_index(lanes v) {
  bit_lanes found = {};
  for (int i = 1; i < 16; ++i) {
    const float middle = (values[i - 1] + values[i]) / 2.0f;
    found = v < middle ? found : bit_lanes{} + static_cast<uint32_t>(i);
  }
  return found;
}

// The scale of a group of 32, x ≈ scale * value, by tries around lowest / largest magnitude.
inline lanes non_linear_scale(const lanes* x, const lanes* w) {
  const lanes most = signed_largest<32>(x);
  lanes scale = {}, best = {};
  for (int k = -8; k <= 7; ++k) {
    const lanes by = k == -8 ? 1.0f / (-most / lowest) : (static_cast<float>(k) + lowest) / most;
    lanes sum_qx = {}, sum_q2 = {};
    for (int i = 0; i < 32; ++i) {
      const lanes q = nearest_value(by * x[i]), weighted = w[i] * q;
      sum_qx += weighted * x[i];
      sum_q2 += weighted * q;
    }
    const lanes fitted = ratio(sum_qx, sum_q2);
    if (k == -8) {
      scale = fitted;
      best = scale * sum_qx;
      continue;
    }
    const int_lanes better = (int_lanes)(sum_q2 > 0.0f) & (int_lanes)(sum_qx * sum_qx > best * sum_q2);
    scale = better ? fitted : scale;
    best = better ? fitted * sum_qx : best;
  }
  return magnitude(most) < smallest ? lanes{} : scale;
}

template <bool Weighted>
inline void weigh_group(const lanes* x, const lanes* qw, lanes variance, lanes* w) {
  if constexpr (Weighted) {
    weigh(x, qw, variance, 32, w);
  } else {
    for (int i = 0; i < 32; ++i) w[i] = x[i] * x[i];
  }
}

template <bool Weighted>
struct IQ4NL {
  static constexpr int block = 32, bytes = 18, words = 5, skip = 2;

  static int_lanes quantize(const Block32& tile, bit_lanes* out) {
    lanes w[32];
    bit_lanes levels[32];
    weigh_group<Weighted>(tile.x, tile.qw, Weighted ? sum_of_squares<32>(tile.x) * (2.0f / 32.0f) : lanes{}, w);
    const lanes scale = non_linear_scale(tile.x, w), inverse = scale != 0.0f ? 1.0f / scale : lanes{};
    for (int i = 0; i < 32; ++i) levels[i] = nearest_index(inverse * tile.x[i]);
    const bit_lanes d = half_bits(scale);
    out[0] = d << 16;
    pack_levels<4>(levels, out + 1);
    return beyond_half(d);
  }
};

template <bool Weighted>
struct IQ4XS {
  static constexpr int block = 256, bytes = 136, words = 34, skip = 0;

  static int_lanes quantize(const Block256& tile, bit_lanes* out) {
    const lanes variance = Weighted ? sum_of_squares<256>(tile.x) * (2.0f / 256.0f) : lanes{};
    lanes scales[8];
    for (int g = 0; g < 8; ++g) {
      lanes w[32];
      weigh_group<Weighted>(tile.x + 32 * g, tile.qw + 32 * g, variance, w);
      scales[g] = non_linear_scale(tile.x + 32 * g, w);
    }
    const lanes step = signed_largest<8>(scales) / -32.0f, by = step != 0.0f ? 1.0f / step : lanes{};
    const bit_lanes d = half_bits(step);
    out[0] = d;
    out[1] = bit_lanes{};
    for (int g = 0; g < 8; ++g) {
      const lanes level = clip(whole(by * scales[g]), -32.0f, 31.0f), scale = step * level;
      const lanes inverse = scale != 0.0f ? 1.0f / scale : lanes{};
      const bit_lanes kept = to_bits(level + 32.0f);
      out[0] |= (kept >> 4) << (16 + 2 * g);
      out[1] |= (kept & 15u) << (4 * g);
      bit_lanes levels[32];
      for (int i = 0; i < 32; ++i) levels[i] = nearest_index(inverse * tile.x[32 * g + i]);
      pack_levels<4>(levels, out + 2 + 4 * g);
    }
    return beyond_half(d);
  }
};

// An exponent from the largest magnitude, and of equally near values the first. Far below 2^-125 the exponent wraps, as in
// ggml, and all values become zero; so they do beside infinity, which has no exponent.
struct MXFP4 {
  static constexpr int block = 32, bytes = 17, words = 5, skip = 3;

  static int_lanes quantize(const Block32& tile, bit_lanes* out) {
    lanes most = {}, step = {};
    for (int i = 0; i < 32; ++i) most = greater(magnitude(tile.x[i]), most);
    bit_lanes exponent = {};
    for (int64_t r = 0; r < width; ++r) {
      if (most[r] > 0.0f && most[r] <= std::numeric_limits<float>::max())
        exponent[r] = static_cast<uint32_t>(static_cast<int>(__builtin_floorf(__builtin_log2f(most[r]))) + 125) & 255u;
      step[r] = half_power(exponent[r]);
    }
    bit_lanes levels[32];
    for (int i = 0; i < 32; ++i) {
      lanes error = magnitude(tile.x[i]);
      levels[i] = bit_lanes{};
      for (uint32_t level = 1; level < 16; ++level) {
        const lanes other = magnitude(doubled_e2m1[level] * step - tile.x[i]);
        const int_lanes better = (int_lanes)(other < error);
        levels[i] = better ? bit_lanes{} + level : levels[i];
        error = better ? other : error;
      }
    }
    out[0] = exponent << 24;
    pack_levels<4>(levels, out + 1);
    return int_lanes{};
  }
};

}  // namespace
}  // namespace veneer
