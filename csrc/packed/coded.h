// Weights in codes, packed: of 2 to 8 bits, their scales among them in one stream. A product is, to the bit, that of the
// dense packed matrix of the values that the codes stand for: they come out of the codes in registers, for a few rows, or
// panel by panel into cache. Here are NF4, FP4 and int8; the others are in grouped.h.
//
// A panel of `across` outputs is, for each unit of inputs, a scale of each output, in most formulas a second number of each,
// and then the codes of the unit. In 4 bits: [unit / 16][across][2] words of 32 bits, the even and the odd ones of sixteen
// inputs, the first in the lowest bits. In 8 bits: [unit / 2][across][2]. In 2 and 3 bits as planes.h has it. Inputs are
// filled up with zeros to whole units; a unit is a multiple of 16.
#pragma once

#include "core/panels.h"
#include "four_bit/four_bit.h"

namespace veneer {
namespace {

constexpr int64_t group = 16;  // inputs that are decoded together
constexpr float inverse_127 = 7.874015718698502e-3f;

inline bool is_coded(const PanelMatrix& m) { return m.coding.numbers != Coding::none; }
inline int64_t code_bits(const PanelMatrix& m) {
  switch (m.coding.numbers) {
    case Coding::int8:
    case Coding::signed8:
    case Coding::unsigned8:
    case Coding::e4m3:
    case Coding::e5m2: return 8;
    case Coding::signed2:
    case Coding::unsigned2: return 2;
    case Coding::signed3:
    case Coding::unsigned3: return 3;
    default: return 4;
  }
}
inline int64_t scale_bytes(Coding::Scales scales) { return scales == Coding::float32 ? 4 : scales == Coding::e8m0 ? 1 : 2; }
// Of one output: what stands in front of a unit's codes, and a unit.
inline int64_t head_bytes(const PanelMatrix& m) { return scale_bytes(m.coding.scales) * (m.coding.formula == Coding::scaled ? 1 : 2); }
inline int64_t unit_bytes(const PanelMatrix& m) { return head_bytes(m) + m.unit * code_bits(m) / 8; }
inline int64_t output_bytes(const PanelMatrix& m) { return m.depth / m.unit * unit_bytes(m); }
inline char* coded_panel(const PanelMatrix& m, int64_t block) {
  return static_cast<char*>(m.values) + block / panel_blocks * panel_blocks * panel_block * output_bytes(m);
}

// ---- one value at a time ------------------------------------------------------------------------------------------------

struct CodedOutput {  // of a panel
  const PanelMatrix& m;
  char* panel;
  int64_t across, first;

  CodedOutput(const PanelMatrix& matrix, int64_t r)
      : m(matrix), panel(coded_panel(matrix, r / panel_block)), across(panel_of(matrix, r / panel_block).across),
        first(panel_of(matrix, r / panel_block).first + r % panel_block) {}

