#include "terms/terms.h"

#include "core/lanes.h"
#include "core/parallel.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t padding = 16;
constexpr int64_t grain = 1 << 13;  // multiplications

template <int64_t n>
struct Number {
  static constexpr int64_t value = n;
};

int64_t padded(int64_t n) { return (n + padding - 1) / padding * padding; }

// Rows that are mapped at once, so that a value of the term is read once for all of them. A row's sums are the same in any company.
#if defined(__AVX512F__)
constexpr int64_t most_rows = 4;
#else
constexpr int64_t most_rows = 2;
#endif

// Of each of R rows x (`apart` values apart) sum_j x[j] times the registers at w + j * stride; of even and of odd j.
template <int64_t R, int64_t C>
void tile(const float* x, int64_t apart, int64_t n, const float* w, int64_t stride, lanes (*sums)[R][C]) {
  const auto step = [=](int64_t j, lanes (&to)[R][C]) {
    for (int64_t c = 0; c < C; ++c) {
      const lanes right = load(w + j * stride + c * width);
      for (int64_t r = 0; r < R; ++r) to[r][c] += x[r * apart + j] * right;
    }
  };
  int64_t j = 0;
  for (; j + 2 <= n; j += 2) {
    step(j, sums[0]);
    step(j + 1, sums[1]);
  }
  if (j < n) step(j, sums[0]);
}

// The same over `parts` stretches of x and of w, with f(row, first column, values, sum) for each sum.
struct Stretches {
  int64_t n, x_step, w_step;
};
template <int64_t R, int64_t C, class F>
void sums_of(const float* x, int64_t apart, int64_t n, const float* w, int64_t stride, int64_t columns, const Stretches& parts, const F& f) {
  lanes sums[2][R][C] = {};
  for (int64_t p = 0; p < parts.n; ++p) tile<R, C>(x + p * parts.x_step, apart, n, w + p * parts.w_step, stride, sums);
  for (int64_t r = 0; r < R; ++r)
    for (int64_t c = 0; c * width < columns; ++c) {
      const int64_t left = columns - c * width;
      f(r, c * width, left < width ? left : width, sums[0][r][c] + sums[1][r][c]);
    }
}

// f(row, column, values, sum) for all columns of `rows` rows.
template <class F>
void each_sum(const float* x, int64_t apart, int64_t rows, int64_t n, const float* w, int64_t stride, int64_t columns, const Stretches& parts,
              const F& f) {
  for (int64_t c = 0; c < columns; c += 2 * width) {
    const int64_t left = columns - c;
    const auto part = [&](int64_t first, auto size) {
      const auto put_at = [&](int64_t r, int64_t column, int64_t m, lanes sum) { f(first + r, c + column, m, sum); };
      const float* from = x + first * apart;
      if (left > width) sums_of<size.value, 2>(from, apart, n, w + c, stride, left < 2 * width ? left : 2 * width, parts, put_at);
      else sums_of<size.value, 1>(from, apart, n, w + c, stride, left, parts, put_at);
    };
    int64_t r = 0;
    for (; r + most_rows <= rows; r += most_rows) part(r, Number<most_rows>{});
    for (; r < rows; ++r) part(r, Number<1>{});
  }
}

template <class T>
void put_sum(T* y, lanes x, int64_t n, bool add) { put(y, add ? take(y, n) + x : x, n); }

// Units of rows that are computed by themselves, the multiplications of one, and how many rows are mapped at once.
struct Units {
  int64_t n, cost, rows;
};

Units units_of(const Term& t) {
  const int64_t* s = t.sizes;
  switch (t.kind) {
    case TermKind::blocks: return {s[0], s[1] * padded(s[1]), most_rows};
    case TermKind::sparse: return {s[0], t.index[s[0]] / s[0] + 1, width};
    case TermKind::kronecker: return {1, (s[1] * s[3] + s[0] * s[1]) * padded(s[2]), 1};
    case TermKind::circulant: return {s[0], s[1] * s[2] * padded(s[2]), most_rows};
    case TermKind::hadamard: break;  // a product with panels that `make` makes
  }
  return {0, 1, 1};
}

int64_t in_features(const Term& t) {
  const int64_t* s = t.sizes;
  switch (t.kind) {
    case TermKind::blocks: return s[0] * s[1];
    case TermKind::sparse: return s[1];
    case TermKind::kronecker: return s[1] * s[3];
    case TermKind::circulant: return s[1] * s[2];
    case TermKind::hadamard: return s[1];
  }
  return 0;
}

