// Matrices packed for the product W x of a few rows or of many, and that product. Every sum is one chain over the inputs in
// their order, whatever the tile: so a row's result is the same in any batch.
#pragma once

#include "core/lanes.h"
#include "core/panel_layout.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace veneer {

namespace {

// One block of outputs from rows of W, `stride` values apart.
template <class T>
inline void pack_block(const PanelMatrix& m, int64_t block, const T* rows, int64_t stride) {
  const Panel panel = panel_of(m, block);
  T* to = static_cast<T*>(m.values) + panel.start;
  for (int64_t j = 0; j < panel_block; ++j) {
    const int64_t row = block * panel_block + j, present = row < m.o ? m.i : 0;
    for (int64_t k = 0; k < present; ++k) to[place<T>(panel.across, k, panel.first + j)] = rows[row * stride + k];
    for (int64_t k = present; k < m.depth; ++k) to[place<T>(panel.across, k, panel.first + j)] = T{};
  }
}

// Row r of W.
template <class T>
inline void unpack_row(const PanelMatrix& m, int64_t r, T* row) {
  const Panel panel = panel_of(m, r / panel_block);
  const T* from = static_cast<const T*>(m.values) + panel.start;
  for (int64_t k = 0; k < m.i; ++k) row[k] = from[place<T>(panel.across, k, panel.first + r % panel_block)];
}

// ---- engines: how a register of outputs is multiplied by one row's values -------------------------------------------------

constexpr int64_t vectors = panel_block / width;  // registers across a block

// One rounding where the CPU has such an instruction, said explicitly: two tiles must not differ in what is contracted.
inline lanes multiply_add(lanes a, lanes b, lanes sum) {
#if defined(__AVX512F__)
  return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
  return (lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
  return (lanes)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + sum;
#endif
}

// Register v of row k of a right operand.
inline lanes weights_at(const float* b, int64_t across, int64_t k, int64_t v) { return load(b + k * across + v * width); }
inline lanes weights_at(const fp16* b, int64_t across, int64_t k, int64_t v) {
  const fp16* p = b + k * across + v * width;
#if defined(__AVX512F__)
  return (lanes)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (lanes)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  float16x4_t half;
  std::memcpy(&half, p, sizeof half);
  return (lanes)vcvt_f32_f16(half);
#else
  return load(p);
#endif
}
inline lanes weights_at(const bf16* b, int64_t across, int64_t k, int64_t v) {
  bit_lanes pairs;
  std::memcpy(&pairs, b + k / 2 * 2 * across + v * 2 * width, sizeof pairs);
  return (lanes)(k % 2 ? pairs & 0xffff0000u : pairs << 16);
}

// Weights of any type times float32, in float32.
template <class T>
struct FloatEngine {
  using W = T;
  using X = float;
  static constexpr int64_t depth_unit = 1;

  struct Weights {
    lanes value;
  };
  static Weights weights(const T* b, int64_t across, int64_t k, int64_t v) { return {weights_at(b, across, k, v)}; }
  struct Values {
    lanes value;
  };
  static Values values(const float* x) { return {splat(*x)}; }
  static lanes add(lanes sum, Values x, Weights w) { return multiply_add(x.value, w.value, sum); }
  static void keep(float* x, lanes values) { store(x, values); }
  static lanes exp_kept(lanes x) { return exp(x); }
};

#if defined(__AVX512BF16__)
struct PairEngine {
  using W = bf16;
  using X = bf16;
  static constexpr int64_t depth_unit = 2;

  struct Weights {
    __m512bh value;
  };
  static Weights weights(const bf16* b, int64_t across, int64_t k, int64_t v) {
    return {(__m512bh)_mm512_loadu_si512(b + k * across + v * 32)};
  }
  struct Values {
    __m512bh value;
  };
  static Values values(const bf16* x) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return {(__m512bh)_mm512_set1_epi32(pair)};
  }
  static lanes add(lanes sum, Values x, Weights w) { return (lanes)_mm512_dpbf16_ps((__m512)sum, x.value, w.value); }
  static void keep(bf16* x, lanes values) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)values);
    std::memcpy(static_cast<void*>(x), &rounded, sizeof rounded);
  }
  static lanes exp_kept(lanes x) { return coarse_exp(x); }
};
#endif

// ---- tiles ------------------------------------------------------------------------------------------------------------------

