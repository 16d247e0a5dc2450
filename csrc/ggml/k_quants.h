// The K types: 256 values in groups with scales (and minima), and scales of those in the block. Each format writes the words
// of its blocks, first byte lowest; `skip` bytes of the first word are none of the block's.
#pragma once

#include "ggml/search.h"

namespace veneer {
namespace {

constexpr int side = 2;  // groups that a search takes at once

using Block256 = Tile<256>;

struct Step {  // of the levels of scales: the half that is written, and its value
  bit_lanes bits;
  lanes value;
};
inline Step step_of(lanes v) {
  const bit_lanes bits = half_bits(v);
  return {bits, from_half(bits)};
}

// The step by which the largest scale is level n_max, and the scales' levels.
template <int N>
inline Step by_largest(const lanes* scales, float n_max, bit_lanes* levels) {
  lanes most = {};
  for (int i = 0; i < N; ++i) most = greater(scales[i], most);
  const lanes inverse = most > 0.0f ? n_max / most : lanes{};
  for (int i = 0; i < N; ++i) levels[i] = to_bits(whole(inverse * scales[i])) & 255u;
  return step_of(most / n_max);
}

template <int N>
inline Step by_weights(const lanes* scales, const lanes* sums, float n_max, bit_lanes* levels) {
  lanes kept[N];
  const lanes step = positive<N>(scales, sums, n_max, kept);
  for (int i = 0; i < N; ++i) levels[i] = to_bits(kept[i]) & 255u;
  return step_of(step);
}

// The levels of a group by the scale and minimum that the block really holds; those of the search where that scale is 0.
template <int N>
inline void affine_anew(const lanes* x, lanes scale, lanes minimum, const AffineFit& fit, float n_max, bit_lanes* levels) {
  const int_lanes none = (int_lanes)(scale == 0.0f);
  const bool ask = any(none);
  for (int i = 0; i < N; ++i) {
    lanes level = clip(whole((x[i] + minimum) / scale), 0.0f, n_max);
    if (ask) level = none ? affine_level(x[i], fit.inverse, fit.from, n_max) : level;
    levels[i] = to_bits(level);
  }
}

inline lanes symmetric_anew(lanes x, lanes scale, float n_max) {
  return clip(whole(x / scale), -n_max, n_max - 1.0f) + n_max;
}

// Scales, minima and their levels in groups of N values.
template <int N>
struct AffineBlock {
  static constexpr int groups = 256 / N;
  AffineFit fits[groups];
  lanes scales[groups], minima[groups], sums[groups];
  bit_lanes scale_levels[groups], min_levels[groups];

  template <bool Absolute, class Weigh>
  void search(const Block256& tile, const Grid& grid, const Weigh& weigh_group) {
    lanes w[side * N];
    for (int g = 0; g < groups; g += side) {
      for (int s = 0; s < side; ++s) sums[g + s] = weigh_group(tile, (g + s) * N, w + s * N);
      affine<N, Absolute, side>(tile.x + g * N, w, grid, fits + g);
    }
    for (int g = 0; g < groups; ++g) {
      scales[g] = fits[g].scale;
      minima[g] = -fits[g].low;
    }
  }

  void levels_anew(const Block256& tile, const Step& d, const Step& d_min, float n_max, bit_lanes* levels) const {
    for (int g = 0; g < groups; ++g)
      affine_anew<N>(tile.x + g * N, d.value * to_lanes(scale_levels[g]), d_min.value * to_lanes(min_levels[g]), fits[g],
                     n_max, levels + g * N);
  }
};

// With importance: the weights of a group of N from place `at` on, and their sum.
template <int N>
struct ByImportance {
  lanes variance;
  lanes operator()(const Block256& tile, int at, lanes* w) const { return weigh(tile.x + at, tile.qw + at, variance, N, w); }
};

template <bool Weighted>
struct Q2K {
  static constexpr int block = 256, bytes = 84, words = 21, skip = 0;

