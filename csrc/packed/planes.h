// Numbers of 2 and 3 bits. A word of 32 bits holds the lower two bits of sixteen inputs of an output. Its low half has the
// even inputs, the first in the lowest bits, and its high half the odd ones. The third bits come behind the words of all
// outputs, for sixteen outputs together. They are eight words: word m has inputs 2 m and 2 m + 1 of each output side by side.
#pragma once

#include "packed/groups.h"

namespace veneer {
namespace {

inline float middle_of(const PanelMatrix& m) {
  return m.coding.numbers == Coding::signed3 ? 4.0f : m.coding.numbers == Coding::signed2 ? 2.0f : 0.0f;
}
constexpr int64_t third_bytes = 32;  // of sixteen outputs

template <bool has_third>
struct Planes {
  static constexpr int64_t group_bytes = has_third ? 6 : 4;
  using Half = PlainHalf;
  const float middle;
  bit_lanes words, places;
  const char* thirds;

  explicit Planes(const PanelMatrix& m) : middle(middle_of(m)) {}
  void load(const char* group_codes, int64_t across, int64_t output) {
    std::memcpy(&words, group_codes + 4 * output, sizeof words);
    thirds = group_codes + 4 * across + output / panel_block * third_bytes;
    for (int64_t l = 0; l < width; ++l) places[l] = static_cast<uint32_t>(2 * (output % panel_block + l));
  }
  void numbers(int m, lanes& first, lanes& second) const {
    bit_lanes even = words >> 2 * m & 3u, odd = words >> (16 + 2 * m) & 3u;
    if constexpr (has_third) {
      uint32_t third;
      std::memcpy(&third, thirds + 4 * m, sizeof third);
      const bit_lanes both = (bit_lanes{} + third) >> places;
      even |= (both & 1u) << 2;
      odd |= (both & 2u) << 1;
    }
    first = __builtin_convertvector((int_lanes)even, lanes) - middle;
    second = __builtin_convertvector((int_lanes)odd, lanes) - middle;
  }
};

#if defined(__AVX512BF16__)
// The values of all numbers of sixteen outputs: number q of output o is word 16 q + o of two registers, or of two more.
template <class Formula, int numbers>
struct ValueTable {
  __m512i words[numbers / 2];

  ValueTable(const UnitHead& head, int64_t output, float middle) {
    const lanes scale = load(head.scale + output), beside = load(head.beside + output);
#pragma GCC unroll 4
    for (int q = 0; q < numbers; q += 2) {
      const lanes first = Formula::of(splat(static_cast<float>(q)) - middle, scale, beside);
      const lanes second = Formula::of(splat(static_cast<float>(q + 1)) - middle, scale, beside);
      words[q / 2] = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    }
  }
};

template <class Formula, bool has_third, class T>
void decode_planes(const PanelMatrix& m, int64_t begin, int64_t end, int64_t from, int64_t to, T* out, int64_t own) {
  using Codes = Planes<has_third>;
  const Panel panel = panel_of(m, begin);
  const int64_t outputs = (end - begin) * panel_block, first_output = panel.first, across = panel.across;
  const int64_t step = across * Codes::group_bytes;
  const float middle = middle_of(m);
  const __m512i numbers = _mm512_set1_epi16(0x30), place = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(0x10001));
  each_unit<UnitHead>(m, begin, from, to, Codes::group_bytes, [&](int64_t start, int64_t stop, const char* at, const UnitHead& head) {
    for (int64_t j = 0; j < outputs; j += panel_block) {
      const int64_t output = first_output + j;
      const ValueTable<Formula, has_third ? 8 : 4> table(head, output, middle);
      const char *codes = at + 4 * output, *thirds = at + 4 * across + output / panel_block * third_bytes;
      for (int64_t k = start; k < stop; k += group, codes += step, thirds += step) {
        const __m512i words = _mm512_loadu_si512(codes);
        PairSink<T> sink(out, own, k - from, j);
#pragma GCC unroll 8
        for (int p = 0; p < 8; ++p) {
          const __m512i moved = p < 2 ? _mm512_slli_epi16(words, static_cast<unsigned>(4 - 2 * p))
                                      : _mm512_srli_epi16(words, static_cast<unsigned>(2 * p - 4));
          const __m512i index = _mm512_ternarylogic_epi32(moved, numbers, place, 0xea);  // (moved & numbers) | place
          __m512i pairs = _mm512_permutex2var_epi16(table.words[0], index, table.words[1]);
          if constexpr (has_third) {
            __mmask32 third;
            std::memcpy(&third, thirds + 4 * p, sizeof third);
            pairs = _mm512_mask_blend_epi16(third, pairs, _mm512_permutex2var_epi16(table.words[2], index, table.words[3]));
          }
          sink.put(p, pairs);
        }
        sink.finish();
      }
    }
  });
}
#endif

}  // namespace
}  // namespace veneer