  char* unit_at(int64_t k) const { return panel + k / m.unit * across * unit_bytes(m); }
  float scale(int64_t k) const {
    float s;
    std::memcpy(&s, unit_at(k) + 4 * first, sizeof s);
    return s;
  }
  void put_scale(int64_t k, float s) const { std::memcpy(unit_at(k) + 4 * first, &s, sizeof s); }
  char* word_at(int64_t k) const { return unit_at(k) + across * 4 + k % m.unit / group * across * 8 + first * 8 + k % 2 * 4; }
  int four_bit(int64_t k) const {
    uint32_t word;
    std::memcpy(&word, word_at(k), sizeof word);
    return static_cast<int>(word >> k % group / 2 * 4 & 15u);
  }
  int8_t& int8(int64_t k) const {
    return *reinterpret_cast<int8_t*>(unit_at(k) + across * 4 + k % m.unit / 2 * across * 2 + first * 2 + k % 2);
  }
};

inline const FourBitCode& code_of(const PanelMatrix& m) { return four_bit_code(m.coding.numbers == Coding::fp4 ? 1 : 0); }

inline void pack_four_bit_row(const PanelMatrix& m, int64_t r, const uint8_t* packed, const float* absmax, int64_t block_size) {
  const CodedOutput out(m, r);
  for (int64_t k = 0; k < m.depth; k += m.unit) out.put_scale(k, r < m.o ? absmax[(r * m.i + k) / block_size] : 0.0f);
  for (int64_t k = 0; k < m.depth; k += group) {
    uint32_t words[2] = {0, 0};
    for (int64_t j = 0; r < m.o && j < group; ++j) {
      const int64_t at = r * m.i + k + j;
      const uint32_t code = at % 2 ? packed[at / 2] & 15u : packed[at / 2] >> 4;
      words[j % 2] |= code << j / 2 * 4;
    }
    std::memcpy(out.word_at(k), words, sizeof words);
  }
}
inline void unpack_four_bit_row(const PanelMatrix& m, int64_t r, uint8_t* packed) {
  const CodedOutput out(m, r);
  for (int64_t k = 0; k < m.i; k += 2) packed[(r * m.i + k) / 2] = static_cast<uint8_t>(out.four_bit(k) << 4 | out.four_bit(k + 1));
}

inline void pack_int8_row(const PanelMatrix& m, int64_t r, const int8_t* codes, const float* absmax) {
  const CodedOutput out(m, r);
  out.put_scale(0, r < m.o ? absmax[r] : 0.0f);
  for (int64_t k = 0; k < m.depth; ++k) out.int8(k) = r < m.o && k < m.i ? codes[r * m.i + k] : int8_t{0};
}
inline void unpack_int8_row(const PanelMatrix& m, int64_t r, int8_t* codes) {
  const CodedOutput out(m, r);
  for (int64_t k = 0; k < m.i; ++k) codes[r * m.i + k] = out.int8(k);
}

template <class T>
inline void dequantize_row(const PanelMatrix& m, int64_t r, T* row) {
  const CodedOutput out(m, r);
  const float* table = code_of(m).table;
  for (int64_t k = 0; k < m.i; ++k) {
    const float scale = out.scale(k);
    row[k] = from_float<T>(m.coding.numbers == Coding::int8 ? static_cast<float>(out.int8(k)) * scale * inverse_127 : table[out.four_bit(k)] * scale);
  }
}

// ---- registers of float -------------------------------------------------------------------------------------------------

// The values of codes: the low four bits of each lane count.
#if defined(__AVX512F__)
struct CodeTable {
  __m512 values;
  explicit CodeTable(const float* table) : values(_mm512_loadu_ps(table)) {}
  lanes operator[](bit_lanes codes) const { return (lanes)_mm512_permutexvar_ps((__m512i)codes, values); }
};
#elif defined(__AVX2__)
struct CodeTable {
  __m256 low, high;
  explicit CodeTable(const float* table) : low(_mm256_loadu_ps(table)), high(_mm256_loadu_ps(table + 8)) {}
  lanes operator[](bit_lanes codes) const {  // bit 3, shifted to the sign, chooses the half
    const __m256i at = (__m256i)codes;
    return (lanes)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at),
                                   _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
  }
};
#else
struct CodeTable {
  const float* values;
  explicit CodeTable(const float* table) : values(table) {}
  lanes operator[](bit_lanes codes) const {
    lanes out;
    for (int64_t l = 0; l < width; ++l) out[l] = values[codes[l] & 15u];
    return out;
  }
};
#endif

template <class W>
inline lanes rounded(lanes x) { return x; }
template <>
inline lanes rounded<fp16>(lanes x) { return half_rounded(x); }
template <>
inline lanes rounded<bf16>(lanes x) {  // of finite values
  const bit_lanes bits = (bit_lanes)x;
  return (lanes)((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

struct FourBits {  // sixteen inputs of as many outputs as a register holds
  static constexpr int64_t group_bytes = 8;  // of one output
  static constexpr int together = 8;         // pairs whose code is written out: here shifts become constants
  static constexpr bool is_whole = true;     // each row of W is a number of groups
  bit_lanes even, odd;

  void load(const char* codes, int64_t, int64_t output) {
#if defined(__AVX512F__)
    const __m512i one = _mm512_loadu_si512(codes + 8 * output), two = _mm512_loadu_si512(codes + 8 * output + 64);
    const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even = (bit_lanes)_mm512_permutex2var_epi32(one, first, two);
    odd = (bit_lanes)_mm512_permutex2var_epi32(one, _mm512_add_epi32(first, _mm512_set1_epi32(1)), two);
#else
    uint32_t words[2 * width];
    std::memcpy(words, codes + 8 * output, sizeof words);
    for (int64_t l = 0; l < width; ++l) {
      even[l] = words[2 * l];
      odd[l] = words[2 * l + 1];
    }
#endif
  }
  // Inputs 2 m and 2 m + 1.
  void values(int m, const CodeTable& table, lanes scale, lanes& first, lanes& second) const {
    first = table[even >> 4 * m] * scale;
    second = table[odd >> 4 * m] * scale;
  }
};

struct EightBits {
  static constexpr int64_t group_bytes = 16;
  static constexpr int together = 2;  // more is slower, and takes a compiler longer
  static constexpr bool is_whole = false;
  const char* codes;
  int64_t apart;

  void load(const char* group_codes, int64_t across, int64_t output) {
    codes = group_codes + 2 * output;
    apart = across * 2;
  }
  void values(int m, const CodeTable&, lanes scale, lanes& first, lanes& second) const {
    half_lanes pairs;
    std::memcpy(&pairs, codes + m * apart, sizeof pairs);
    const bit_lanes words = __builtin_convertvector(pairs, bit_lanes);
    first = __builtin_convertvector((int_lanes)(words << 24) >> 24, lanes) * scale * inverse_127;
    second = __builtin_convertvector((int_lanes)(words << 16) >> 24, lanes) * scale * inverse_127;
  }
};

// Tiles of a few rows of x, straight from the codes. W: what values are rounded to.
template <class Codes, class W, class Sink>
struct CodedProduct {
  const PanelMatrix& m;
  const float* x;
  int64_t stride;
  const Sink& sink;

  template <int rows, int blocks>
  void tile(int64_t row, int64_t block) const {
    constexpr int registers = blocks * vectors;
    const Panel panel = panel_of(m, block);
    const int64_t across = panel.across, depth = m.i, unit = m.unit, apart = stride;
    const float* from = x + row * apart;
    const char* at = coded_panel(m, block);
    const CodeTable table(code_of(m).table);
    lanes sums[rows][registers];
    for (int r = 0; r < rows; ++r)
      for (int s = 0; s < registers; ++s) sums[r][s] = lanes{};
    for (int64_t k = 0; k < depth;) {
      const float* scales = reinterpret_cast<const float*>(at) + panel.first;
      at += across * 4;
      for (const int64_t end = k + unit; k < end; k += group, at += across * Codes::group_bytes) {
        for (int64_t l = 0; l < blocks * panel_block * Codes::group_bytes; l += line)
          fetch(at + panel.first * Codes::group_bytes + far_ahead + l);
        Codes codes[registers];
        for (int s = 0; s < registers; ++s) codes[s].load(at, across, panel.first + s * width);
        const auto pair = [&](int j, int64_t left) __attribute__((always_inline)) {
          for (int s = 0; s < registers; ++s) {
            lanes first, second;
            codes[s].values(j, table, load(scales + s * width), first, second);
            for (int r = 0; r < rows; ++r)
              sums[r][s] = multiply_add(splat(from[r * apart + k + 2 * j]), rounded<W>(first), sums[r][s]);
            if (2 * j + 1 < left)
              for (int r = 0; r < rows; ++r)
                sums[r][s] = multiply_add(splat(from[r * apart + k + 2 * j + 1]), rounded<W>(second), sums[r][s]);
          }
        };
        if (Codes::is_whole || depth - k >= group) {
          for (int j = 0; j < 8; j += Codes::together) {
#pragma GCC unroll 8
            for (int next = 0; next < Codes::together; ++next) pair(j + next, group);
          }
        } else {
          for (int j = 0; 2 * j < depth - k; ++j) pair(j, depth - k);
        }
      }
    }
    each_sum<rows, blocks>(row, block, sums, sink);
  }
};

inline void store_values(float* to, int64_t across, int64_t k, int64_t depth, lanes first, lanes second) {
  store(to + k * across, first);
  if (k + 1 < depth) store(to + (k + 1) * across, second);
}
inline void store_values(bf16* to, int64_t across, int64_t k, int64_t, lanes first, lanes second) {
  const bit_lanes pairs = (bit_lanes)rounded<bf16>(second) | ((bit_lanes)rounded<bf16>(first) >> 16);
  std::memcpy(static_cast<void*>(to + k * across), &pairs, sizeof pairs);
}

// Blocks [begin, end) of one panel as a dense matrix of these outputs alone.
template <class Codes, class W>
void decode_by_lanes(const PanelMatrix& m, int64_t begin, int64_t end, const PanelMatrix& dense) {
  const Panel panel = panel_of(m, begin);
  const int64_t across = panel.across, own = (end - begin) * panel_block;
  const char* at = coded_panel(m, begin);
  const CodeTable table(code_of(m).table);
  W* to = static_cast<W*>(dense.values);
  for (int64_t k = 0; k < m.i;) {
    const float* scales = reinterpret_cast<const float*>(at) + panel.first;
    at += across * 4;
    for (const int64_t stop = k + m.unit; k < stop && k < m.i; k += group, at += across * Codes::group_bytes)
      for (int64_t j = 0; j < own; j += width) {
        Codes codes;
        codes.load(at, across, panel.first + j);
        const lanes scale = load(scales + j);
        const auto pair = [&](int p) __attribute__((always_inline)) {
          lanes first, second;
          codes.values(p, table, scale, first, second);
          store_values(to + place<W>(own, 0, j), own, k + 2 * p, m.i, first, second);
        };
        if (m.i - k >= group) {
#pragma GCC unroll 8
          for (int p = 0; p < 8; ++p) pair(p);
        } else {
          for (int p = 0; k + 2 * p < m.i; ++p) pair(p);
        }
      }
  }
}

// ---- registers of pairs -------------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
struct PairScales {  // of sixteen outputs: each twice, the first eight and the others
  __m512 low, high;
  void load(const float* scales) {
    const __m512 all = _mm512_loadu_ps(scales);
    low = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), all);
    high = _mm512_permutexvar_ps(_mm512_setr_epi32(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15), all);
  }
};

// Pair m of sixteen inputs of a block, in bf16, from the block's codes. Scales are such that the CPU's own rounding is that
// of integers: it would flush subnormal numbers.
inline __m512bh decoded_pairs(FourBits*, const char* codes, int64_t, int m, const __m512& table, const PairScales& scale) {
  const __m512i low = _mm512_srli_epi32(_mm512_loadu_si512(codes), static_cast<unsigned>(4 * m));
  const __m512i high = _mm512_srli_epi32(_mm512_loadu_si512(codes + 64), static_cast<unsigned>(4 * m));
  return _mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_permutexvar_ps(high, table), scale.high),
                             _mm512_mul_ps(_mm512_permutexvar_ps(low, table), scale.low));
}
inline __m512bh decoded_pairs(EightBits*, const char* codes, int64_t across, int m, const __m512&, const PairScales& scale) {
  const __m128i* at = reinterpret_cast<const __m128i*>(codes + m * across * 2);
  const __m512 by = _mm512_set1_ps(inverse_127);
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at + 1)));
  return _mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_mul_ps(high, scale.high), by), _mm512_mul_ps(_mm512_mul_ps(low, scale.low), by));
}
constexpr int64_t block_stride(FourBits*) { return 8; }
constexpr int64_t block_stride(EightBits*) { return 2; }

