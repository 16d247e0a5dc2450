// Weights in codes of other formats, packed as coded.h describes: numbers of 2, 3, 4 or 8 bits with a scale, and perhaps an offset or
// a zero, for each unit of inputs of an output. Values are those of the format's own library, to the bit. A piece of a panel
// is decoded into the first-level cache and multiplied there by a few rows, or a whole panel by many.
#pragma once

#include "packed/groups.h"
#include "packed/planes.h"
#include "packed/tables.h"

namespace veneer {
namespace {

template <class W>
constexpr int64_t piece_inputs = 256 / sizeof(W);  // that are decoded together for a few rows: 16 KB of a whole panel

inline bool is_grouped(const PanelMatrix& m) { return m.coding.numbers >= Coding::signed4; }

// ---- numbers: those of inputs 2 m and 2 m + 1 of sixteen ------------------------------------------------------------------

typedef int16_t half_int_lanes __attribute__((vector_size(width * 2)));

struct Tabled {  // 4 bits, from a table
  using Half = PlainHalf;
  static constexpr int64_t group_bytes = FourBits::group_bytes;
  CodeTable table;
  FourBits codes;

  explicit Tabled(const PanelMatrix& m) : table(table_of(m)) {}
  void load(const char* group_codes, int64_t across, int64_t output) { codes.load(group_codes, across, output); }
  void numbers(int m, lanes& first, lanes& second) const {
    first = table[codes.even >> 4 * m];
    second = table[codes.odd >> 4 * m];
  }
};

struct Bytes {  // 8 bits, two inputs of an output side by side
  static constexpr int64_t group_bytes = 16;
  const char* codes;
  int64_t apart;

  void load(const char* group_codes, int64_t across, int64_t output) {
    codes = group_codes + 2 * output;
    apart = across * 2;
  }
  half_lanes pairs(int m) const {
    half_lanes found;
    std::memcpy(&found, codes + m * apart, sizeof found);
    return found;
  }
};

template <bool is_signed>
struct Whole : Bytes {
  using Half = PlainHalf;
  explicit Whole(const PanelMatrix&) {}
  void numbers(int m, lanes& first, lanes& second) const {
    const bit_lanes words = __builtin_convertvector(pairs(m), bit_lanes);
    const int_lanes low = is_signed ? (int_lanes)(words << 24) >> 24 : (int_lanes)(words & 0xffu);
    const int_lanes high = is_signed ? (int_lanes)(words << 16) >> 24 : (int_lanes)(words >> 8);
    first = __builtin_convertvector(low, lanes);
    second = __builtin_convertvector(high, lanes);
  }
};

struct Floats : Bytes {  // of 8 bits: halves with fewer bits, whose exponent may be one shorter
  using Half = fp16;
  int shift;
  uint16_t kept;