// Some rows of a call.
template <class T>
struct Part {
  const Rows &x, &y;
  int64_t first, n;
  bool add;

  const T* from(int64_t r) const { return row_of<const T>(x, first + r); }
  T* to(int64_t r) const { return row_of<T>(y, first + r); }
  // Columns [start, start + d) of the rows, in float, `apart` values apart.
  void widen(int64_t start, int64_t d, float* memory, int64_t apart) const {
    for (int64_t r = 0; r < n; ++r)
      each_register(d, [&](int64_t c, int64_t m) { put(memory + r * apart + c, take(from(r) + start + c, m), m); });
  }
};

template <class T>
void block(const Term& t, int64_t k, const Part<T>& part, float* x) {
  const int64_t b = t.sizes[1], stride = padded(b);
  part.widen(k * b, b, x, stride);  // no more of the rows, which another thread may be writing
  each_sum(x, stride, part.n, b, t.values + k * b * stride, stride, b, {1, 0, 0},
           [&](int64_t r, int64_t c, int64_t m, lanes sum) { put_sum(part.to(r) + k * b + c, sum, m, part.add); });
}

template <class T>
void circulant(const Term& t, int64_t p, const Part<T>& part, const float* x) {
  const int64_t n = t.sizes[1], b = t.sizes[2], stride = padded(2 * b) + padding;
  each_sum(x, padded(n * b), part.n, b, t.values + p * n * stride + b, -1, b, {n, b, stride},
           [&](int64_t r, int64_t c, int64_t m, lanes sum) { put_sum(part.to(r) + p * b + c, sum, m, part.add); });
}

template <class T>
void kronecker(const Term& t, const Part<T>& part, const float* x, float* inner) {
  const int64_t o1 = t.sizes[0], i1 = t.sizes[1], o2 = t.sizes[2], i2 = t.sizes[3], stride = padded(o2);
  const float *first = t.values, *second = first + padded(o1 * i1);
  each_sum(x, i2, i1, i2, second, stride, stride, {1, 0, 0},
           [&](int64_t r, int64_t c, int64_t m, lanes sum) { put(inner + r * stride + c, sum, m); });
  each_sum(first, i1, o1, i1, inner, stride, o2, {1, 0, 0},
           [&](int64_t p, int64_t c, int64_t m, lanes sum) { put_sum(part.to(0) + p * o2 + c, sum, m, part.add); });
}

// x: of each feature the values of all rows, as many as a register has.
template <class T>
void sparse_row(const Term& t, int64_t o, const Part<T>& part, const float* x) {
  const int32_t *starts = t.index, *columns = starts + t.sizes[0] + 1, start = starts[o], end = starts[o + 1];
  const auto put_value = [&](int64_t r, float sum) {
    T* y = part.to(r) + o;
    *y = from_float<T>(part.add ? to_float(*y) + sum : sum);
  };
  if (part.n == 1) {
    float sums[4] = {};
    for (int32_t k = start; k < end; ++k) sums[(k - start) % 4] = fma(t.values[k], x[columns[k]], sums[(k - start) % 4]);
    return put_value(0, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  lanes sums[4] = {};
  for (int32_t k = start; k < end; ++k) sums[(k - start) % 4] += t.values[k] * load(x + columns[k] * width);
  const lanes sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int64_t r = 0; r < part.n; ++r) put_value(r, sum[r]);
}

// Floats that a thread needs beside: its rows, and what is between two factors.
int64_t scratch_values(const Term& t) {
  return padded(in_features(t)) * units_of(t).rows + (t.kind == TermKind::kronecker ? t.sizes[1] * padded(t.sizes[2]) : 0);
}

template <class T>
void widen_rows(const Term& t, const Part<T>& part, float* x) {
  const int64_t i = in_features(t);
  if (t.kind != TermKind::sparse || part.n == 1) return part.widen(0, i, x, padded(i));
  for (int64_t c = 0; c < i; ++c)
    for (int64_t r = 0; r < width; ++r) x[c * width + r] = r < part.n ? to_float(part.from(r)[c]) : 0.0f;
}

template <class T>
void run_unit(const Term& t, int64_t unit, const Part<T>& part, float* x) {
  switch (t.kind) {
    case TermKind::blocks: return block(t, unit, part, x);
    case TermKind::sparse: return sparse_row(t, unit, part, x);
    case TermKind::kronecker: return kronecker(t, part, x, x + padded(in_features(t)));
    case TermKind::circulant: return circulant(t, unit, part, x);
    case TermKind::hadamard: return;
  }
}

template <class T>
void apply_typed(const Term& t, int64_t n, const Rows& x, const Rows& y, bool add, float* scratch) {
  const Units units = units_of(t);
  const int64_t parts = (n + units.rows - 1) / units.rows, total = parts * units.n;
  const int64_t wanted = n * units.n * units.cost / grain + 1, limit = total < max_threads() ? total : max_threads();
  const int64_t pieces = wanted < limit ? wanted : limit, own = scratch_values(t);
  parallel_for(pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t begin = total * piece / pieces, end = total * (piece + 1) / pieces;
      float* memory = scratch + piece * own;
      for (int64_t at = begin; at < end; ++at) {
        const int64_t start = at / units.n * units.rows, unit = at % units.n, left = n - start;
        const Part<T> part{x, y, start, left < units.rows ? left : units.rows, add};
        if (t.kind != TermKind::blocks && (at == begin || unit == 0)) widen_rows(t, part, memory);
        run_unit(t, unit, part, memory);
      }
    }
  });
}

