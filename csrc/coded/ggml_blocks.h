// The values of ggml's blocks, as its own decoders compute them: products and differences in float, none fused.
#pragma once

#include "coded/coded.h"
#include "coded/product.h"
#include "ggml/mxfp4.h"

namespace veneer {
namespace {

inline float half_at(const uint8_t* p) {
  fp16 half;
  std::memcpy(&half, p, sizeof half);
  return to_float(half);
}

// Values of the codes of four bits, from value(code): with AVX-512 a table in a register.
template <class F>
struct Nibbles {
  const F& value;
#if defined(__AVX512F__)
  __m512 table;

  explicit Nibbles(const F& f) : value(f) {
    alignas(64) float values[16];
#pragma omp simd
    for (int q = 0; q < 16; ++q) values[q] = f(q);
    table = _mm512_load_ps(values);
  }
  void sixteen(const uint8_t* qs, int shift, float* out) const {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(qs)));
    // only the low four bits of an index count
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(_mm512_srli_epi32(codes, static_cast<unsigned>(shift)), table));
  }
#else
  explicit Nibbles(const F& f) : value(f) {}
  void sixteen(const uint8_t* qs, int shift, float* out) const {
#pragma omp simd
    for (int j = 0; j < 16; ++j) out[j] = value(qs[j] >> shift & 15);
  }
#endif
  // The low nibbles of 16 bytes, then the high ones.
  void both(const uint8_t* qs, float* out) const {
    sixteen(qs, 0, out);
    sixteen(qs, 4, out + 16);
  }
};

// The same where a value depends on its place too.
template <class F>
inline void each_nibble(const uint8_t* qs, float* out, const F& value) {
#pragma omp simd
  for (int j = 0; j < 16; ++j) out[j] = value(j, qs[j] & 15);
#pragma omp simd
  for (int j = 0; j < 16; ++j) out[j + 16] = value(j + 16, qs[j] >> 4);
}

struct DecodeQ40 {
  static constexpr int64_t values = 32, bytes = 18;
  static void block(const uint8_t* p, float* out) {
    const float d = half_at(p);
    const auto value = [d](int q) { return static_cast<float>(q - 8) * d; };
    Nibbles(value).both(p + 2, out);
  }
};

struct DecodeQ41 {
  static constexpr int64_t values = 32, bytes = 20;
  static void block(const uint8_t* p, float* out) {
    const float d = half_at(p), m = half_at(p + 2);
    const auto value = [d, m](int q) { return static_cast<float>(q) * d + m; };
    Nibbles(value).both(p + 4, out);
  }
};

struct DecodeQ50 {
  static constexpr int64_t values = 32, bytes = 22;
  static void block(const uint8_t* p, float* out) {
    const float d = half_at(p);
    uint32_t fifth;
    std::memcpy(&fifth, p + 2, sizeof fifth);
    each_nibble(p + 6, out, [d, fifth](int j, int q) {
      return static_cast<float>((q | static_cast<int>(fifth >> j & 1u) << 4) - 16) * d;
    });
  }
};

struct DecodeQ51 {
  static constexpr int64_t values = 32, bytes = 24;
  static void block(const uint8_t* p, float* out) {
    const float d = half_at(p), m = half_at(p + 2);
    uint32_t fifth;
    std::memcpy(&fifth, p + 4, sizeof fifth);
    each_nibble(p + 8, out, [d, m, fifth](int j, int q) {
      return static_cast<float>(q | static_cast<int>(fifth >> j & 1u) << 4) * d + m;
    });
  }
};

struct DecodeQ80 {
  static constexpr int64_t values = 32, bytes = 34;
  static void block(const uint8_t* p, float* out) {
    const float d = half_at(p);
    const int8_t* q = reinterpret_cast<const int8_t*>(p + 2);
#pragma omp simd
    for (int j = 0; j < 32; ++j) out[j] = static_cast<float>(q[j]) * d;
  }
};

