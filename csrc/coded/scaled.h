// Numbers of 1 to 8 bits times a scale, as the formats' own libraries compute them: each step is rounded as there.
#pragma once

#include "coded/coded.h"
#include "coded/product.h"

namespace veneer {
namespace {

typedef uint8_t byte_lanes __attribute__((vector_size(width)));

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
  return half_rounded(v);
}

// ---- numbers: small floats are halves whose exponents are off by a power of two -------------------------------------------

// GCC 12 takes a __builtin_convertvector of bytes apart.
inline half_lanes widened(byte_lanes codes) {
#if defined(__AVX512F__)
  return (half_lanes)_mm256_cvtepu8_epi16((__m128i)codes);
#elif defined(__AVX2__)
  return (half_lanes)_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&codes)));
#else
  return __builtin_convertvector(codes, half_lanes);
#endif
}

struct Whole {
  static lanes of(byte_lanes codes) {
    return __builtin_convertvector((int_lanes)__builtin_convertvector(widened(codes), bit_lanes), lanes);
  }
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

// f(number) for each of n codes, one a byte.
template <class Number, class F>
inline void each_number(const uint8_t* codes, int64_t n, float* out, const F& f) {
  int64_t j = 0;
  for (; j + width <= n; j += width) {
    byte_lanes c;
    std::memcpy(&c, codes + j, sizeof c);
    store(out + j, f(Number::of(c)));
  }
  if (j < n) {
    byte_lanes c = {};
    std::memcpy(&c, codes + j, static_cast<size_t>(n - j));
    store_some(out + j, f(Number::of(c)), n - j);
  }
}

// Values [at, at + n) of scales or zeros.
inline void stored_values(const void* values, Stored how, int64_t at, int64_t n, float* out) {
  const auto widen = [&](const auto* from) {
    each_register(n, [&](int64_t j, int64_t left) { put(out + j, take(from + at + j, left), left); });
  };
  const uint8_t* bytes = static_cast<const uint8_t*>(values) + at;
  const auto convert = [&](auto value) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] = value(bytes[j]);
  };
  switch (how) {
    case Stored::bfloat16: return widen(static_cast<const bf16*>(values));
    case Stored::float16: return widen(static_cast<const fp16*>(values));
    case Stored::e8m0:
      return convert([](uint8_t b) {  // 2^-127 is no normal number
        return bit_cast<float>(b == 0 ? 0x00400000u : b == 255 ? 0x7fc00000u : static_cast<uint32_t>(b) << 23);
      });
    case Stored::e4m3: return each_number<E4m3>(bytes, n, out, [](lanes v) { return v; });
    case Stored::uint8: return convert([](uint8_t b) { return static_cast<float>(b); });
    default: return widen(static_cast<const float*>(values));
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
template <int bits>
inline void unpack_words(const uint8_t* packed, int64_t n, uint8_t* codes) {
  constexpr uint64_t mask = (1 << bits) - 1;
  for (int64_t first = 0; first < n; first += 8, packed += bits) {
    uint64_t word = 0;
    // three bytes are put together in memory, eight are one load
    if ((n - first) * bits >= 64)
      std::memcpy(&word, packed, sizeof word);
    else
      std::memcpy(&word, packed, bits);
#if defined(__BMI2__)
    const uint64_t spread = _pdep_u64(word, mask * 0x0101010101010101u);
    std::memcpy(codes + first, &spread, sizeof spread);
#else
    for (int64_t k = 0; k < 8; ++k) codes[first + k] = static_cast<uint8_t>(word >> (k * bits) & mask);
#endif
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
    case 3: unpack_words<3>(packed, n, room); break;
    case 5: unpack_words<5>(packed, n, room); break;
    default: unpack_words<6>(packed, n, room);
  }
  return room;
}

// ---- rows -----------------------------------------------------------------------------------------------------------------

// How numbers of a group become values. Apart: the difference to a zero that is no whole number is rounded too.
template <class NumberOf, class Round, bool Apart>
struct Scaling {
  using Number = NumberOf;
  float zero, scale;

  lanes operator()(lanes number) const {
    const lanes apart = number - zero;
    return rounded<Round>((Apart ? rounded<Round>(apart) : apart) * scale);
  }
};

#if defined(__AVX512F__)
// Two codes a byte, n of them, a multiple of 16: looked up in a table.
template <class Value>
inline void each_nibble_number(const uint8_t* packed, int64_t n, float* out, const Value& value) {
  const byte_lanes every = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const __m512 table = (__m512)value(Value::Number::of(every));
  for (int64_t j = 0; j < n; j += 16, packed += 8) {
    const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
    // only the low four bits of an index count
    _mm512_storeu_ps(out + j, _mm512_permutexvar_ps(_mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28)), table));
  }
}
#endif

inline int64_t divided(int64_t a, int64_t b) { return static_cast<uint32_t>(a) / static_cast<uint32_t>(b); }  // in a third of the time

// Values [from, stop) of a row, at most piece_values, whose scales begin at `first`.
template <class Value>
inline void decode_groups(const ScaledMatrix& w, const uint8_t* codes, int64_t first, int64_t from, int64_t stop, float* out) {
  float scales[piece_values + 1], zeros[piece_values + 1];
  const int64_t g = from == 0 ? 0 : divided(from, w.group), n = divided(stop - 1, w.group) + 1 - g;
  stored_values(w.scales, w.scales_stored, first + g, n, scales);
  if (w.overall != nullptr) {
    const float overall = *w.overall;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) scales[j] = w.divides ? scales[j] / overall : scales[j] * overall;
  }
  if (w.zeros != nullptr) stored_values(w.zeros, w.zeros_stored, first + g, n, zeros);
  const auto each_group = [&](const auto& decode) {
    int64_t c = from, end = (g + 1) * w.group;
    for (int64_t j = 0; j < n; ++j, c = end, end += w.group) {
      const int64_t last = end < stop ? end : stop;
      decode(c - from, last - c, Value{w.zeros == nullptr ? w.zero : zeros[j], scales[j]});
    }
  };
#if defined(__AVX512F__)
  if (w.bits == 4 && w.group % 16 == 0 && w.i % 16 == 0) {
    const uint8_t* packed = codes + from / 2;
    return each_group([&](int64_t c, int64_t m, const Value& value) { each_nibble_number(packed + c / 2, m, out + c, value); });
  }
#endif
  uint8_t room[piece_values + 8];
  const uint8_t* unpacked = codes_at(codes, w.bits, from, stop - from, room);
  each_group([&](int64_t c, int64_t m, const Value& value) {
    each_number<typename Value::Number>(unpacked + c, m, out + c, value);
  });
}

template <class Value>
void decode_scaled_piece(const void* matrix, int64_t r, int64_t from, int64_t n, float* out) {
  const ScaledMatrix& w = *static_cast<const ScaledMatrix*>(matrix);
  const int64_t row = w.order == nullptr ? w.first + r : w.order[r];
  const int64_t first = (w.height == 1 ? row : row / w.height) * w.groups;
  const uint8_t* codes = w.codes + row * w.stride;
  for (const int64_t end = from + n; from < end; from += piece_values, out += piece_values)
    decode_groups<Value>(w, codes, first, from, from + piece_values < end ? from + piece_values : end, out);
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
