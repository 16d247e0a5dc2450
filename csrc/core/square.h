// Transposition of squares of registers. Internal to each kernels.cpp, for the reason that numeric.h gives.
#pragma once

#include "core/lanes.h"

#if defined(__clang__)
#define VENEER_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define VENEER_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, int_lanes{__VA_ARGS__})
#endif

namespace veneer {
namespace {

inline lanes zip_low(lanes a, lanes b) {
#if defined(__AVX512F__)
  return VENEER_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX__)
  return VENEER_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return VENEER_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}
inline lanes zip_high(lanes a, lanes b) {
#if defined(__AVX512F__)
  return VENEER_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX__)
  return VENEER_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return VENEER_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// A square of `width` registers: lane j of register i becomes lane i of register j.
inline void transpose(lanes (&square)[width]) {
  for (int64_t round = width; round > 1; round /= 2) {
    lanes next[width];
    for (int64_t i = 0; i < width / 2; ++i) {
      next[2 * i] = zip_low(square[i], square[i + width / 2]);
      next[2 * i + 1] = zip_high(square[i], square[i + width / 2]);
    }
    for (int64_t i = 0; i < width; ++i) square[i] = next[i];
  }
}

}  // namespace
}  // namespace veneer