// As CodedProduct, on rows of bf16 that are filled up with zeros to an even number.
template <class Codes, class Sink>
struct CodedPairProduct {
  const PanelMatrix& m;
  const bf16* x;
  int64_t stride;
  const Sink& sink;

  template <int rows, int blocks>
  void tile(int64_t row, int64_t block) const {
    constexpr Codes* kind = nullptr;
    const Panel panel = panel_of(m, block);
    const int64_t across = panel.across, depth = m.i, unit = m.unit, apart = stride;
    const bf16* from = x + row * apart;
    const char* at = coded_panel(m, block);
    const __m512 table = _mm512_loadu_ps(code_of(m).table);
    lanes sums[rows][blocks];
    for (int r = 0; r < rows; ++r)
      for (int b = 0; b < blocks; ++b) sums[r][b] = lanes{};
    for (int64_t k = 0; k < depth;) {
      const float* from_scales = reinterpret_cast<const float*>(at) + panel.first;
      PairScales scales[blocks];
      for (int b = 0; b < blocks; ++b) scales[b].load(from_scales + b * panel_block);
      at += across * 4;
      for (const int64_t end = k + unit; k < end && k < depth; k += group, at += across * Codes::group_bytes) {
        for (int64_t l = 0; l < blocks * panel_block * Codes::group_bytes; l += line)
          fetch(at + panel.first * Codes::group_bytes + far_ahead + l);
        const char* codes = at + panel.first * block_stride(kind);
        const auto pair = [&](int j) __attribute__((always_inline)) {
          PairEngine::Values values[rows];
          for (int r = 0; r < rows; ++r) values[r] = PairEngine::values(from + r * apart + k + 2 * j);
          for (int b = 0; b < blocks; ++b) {
            const PairEngine::Weights w{decoded_pairs(kind, codes + b * panel_block * block_stride(kind), across, j, table, scales[b])};
            for (int r = 0; r < rows; ++r) sums[r][b] = PairEngine::add(sums[r][b], values[r], w);
          }
        };
        if (depth - k >= group) {
#pragma GCC unroll 8
          for (int j = 0; j < 8; ++j) pair(j);
        } else {
          for (int j = 0; 2 * j < depth - k; ++j) pair(j);
        }
      }
    }
    each_sum<rows, blocks>(row, block, sums, sink);
  }
};