  explicit Floats(const PanelMatrix& m) : shift(m.coding.numbers == Coding::e4m3), kept(shift ? 0xbfff : 0xffff) {}
  void numbers(int m, lanes& first, lanes& second) const {
    const half_lanes both = pairs(m);
    first = from_half((half_lanes)((half_int_lanes)(both << 8) >> static_cast<int16_t>(shift)) & kept);
    second = from_half((half_lanes)((half_int_lanes)(both & 0xff00) >> static_cast<int16_t>(shift)) & kept);
  }
};

// W: what values are rounded to. T: what they are stored as.
template <class Codes, class Formula, class W, class T>
void decode_group_lanes(const PanelMatrix& m, int64_t begin, int64_t end, int64_t from, int64_t to, T* out, int64_t own) {
  const Panel panel = panel_of(m, begin);
  const int64_t outputs = (end - begin) * panel_block, first_output = panel.first, across = panel.across;
  Codes codes(m);
  each_group(m, begin, from, to, Codes::group_bytes, [&](int64_t k, const char* at, const UnitHead& head) {
    T* row = out + (k - from) * own;
    for (int64_t j = 0; j < outputs; j += width) {
      codes.load(at, across, first_output + j);
      const lanes scale = load(head.scale + first_output + j), beside = load(head.beside + first_output + j);
      const auto pair = [&](int p) __attribute__((always_inline)) {
        lanes first, second;
        codes.numbers(p, first, second);
        store_values(row + place<T>(own, 0, j), own, 2 * p, to - k, rounded<W>(Formula::of(first, scale, beside)),
                     rounded<W>(Formula::of(second, scale, beside)));
      };
      if (to - k >= group) {
#pragma GCC unroll 8
        for (int p = 0; p < 8; ++p) pair(p);
      } else {
        for (int p = 0; k + 2 * p < to; ++p) pair(p);
      }
    }
  });
}

#if defined(__AVX512BF16__)
struct PairedHead {  // of sixteen outputs: each twice, the first eight and the others
  PairScales scale, beside;
  PairedHead(const UnitHead& head, int64_t output) {
    scale.load(head.scale + output);
    beside.load(head.beside + output);
  }
};

// Pair m of sixteen inputs of sixteen outputs, the first eight and the others.
inline void pair_numbers(const Tabled& t, const char* codes, int64_t, int m, lanes& low, lanes& high) {
  const bit_lanes first = (bit_lanes)_mm512_loadu_si512(codes), second = (bit_lanes)_mm512_loadu_si512(codes + 64);
  low = t.table[first >> 4 * m];
  high = t.table[second >> 4 * m];
}
template <bool is_signed>
inline void pair_numbers(const Whole<is_signed>&, const char* codes, int64_t across, int m, lanes& low, lanes& high) {
  const __m128i* at = reinterpret_cast<const __m128i*>(codes + m * across * 2);
  const auto wide = [](__m128i bytes) { return is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes); };
  low = (lanes)_mm512_cvtepi32_ps(wide(_mm_loadu_si128(at)));
  high = (lanes)_mm512_cvtepi32_ps(wide(_mm_loadu_si128(at + 1)));
}
inline void pair_numbers(const Floats& t, const char* codes, int64_t across, int m, lanes& low, lanes& high) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + m * across * 2));
  const __m512i words = _mm512_slli_epi16(_mm512_cvtepu8_epi16(bytes), 8);
  const __m512i halves = _mm512_and_si512(_mm512_sra_epi16(words, _mm_cvtsi32_si128(t.shift)), _mm512_set1_epi16(static_cast<int16_t>(t.kept)));
  low = (lanes)_mm512_cvtph_ps(_mm512_castsi512_si256(halves));
  high = (lanes)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
}
constexpr int64_t output_stride(const Tabled&) { return 8; }
constexpr int64_t output_stride(const Bytes&) { return 2; }

template <class Codes, class Formula, class T>
void decode_group_pairs(const PanelMatrix& m, int64_t begin, int64_t end, int64_t from, int64_t to, T* out, int64_t own) {
  const Panel panel = panel_of(m, begin);
  const int64_t outputs = (end - begin) * panel_block, first_output = panel.first, across = panel.across;
  const Codes codes(m);
  each_group(m, begin, from, to, Codes::group_bytes, [&](int64_t k, const char* at, const UnitHead& head) {
    for (int64_t j = 0; j < outputs; j += panel_block) {
      const PairedHead paired(head, first_output + j);
      const char* here = at + (first_output + j) * output_stride(codes);
      PairSink<T> sink(out, own, k - from, j);
      const auto pair = [&](int p) __attribute__((always_inline)) {
        lanes low, high;
        pair_numbers(codes, here, across, p, low, high);
        const lanes first = Formula::of(low, (lanes)paired.scale.low, (lanes)paired.beside.low);
        const lanes second = Formula::of(high, (lanes)paired.scale.high, (lanes)paired.beside.high);
        sink.put(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
      };
      if (to - k >= group) {
#pragma GCC unroll 8
        for (int p = 0; p < 8; ++p) pair(p);
      } else {
        for (int p = 0; k + 2 * p < to; ++p) pair(p);
      }
      sink.finish();
    }
  });
}
#endif

#if defined(__AVX512BF16__)
// Whole numbers of 4 bits whose scales and values are halves.
inline bool are_halves(const PanelMatrix& m) {
  const bool whole = m.coding.numbers == Coding::signed4 || m.coding.numbers == Coding::unsigned4;
  return whole && m.coding.scales == Coding::float16 && m.coding.rounding == Dtype::float16 && m.coding.formula != Coding::added;
}
#endif

#if defined(__AVX512FP16__)
// They are decoded by the CPU's own arithmetic of halves, which rounds as these formats do and keeps subnormal numbers. Values of
// sixteen outputs are one register, of two inputs: side by side for T = bf16, else one input behind the other.
struct HalfHead {  // as it is stored
  const char *scale, *beside;
  void load(const PanelMatrix&, const char* at, int64_t across) {
    scale = at;
    beside = at + across * 2;
  }
};

// Where the lanes of a register find the codes of inputs 0, 2, 4, 6 or 1, 3, 5, 7 among those of sixteen outputs; a fourth of
// it is their output, and one more is where the codes of the eight inputs behind them are.
template <class T>
inline __m512i code_places() {
  alignas(64) uint16_t places[32];
  for (int l = 0; l < 32; ++l) places[l] = static_cast<uint16_t>(sizeof(T) == 2 ? l / 2 * 4 + l % 2 * 2 : l % 16 * 4 + l / 16 * 2);
  return _mm512_load_si512(places);
}
inline __m512h half_lanes_of(const char* outputs, __m512i places) {
  const __m512i all = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(outputs)));
  return (__m512h)_mm512_permutexvar_epi16(_mm512_srli_epi16(places, 2), all);
}

