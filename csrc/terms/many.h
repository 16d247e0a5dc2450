// Forms of the many rows of a training step: sparse maps of them, and gradients in the numbers of each form.
// Sums over rows are taken in pieces of a fixed size, in their order: no result depends on the number of threads.
// Internal to kernels.cpp, for the reason that numeric.h gives.
#pragma once

#include "core/parallel.h"
#include "core/scratch.h"
#include "terms/sums.h"
#include "terms/terms.h"

namespace veneer {
namespace {

constexpr int64_t strip = 4 * width;    // rows that a sparse matrix maps at once
constexpr int64_t piece_rows = 64;      // of a sum over rows
constexpr int64_t turned_bytes = 512;   // of a feature's rows that a sparse matrix's gradients read at once: all stay in a core's own cache
constexpr int64_t grouped = 8;          // rows whose inner results of a Kronecker product are kept

// `n` rows from the first on, turned: `to` has for each feature their values, `apart` values apart; zeros beyond n.
template <class T, class To>
void turned(const Rows& x, int64_t first, int64_t n, int64_t features, int64_t apart, To* to) {
  for (int64_t r = 0; r < apart; r += width)
    for (int64_t c = 0; c < features; c += width) {
      const int64_t m = features - c < width ? features - c : width;
      lanes square[width];
      for (int64_t j = 0; j < width; ++j)
        if (r + j >= n) square[j] = lanes{};
        else {
          const T* row = row_of<const T>(x, first + r + j) + c;
          square[j] = m == width ? load(row) : take_first(row, m);
        }
      turn(square);
      for (int64_t j = 0; j < m; ++j) store(to + (c + j) * apart + r, square[j]);
    }
}

// The same back, added to rows of y or written there.
template <class T>
void put_turned(const float* from, int64_t apart, int64_t first, int64_t n, int64_t features, const Rows& y, bool add) {
  for (int64_t r = 0; r < n; r += width)
    for (int64_t c = 0; c < features; c += width) {
      const int64_t m = features - c < width ? features - c : width;
      lanes square[width];
      for (int64_t j = 0; j < width; ++j) square[j] = j < m ? load(from + (c + j) * apart + r) : lanes{};
      turn(square);
      for (int64_t j = 0; j < width && r + j < n; ++j) {
        T* to = row_of<T>(y, first + r + j) + c;
        if (m == width) store(to, add ? load(to) + square[j] : square[j]);
        else put_first(to, add ? take_first(to, m) + square[j] : square[j], m);
      }
    }
}

// Rows and columns of places, which are counted row by row.
void split_places(const FormAt& f, int32_t* rows, int32_t* columns) {
  const int64_t i = f.sizes[1];
  int64_t row = 0;
  for (int64_t k = 0; k < f.n_places; ++k) {
    if (f.places[k] < row * i || f.places[k] >= (row + 1) * i) row = f.places[k] / i;  // few divisions, if places are in order
    rows[k] = static_cast<int32_t>(row);
    columns[k] = static_cast<int32_t>(f.places[k] - row * i);
  }
}

// ---- a sparse matrix of many rows

// y[to] += value * x[from] for one strip; values that follow each other and have one `to` are summed in registers.
void add_values(const float* values, const int32_t* to, const int32_t* from, int64_t n, const float* x, float* y) {
  for (int64_t k = 0; k < n;) {
    const int32_t row = to[k];
    float* place = y + row * strip;
    lanes sums[4] = {load(place), load(place + width), load(place + 2 * width), load(place + 3 * width)};
    for (; k < n && to[k] == row; ++k)
      for (int64_t s = 0; s < 4; ++s) sums[s] += values[k] * load(x + from[k] * strip + s * width);
    for (int64_t s = 0; s < 4; ++s) store(place + s * width, sums[s]);
  }
}

int64_t sparse_strip_floats(const FormAt& f) { return (f.sizes[0] + f.sizes[1]) * strip; }

template <class T>
void map_sparse(const MapCall& call) {
  const FormAt& f = call.form;
  const int64_t in = f.sizes[call.transposed ? 0 : 1], out = f.sizes[call.transposed ? 1 : 0], strips = (call.n + strip - 1) / strip;
  Scratch scratch{static_cast<char*>(call.scratch)};
  int32_t *rows = scratch.take<int32_t>(f.n_places), *columns = scratch.take<int32_t>(f.n_places);
  float* memory = scratch.take<float>(max_threads() * sparse_strip_floats(f));
  split_places(f, rows, columns);
  parallel_for_indexed(strips, [&](int thread, int64_t begin, int64_t end) {
    float *x = memory + thread * sparse_strip_floats(f), *y = x + in * strip;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t first = s * strip, n = call.n - first < strip ? call.n - first : strip;
      turned<T>(call.x, first, n, in, strip, x);
      std::memset(y, 0, out * strip * sizeof(float));
      if (call.transposed) add_values(f.values, columns, rows, f.n_places, x, y);
      else add_values(f.values, rows, columns, f.n_places, x, y);
      put_turned<T>(y, strip, first, n, out, call.y, call.add);
    }
  });
}

// Type in which values of T are multiplied. bfloat16: in pairs if the CPU has them, exact but for subnormal numbers.
template <class T>
struct Multiplied {
  using Value = float;
};

inline lanes add_products(lanes sums, const float* a, const float* b) { return sums + load(a) * load(b); }

#if defined(__AVX512BF16__)
template <>
struct Multiplied<bf16> {
  using Value = bf16;
};

inline lanes add_products(lanes sums, const bf16* a, const bf16* b) {
  return (lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
}
#endif

template <class T>
void sparse_gradients(const MapGradients& call) {
  using Value = typename Multiplied<T>::Value;
  constexpr int64_t turned_rows = turned_bytes / sizeof(Value), at_once = width * sizeof(float) / sizeof(Value);
  const FormAt& f = call.form;
  const int64_t o = f.sizes[0], i = f.sizes[1];
  Scratch scratch{static_cast<char*>(call.scratch)};
  int32_t *rows = scratch.take<int32_t>(f.n_places), *columns = scratch.take<int32_t>(f.n_places);
  Value *x = scratch.take<Value>(i * turned_rows), *dy = scratch.take<Value>(o * turned_rows);
  split_places(f, rows, columns);
  std::memset(call.values, 0, f.n_places * sizeof(float));
  for (int64_t first = 0; first < call.n; first += turned_rows) {
    const int64_t n = call.n - first < turned_rows ? call.n - first : turned_rows;
    parallel_for(2, 1, [&](int64_t begin, int64_t end) {
      if (begin == 0) turned<T>(call.x, first, n, i, turned_rows, x);
      if (end == 2) turned<T>(call.dy, first, n, o, turned_rows, dy);
    });
    parallel_for(f.n_places, 1 + (1 << 14) / turned_rows, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const Value *a = dy + rows[k] * turned_rows, *b = x + columns[k] * turned_rows;
        lanes sums[4] = {};
        for (int64_t r = 0; r < n; r += 4 * at_once)
          for (int64_t s = 0; s < 4; ++s) sums[s] = add_products(sums[s], a + r + s * at_once, b + r + s * at_once);
        call.values[k] += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
      }
    });
  }
}