  static int_lanes quantize(const Block256& tile, bit_lanes* out) {
    AffineBlock<16> found;
    Step d, d_min;
    if constexpr (Weighted) {
      const ByImportance<16> by{sum_of_squares<256>(tile.x) / 256.0f};
      found.template search<false>(tile, Grid{3.0f, -0.9f, 0.05f, 36}, by);
      d = by_weights<16>(found.scales, found.sums, 15.0f, found.scale_levels);
      d_min = by_weights<16>(found.minima, found.sums, 15.0f, found.min_levels);
    } else {
      const auto sizes = [](const Block256& t, int at, lanes* w) {
        for (int i = 0; i < 16; ++i) w[i] = magnitude(t.x[at + i]);
        return lanes{};
      };
      found.template search<true>(tile, Grid{3.0f, -0.5f, 0.1f, 15}, sizes);
      d = by_largest<16>(found.scales, 15.0f, found.scale_levels);
      d_min = by_largest<16>(found.minima, 15.0f, found.min_levels);
    }
    for (int g = 0; g < 16; ++g) {
      const bit_lanes both = (found.scale_levels[g] | found.min_levels[g] << 4) & 255u;
      found.scale_levels[g] = both & 15u;
      found.min_levels[g] = both >> 4;
      out[g / 4] = (g % 4 ? out[g / 4] : bit_lanes{}) | both << (8 * (g % 4));
    }
    bit_lanes levels[256];
    found.levels_anew(tile, d, d_min, 3.0f, levels);
    pack<32, 2, false>(levels, 256, 0, out + 4);
    out[20] = d.bits | d_min.bits << 16;
    return beyond_half(d.bits) | beyond_half(d_min.bits);
  }
};

template <int Bits, bool Weighted>
struct Q45K {
  static constexpr int block = 256, bytes = Bits == 4 ? 144 : 176, words = bytes / 4, skip = 0;
  static constexpr float n_max = Bits == 4 ? 15.0f : 31.0f;

  static int_lanes quantize(const Block256& tile, bit_lanes* out) {
    AffineBlock<32> found;
    Step d, d_min;
    if constexpr (Weighted) {
      const ByImportance<32> by{2.0f * sum_of_squares<256>(tile.x) / 256.0f};
      found.template search<false>(tile, Grid{n_max, -0.9f, 0.05f, 36}, by);
      d = by_weights<8>(found.scales, found.sums, 63.0f, found.scale_levels);
      d_min = by_weights<8>(found.minima, found.sums, 63.0f, found.min_levels);
    } else {
      const auto sizes = [](const Block256& t, int at, lanes* w) {
        const lanes mean = root(sum_of_squares<32>(t.x + at) / 32.0f);
        for (int i = 0; i < 32; ++i) w[i] = mean + magnitude(t.x[at + i]);
        return lanes{};
      };
      found.template search<false>(tile, Bits == 4 ? Grid{n_max, -1.0f, 0.1f, 20} : Grid{n_max, -0.5f, 0.1f, 15}, sizes);
      d = by_largest<8>(found.scales, 63.0f, found.scale_levels);
      d_min = by_largest<8>(found.minima, 63.0f, found.min_levels);
    }
    bit_lanes levels[256];
    six_bits(found.scale_levels, found.min_levels, out + 1);
    found.levels_anew(tile, d, d_min, n_max, levels);
    out[0] = d.bits | d_min.bits << 16;
    bit_lanes* rest = out + 4;
    if constexpr (Bits == 5) rest = pack<32, 1>(levels, 256, 4, rest);
    pack<32, 4, Bits == 5>(levels, 256, 0, rest);
    return beyond_half(d.bits) | beyond_half(d_min.bits);
  }

  // At most 63 each; eight scales and eight minima in twelve bytes.
  static void six_bits(bit_lanes* scales, bit_lanes* minima, bit_lanes* out) {
    for (int g = 0; g < 8; ++g) {
      scales[g] = scales[g] > 63u ? bit_lanes{} + 63u : scales[g];
      minima[g] = minima[g] > 63u ? bit_lanes{} + 63u : minima[g];
    }
    out[0] = out[1] = out[2] = bit_lanes{};
    for (int g = 0; g < 4; ++g) {
      out[0] |= (scales[g] | (scales[g + 4] >> 4) << 6) << (8 * g);
      out[1] |= (minima[g] | (minima[g + 4] >> 4) << 6) << (8 * g);
      out[2] |= ((scales[g + 4] & 15u) | (minima[g + 4] & 15u) << 4) << (8 * g);
    }
  }
};

template <bool Weighted>
struct Q3K {
  static constexpr int block = 256, bytes = 110, words = 28, skip = 0;

