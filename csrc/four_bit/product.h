// Products with a quantized matrix: panels of it are decoded into tiles, and the tiles multiplied while they are in cache.
#pragma once

#include "core/amx.h"
#include "core/parallel.h"
#include "four_bit/codec.h"

#if defined(__AMX_BF16__)

namespace veneer {
namespace {

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Values [first, first + n) of the matrix, wherever they lie.
template <class T>
inline void decode_span(const FourBitMatrix& w, int64_t first, int64_t n, T* out) {
  while (n > 0) {
    const int64_t block = first >> w.block_shift, left = ((block + 1) << w.block_shift) - first;
    int64_t take = left < n ? left : n;
    const BlockTable<T> t = block_table<T>(*w.code, w.absmax[block]);
    if (first % 2) {
      *out = t.value[w.packed[first / 2] & 15];
      take = 1;
    } else {
      dequantize_run(w.packed + first / 2, take, t, out);
    }
    first += take;
    out += take;
    n -= take;
  }
}

inline bool whole_tiles(const FourBitMatrix& w) { return w.i % tile_depth == 0 && w.block_shift >= 5; }

// Row `row`, columns [32 k, 32 k + 32) -> one register; columns past the end are zero.
struct RowReader {
  const FourBitMatrix& w;
  __m512 table;
  bool whole;

  explicit RowReader(const FourBitMatrix& matrix)
      : w(matrix), table(_mm512_loadu_ps(matrix.code->table)), whole(whole_tiles(matrix)) {}

  // Calls f(k, values) for k in [from, to).
  template <class F>
  void read(int64_t row, int64_t from, int64_t to, const F& f) const {
    if (row >= w.o) {
      for (int64_t k = from; k < to; ++k) f(k, _mm512_setzero_si512());
      return;
    }
    if (!whole) {
      for (int64_t k = from; k < to; ++k) {
        alignas(64) bf16 values[32] = {};
        const int64_t left = w.i - k * 32;
        decode_span(w, row * w.i + k * 32, left < 32 ? left : 32, values);
        f(k, _mm512_load_si512(values));
      }
      return;
    }
    // All in locals: a store through f could change a member, for all that the compiler knows.
    const __m512 unscaled = table;
    const int64_t at = row * w.i + from * 32, per_block = int64_t{1} << (w.block_shift - 5);
    const uint8_t* packed = w.packed + at / 2;
    const float* absmax = w.absmax + (at >> w.block_shift);
    int64_t in_block = per_block - ((at >> 5) & (per_block - 1));
    for (int64_t k = from; k < to; in_block = per_block) {
      const __m512i values = doubled_table(unscaled, *absmax++);
      const int64_t end = k + in_block < to ? k + in_block : to;
      for (; k < end; ++k, packed += 16) f(k, _mm512_permutexvar_epi16(unpack32(packed), values));
    }
  }
};

// ---- W x ------------------------------------------------------------------------------------------------------------

// Rows [m0, m0 + m_tiles * 16) of x as right operands: tile (m, k) at (m * depth + k).
inline void pack_columns(const uint16_t* x, int64_t rows, int64_t i, int64_t m0, int64_t m_tiles, uint16_t* tiles) {
  const int64_t depth = round_up(i, tile_depth) / tile_depth;
  parallel_for(m_tiles, 4, [=](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t row = m0 + m * 16;
        pack_right(x + row * i + k * 32, i, rows - row, i - k * 32, tiles + (m * depth + k) * tile_elements);
      }
  });
}

// out rows [m0, ...) of m_tiles tiles, columns of the 32 rows of W that `panel` holds.
inline void multiply_panel(const uint16_t* panel, const uint16_t* x_tiles, int64_t depth, int64_t m_tiles,
                                             uint16_t* out, int64_t rows, int64_t stride, int64_t width) {
  alignas(64) float c[4 * 256];
  const int64_t step = depth * tile_elements;
  for (int64_t m = 0; m < m_tiles; m += 2) {
    const bool two = m + 1 < m_tiles;
    const uint16_t* b = x_tiles + m * step;
    if (two)
      amx_2x2(panel, panel + step, b, b + step, depth, c);
    else
      amx_2x1(panel, panel + step, b, depth, c);
    const int columns = two ? 2 : 1;
    for (int n = 0; n < 2; ++n)
      for (int j = 0; j < columns; ++j)
        if (width > n * 16)
          store_transposed(c + (n * columns + j) * 256, out + (m + j) * 16 * stride + n * 16, stride, width - n * 16,
                           rows - (m + j) * 16);
  }
}

// Rows of x that are packed at a time: their tiles stay in a core's second-level cache.
inline int64_t rows_at_once(int64_t depth_values) {
  const int64_t fit = (int64_t{1} << 19) / round_up(depth_values, tile_depth);
  return fit < 32 ? 32 : fit / 32 * 32;
}

// scratch: x tiles, then one panel of 32 rows for each thread.
inline void multiply(const FourBitMatrix& w, const uint16_t* x, int64_t rows, uint16_t* out,
                                       uint16_t* scratch) {
  const int64_t depth = round_up(w.i, tile_depth) / tile_depth, panels = (w.o + 31) / 32;
  const int64_t at_once = rows_at_once(w.i), step = depth * tile_elements;
  for (int64_t m0 = 0; m0 < rows; m0 += at_once) {
    const int64_t left = rows - m0 < at_once ? rows - m0 : at_once, m_tiles = (left + 15) / 16;
    pack_columns(x, rows, w.i, m0, m_tiles, scratch);
    const RowReader reader(w);
    parallel_for_indexed(panels, [=, &w, &reader](int thread, int64_t begin, int64_t end) {
      uint16_t* panel = scratch + (m_tiles + 2 * thread) * step;
      amx_begin();
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t r = 0; r < 32; ++r)
          reader.read(p * 32 + r, 0, depth, [=](int64_t k, __m512i values) {
            _mm512_storeu_si512(panel + (r / 16) * step + k * tile_elements + (r % 16) * 32, values);
          });
        multiply_panel(panel, scratch, depth, m_tiles, out + m0 * w.o + p * 32, left, w.o, w.o - p * 32);
      }
      amx_end();
    });
  }
}