// ---- gradients of blocks

// Columns [start, start + d) of rows, in float, `apart` values apart; zeros beyond d.
template <class T>
void widen(const Rows& x, int64_t first, int64_t n, int64_t start, int64_t d, int64_t apart, float* to) {
  for (int64_t r = 0; r < n; ++r) {
    const T* row = row_of<const T>(x, first + r) + start;
    int64_t c = 0;
    for (; c + width <= d; c += width) store(to + r * apart + c, load(row + c));
    for (; c < apart; c += width) store(to + r * apart + c, c < d ? take_first(row + c, d - c) : lanes{});
  }
}

template <class T>
void block_gradients(const MapGradients& call) {
  const FormAt& f = call.form;
  const int64_t b = f.sizes[1], wide = padded(b), own = (2 * piece_rows + b) * wide;
  float* memory = static_cast<float*>(call.scratch);
  parallel_for_indexed(f.sizes[0], [&](int thread, int64_t begin, int64_t end) {
    float *dy = memory + thread * own, *x = dy + piece_rows * wide, *sums = x + piece_rows * wide;
    for (int64_t k = begin; k < end; ++k) {
      std::memset(sums, 0, b * wide * sizeof(float));
      for (int64_t first = 0; first < call.n; first += piece_rows) {
        const int64_t n = call.n - first < piece_rows ? call.n - first : piece_rows;
        widen<T>(call.dy, first, n, k * b, b, wide, dy);
        widen<T>(call.x, first, n, k * b, b, wide, x);
        add_outer(dy, wide, x, wide, n, b, wide, sums, wide);
      }
      for (int64_t c = 0; c < b; ++c) std::memcpy(call.values + (k * b + c) * b, sums + c * wide, b * sizeof(float));
    }
  });
}