// number - zero, where `raised` is a half: 1024 + number, or 1024 + 16 number in odd places.
struct WholeDifference {  // exact
  __m512h even, odd;
  explicit WholeDifference(__m512h zero) : even(_mm512_set1_ph(-1024) - zero), odd(_mm512_set1_ph(-64) - zero) {}
  __m512h of(__m512h raised, int place) const {
    return place % 2 ? _mm512_fmadd_ph(raised, _mm512_set1_ph(_Float16(0x1p-4f)), odd) : raised + even;
  }
};
struct RoundedDifference {
  __m512h zero;
  explicit RoundedDifference(__m512h zeros) : zero(zeros) {}
  __m512h of(__m512h raised, int place) const {
    const __m512h number = place % 2 ? _mm512_fmadd_ph(raised, _mm512_set1_ph(_Float16(0x1p-4f)), _mm512_set1_ph(-64))
                                     : raised - _mm512_set1_ph(1024);
    return number - zero;
  }
};

// Eight pairs of inputs of sixteen outputs, as T in a right operand. They go by way of memory: the upper half of a register would
// have to be moved down before it is widened.
template <class W, class T>
inline void widen(const char (&halves)[8][64], T* out, int64_t own, int64_t j) {
  asm volatile("" : : "r"(halves) : "memory");
#pragma GCC unroll 8
  for (int p = 0; p < 8; ++p, out += 2 * own) {
    const __m512 first = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(halves[p])));
    const __m512 second = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(halves[p] + 32)));
    if constexpr (sizeof(T) == 2) {
      _mm512_storeu_si512(out + 2 * j, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    } else {
      store(out + j, rounded<W>((lanes)first));
      store(out + own + j, rounded<W>((lanes)second));
    }
  }
}

