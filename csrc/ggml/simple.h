// The types of 32 values a block, Q4_0 to Q8_0, a block a lane.
#pragma once

#include "ggml/search.h"

namespace veneer {
namespace {

using Block32 = Tile<32>;

// v * factor + half is cut to whole numbers. Where 1 / scale is infinite, x86-64's conversion gives 0 for every value.
struct Cut {
  lanes factor, half;
};
inline Cut cut_of(lanes scale, float half) {
  const lanes inverse = scale != 0.0f ? 1.0f / scale : lanes{};
  const int_lanes infinite = (int_lanes)(magnitude(inverse) > 3.4028235e38f);
  return {infinite ? lanes{} : inverse, infinite ? lanes{} : splat(half)};
}

inline bit_lanes fifth_bits(const bit_lanes* levels) {
  bit_lanes word = {};
  for (int i = 0; i < 32; ++i) word |= ((levels[i] >> 4) & 1u) << i;
  return word;
}

// Of five bits the fifth ones in a word, and the rest.
template <int Bits>
inline void pack_levels(const bit_lanes* levels, bit_lanes* out) {
  if constexpr (Bits == 5) *out++ = fifth_bits(levels);
  pack<16, 4, Bits == 5>(levels, 32, 0, out);
}

// With importance the block's values weigh importance * sqrt(variance of the row + x²).
template <int Bits, bool Weighted>
struct SymmetricSimple {  // Q4_0, Q5_0
  static constexpr int block = 32, bytes = Bits == 4 ? 18 : 22, words = (bytes + 2) / 4, skip = 2;
  static constexpr float n_max = Bits == 4 ? 8.0f : 16.0f;

  static int_lanes quantize(const Block32& tile, bit_lanes* out) {
    bit_lanes levels[32];
    lanes scale;
    if constexpr (Weighted) {
      lanes w[32];
      SymmetricFit fit;
      weigh(tile.x, tile.qw, tile.variance, 32, w);
      symmetric<32, 1>(tile.x, w, n_max, &fit);
      for (int i = 0; i < 32; ++i) levels[i] = to_bits(kept_level(tile.x[i], fit, n_max));
      scale = fit.scale;
    } else {
      scale = signed_largest<32>(tile.x) / -n_max;
      const Cut cut = cut_of(scale, n_max + 0.5f);
      for (int i = 0; i < 32; ++i)
        levels[i] = to_bits(lesser(tile.x[i] * cut.factor + cut.half, splat(2.0f * n_max - 1.0f)));
    }
    const bit_lanes d = half_bits(scale);
    out[0] = d << 16;
    pack_levels<Bits>(levels, out + 1);
    return beyond_half(d);
  }
};

template <int Bits, bool Weighted>
struct AffineSimple {  // Q4_1, Q5_1
  static constexpr int block = 32, bytes = Bits == 4 ? 20 : 24, words = bytes / 4, skip = 0;
  static constexpr float n_max = Bits == 4 ? 15.0f : 31.0f;

  static int_lanes quantize(const Block32& tile, bit_lanes* out) {
    bit_lanes levels[32];
    lanes scale, low;
    if constexpr (Weighted) {
      lanes w[32];
      AffineFit fit;
      weigh(tile.x, tile.qw, tile.variance, 32, w);
      affine<32, false, 1>(tile.x, w, Grid{n_max, -0.9f, 0.05f, 36}, &fit);
      for (int i = 0; i < 32; ++i) levels[i] = to_bits(affine_level(tile.x[i], fit.inverse, fit.from, n_max));
      scale = fit.scale;
      low = fit.low;
    } else {
      lanes high = low = tile.x[0];
      for (int i = 1; i < 32; ++i) {
        low = lesser(tile.x[i], low);
        high = greater(tile.x[i], high);
      }
      scale = (high - low) / n_max;
      const Cut cut = cut_of(scale, 0.5f);
      for (int i = 0; i < 32; ++i) levels[i] = to_bits((tile.x[i] - low) * cut.factor + cut.half);  // under n_max + 1
    }
    const bit_lanes d = half_bits(scale), m = half_bits(low);
    out[0] = d | m << 16;
    pack_levels<Bits>(levels, out + 1);
    return beyond_half(d) | beyond_half(m);
  }
};

struct Q80 {
  static constexpr int block = 32, bytes = 34, words = 9, skip = 2;

  static int_lanes quantize(const Block32& tile, bit_lanes* out) {
    lanes most = {};
    for (int i = 0; i < 32; ++i) most = greater(magnitude(tile.x[i]), most);
    const lanes scale = most / 127.0f, factor = cut_of(scale, 0.0f).factor;
    for (int first = 0; first < 32; first += 4) {
      bit_lanes word = {};
      for (int b = 0; b < 4; ++b) {
        const lanes v = tile.x[first + b] * factor;
        const int_lanes cut = to_int(v);
        const lanes rest = v - __builtin_convertvector(cut, lanes);
        const int_lanes away = cut - (int_lanes)(rest >= 0.5f) + (int_lanes)(rest <= -0.5f);  // a mask is -1
        word |= ((bit_lanes)away & 255u) << (8 * b);
      }
      out[1 + first / 4] = word;
    }
    const bit_lanes d = half_bits(scale);
    out[0] = d << 16;
    return beyond_half(d);
  }
};

}  // namespace
}  // namespace veneer