// ---- transpose(W) y ---------------------------------------------------------------------------------------------------

inline void pack_rows(const uint16_t* y, int64_t rows, int64_t o, int64_t m0, int64_t m_tiles, uint16_t* tiles) {
  const int64_t depth = round_up(o, tile_depth) / tile_depth;
  parallel_for(m_tiles, 4, [=](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t row = m0 + m * 16;
        pack_left(y + row * o + k * 32, o, rows - row, o - k * 32, tiles + (m * depth + k) * tile_elements);
      }
  });
}

// 32 columns of out from two tiles whose columns are 0-3, 8-11, 16-19, 24-27 and the four after each.
inline void store_interleaved(const float* low, const float* high, uint16_t* out, int64_t stride, int64_t width,
                              int64_t rows) {
  const __mmask32 lanes = first_lanes(width);
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t m = 0; m < 16 && m < rows; ++m) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(high + m * 16), _mm512_loadu_ps(low + m * 16));
    _mm512_mask_storeu_epi16(out + m * stride, lanes, _mm512_permutexvar_epi64(order, both));
  }
}

inline void multiply_transposed(const FourBitMatrix& w, const uint16_t* y, int64_t rows, uint16_t* out,
                                                  uint16_t* scratch) {
  const int64_t depth = round_up(w.o, tile_depth) / tile_depth, panels = (w.i + 31) / 32;
  const int64_t at_once = rows_at_once(w.o), step = depth * tile_elements;
  for (int64_t m0 = 0; m0 < rows; m0 += at_once) {
    const int64_t left = rows - m0 < at_once ? rows - m0 : at_once, m_tiles = (left + 15) / 16, m_pairs = (m_tiles + 1) / 2;
    pack_rows(y, rows, w.o, m0, m_pairs * 2, scratch);
    const RowReader reader(w);
    parallel_for_indexed(panels, [=, &w, &reader](int thread, int64_t begin, int64_t end) {
      uint16_t* panel = scratch + (m_pairs * 2 + 2 * thread) * step;
      alignas(64) float c[4 * 256];
      amx_begin();
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t r = 0; r < depth * 32; r += 2) {
          __m512i even{}, odd{};
          reader.read(r, p, p + 1, [&](int64_t, __m512i values) { even = values; });
          reader.read(r + 1, p, p + 1, [&](int64_t, __m512i values) { odd = values; });
          uint16_t* at = panel + (r / 32) * tile_elements + (r % 32) / 2 * 32;
          _mm512_storeu_si512(at, _mm512_unpacklo_epi16(even, odd));
          _mm512_storeu_si512(at + step, _mm512_unpackhi_epi16(even, odd));
        }
        for (int64_t m = 0; m < m_pairs; ++m) {
          const uint16_t* a = scratch + 2 * m * step;
          amx_2x2(a, a + step, panel, panel + step, depth, c);
          for (int64_t j = 0; j < 2; ++j) {
            const int64_t row = m * 32 + j * 16;
            if (row < left)
              store_interleaved(c + j * 512, c + j * 512 + 256, out + (m0 + row) * w.i + p * 32, w.i, w.i - p * 32, left - row);
          }
        }
      }
      amx_end();
    });
  }
}

}  // namespace
}  // namespace veneer
#endif