template <class Difference, class W, class T>
void decode_halves(const PanelMatrix& m, int64_t begin, int64_t end, int64_t from, int64_t to, T* out, int64_t own) {
  const Panel panel = panel_of(m, begin);
  const int64_t outputs = (end - begin) * panel_block, first_output = panel.first, step = panel.across * FourBits::group_bytes;
  const bool has_zeros = m.coding.formula != Coding::scaled;
  const __m512h middle = _mm512_set1_ph(m.coding.numbers == Coding::signed4 ? 8 : 0);
  const __m512i places = code_places<T>(), behind = _mm512_add_epi16(places, _mm512_set1_epi16(1));
  each_unit<HalfHead>(m, begin, from, to, FourBits::group_bytes, [&](int64_t start, int64_t stop, const char* at, const HalfHead& head) {
    for (int64_t j = 0; j < outputs; j += panel_block) {
      const int64_t output = first_output + j;
      const __m512h scale = half_lanes_of(head.scale + output * 2, places);
      const Difference difference(has_zeros ? half_lanes_of(head.beside + output * 2, places) : middle);
      const char* codes = at + output * FourBits::group_bytes;
      for (int64_t k = start; k < stop; k += group, codes += step) {
        const __m512i one = _mm512_loadu_si512(codes), two = _mm512_loadu_si512(codes + 64);
        const __m512i words[2] = {_mm512_permutex2var_epi16(one, places, two), _mm512_permutex2var_epi16(one, behind, two)};
        alignas(64) char halves[8][64];
#pragma GCC unroll 8
        for (int p = 0; p < 8; ++p) {
          const __m512i shifted = p % 4 < 2 ? words[p / 4] : _mm512_srli_epi16(words[p / 4], 8);
          const __m512i kept = _mm512_set1_epi16(p % 2 ? 0xf0 : 0xf), raise = _mm512_set1_epi16(0x6400);
          const __m512h raised = (__m512h)_mm512_ternarylogic_epi32(shifted, kept, raise, 0xea);  // (shifted & kept) | raise
          _mm512_store_si512(halves[p], (__m512i)(difference.of(raised, p) * scale));
        }
        widen<W>(halves, out + (k - from) * own, own, j);
      }
    }
  });
}
#endif

#if defined(__AVX512BF16__)
template <class Codes, class Formula>
struct PairsOf {
  template <class T>
  static constexpr Decode<T> decoder = decode_group_pairs<Codes, Formula, T>;
};
template <class Formula, bool has_third>
struct PairsOf<Planes<has_third>, Formula> {
  template <class T>
  static constexpr Decode<T> decoder = decode_planes<Formula, has_third, T>;
};
#endif

// T: float, or W, or RowSums.
template <class Codes, class Formula, class W, class T>
constexpr Decode<T> decoder_as() {
  if constexpr (sizeof(T) == 4) return decode_group_lanes<Codes, Formula, W, T>;
#if defined(__AVX512BF16__)
  else return PairsOf<Codes, Formula>::template decoder<T>;
#else
  else return decode_group_lanes<Codes, Formula, float, T>;  // storing rounds
#endif
}

template <class W, class T, class Codes, template <class> class Formula>
Decode<T> decoder_rounding(const PanelMatrix& m) {
  switch (m.coding.rounding) {
    case Dtype::float16: return decoder_as<Codes, Formula<typename Codes::Half>, W, T>();
    case Dtype::bfloat16: return decoder_as<Codes, Formula<bf16>, W, T>();
    default: return decoder_as<Codes, Formula<float>, W, T>();
  }
}

template <class W, class T, class Codes>
Decode<T> decoder_beside(const PanelMatrix& m) {
  if (m.coding.formula == Coding::apart) return decoder_rounding<W, T, Codes, Apart>(m);
  return decoder_rounding<W, T, Codes, Added>(m);
}

template <class W, class T>
Decode<T> decoder_of(const PanelMatrix& m) {
#if defined(__AVX512FP16__)
  if (are_halves(m)) {
    if (m.coding.formula == Coding::apart) return decode_halves<RoundedDifference, W, T>;
    return decode_halves<WholeDifference, W, T>;
  }
#elif defined(__AVX512BF16__)
  if constexpr (sizeof(T) != 4)
    if (are_halves(m) && m.unit >= least_tabled) return tables_of<T>(m);
#endif
  switch (m.coding.numbers) {
    case Coding::e4m3:
    case Coding::e5m2: return decoder_rounding<W, T, Floats, Scaled>(m);
    case Coding::signed8: return decoder_rounding<W, T, Whole<true>, Scaled>(m);
    case Coding::unsigned8: return decoder_beside<W, T, Whole<false>>(m);
    case Coding::signed2: return decoder_rounding<W, T, Planes<false>, Scaled>(m);
    case Coding::signed3: return decoder_rounding<W, T, Planes<true>, Scaled>(m);
    case Coding::unsigned2: return decoder_beside<W, T, Planes<false>>(m);
    case Coding::unsigned3: return decoder_beside<W, T, Planes<true>>(m);
    default: break;
  }
  if (m.coding.formula != Coding::scaled) return decoder_beside<W, T, Tabled>(m);
  return decoder_rounding<W, T, Tabled, Scaled>(m);
}

