// The values of ggml's MXFP4: twice those of E2M1, times half of a power of two.
#pragma once

#include "core/numeric.h"

namespace veneer {
namespace {

constexpr float doubled_e2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Half of 2 ^ (e - 127).
inline float half_power(uint32_t e) { return bit_cast<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23); }

}  // namespace
}  // namespace veneer
