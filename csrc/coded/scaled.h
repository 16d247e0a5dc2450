// Numbers of 1 to 8 bits times a scale, as the formats' own libraries compute them: each step is rounded as there.
#pragma once

#include "coded/coded.h"
#include "coded/product.h"

namespace veneer {
namespace {

typedef uint8_t byte_lanes __attribute__((vector_size(width)));

inline lanes from_half(half_lanes bits) {
#if defined(__AVX512F__)
  return (lanes)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
  return (lanes)_mm256_cvtph_ps((__m128i)bits);
#else
  lanes out;
  for (int64_t i = 0; i < width; ++i) out[i] = to_float(fp16{bits[i]});
  return out;
#endif
}

template <class T>
inline lanes rounded(lanes v) {
  return v;
}
template <>
inline lanes rounded<bf16>(lanes v) {
  return (lanes)(bf16_bits(v) << 16);
}
template <>
inline lanes rounded<fp16>(lanes v) {
#if defined(__AVX512F__)
  return (lanes)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return (lanes)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int64_t i = 0; i < width; ++i) v[i] = to_float(from_float<fp16>(v[i]));
  return v;
#endif
}

// ---- numbers: small floats are halves whose exponents are off by a power of two -------------------------------------------

inline half_lanes widened(byte_lanes codes) { return __builtin_convertvector(codes, half_lanes); }

struct Whole {
  static lanes of(byte_lanes codes) { return __builtin_convertvector(__builtin_convertvector(codes, int_lanes), lanes); }
};
struct E2m1 {
  static lanes of(byte_lanes codes) {
    const half_lanes c = widened(codes);
    return from_half((c & 7) << 9 | (c & 8) << 12) * 0x1p14f;
  }
};
struct E4m3 {
  static lanes of(byte_lanes codes) {
    const half_lanes c = widened(codes), magnitude = c & 0x7f;
    const half_lanes nan = (half_lanes)(magnitude == 0x7f) & 0x7e00;
    return from_half((magnitude << 7 | (c & 0x80) << 8) | nan) * 0x1p8f;
  }
};
struct E5m2 {
  static lanes of(byte_lanes codes) { return from_half(widened(codes) << 8); }
};

inline float e4m3_value(uint8_t code) {
  if ((code & 0x7f) == 0x7f) return bit_cast<float>(0x7fc00000u);
  return to_float(fp16{static_cast<uint16_t>((code & 0x7f) << 7 | (code & 0x80) << 8)}) * 0x1p8f;
}
inline float e8m0_value(uint8_t code) {
  if (code == 0) return 0x1p-127f;
  return bit_cast<float>(code == 255 ? 0x7fc00000u : static_cast<uint32_t>(code) << 23);
}

inline float stored_value(const void* values, Stored how, int64_t at) {
  switch (how) {
    case Stored::bfloat16: return to_float(static_cast<const bf16*>(values)[at]);
    case Stored::float16: return to_float(static_cast<const fp16*>(values)[at]);
    case Stored::e8m0: return e8m0_value(static_cast<const uint8_t*>(values)[at]);
    case Stored::e4m3: return e4m3_value(static_cast<const uint8_t*>(values)[at]);
    case Stored::uint8: return static_cast<float>(static_cast<const uint8_t*>(values)[at]);
    default: return static_cast<const float*>(values)[at];
  }
}

// ---- codes ----------------------------------------------------------------------------------------------------------------

// n codes, a whole number of bytes or the last of a row; up to 7 more are written.
template <int bits>
inline void unpack_bytes(const uint8_t* packed, int64_t n, uint8_t* codes) {
  constexpr int per_byte = 8 / bits;
  constexpr uint8_t mask = (1 << bits) - 1;
#pragma omp simd
  for (int64_t b = 0; b < (n + per_byte - 1) / per_byte; ++b)
    for (int k = 0; k < per_byte; ++k) codes[b * per_byte + k] = packed[b] >> (k * bits) & mask;
}

// The same for codes that do not end with a byte: eight of them are `bits` bytes.
inline void unpack_words(const uint8_t* packed, int64_t bits, int64_t n, uint8_t* codes) {
  const uint8_t mask = static_cast<uint8_t>((1 << bits) - 1);
  for (int64_t first = 0; first < n; first += 8, packed += bits) {
    uint64_t word = 0;
    for (int64_t b = 0; b < bits; ++b) word |= static_cast<uint64_t>(packed[b]) << (8 * b);
    for (int64_t k = 0; k < 8; ++k) codes[first + k] = static_cast<uint8_t>(word >> (k * bits)) & mask;
  }
}

// n codes of a row from `from`, a multiple of eight: where they are, one a byte.
inline const uint8_t* codes_at(const uint8_t* row, int64_t bits, int64_t from, int64_t n, uint8_t* room) {
  const uint8_t* packed = row + from * bits / 8;
  switch (bits) {
    case 8: return packed;
    case 4: unpack_bytes<4>(packed, n, room); break;
    case 2: unpack_bytes<2>(packed, n, room); break;
    case 1: unpack_bytes<1>(packed, n, room); break;
    default: unpack_words(packed, bits, n, room);
  }
  return room;
}

// ---- rows -----------------------------------------------------------------------------------------------------------------

// How codes of a group become values. Apart: the difference to a zero that is no whole number is rounded too.
template <class Number, class Round, bool Apart>
struct Scaling {
  float zero, scale;