// ---- products of a few rows -----------------------------------------------------------------------------------------------

// Tiles of rows of x with a piece of a panel, 64 outputs wide, onto the sums of the inputs before: each sum is the same chain as
// in PanelProduct.
template <class Engine>
struct PieceProduct {
  const typename Engine::W* weights;
  const typename Engine::X* x;
  int64_t stride, depth;
  float* sums;  // (rows, 64)

  template <int rows, int blocks>
  void tile(int64_t row, int64_t block) const {
    constexpr int registers = blocks * vectors;
    const auto* w = weights + place<typename Engine::W>(panel_outputs, 0, block * panel_block);
    const auto* from = x + row * stride;
    float* kept = sums + row * panel_outputs + block * panel_block;
    lanes own[rows][registers];
    for (int r = 0; r < rows; ++r)
      for (int s = 0; s < registers; ++s) own[r][s] = load(kept + r * panel_outputs + s * width);
    for (int64_t k = 0; k < depth; k += Engine::depth_unit) {
      typename Engine::Weights values[registers];
      for (int s = 0; s < registers; ++s) values[s] = Engine::weights(w, panel_outputs, k, s);
      for (int r = 0; r < rows; ++r) {
        const auto value = Engine::values(from + r * stride + k);
        for (int s = 0; s < registers; ++s) own[r][s] = Engine::add(own[r][s], value, values[s]);
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int s = 0; s < registers; ++s) store(kept + r * panel_outputs + s * width, own[r][s]);
  }

  // All blocks of a panel: those beyond its own are multiplied too, so that there is one tile for each height.
  template <int most = most_rows>
  void rows_from(int64_t row, int64_t n) const {
    if constexpr (most > 1)
      if (n < most) return rows_from<most - 1>(row, n);
    constexpr int blocks = blocks_beside(most);
    for (int64_t block = 0; block < panel_blocks; block += blocks) tile<most, blocks>(row, block);
  }
  void all(int64_t n) const {
    const int64_t heights = (n + most_rows - 1) / most_rows;
    for (int64_t t = 0; t < heights; ++t) rows_from(n * t / heights, n * (t + 1) / heights - n * t / heights);
  }
};

#if defined(__AVX512BF16__)
// Some blocks of one panel times one row of x, whose values go from the codes into the sums.
template <class Sink>
void multiply_row(const PanelMatrix& m, Decode<RowSums> multiply, const bf16* x, int64_t begin, int64_t end, const Sink& sink) {
  RowSums row{x};
  multiply(m, begin, end, 0, m.i, &row, 0);
  for (int64_t block = begin; block < end; ++block) sink(0, block, &row.sums[block - begin]);
}
#endif

constexpr int64_t most_by_pieces = 4 * most_rows;  // rows of x

// Some blocks of one panel times at most `most_by_pieces` rows of x; sink(row, block, sums).
template <class Engine, class Sink>
void multiply_pieces(const PanelMatrix& m, Decode<typename Engine::W> decode, const typename Engine::X* x, int64_t stride, int64_t n,
                     int64_t begin, int64_t end, const Sink& sink) {
  constexpr int64_t inputs = piece_inputs<typename Engine::W>;
  alignas(64) typename Engine::W weights[inputs * panel_outputs] = {};
  alignas(64) float sums[most_by_pieces * panel_outputs];
  std::memset(sums, 0, static_cast<size_t>(n * panel_outputs) * sizeof(float));
  for (int64_t k = 0; k < m.i; k += inputs) {
    const int64_t stop = k + inputs < m.i ? k + inputs : m.i;
    decode(m, begin, end, k, stop, weights, panel_outputs);
    PieceProduct<Engine>{weights, x + k, stride, stop - k, sums}.all(n);
  }
  for (int64_t r = 0; r < n; ++r)
    for (int64_t block = begin; block < end; ++block) {
      lanes own[vectors];
      for (int64_t v = 0; v < vectors; ++v) own[v] = load(sums + r * panel_outputs + (block - begin) * panel_block + v * width);
      sink(r, block, own);
    }
}

}  // namespace
}  // namespace veneer
