#include "ggml/ggml.h"

#include "core/parallel.h"
#include "ggml/k_quants.h"
#include "ggml/non_linear.h"
#include "ggml/simple.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t grain_values = 1 << 14;  // worth a thread

void keep_smallest(int64_t* first, int64_t row) {
  int64_t seen = __atomic_load_n(first, __ATOMIC_RELAXED);
  while (row < seen &&
         !__atomic_compare_exchange_n(first, &seen, row, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

int_lanes not_finite(const lanes* x, int n) {
  bit_lanes off = {};
  for (int i = 0; i < n; ++i) off |= (bit_lanes)(x[i] - x[i]);  // 0, or NaN
  return (int_lanes)(off != 0u);
}

// The mean squares of rows [begin, end), a row a lane.
template <class T>
void mean_squares(const GgmlRows& rows, int64_t begin, int64_t end) {
  const T* data = static_cast<const T*>(rows.data);
  for (int64_t first = begin; first < end; first += width) {
    const T* places[width];
    for (int64_t r = 0; r < width; ++r) places[r] = data + (first + r < end ? first + r : begin) * rows.columns;
    lanes total = {};
    for (int64_t c = 0; c < rows.columns; c += 32) {
      const T* here[width];
      lanes x[32];
      for (int64_t r = 0; r < width; ++r) here[r] = places[r] + c;
      turn(here, 32, x);
      for (int i = 0; i < 32; ++i) total += x[i] * x[i];
    }
    total /= static_cast<float>(rows.columns);
    store_some(rows.scratch + first, total, end - first < width ? end - first : width);
  }
}

// The `width` blocks from `first` on, or the n there are; the other lanes hold zeros.
template <int Block, class T>
void fill(const GgmlRows& rows, int64_t first, int64_t n, bool row_variance, Tile<Block>& tile) {
  static const T none[Block] = {};
  const int64_t per_row = rows.columns / Block;
  const T* places[width];
  for (int64_t r = 0; r < width; ++r) places[r] = r < n ? static_cast<const T*>(rows.data) + (first + r) * Block : none;
  turn(places, Block, tile.x);
  if (rows.importance == nullptr) return;
  const float* weights[width];
  for (int64_t r = 0; r < width; ++r) {
    const int64_t at = first + (r < n ? r : 0);
    weights[r] = rows.importance + at % per_row * Block;
    if (row_variance) tile.variance[r] = rows.scratch[at / per_row];
  }
  turn(weights, Block, tile.qw);
}

// Not inline: compiled once for all types of values.
template <class Format>
__attribute__((noinline)) int_lanes quantize_tile(const Tile<Format::block>& tile, bit_lanes* words) {
  return Format::quantize(tile, words);
}

template <class Format, class T>
int64_t quantize_format(const GgmlRows& rows, bool row_variance, uint8_t* out) {
  const int64_t per_row = rows.columns / Format::block, blocks = rows.rows * per_row;
  int64_t first_bad = rows.rows;
  parallel_for((blocks + width - 1) / width, grain_values / (width * Format::block), [&](int64_t begin, int64_t end) {
    Tile<Format::block> tile;
    bit_lanes words[Format::words];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * width, n = blocks - first < width ? blocks - first : width;
      fill<Format::block, T>(rows, first, n, row_variance, tile);
      const int_lanes bad = quantize_tile<Format>(tile, words) | not_finite(tile.x, Format::block);
      emit<Format::words>(words, Format::skip, Format::bytes, n, out + first * Format::bytes);
      if (any(bad))
        for (int64_t r = n - 1; r >= 0; --r)
          if (bad[r]) keep_smallest(&first_bad, (first + r) / per_row);
    }
  });
  return first_bad < rows.rows ? first_bad : -1;
}

template <template <bool> class Format, class T>
int64_t with_or_without(const GgmlRows& rows, bool row_variance, uint8_t* out) {
  if (rows.importance == nullptr) return quantize_format<Format<false>, T>(rows, false, out);
  if (row_variance)
    parallel_for(rows.rows, width, [&](int64_t begin, int64_t end) { mean_squares<T>(rows, begin, end); });
  return quantize_format<Format<true>, T>(rows, row_variance, out);
}

template <bool W> using Q40 = SymmetricSimple<4, W>;
template <bool W> using Q50 = SymmetricSimple<5, W>;
template <bool W> using Q41 = AffineSimple<4, W>;
template <bool W> using Q51 = AffineSimple<5, W>;
template <bool W> using Q4K = Q45K<4, W>;
template <bool W> using Q5K = Q45K<5, W>;

template <class T>
int64_t quantize_kind(const GgmlRows& rows, GgmlKind kind, uint8_t* out) {
  switch (kind) {
    case GgmlKind::q4_0: return with_or_without<Q40, T>(rows, true, out);
    case GgmlKind::q4_1: return with_or_without<Q41, T>(rows, true, out);
    case GgmlKind::q5_0: return with_or_without<Q50, T>(rows, true, out);
    case GgmlKind::q5_1: return with_or_without<Q51, T>(rows, true, out);
    case GgmlKind::q2_k: return with_or_without<Q2K, T>(rows, false, out);
    case GgmlKind::q3_k: return with_or_without<Q3K, T>(rows, false, out);
    case GgmlKind::q4_k: return with_or_without<Q4K, T>(rows, false, out);
    case GgmlKind::q5_k: return with_or_without<Q5K, T>(rows, false, out);
    case GgmlKind::q6_k: return with_or_without<Q6K, T>(rows, false, out);
    case GgmlKind::iq4_nl: return with_or_without<IQ4NL, T>(rows, false, out);
    case GgmlKind::iq4_xs: return with_or_without<IQ4XS, T>(rows, false, out);
    default: {
      GgmlRows unweighted = rows;
      unweighted.importance = nullptr;
      if (kind == GgmlKind::mxfp4) return quantize_format<MXFP4, T>(unweighted, false, out);
      return quantize_format<Q80, T>(unweighted, false, out);
    }
  }
}

int64_t quantize(const GgmlRows& rows, GgmlKind kind, uint8_t* out) {
  switch (rows.dtype) {
    case Dtype::bfloat16: return quantize_kind<bf16>(rows, kind, out);
    case Dtype::float16: return quantize_kind<fp16>(rows, kind, out);
    default: return quantize_kind<float>(rows, kind, out);
  }
}

}  // namespace

const GgmlKernels ggml = {quantize};

}  // namespace VENEER_ISA
}  // namespace veneer