int64_t scratch_bytes(const Term& t) { return max_threads() * scratch_values(t) * static_cast<int64_t>(sizeof(float)); }

void apply(const TermCall& call) {
  float* scratch = static_cast<float*>(call.scratch);
  switch (call.dtype) {
    case Dtype::float32: return apply_typed<float>(call.term, call.n, call.x, call.y, call.add, scratch);
    case Dtype::bfloat16: return apply_typed<bf16>(call.term, call.n, call.x, call.y, call.add, scratch);
    case Dtype::float16: return apply_typed<fp16>(call.term, call.n, call.x, call.y, call.add, scratch);
  }
}

constexpr int64_t pairs_at_once = 2;  // of inputs, whose sums are made together

// Some columns of the product of two factors: of inputs [0, n) from `a` on, `stride` values apart, at as many outputs as a register has.
template <int64_t n>
void entries(const float* a, int64_t stride, const float* b, int64_t r, lanes (&sums)[n]) {
  for (int64_t k = 0; k < r; ++k) {
    const lanes right = load(b + k * panel_block);
    for (int64_t j = 0; j < n; ++j) sums[j] += a[k * stride + j] * right;
  }
}

void put_products(const float* w, int64_t across, const lanes* sums, int64_t n, float* out) {
  for (int64_t j = 0; j < n; ++j) store(out + j * across, load(w + j * across) * sums[j]);
}

// Neighbours in i lie side by side, the first in the low half of 32 bits.
void put_products(const bf16* w, int64_t across, const lanes* sums, int64_t n, bf16* out) {
  for (int64_t j = 0; j < n; j += 2) {
    bit_lanes both;
    std::memcpy(&both, w + j * across, sizeof both);
    const bit_lanes low = bf16_bits((lanes)(both << 16) * sums[j]), high = bf16_bits((lanes)(both & 0xffff0000u) * sums[j + 1]);
    both = low | (high << 16);
    std::memcpy(out + j * across, &both, sizeof both);
  }
}

template <class T>
void make_typed(const Term& t, const PanelMatrix& w, T* out) {
  const int64_t r = t.sizes[2], stride = (t.sizes[1] + 31) / 32 * 32, across_of_one = sizeof(T) == 2 ? 2 : 1;
  const float *a = t.values, *b = a + r * stride;
  const T* values = static_cast<const T*>(w.values);
  parallel_for(blocks_of(w.o), 1 + grain / (w.depth * r + 1), [=](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const Panel p = panel_of(w, block);
      for (int64_t k = 0; k < w.depth; k += 2 * pairs_at_once) {
        const int64_t left = w.depth - k, n = left < 2 * pairs_at_once ? left : 2 * pairs_at_once;
        for (int64_t c = 0; c < panel_block; c += width) {
          lanes sums[2 * pairs_at_once] = {};
          entries(a + k, stride, b + block * r * panel_block + c, r, sums);
          const int64_t at = p.start + k * p.across + (p.first + c) * across_of_one;
          put_products(values + at, p.across, sums, n, out + at);
        }
      }
    }
  });
}

void make(const Term& term, const PanelMatrix& weight, void* panels) {
  if (weight.dtype == Dtype::float32) return make_typed(term, weight, static_cast<float*>(panels));
  make_typed(term, weight, static_cast<bf16*>(panels));
}

}  // namespace

const TermKernels terms = {scratch_bytes, apply, make};

}  // namespace VENEER_ISA
}  // namespace veneer
