#include "terms/terms.h"

#include "core/parallel.h"
#include "terms/entries.h"
#include "terms/many.h"
#include "terms/sums.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t grain = 1 << 13;  // multiplications

template <class T>
void put_sum(T* y, lanes x, int64_t n, bool add) {
  if (n == width) store(y, add ? load(y) + x : x);
  else put_first(y, add ? take_first(y, n) + x : x, n);
}

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
      each_register(d, [&](int64_t c, int64_t m) {
        const T* values = from(r) + start + c;
        if (m == width) store(memory + r * apart + c, load(values));
        else put_first(memory + r * apart + c, take_first(values, m), m);
      });
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

// ---- the frozen weight times the product of two factors, entry by entry

constexpr int64_t pairs_at_once = 4;  // of inputs, whose sums are made together
constexpr int64_t inputs_at_once = 2 * pairs_at_once;

int64_t padded_inputs(const Term& t) { return (t.sizes[1] + 31) / 32 * 32; }

// Factors in float: of a bfloat16 weight rounded to bfloat16, as training rounds them.
struct Floats {
  const float *a, *b;
  int64_t r, stride;

  // Of inputs [k, k + inputs_at_once) the entries at the outputs of a register of a block.
  void entries(int64_t k, int64_t block, int64_t c, lanes (&sums)[inputs_at_once]) const {
    for (int64_t l = 0; l < r; ++l) {
      const lanes right = load(b + (block * r + l) * panel_block + c);
      for (int64_t j = 0; j < inputs_at_once; ++j) sums[j] += a[l * stride + k + j] * right;
    }
  }
};

void put_products(const float* w, int64_t across, const lanes* sums, int64_t n, float* out) {
  for (int64_t j = 0; j < n; ++j) store(out + j * across, load(w + j * across) * sums[j]);
}

// Neighbours in i lie side by side, the first in the low half of 32 bits.
void put_products(const bf16* w, int64_t across, const lanes* sums, int64_t n, bf16* out) {
  for (int64_t j = 0; j < n; j += 2) {
    bit_lanes both;
    std::memcpy(&both, w + j * across, sizeof both);
    const lanes first = (lanes)(both << 16) * sums[j], second = (lanes)(both & 0xffff0000u) * sums[j + 1];
#if defined(__AVX512BF16__)
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
    both = (bit_lanes)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
#else
    both = bf16_bits(first) | (bf16_bits(second) << 16);
#endif
    std::memcpy(out + j * across, &both, sizeof both);
  }
}

template <class T, class Factors>
void make_typed(const Factors& factors, const PanelMatrix& w, T* out) {
  const int64_t across_of_one = sizeof(T) == 2 ? 2 : 1;
  const T* values = static_cast<const T*>(w.values);
  const int64_t steps = (w.depth + inputs_at_once - 1) / inputs_at_once, panels = (blocks_of(w.o) + panel_blocks - 1) / panel_blocks;
  parallel_for(panels * steps, 1 + grain / (inputs_at_once * panel_blocks * factors.r), [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {  // in the order of memory
      const int64_t first = i / steps * panel_blocks, k = i % steps * inputs_at_once, left = w.depth - k;
      const Panel p = panel_of(w, first);
      for (int64_t j = 0; j < p.across; j += width) {
        lanes sums[inputs_at_once] = {};
        factors.entries(k, first + j / panel_block, j % panel_block, sums);
        const int64_t at = p.start + k * p.across + j * across_of_one;
        put_products(values + at, p.across, sums, left < inputs_at_once ? left : inputs_at_once, out + at);
      }
    }
  });
}

#if defined(__AVX512BF16__)
// Factors in bfloat16, neighbours in rank side by side: a (r / 2, inputs, 2) and b (blocks, r / 2, 16, 2).
struct Pairs {
  const bf16 *a, *b;
  int64_t r, stride;

  void entries(int64_t k, int64_t block, int64_t, lanes (&sums)[inputs_at_once]) const {
    for (int64_t l = 0; l < r / 2; ++l) {
      const __m512bh right = (__m512bh)_mm512_loadu_si512(b + (block * (r / 2) + l) * 2 * panel_block);
      for (int64_t j = 0; j < inputs_at_once; ++j) {
        int32_t pair;
        std::memcpy(&pair, a + (l * stride + k + j) * 2, sizeof pair);
        sums[j] = (lanes)_mm512_dpbf16_ps((__m512)sums[j], (__m512bh)_mm512_set1_epi32(pair), right);
      }
    }
  }
};