template <class Codes>
void decode_pairs(const PanelMatrix& m, int64_t begin, int64_t end, const PanelMatrix& dense) {
  constexpr Codes* kind = nullptr;
  const Panel panel = panel_of(m, begin);
  const int64_t across = panel.across, own = (end - begin) * panel_block;
  const char* at = coded_panel(m, begin);
  const __m512 table = _mm512_loadu_ps(code_of(m).table);
  bf16* to = static_cast<bf16*>(dense.values);
  for (int64_t k = 0; k < m.i;) {
    const float* scales = reinterpret_cast<const float*>(at) + panel.first;
    at += across * 4;
    for (const int64_t stop = k + m.unit; k < stop && k < m.i; k += group, at += across * Codes::group_bytes)
      for (int64_t j = 0; j < own; j += panel_block) {
        PairScales scale;
        scale.load(scales + j);
        const char* codes = at + (panel.first + j) * block_stride(kind);
        const auto pair = [&](int p) __attribute__((always_inline)) {
          _mm512_storeu_si512(to + (k + 2 * p) * own + 2 * j, (__m512i)decoded_pairs(kind, codes, across, p, table, scale));
        };
        if (m.i - k >= group) {
#pragma GCC unroll 8
          for (int p = 0; p < 8; ++p) pair(p);
        } else {
          for (int p = 0; k + 2 * p < m.i; ++p) pair(p);
        }
      }
  }
}
#endif

template <class Codes, class W>
inline void decode_blocks(const PanelMatrix& m, int64_t begin, int64_t end, const PanelMatrix& dense) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(W) == 2) return decode_pairs<Codes>(m, begin, end, dense);
#endif
  decode_by_lanes<Codes, W>(m, begin, end, dense);
}

}  // namespace
}  // namespace veneer