// ---- gradients of a Kronecker product

struct KroneckerSizes {
  int64_t o1, i1, o2, i2, wide_o2, wide_i2;

  explicit KroneckerSizes(const FormAt& f)
      : o1(f.sizes[0]), i1(f.sizes[1]), o2(f.sizes[2]), i2(f.sizes[3]), wide_o2(padded(o2)), wide_i2(padded(i2)) {}
  int64_t of_piece() const { return o1 * i1 + o2 * wide_i2; }
  int64_t of_thread() const { return grouped * (i1 * wide_i2 + o1 * wide_o2 + 2 * i1 * wide_o2) + o1 * i1 * width; }
  int64_t packed() const { return i2 * wide_o2 + padded(i1 * o1); }
};

// Lanes of sums over the columns of A (m, n) times those of B (k, n), each `stride` values a row, added to those of C (m, k).
template <int64_t R, int64_t C>
void inner_tile(const float* a, const float* b, int64_t stride, int64_t groups, int64_t a_step, int64_t b_step, float* c, int64_t k) {
  lanes sums[R][C];
#pragma GCC unroll 4
  for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int64_t s = 0; s < C; ++s) sums[r][s] = load(c + (r * k + s) * width);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t l = 0; l < stride; l += width)
      for (int64_t s = 0; s < C; ++s) {
        const lanes right = load(b + g * b_step + s * stride + l);
        for (int64_t r = 0; r < R; ++r) sums[r][s] += load(a + g * a_step + r * stride + l) * right;
      }
#pragma GCC unroll 4
  for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int64_t s = 0; s < C; ++s) store(c + (r * k + s) * width, sums[r][s]);
}

inline void add_inner(const float* a, int64_t m, const float* b, int64_t k, int64_t stride, int64_t groups, float* c) {
  const auto columns = [&](int64_t row, auto size) {
    const float* left = a + row * stride;
    float* to = c + row * k * width;
    int64_t j = 0;
    for (; j + 2 <= k; j += 2) inner_tile<size.value, 2>(left, b + j * stride, stride, groups, m * stride, k * stride, to + j * width, k);
    if (j < k) inner_tile<size.value, 1>(left, b + j * stride, stride, groups, m * stride, k * stride, to + j * width, k);
  };
  int64_t row = 0;
  for (; row + most_rows <= m; row += most_rows) columns(row, Number<most_rows>{});
  for (; row < m; ++row) columns(row, Number<1>{});
}

// Of some rows: their inner results on the way there and back, and from these the gradients.
template <class T>
void kronecker_piece(const MapGradients& call, const KroneckerSizes& s, const float* second_t, const float* first_t, int64_t begin,
                     int64_t end, float* memory, float* first, float* second) {
  float *x = memory, *dy = x + grouped * s.i1 * s.wide_i2, *inner = dy + grouped * s.o1 * s.wide_o2;
  float *back = inner + grouped * s.i1 * s.wide_o2, *sums = back + grouped * s.i1 * s.wide_o2;
  std::memset(sums, 0, s.o1 * s.i1 * width * sizeof(float));
  std::memset(second, 0, s.o2 * s.wide_i2 * sizeof(float));
  const auto into = [](float* to, int64_t stride) {
    return [=](int64_t r, int64_t c, int64_t, lanes values) { store(to + r * stride + c, values); };
  };
  for (int64_t at = begin; at < end; at += grouped) {
    const int64_t n = end - at < grouped ? end - at : grouped;
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t j = 0; j < s.i1; ++j) widen<T>(call.x, at + r, 1, j * s.i2, s.i2, s.wide_i2, x + (r * s.i1 + j) * s.wide_i2);
      for (int64_t p = 0; p < s.o1; ++p) widen<T>(call.dy, at + r, 1, p * s.o2, s.o2, s.wide_o2, dy + (r * s.o1 + p) * s.wide_o2);
      each_sum(first_t, s.o1, s.i1, s.o1, dy + r * s.o1 * s.wide_o2, s.wide_o2, s.wide_o2, {1, 0, 0}, into(back + r * s.i1 * s.wide_o2, s.wide_o2));
    }
    each_sum(x, s.wide_i2, n * s.i1, s.i2, second_t, s.wide_o2, s.wide_o2, {1, 0, 0}, into(inner, s.wide_o2));
    add_outer(back, s.wide_o2, x, s.wide_i2, n * s.i1, s.o2, s.wide_i2, second, s.wide_i2);
    add_inner(dy, s.o1, inner, s.i1, s.wide_o2, n, sums);
  }
  for (int64_t k = 0; k < s.o1 * s.i1; ++k) first[k] = sum(load(sums + k * width));
}