// `n` values, a multiple of a register, of two rows side by side; the second may be null, which is zeros.
void put_pair(const float* first, const float* second, int64_t n, bf16* to) {
  for (int64_t c = 0; c < n; c += width) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)load(first + c)));
    const lanes beside = second == nullptr ? lanes{} : load(second + c);
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)beside));
    _mm512_storeu_si512(to + 2 * c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

void make_rounded(const Term& t, const PanelMatrix& w, bf16* out, void* scratch) {
  const int64_t r = t.sizes[2], stride = padded_inputs(t), even = (r + 1) / 2 * 2, blocks = blocks_of(w.o);
  const float *a = t.values, *b = a + r * stride;
  bf16 *a_pairs = static_cast<bf16*>(scratch), *b_pairs = a_pairs + even * stride;
  for (int64_t l = 0; l < r; l += 2) put_pair(a + l * stride, l + 1 < r ? a + (l + 1) * stride : nullptr, stride, a_pairs + l * stride);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t l = 0; l < r; l += 2) {
      const float* from = b + (block * r + l) * panel_block;
      put_pair(from, l + 1 < r ? from + panel_block : nullptr, panel_block, b_pairs + (block * even + l) * panel_block);
    }
  make_typed<bf16>(Pairs{a_pairs, b_pairs, even, stride}, w, out);
}
#else
void make_rounded(const Term& t, const PanelMatrix& w, bf16* out, void* scratch) {
  const int64_t r = t.sizes[2], stride = padded_inputs(t), n = r * (stride + blocks_of(w.o) * panel_block);
  float* rounded = static_cast<float*>(scratch);
  for (int64_t k = 0; k < n; ++k) rounded[k] = to_float(from_float<bf16>(t.values[k]));
  make_typed<bf16>(Floats{rounded, rounded + r * stride, r, stride}, w, out);
}
#endif

int64_t make_bytes(const Term& t) {
  return (t.sizes[2] + 1) * (padded_inputs(t) + padded(t.sizes[0])) * static_cast<int64_t>(sizeof(float));
}

void make(const Term& term, const PanelMatrix& weight, void* panels, void* scratch) {
  const int64_t r = term.sizes[2], stride = padded_inputs(term);
  if (weight.dtype == Dtype::bfloat16) return make_rounded(term, weight, static_cast<bf16*>(panels), scratch);
  make_typed<float>(Floats{term.values, term.values + r * stride, r, stride}, weight, static_cast<float*>(panels));
}

// ---- forms, which are packed here: for the rows of a training step that costs next to nothing

bool is_packed(const FormAt& f) { return f.kind == TermKind::blocks || f.kind == TermKind::kronecker; }

// The matrix (rows, columns) with each row padded; or its transpose.
void pad_rows(const float* from, int64_t rows, int64_t columns, bool transposed, float* to) {
  const int64_t n = transposed ? columns : rows, m = transposed ? rows : columns, wide = padded(m);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t c = 0; c < wide; ++c) to[r * wide + c] = c >= m ? 0.0f : transposed ? from[c * columns + r] : from[r * columns + c];
}

int64_t packed_floats(const FormAt& f) {
  const int64_t* s = f.sizes;
  if (f.kind == TermKind::blocks) return s[0] * s[1] * padded(s[1]);
  const int64_t wider = s[2] > s[3] ? s[2] : s[3];
  return padded(s[0] * s[1]) + wider * padded(wider);
}

Term packed(const FormAt& f, bool transposed, float* to) {
  const int64_t* s = f.sizes;
  if (f.kind == TermKind::blocks) {
    for (int64_t k = 0; k < s[0]; ++k) pad_rows(f.values + k * s[1] * s[1], s[1], s[1], !transposed, to + k * s[1] * padded(s[1]));
    return {f.kind, {s[0], s[1], 0, 0}, to, nullptr};
  }
  const int64_t o1 = s[transposed ? 1 : 0], i1 = s[transposed ? 0 : 1];
  for (int64_t p = 0; p < o1; ++p)
    for (int64_t j = 0; j < i1; ++j) to[p * i1 + j] = transposed ? f.values[j * o1 + p] : f.values[p * i1 + j];
  pad_rows(f.second, s[2], s[3], !transposed, to + padded(o1 * i1));
  return {f.kind, {o1, i1, s[transposed ? 3 : 2], s[transposed ? 2 : 3]}, to, nullptr};
}

int64_t map_bytes(const FormAt& f) {
  constexpr int64_t apart = 64, float_bytes = sizeof(float);
  if (!is_packed(f)) return 2 * f.n_places * 4 + max_threads() * sparse_strip_floats(f) * float_bytes + 3 * apart;
  const int64_t* s = f.sizes;  // the wider of both directions
  const Term there{f.kind, {s[0], s[1], s[2], s[3]}, nullptr, nullptr}, back{f.kind, {s[1], s[0], s[3], s[2]}, nullptr, nullptr};
  const int64_t a = scratch_bytes(there), b = f.kind == TermKind::blocks ? a : scratch_bytes(back);
  return packed_floats(f) * float_bytes + apart + (a > b ? a : b);
}

template <class T>
void map_typed(const MapCall& call) {
  if (!is_packed(call.form)) return map_sparse<T>(call);
  Scratch scratch{static_cast<char*>(call.scratch)};
  const Term term = packed(call.form, call.transposed, scratch.take<float>(packed_floats(call.form)));
  apply_typed<T>(term, call.n, call.x, call.y, call.add, reinterpret_cast<float*>(scratch.next));
}

void map(const MapCall& call) {
  switch (call.dtype) {
    case Dtype::float32: return map_typed<float>(call);
    case Dtype::bfloat16: return map_typed<bf16>(call);
    case Dtype::float16: return map_typed<fp16>(call);
  }
}

}  // namespace

const TermKernels terms = {scratch_bytes, apply,     make_bytes,    make,    map_bytes,            map,
                           gradient_bytes, gradients, entries_bytes, entries, entry_gradient_bytes, entry_gradients};

}  // namespace VENEER_ISA
}  // namespace veneer