  static int_lanes quantize(const Block256& tile, bit_lanes* out) {
    lanes scales[16], sums[16];
    lanes kept[256];  // the levels that the search found
    bit_lanes scale_levels[16];
    lanes step;
    if constexpr (Weighted) {
      const lanes variance = 2.0f * sum_of_squares<256>(tile.x) / 256.0f;
      for (int g = 0; g < 16; g += side) {
        lanes w[side * 16];
        SymmetricFit fits[side];
        for (int s = 0; s < side; ++s)
          sums[g + s] = weigh(tile.x + 16 * (g + s), tile.qw + 16 * (g + s), variance, 16, w + 16 * s);
        symmetric<16, side>(tile.x + 16 * g, w, 4.0f, fits);
        for (int s = 0; s < side; ++s) {
          scales[g + s] = fits[s].scale;
          for (int i = 16 * (g + s); i < 16 * (g + s + 1); ++i) kept[i] = kept_level(tile.x[i], fits[s], 4.0f);
        }
      }
      SymmetricFit fit;
      symmetric<16, 1>(scales, sums, 32.0f, &fit);
      for (int g = 0; g < 16; ++g) scale_levels[g] = to_bits(kept_level(scales[g], fit, 32.0f));
      step = fit.scale;
    } else {
      for (int g = 0; g < 16; g += side) descent<16, side>(tile.x + 16 * g, 4.0f, kept + 16 * g, scales + g);
      step = by_signed_largest(scales, scale_levels);
    }
    const Step d = step_of(step);
    bit_lanes levels[256];
    for (int g = 0; g < 16; ++g) {
      const lanes scale = d.value * (to_lanes(scale_levels[g]) - 32.0f);
      const int_lanes none = (int_lanes)(scale == 0.0f);
      for (int i = 16 * g; i < 16 * (g + 1); ++i)
        levels[i] = to_bits(none ? kept[i] : symmetric_anew(tile.x[i], scale, 4.0f));
    }
    bit_lanes* rest = pack<32, 2>(levels, 256, 0, pack<32, 1>(levels, 256, 2, out));
    rest = pack<4, 2>(scale_levels, 16, 4, pack<8, 4>(scale_levels, 16, 0, rest));
    *rest = d.bits;
    return beyond_half(d.bits);
  }

  // The step by which the scale of largest magnitude is level 0, and the scales' levels (0 … 63); zeros without a scale.
  static lanes by_signed_largest(const lanes* scales, bit_lanes* levels) {
    const lanes most = signed_largest<16>(scales), inverse = -32.0f / most;
    const int_lanes none = (int_lanes)(most == 0.0f);
    for (int g = 0; g < 16; ++g) {
      const int_lanes byte = (int_lanes)(to_bits(whole(inverse * scales[g])) << 24) >> 24;  // ggml keeps it in a signed byte
      const lanes level = clip(__builtin_convertvector(byte, lanes), -32.0f, 31.0f) + 32.0f;
      levels[g] = to_bits(none ? lanes{} : level);
    }
    return none ? lanes{} : 1.0f / inverse;
  }
};

template <bool Weighted>
struct Q6K {
  static constexpr int block = 256, bytes = 210, words = 53, skip = 0;

  static int_lanes quantize(const Block256& tile, bit_lanes* out) {
    SymmetricFit fits[16];
    lanes scales[16], squares[side * 16];
    for (int g = 0; g < 16; g += side) {
      const lanes *x = tile.x + 16 * g, *w = tile.qw + 16 * g;
      if constexpr (!Weighted) {
        for (int i = 0; i < side * 16; ++i) squares[i] = x[i] * x[i];
        w = squares;
      }
      symmetric<16, side>(x, w, 32.0f, fits + g);
    }
    for (int g = 0; g < 16; ++g) scales[g] = fits[g].scale;
    const lanes most = signed_largest<16>(scales), inverse = -128.0f / most;
    const Step d = step_of(1.0f / inverse);
    const int_lanes filled = (int_lanes)(magnitude(most) >= smallest);  // else the block is zero bytes
    bit_lanes levels[256], scale_levels[16];
    for (int g = 0; g < 16; ++g) {
      const lanes level = lesser(whole(inverse * scales[g]), splat(127.0f)), scale = d.value * level;
      const int_lanes none = (int_lanes)(scale == 0.0f);
      const bool ask = any(none);
      scale_levels[g] = to_bits(level);
      for (int i = 16 * g; i < 16 * (g + 1); ++i) {
        lanes anew = symmetric_anew(tile.x[i], scale, 32.0f);
        if (ask) anew = none ? kept_level(tile.x[i], fits[g], 32.0f) : anew;
        levels[i] = to_bits(anew);
      }
    }
    bit_lanes* rest = pack<32, 2>(levels, 256, 4, pack<64, 4>(levels, 256, 0, out));
    for (int g = 0; g < 16; ++g)
      rest[g / 4] = (g % 4 ? rest[g / 4] : bit_lanes{}) | (scale_levels[g] & 255u) << (8 * (g % 4));
    rest[4] = d.bits;
    for (int i = 0; i < words; ++i) out[i] &= (bit_lanes)filled;
    return beyond_half(d.bits) & filled;
  }
};

}  // namespace
}  // namespace veneer