template <class T>
void kronecker_gradients(const MapGradients& call) {
  const FormAt& f = call.form;
  const KroneckerSizes s(f);
  const int64_t pieces = (call.n + piece_rows - 1) / piece_rows;
  Scratch scratch{static_cast<char*>(call.scratch)};
  float *second_t = scratch.take<float>(s.i2 * s.wide_o2), *first_t = scratch.take<float>(s.i1 * s.o1);
  float *found = scratch.take<float>(pieces * s.of_piece()), *memory = scratch.take<float>(max_threads() * s.of_thread());
  for (int64_t l = 0; l < s.i2; ++l)
    for (int64_t q = 0; q < s.wide_o2; ++q) second_t[l * s.wide_o2 + q] = q < s.o2 ? f.second[q * s.i2 + l] : 0.0f;
  for (int64_t j = 0; j < s.i1; ++j)
    for (int64_t p = 0; p < s.o1; ++p) first_t[j * s.o1 + p] = f.values[p * s.i1 + j];
  parallel_for_indexed(pieces, [&](int thread, int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * piece_rows, last = first + piece_rows < call.n ? first + piece_rows : call.n;
      float* to = found + piece * s.of_piece();
      kronecker_piece<T>(call, s, second_t, first_t, first, last, memory + thread * s.of_thread(), to, to + s.o1 * s.i1);
    }
  });
  std::memset(call.values, 0, s.o1 * s.i1 * sizeof(float));
  std::memset(call.second, 0, s.o2 * s.i2 * sizeof(float));
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const float *first = found + piece * s.of_piece(), *second = first + s.o1 * s.i1;
    for (int64_t k = 0; k < s.o1 * s.i1; ++k) call.values[k] += first[k];
    for (int64_t q = 0; q < s.o2; ++q)
      for (int64_t l = 0; l < s.i2; ++l) call.second[q * s.i2 + l] += second[q * s.wide_i2 + l];
  }
}

int64_t gradient_bytes(const FormAt& f, int64_t n) {
  constexpr int64_t apart = 64, float_bytes = sizeof(float);
  switch (f.kind) {
    case TermKind::blocks: return max_threads() * (2 * piece_rows + f.sizes[1]) * padded(f.sizes[1]) * float_bytes;
    case TermKind::sparse: return 2 * f.n_places * 4 + (f.sizes[0] + f.sizes[1]) * turned_bytes + 4 * apart;
    case TermKind::kronecker: {
      const KroneckerSizes s(f);
      return (s.packed() + (n + piece_rows - 1) / piece_rows * s.of_piece() + max_threads() * s.of_thread()) * float_bytes + 4 * apart;
    }
    default: return 0;
  }
}

template <class T>
void gradients_typed(const MapGradients& call) {
  switch (call.form.kind) {
    case TermKind::blocks: return block_gradients<T>(call);
    case TermKind::sparse: return sparse_gradients<T>(call);
    case TermKind::kronecker: return kronecker_gradients<T>(call);
    default: return;
  }
}

void gradients(const MapGradients& call) {
  switch (call.dtype) {
    case Dtype::float32: return gradients_typed<float>(call);
    case Dtype::bfloat16: return gradients_typed<bf16>(call);
    case Dtype::float16: return gradients_typed<fp16>(call);
  }
}

}  // namespace
}  // namespace veneer