struct DecodeQ2K {
  static constexpr int64_t values = 256, bytes = 84;
  static void block(const uint8_t* p, float* out) {
    const float d = half_at(p + 80), low = half_at(p + 82);
    for (int part = 0; part < 8; ++part) {  // 32 values each
      const uint8_t* q = p + 16 + part / 4 * 32;
      const int shift = part % 4 * 2;
      for (int group = 0; group < 2; ++group) {
        const int scale = p[2 * part + group];
        const float step = d * static_cast<float>(scale & 15), less = low * static_cast<float>(scale >> 4);
        float* to = out + part * 32 + group * 16;
#pragma omp simd
        for (int j = 0; j < 16; ++j) to[j] = step * static_cast<float>(q[group * 16 + j] >> shift & 3) - less;
      }
    }
  }
};

struct DecodeQ3K {
  static constexpr int64_t values = 256, bytes = 110;
  static void block(const uint8_t* p, float* out) {
    const float d = half_at(p + 108);
    const uint8_t* scales = p + 96;
    for (int part = 0; part < 8; ++part) {
      const uint8_t* q = p + 32 + part / 4 * 32;
      const int shift = part % 4 * 2;
      for (int group = 0; group < 2; ++group) {
        const int s = 2 * part + group;
        const int six = (s < 8 ? scales[s] & 15 : scales[s - 8] >> 4) | (scales[8 + s % 4] >> (s / 4 * 2) & 3) << 4;
        const float step = d * static_cast<float>(six - 32);
        float* to = out + part * 32 + group * 16;
#pragma omp simd
        for (int j = 0; j < 16; ++j) {
          const int level = (q[group * 16 + j] >> shift & 3) | (p[group * 16 + j] >> part & 1) << 2;
          to[j] = step * static_cast<float>(level - 4);
        }
      }
    }
  }
};

// The eight scales and minima of six bits in twelve bytes.
inline void six_bits(const uint8_t* b, int (&scales)[8], int (&minima)[8]) {
  for (int j = 0; j < 4; ++j) {
    scales[j] = b[j] & 63;
    minima[j] = b[j + 4] & 63;
    scales[j + 4] = (b[j + 8] & 15) | (b[j] >> 6) << 4;
    minima[j + 4] = b[j + 8] >> 4 | (b[j + 4] >> 6) << 4;
  }
}

template <bool Fifth>
struct DecodeQ45K {
  static constexpr int64_t values = 256, bytes = Fifth ? 176 : 144;
  static void block(const uint8_t* p, float* out) {
    const float d = half_at(p), low = half_at(p + 2);
    int scales[8], minima[8];
    six_bits(p + 4, scales, minima);
    const uint8_t *fifth = p + 16, *qs = p + (Fifth ? 48 : 16);
    for (int group = 0; group < 8; ++group) {
      const float step = d * static_cast<float>(scales[group]), less = low * static_cast<float>(minima[group]);
      const uint8_t* q = qs + group / 2 * 32;
      const int shift = group % 2 * 4;
      float* to = out + group * 32;
      const auto value = [step, less](int level) { return step * static_cast<float>(level) - less; };
      if constexpr (!Fifth) {
        const Nibbles nibbles(value);
        nibbles.sixteen(q, shift, to);
        nibbles.sixteen(q + 16, shift, to + 16);
      } else {
#pragma omp simd
        for (int j = 0; j < 32; ++j) to[j] = value((q[j] >> shift & 15) | (fifth[j] >> group & 1) << 4);
      }
    }
  }
};
using DecodeQ4K = DecodeQ45K<false>;
using DecodeQ5K = DecodeQ45K<true>;

