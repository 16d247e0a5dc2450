// ggml's searches for scales and levels, a group a lane. Several groups go side by side (`Side`), so that one's sums hide
// the latency of the other's. Levels are floats that hold whole numbers.
#pragma once

#include "ggml/tile.h"

namespace veneer {
namespace {

constexpr float smallest = 1e-15f;  // of a group's largest magnitude; below it the group counts as zeros

struct Grid {  // tried are (first + delta * step + n_max) / (max - min)
  float n_max, first, delta;
  int n_steps;
};

// x ≈ scale * L + low. The search keeps no levels, but what they come from: L = whole(inverse * (x - from)), clipped.
struct AffineFit {
  lanes scale, low, inverse, from;
};
inline lanes affine_level(lanes x, lanes inverse, lanes from, float n_max) {
  return clip(whole(inverse * (x - from)), 0.0f, n_max);
}

// x ≈ scale * (L - n_max); L = whole(inverse * x), clipped, + n_max, and 0 in a group of zeros.
struct SymmetricFit {
  lanes scale, inverse;
  int_lanes zero;
};
inline lanes symmetric_level(lanes x, lanes inverse, float n_max) { return clip(whole(inverse * x), -n_max, n_max - 1.0f); }
inline lanes kept_level(lanes x, const SymmetricFit& fit, float n_max) {
  return fit.zero ? lanes{} : symmetric_level(x, fit.inverse, n_max) + n_max;
}

template <bool Absolute>
inline lanes deviation(lanes off) { return Absolute ? magnitude(off) : off * off; }

// `Side` groups of N values one after the other.
template <int N, bool Absolute, int Side>
inline void affine(const lanes* x, const lanes* w, const Grid& grid, AffineFit* fits) {
  lanes tried[Side * N];
  lanes low[Side], high[Side], sum_w[Side], sum_x[Side], scale[Side], error[Side], inverse[Side], from[Side];
  int_lanes flat[Side];
  for (int s = 0; s < Side; ++s) {
    low[s] = high[s] = x[s * N];
    sum_w[s] = w[s * N];
    sum_x[s] = sum_w[s] * x[s * N];
    for (int i = 1; i < N; ++i) {
      const lanes v = x[s * N + i], weight = w[s * N + i];
      low[s] = lesser(v, low[s]);
      high[s] = greater(v, high[s]);
      sum_w[s] += weight;
      sum_x[s] += weight * v;
    }
    low[s] = low[s] > 0.0f ? lanes{} : low[s];
    flat[s] = (int_lanes)(high[s] <= low[s]);
    inverse[s] = grid.n_max / (high[s] - low[s]);
    scale[s] = 1.0f / inverse[s];
    from[s] = low[s];
    error[s] = lanes{};
  }
  for (int i = 0; i < N; ++i)
    for (int s = 0; s < Side; ++s) {
      const lanes v = x[s * N + i], level = affine_level(v, inverse[s], low[s], grid.n_max);
      error[s] += w[s * N + i] * deviation<Absolute>(scale[s] * level + low[s] - v);
    }
  for (int step = 0; step <= grid.n_steps; ++step) {
    const float numerator = grid.first + grid.delta * static_cast<float>(step) + grid.n_max;
    lanes by[Side], sum_l[Side], sum_l2[Side], sum_xl[Side];
    for (int s = 0; s < Side; ++s) {
      by[s] = numerator / (high[s] - low[s]);
      sum_l[s] = sum_l2[s] = sum_xl[s] = lanes{};
    }
    for (int i = 0; i < N; ++i)
      for (int s = 0; s < Side; ++s) {
        const lanes v = x[s * N + i], level = affine_level(v, by[s], low[s], grid.n_max);
        const lanes weighted = w[s * N + i] * level;
        tried[s * N + i] = level;
        sum_l[s] += weighted;
        sum_l2[s] += weighted * level;
        sum_xl[s] += weighted * v;
      }
    lanes new_scale[Side], new_low[Side], new_error[Side];
    int_lanes solvable[Side];
    for (int s = 0; s < Side; ++s) {
      const lanes determinant = sum_w[s] * sum_l2[s] - sum_l[s] * sum_l[s];
      solvable[s] = (int_lanes)(determinant > 0.0f);
      new_scale[s] = (sum_w[s] * sum_xl[s] - sum_x[s] * sum_l[s]) / determinant;
      new_low[s] = (sum_l2[s] * sum_x[s] - sum_l[s] * sum_xl[s]) / determinant;
      const int_lanes above = (int_lanes)(new_low[s] > 0.0f);
      new_scale[s] = above ? sum_xl[s] / sum_l2[s] : new_scale[s];
      new_low[s] = above ? lanes{} : new_low[s];
      new_error[s] = lanes{};
    }
    for (int i = 0; i < N; ++i)
      for (int s = 0; s < Side; ++s)
        new_error[s] += w[s * N + i] * deviation<Absolute>(new_scale[s] * tried[s * N + i] + new_low[s] - x[s * N + i]);
    for (int s = 0; s < Side; ++s) {
      const int_lanes better = solvable[s] & (int_lanes)(new_error[s] < error[s]);
      error[s] = better ? new_error[s] : error[s];
      scale[s] = better ? new_scale[s] : scale[s];
      inverse[s] = better ? by[s] : inverse[s];
      from[s] = better ? low[s] : from[s];
      low[s] = better ? new_low[s] : low[s];
    }
  }
  for (int s = 0; s < Side; ++s)
    fits[s] = {flat[s] ? lanes{} : scale[s], low[s], flat[s] ? lanes{} : inverse[s], from[s]};
}

// The first value of largest magnitude of each group; 0, never -0, of zeros.
template <int N>
inline lanes signed_largest(const lanes* x) {
  lanes most = {}, found = {};
  for (int i = 0; i < N; ++i) {
    const lanes size = magnitude(x[i]);
    const int_lanes larger_yet = (int_lanes)(size > most);
    most = larger_yet ? size : most;
    found = larger_yet ? x[i] : found;
  }
  return found;
}

inline lanes ratio(lanes a, lanes b) { return b > 0.0f ? a / b : lanes{}; }

template <int N, int Side>
inline void symmetric(const lanes* x, const lanes* w, float n_max, SymmetricFit* fits) {
  lanes wx[Side * N], most[Side], scale[Side], best[Side], inverse[Side];
  for (int i = 0; i < Side * N; ++i) wx[i] = w[i] * x[i];
  for (int s = 0; s < Side; ++s) {
    most[s] = signed_largest<N>(x + s * N);
    scale[s] = best[s] = inverse[s] = lanes{};
  }
  for (int turn = 0; turn <= 18; ++turn) {
    const int k = turn == 0 ? 0 : turn - (turn <= 9 ? 10 : 9);  // 0 first, then -9 … 9 without it
    const float numerator = -(n_max + 0.1f * static_cast<float>(k));
    lanes by[Side], sum_lx[Side], sum_l2[Side];
    for (int s = 0; s < Side; ++s) {
      by[s] = numerator / most[s];
      sum_lx[s] = sum_l2[s] = lanes{};
    }
    for (int i = 0; i < N; ++i)
      for (int s = 0; s < Side; ++s) {
        const lanes level = symmetric_level(x[s * N + i], by[s], n_max);
        sum_lx[s] += wx[s * N + i] * level;
        sum_l2[s] += w[s * N + i] * level * level;
      }
    for (int s = 0; s < Side; ++s) {
      const lanes fitted = sum_lx[s] / sum_l2[s];
      if (turn == 0) {
        scale[s] = sum_l2[s] != 0.0f ? fitted : lanes{};
        best[s] = scale[s] * sum_lx[s];
        inverse[s] = by[s];
        continue;
      }
      const int_lanes better =
          (int_lanes)(sum_l2[s] > 0.0f) & (int_lanes)(sum_lx[s] * sum_lx[s] > best[s] * sum_l2[s]);
      scale[s] = better ? fitted : scale[s];
      best[s] = better ? fitted * sum_lx[s] : best[s];
      inverse[s] = better ? by[s] : inverse[s];
    }
  }
  for (int s = 0; s < Side; ++s) {
    const int_lanes zero = (int_lanes)(magnitude(most[s]) < smallest);
    fits[s] = {zero ? lanes{} : scale[s], inverse[s], zero};
  }
}

// Levels move one at a time to where they suit the others best, in up to five passes. A lane in which nothing moved in one
// pass cannot move in the next, so that it needs no mask.
template <int N, int Side, class Move>
inline void descend(const lanes* x, const lanes* wx, const lanes* w, const Move& move, lanes* levels, lanes* scale) {
  lanes sum_lx[Side], sum_l2[Side];
  for (int s = 0; s < Side; ++s) {
    sum_lx[s] = sum_l2[s] = lanes{};
    for (int i = s * N; i < (s + 1) * N; ++i) {
      sum_lx[s] += wx[i] * levels[i];
      sum_l2[s] += w[i] * levels[i] * levels[i];
    }
    move.first(levels + s * N, N);
  }
  for (int pass = 0; pass < 5; ++pass) {
    int_lanes moved = {};
    for (int i = 0; i < N; ++i)
      for (int s = 0; s < Side; ++s) {
        const int at = s * N + i;
        const lanes old = levels[at], rest_lx = sum_lx[s] - wx[at] * old, rest_l2 = sum_l2[s] - w[at] * old * old;
        const lanes level = move.clipped(whole(x[at] * rest_l2 / rest_lx));
        const lanes new_lx = rest_lx + wx[at] * level, new_l2 = rest_l2 + w[at] * level * level;
        const int_lanes better = (int_lanes)(rest_lx > 0.0f) & (int_lanes)(move.denominator(rest_l2, new_l2) > 0.0f) &
                                 (int_lanes)(level != old) &
                                 (int_lanes)(new_lx * new_lx * sum_l2[s] > sum_lx[s] * sum_lx[s] * new_l2);
        sum_lx[s] = better ? new_lx : sum_lx[s];
        sum_l2[s] = better ? new_l2 : sum_l2[s];
        levels[at] = better ? move.kept(level) : old;
        moved |= better;
      }
    if (!any(moved)) break;
  }
  for (int s = 0; s < Side; ++s) scale[s] = ratio(sum_lx[s], sum_l2[s]);
}

struct SignedMove {
  float n_max;
  void first(lanes*, int) const {}
  lanes clipped(lanes level) const { return clip(level, -n_max, n_max - 1.0f); }
  lanes kept(lanes level) const { return level; }
  lanes denominator(lanes, lanes after) const { return after; }
};

struct ByteMove {  // ggml keeps these levels in bytes, and a negative one wraps
  float n_max;
  static lanes byte(lanes level) { return to_lanes(to_bits(level) & 255u); }
  void first(lanes* levels, int n) const {
    for (int i = 0; i < n; ++i) levels[i] = byte(levels[i]);
  }
  lanes clipped(lanes level) const { return lesser(level, splat(n_max)); }
  lanes kept(lanes level) const { return byte(level); }
  lanes denominator(lanes before, lanes) const { return before; }
};

// Scales and levels (0 … 2 n_max - 1) with weights x², level by level.
template <int N, int Side>
inline void descent(const lanes* x, float n_max, lanes* levels, lanes* scale) {
  lanes w[Side * N], wx[Side * N];
  int_lanes zero[Side];
  for (int s = 0; s < Side; ++s) {
    const lanes most = signed_largest<N>(x + s * N), inverse = -n_max / most;
    zero[s] = (int_lanes)(magnitude(most) < smallest);
    for (int i = s * N; i < (s + 1) * N; ++i) {
      w[i] = x[i] * x[i];
      wx[i] = w[i] * x[i];
      levels[i] = symmetric_level(x[i], inverse, n_max);
    }
  }
  descend<N, Side>(x, wx, w, SignedMove{n_max}, levels, scale);
  for (int s = 0; s < Side; ++s) {
    scale[s] = zero[s] ? lanes{} : scale[s];
    for (int i = s * N; i < (s + 1) * N; ++i) levels[i] = zero[s] ? lanes{} : levels[i] + n_max;
  }
}

// Scale and levels (0 … n_max) of values that are not negative: the scales of a block's groups, or their minima.
template <int N>
inline lanes positive(const lanes* x, const lanes* w, float n_max, lanes* levels) {
  lanes most = {}, wx[N], scale;
  for (int i = 0; i < N; ++i) {
    most = greater(x[i], most);
    wx[i] = w[i] * x[i];
  }
  lanes inverse = n_max / most, error = {};
  const lanes first = 1.0f / inverse;
  for (int i = 0; i < N; ++i) {
    const lanes off = x[i] - first * ByteMove::byte(whole(inverse * x[i]));
    error += w[i] * off * off;
  }
  for (int k = -4; k <= 4; ++k) {
    if (k == 0) continue;
    const lanes by = (0.1f * static_cast<float>(k) + n_max) / most, step = 1.0f / by;
    lanes tried = {};
    for (int i = 0; i < N; ++i) {
      const lanes off = x[i] - step * lesser(whole(by * x[i]), splat(n_max));
      tried += w[i] * off * off;
    }
    const int_lanes better = (int_lanes)(tried < error);
    error = better ? tried : error;
    inverse = better ? by : inverse;
  }
  for (int i = 0; i < N; ++i) levels[i] = lesser(whole(inverse * x[i]), splat(n_max));
  descend<N, 1>(x, wx, w, ByteMove{n_max}, levels, &scale);
  const int_lanes zero = (int_lanes)(most < smallest);
  for (int i = 0; i < N; ++i) levels[i] = zero ? lanes{} : levels[i];
  return zero ? lanes{} : scale;
}

template <int N>
inline lanes sum_of_squares(const lanes* x) {
  lanes total = {};
  for (int i = 0; i < N; ++i) total += x[i] * x[i];
  return total;
}

// importance * sqrt(variance + x²) for n values; returns their sum.
inline lanes weigh(const lanes* x, const lanes* qw, lanes variance, int n, lanes* w) {
  lanes total = {};
  for (int i = 0; i < n; ++i) {
    w[i] = qw[i] * root(variance + x[i] * x[i]);
    total += w[i];
  }
  return total;
}

}  // namespace
}  // namespace veneer
