// The largest of many values without a sort: those that remain are parted again and again.
// Internal to kernels.cpp, for the reason that numeric.h gives.
#pragma once

#include "core/lanes.h"

namespace veneer {
namespace {

// Whole numbers in the order of floats; both zeros are one.
inline int32_t ordered(float x) {
  const int32_t bits = bit_cast<int32_t>(x + 0.0f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Writes the lanes of which `kept` says so, one behind the other, and as far as a register reaches; returns how many.
inline int64_t append(const int_lanes& x, const int_lanes& kept, void* to) {
#if defined(__AVX512F__)
  const __mmask16 mask = _mm512_test_epi32_mask((__m512i)kept, (__m512i)kept);
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(mask, (__m512i)x));
  return __builtin_popcount(mask);
#else
  int32_t found[width];
  int64_t n = 0;
  for (int64_t i = 0; i < width; ++i) {
    found[n] = x[i];
    n -= kept[i];
  }
  std::memcpy(to, found, sizeof found);
  return n;
#endif
}

// Values with their shares, which are 1 where there are none.
struct Keyed {
  int32_t* keys;
  int64_t* shares;  // or null
  int64_t n;

  int64_t sum_from(int32_t least) const {
    int64_t total = 0;
    if (shares == nullptr)
      for (int64_t i = 0; i < n; ++i) total += keys[i] >= least;
    else
      for (int64_t i = 0; i < n; ++i) total += keys[i] >= least ? shares[i] : 0;
    return total;
  }
  void keep(int32_t least, int32_t most) {
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t key = keys[i];
      keys[left] = key;
      if (shares != nullptr) shares[left] = shares[i];
      left += key >= least && key <= most;
    }
    n = left;
  }
  // One that lies amid the others; never the lowest, so that each turn parts them.
  int32_t pivot(int32_t low, int32_t high, int turn) const {
    const int32_t half = static_cast<int32_t>(low + (static_cast<int64_t>(high) - low + 1) / 2);
    const int32_t a = keys[0], b = keys[n / 2], c = keys[n - 1];
    const int32_t median = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
    return turn % 3 == 2 || median <= low ? half : median;
  }
};

struct Cut {
  int32_t key;    // the lowest that is kept, as `ordered` gives it
  int64_t above;  // the sum of the shares of what lies above
};

// The highest key such that it and what lies above have `limit` in shares together; the lowest, if all have less. Shares may be
// null: each is 1 then. `keys` and `own` take n values each. Every third turn halves the bits that remain.
inline Cut cut_of(const float* values, const int64_t* shares, int64_t n, int64_t limit, int32_t* keys, int64_t* own) {
  Keyed some{keys, shares == nullptr ? nullptr : own, n};
  for (int64_t i = 0; i < n; ++i) keys[i] = ordered(values[i]);
  if (shares != nullptr) std::memcpy(own, shares, n * sizeof(int64_t));
  int64_t above = 0;
  for (int turn = 0;; ++turn) {
    int32_t low = 0x7fffffff, high = -0x7fffffff - 1;
    for (int64_t i = 0; i < some.n; ++i) {
      low = keys[i] < low ? keys[i] : low;
      high = keys[i] > high ? keys[i] : high;
    }
    if (low >= high) return {low, above};
    const int32_t least = some.pivot(low, high, turn);
    const int64_t upper = some.sum_from(least);
    if (above + upper >= limit) {
      some.keep(least, high);
    } else {
      above += upper;
      some.keep(low, least - 1);
    }
  }
}

}  // namespace
}  // namespace veneer