struct DecodeQ6K {
  static constexpr int64_t values = 256, bytes = 210;
  static void block(const uint8_t* p, float* out) {
    const float d = half_at(p + 208);
    const int8_t* scales = reinterpret_cast<const int8_t*>(p + 192);
    for (int part = 0; part < 8; ++part) {
      const int half = part / 4, quarter = part % 4;
      const uint8_t *low = p + half * 64 + quarter % 2 * 32, *high = p + 128 + half * 32;
      const int low_shift = quarter / 2 * 4, high_shift = quarter * 2;
      for (int group = 0; group < 2; ++group) {
        const float step = d * static_cast<float>(scales[2 * part + group]);
        float* to = out + part * 32 + group * 16;
#pragma omp simd
        for (int j = 0; j < 16; ++j) {
          const int at = group * 16 + j, level = (low[at] >> low_shift & 15) | (high[at] >> high_shift & 3) << 4;
          to[j] = step * static_cast<float>(level - 32);
        }
      }
    }
  }
};

constexpr float non_linear_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// 32 values of a table times a step.
inline void look_up(const uint8_t* qs, float step, float* out, const float (&table)[16] = non_linear_values) {
  const auto value = [step, &table](int q) { return table[q] * step; };
  Nibbles(value).both(qs, out);
}

struct DecodeIQ4NL {
  static constexpr int64_t values = 32, bytes = 18;
  static void block(const uint8_t* p, float* out) { look_up(p + 2, half_at(p), out); }
};

struct DecodeIQ4XS {
  static constexpr int64_t values = 256, bytes = 136;
  static void block(const uint8_t* p, float* out) {
    const float d = half_at(p);
    for (int group = 0; group < 8; ++group) {
      const int high = p[2 + group / 4] >> (group % 4 * 2) & 3, low = p[4 + group / 2] >> (group % 2 * 4) & 15;
      look_up(p + 8 + group * 16, d * static_cast<float>((low | high << 4) - 32), out + group * 32);
    }
  }
};

struct DecodeMXFP4 {
  static constexpr int64_t values = 32, bytes = 17;
  static void block(const uint8_t* p, float* out) {
    look_up(p + 1, half_power(p[0]), out, doubled_e2m1);
  }
};

template <class Format>
void decode_blocks(const void* matrix, int64_t r, int64_t from, int64_t n, float* out) {
  const GgmlMatrix& w = *static_cast<const GgmlMatrix*>(matrix);
  const int64_t row = w.order == nullptr ? r : w.order[r];
  const uint8_t* blocks = w.blocks + row * w.stride + from / Format::values * Format::bytes;
  for (int64_t j = 0; j < n; j += Format::values, blocks += Format::bytes) Format::block(blocks, out + j);
}

inline CodedRows rows_of(const GgmlMatrix& w) {
  const auto rows = [&w](auto decode) { return CodedRows{&w, w.o, w.i, decode}; };
  switch (w.kind) {
    case GgmlKind::q4_0: return rows(decode_blocks<DecodeQ40>);
    case GgmlKind::q4_1: return rows(decode_blocks<DecodeQ41>);
    case GgmlKind::q5_0: return rows(decode_blocks<DecodeQ50>);
    case GgmlKind::q5_1: return rows(decode_blocks<DecodeQ51>);
    case GgmlKind::q2_k: return rows(decode_blocks<DecodeQ2K>);
    case GgmlKind::q3_k: return rows(decode_blocks<DecodeQ3K>);
    case GgmlKind::q4_k: return rows(decode_blocks<DecodeQ4K>);
    case GgmlKind::q5_k: return rows(decode_blocks<DecodeQ5K>);
    case GgmlKind::q6_k: return rows(decode_blocks<DecodeQ6K>);
    case GgmlKind::iq4_nl: return rows(decode_blocks<DecodeIQ4NL>);
    case GgmlKind::iq4_xs: return rows(decode_blocks<DecodeIQ4XS>);
    case GgmlKind::mxfp4: return rows(decode_blocks<DecodeMXFP4>);
    default: return rows(decode_blocks<DecodeQ80>);
  }
}

}  // namespace
}  // namespace veneer
