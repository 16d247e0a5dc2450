// The share of an id: the whole number nearest 2^40 e^z, where z <= 0 is its distance from the largest logit. Sums of whole
// numbers are the same in any order, so that no result depends on registers, blocks or threads.
// Internal to kernels.cpp, for the reason that numeric.h gives.
#pragma once

#include "core/lanes.h"

namespace veneer {
namespace {

constexpr double whole_share = 1099511627776.0;  // 2^40
constexpr float no_share_below = -29.0f;          // of z: the nearest whole number is 0 from -28.4 on

constexpr int64_t wide_width = width / 2;
typedef double double_lanes __attribute__((vector_size(wide_width * 8)));
typedef int64_t share_lanes __attribute__((vector_size(wide_width * 8)));
typedef float half_float_lanes __attribute__((vector_size(wide_width * 4)));

inline share_lanes nearest_whole(double_lanes x) {  // 0 <= x < 2^51; ties to even
  constexpr double magic = 4503599627370496.0;      // 2^52: the sum's last digit counts ones
  return (share_lanes)(x + magic) - (share_lanes)(double_lanes{} + magic);
}

struct Shares {
  share_lanes low, high;
};

inline Shares shares_of(lanes z) {
  const lanes scaled = exp(z) * static_cast<float>(whole_share);
#if defined(__AVX512DQ__)
  const double_lanes low = (double_lanes)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)scaled));
  const double_lanes high = (double_lanes)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)scaled, 1));
#else
  half_float_lanes halves[2];
  std::memcpy(halves, &scaled, sizeof scaled);
  const double_lanes low = __builtin_convertvector(halves[0], double_lanes);
  const double_lanes high = __builtin_convertvector(halves[1], double_lanes);
#endif
  return {nearest_whole(low), nearest_whole(high)};
}

inline int64_t sum(share_lanes x) {
  int64_t total = 0;
  for (int64_t i = 0; i < wide_width; ++i) total += x[i];
  return total;
}

// How logits become z.
struct Distance {
  float top, rate;  // the largest logit; one over the temperature
  lanes of(lanes logit) const { return (logit - top) * rate; }
  float of(float logit) const { return (logit - top) * rate; }
};

// Those of n logits, a multiple of `width`.
inline void put_shares(const float* logits, int64_t n, const Distance& distance, int64_t* shares) {
  for (int64_t c = 0; c < n; c += width) {
    const Shares found = shares_of(distance.of(load(logits + c)));
    std::memcpy(shares + c, &found, sizeof found);
  }
}

inline int64_t sum_of_shares(const float* logits, int64_t n, const Distance& distance) {
  share_lanes total{};
  for (int64_t c = 0; c < n; c += width) {
    const Shares found = shares_of(distance.of(load(logits + c)));
    total += found.low + found.high;
  }
  return sum(total);
}

}  // namespace
}  // namespace veneer