  lanes operator()(byte_lanes codes) const {
    const lanes apart = Number::of(codes) - zero;
    return rounded<Round>((Apart ? rounded<Round>(apart) : apart) * scale);
  }

  // One code a byte.
  void bytes(const uint8_t* codes, int64_t n, float* out) const {
    const Scaling value = *this;
    int64_t j = 0;
    for (; j + width <= n; j += width) {
      byte_lanes c;
      std::memcpy(&c, codes + j, sizeof c);
      store(out + j, value(c));
    }
    if (j < n) {
      byte_lanes c = {};
      std::memcpy(&c, codes + j, static_cast<size_t>(n - j));
      store_some(out + j, value(c), n - j);
    }
  }

#if defined(__AVX512F__)
  // Two codes a byte, n of them, a multiple of 16: looked up in a table.
  void nibbles(const uint8_t* packed, int64_t n, float* out) const {
    const __m512 table = (__m512)(*this)(byte_lanes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});
    for (int64_t j = 0; j < n; j += 16, packed += 8) {
      const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
      // only the low four bits of an index count
      const __m512i places = _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28));
      _mm512_storeu_ps(out + j, _mm512_permutexvar_ps(places, table));
    }
  }
#endif
};

template <class Value>
Value scaling_of(const ScaledMatrix& w, int64_t at) {
  float scale = stored_value(w.scales, w.scales_stored, at);
  if (w.overall != nullptr) scale = w.divides ? scale / *w.overall : scale * *w.overall;
  return {w.zeros == nullptr ? w.zero : stored_value(w.zeros, w.zeros_stored, at), scale};
}

// f(group, c, end) for the part [c, end) of each group within [from, stop).
template <class F>
inline void each_group(const ScaledMatrix& w, int64_t from, int64_t stop, const F& f) {
  for (int64_t g = from / w.group; from < stop; ++g) {
    const int64_t end = (g + 1) * w.group < stop ? (g + 1) * w.group : stop;
    f(g, from, end);
    from = end;
  }
}

template <class Value>
void decode_scaled_piece(const void* matrix, int64_t r, int64_t from, int64_t n, float* out) {
  const ScaledMatrix& w = *static_cast<const ScaledMatrix*>(matrix);
  const int64_t row = w.order == nullptr ? w.first + r : w.order[r], groups = (w.i + w.group - 1) / w.group;
  const int64_t first = row / w.height * groups, start = from;
  const uint8_t* codes = w.codes + row * w.stride;
#if defined(__AVX512F__)
  if (w.bits == 4 && w.group % 16 == 0 && w.i % 16 == 0)
    return each_group(w, from, from + n, [&](int64_t g, int64_t c, int64_t end) {
      scaling_of<Value>(w, first + g).nibbles(codes + c / 2, end - c, out + (c - start));
    });
#endif
  uint8_t room[piece_values + 8];
  for (const int64_t end = from + n; from < end; from += piece_values) {
    const int64_t stop = from + piece_values < end ? from + piece_values : end;
    const uint8_t* unpacked = codes_at(codes, w.bits, from, stop - from, room);
    each_group(w, from, stop, [&](int64_t g, int64_t c, int64_t last) {
      scaling_of<Value>(w, first + g).bytes(unpacked + (c - from), last - c, out + (c - start));
    });
  }
}

template <class Number, bool Apart = false>
CodedRows rounding_rows(const ScaledMatrix& w) {
  switch (w.rounding) {
    case Dtype::bfloat16: return {&w, w.o, w.i, decode_scaled_piece<Scaling<Number, bf16, Apart>>};
    case Dtype::float16: return {&w, w.o, w.i, decode_scaled_piece<Scaling<Number, fp16, Apart>>};
    default: return {&w, w.o, w.i, decode_scaled_piece<Scaling<Number, float, Apart>>};
  }
}

inline CodedRows rows_of(const ScaledMatrix& w) {
  const bool whole_zeros = w.zeros == nullptr || w.zeros_stored == Stored::uint8;
  switch (w.numbers) {
    case Numbers::e2m1: return rounding_rows<E2m1>(w);
    case Numbers::e4m3: return rounding_rows<E4m3>(w);
    case Numbers::e5m2: return rounding_rows<E5m2>(w);
    default: return whole_zeros ? rounding_rows<Whole>(w) : rounding_rows<Whole, true>(w);
  }
}

}  // namespace
}  // namespace veneer