// What a tile may hold in registers: rows times blocks of sums, the weights beside them and one value of x.
#if defined(__AVX512F__)
constexpr int most_rows = 6;
constexpr int blocks_beside(int) { return 4; }
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int most_rows = 6;
constexpr int blocks_beside(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
#else
constexpr int most_rows = 2;
constexpr int blocks_beside(int rows) { return rows == 1 ? 2 : 1; }
#endif

// Blocks [block, end) of some rows: f.tile<rows, blocks>(row, block) for each tile.
template <int rows, int blocks, class F>
void tile_blocks(int64_t row, int64_t block, int64_t end, const F& f) {
  for (; block + blocks <= end; block += blocks) f.template tile<rows, blocks>(row, block);
  if constexpr (blocks > 1)
    if (block < end) tile_blocks<rows, blocks - 1>(row, block, end, f);
}
// `least` and `rows` bound n: each height that a compiler meets is code, and a long time.
template <int least = 1, int rows = most_rows, class F>
void tile_height(int64_t row, int64_t n, int64_t block, int64_t end, const F& f) {
  if constexpr (rows > least)
    if (n < rows) return tile_height<least, rows - 1>(row, n, block, end, f);
  tile_blocks<rows, blocks_beside(rows)>(row, block, end, f);
}
constexpr int least_of_several = (most_rows + 1) / 2;  // rows of a tile where there are more than `most_rows` rows

// Rows [row, stop), in tiles of as equal a height as there can be.
template <int least = 1, int most = most_rows, class F>
void tiles(int64_t row, int64_t stop, int64_t block, int64_t end, const F& f) {
  const int64_t n = stop - row, heights = (n + most - 1) / most;
  for (int64_t t = 0; t < heights; ++t) {
    const int64_t first = row + n * t / heights, last = row + n * (t + 1) / heights;
    tile_height<least, most>(first, last - first, block, end, f);
  }
}

// sink(row, block, sums) for each row and block of a tile. The loops stay loops, and their sums go by way of memory: a copy
// of the sink for each pair of them was half of a tile's code.
template <int rows, int blocks, class Sink>
inline void each_sum(int64_t row, int64_t block, const lanes (&sums)[rows][blocks * vectors], const Sink& sink) {
  lanes kept[rows][blocks * vectors];
  for (int r = 0; r < rows; ++r)
    for (int s = 0; s < blocks * vectors; ++s) kept[r][s] = sums[r][s];
#pragma GCC unroll 1
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 1
    for (int b = 0; b < blocks; ++b) sink(row + r, block + b, kept[r] + b * vectors);
}

// Lines of memory that a tile fetches with every two steps in depth: of its `own` weights as many as it reads, so far ahead;
// or so many of the next panel, `beside` its work.
constexpr int64_t line = 64, far_ahead = 4096;
constexpr int own = 0, beside = 2;

inline void fetch(const char* memory) { __builtin_prefetch(memory, 0, 2); }

// Tiles of rows of x with a matrix; sink(row, block, sums) takes the sums of one row and one block, `vectors` registers.
// x has as many values a row as the engine reads: i, or for pairs i filled up with zero to an even number.
template <class Engine, int fetched, class Sink>
struct PanelProduct {
  const PanelMatrix& m;
  const typename Engine::X* x;
  int64_t stride;
  const Sink& sink;
  const char* ahead;  // in the next panel

  template <int rows, int blocks>
  void tile(int64_t row, int64_t block) const {
    constexpr int64_t registers = blocks * vectors, unit = Engine::depth_unit;
    const Panel panel = panel_of(m, block);
    const int64_t depth = m.i, apart = stride, across = panel.across;
    const auto* w = static_cast<const typename Engine::W*>(m.values) + panel.start + place<typename Engine::W>(across, 0, panel.first);
    const auto* from = x + row * apart;
    lanes sums[rows][registers];
    for (int r = 0; r < rows; ++r)
      for (int s = 0; s < registers; ++s) sums[r][s] = lanes{};
    const auto one = [&](int64_t k) __attribute__((always_inline)) {
      typename Engine::Weights weights[registers];
      for (int s = 0; s < registers; ++s) weights[s] = Engine::weights(w, across, k, s);
      for (int r = 0; r < rows; ++r) {
        const auto value = Engine::values(from + r * apart + k);
        for (int s = 0; s < registers; ++s) sums[r][s] = Engine::add(sums[r][s], value, weights[s]);
      }
    };
    constexpr int64_t own_lines = 2 * unit * blocks * panel_block * sizeof(typename Engine::W) / line;
    constexpr int64_t lines = fetched == own ? own_lines : fetched;
    const char* soon = fetched == own ? reinterpret_cast<const char*>(w) + far_ahead : ahead;
    int64_t k = 0;
    for (; k + 2 * unit <= depth; k += 2 * unit, soon += lines * line) {
      for (int64_t l = 0; l < lines; ++l) fetch(soon + l * line);
      one(k);
      one(k + unit);
    }
    for (; k < depth; k += unit) one(k);
    each_sum<rows, blocks>(row, block, sums, sink);
  }
};

// Rows [row, stop) of x times blocks [begin, end): panel by panel, which then stays in cache for all the rows. The first
// tile streams its panel from memory; while the others compute, each fetches a part of the next one, and behind the last
// of `later`, if it is not null.
template <class Engine, class Sink>
void multiply_panels(const PanelMatrix& m, const typename Engine::X* x, int64_t stride, int64_t row, int64_t stop,
                     int64_t begin, int64_t end, const Sink& sink, const char* later = nullptr) {
  const int64_t n = stop - row, heights = (n + most_rows - 1) / most_rows, part = m.depth / Engine::depth_unit / 2 * beside * line;
  while (begin < end) {
    const int64_t after = (begin / panel_blocks + 1) * panel_blocks, next = after < end ? after : end;
    const auto* following = static_cast<const typename Engine::W*>(m.values) + panel_of(m, next < end ? next : begin).start;
    const char* ahead = next == end && later != nullptr ? later : reinterpret_cast<const char*>(following);
    tile_height(row, n / heights, begin, next, PanelProduct<Engine, own, Sink>{m, x, stride, sink, ahead});
    for (int64_t t = 1; t < heights; ++t) {
      const int64_t first = row + n * t / heights, last = row + n * (t + 1) / heights;
      const PanelProduct<Engine, beside, Sink> product{m, x, stride, sink, ahead + (t <= panel_blocks ? t - 1 : 0) * part};
      tile_height<least_of_several>(first, last - first, begin, next, product);
    }
    begin = next;
  }
}

}  // namespace
}  // namespace veneer
