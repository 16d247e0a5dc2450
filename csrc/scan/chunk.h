// Tokens of a chunk, and what its products read. With the state S before the chunk, the sum G of the logarithms of decays
// since then, and Γ_ij = exp(G_i - G_j), a token's error is z_i = v_i - exp(G_i) Sᵀ k_i - Σ_{j<i} Γ_ij (k_i · k_j) x_j and it
// writes x_i = β_i z_i (Yang et al. 2024, arXiv 2406.06484, section 3). The errors come one after the other: no inverse is made.
// Internal to each kernels.cpp, for the reason that core/numeric.h gives.
#pragma once

#include "core/scratch.h"
#include "scan/product.h"
#include "scan/scan.h"

namespace veneer {
namespace {

constexpr int64_t unit = 16;     // a multiple of every register and of `few`
constexpr int64_t longest = 32;  // tokens of a chunk: more take more products within it, fewer more products with the state

// Rows are a cache line longer than their values: rows of 512 bytes would share few sets of the cache.
inline int64_t stride_of(int64_t n) { return up_to(n, unit) + unit; }

inline Matrix matrix(Scratch& scratch, int64_t rows, int64_t n) {
  return {scratch.take<float>(up_to(rows, unit) * stride_of(n)), stride_of(n)};
}
inline int64_t matrix_bytes(int64_t rows, int64_t n) { return up_to(rows, unit) * stride_of(n) * static_cast<int64_t>(sizeof(float)); }

struct Chunk {
  int64_t rows, k_width, v_width;  // multiples of `unit`
  Matrix q, k, k_turned;
  Matrix z, x, y;           // y: outputs, or their gradients
  Matrix decays, reads, n;  // Γ, Γ ∘ q kᵀ, and -Γ ∘ k kᵀ below the diagonal: all else is 0
  float *sums, *from, *to, *beta;  // G; exp(G); decays to the chunk's end; β
  float last;                      // decay over the whole chunk

  static int64_t bytes(const ScanSizes& s) {
    return 2 * matrix_bytes(longest, s.k_width) + matrix_bytes(s.k_width, longest) + 3 * matrix_bytes(longest, s.v_width) +
           3 * matrix_bytes(longest, longest) + 4 * longest * static_cast<int64_t>(sizeof(float));
  }
  Chunk(const ScanSizes& s, Scratch& scratch) : rows(0), k_width(up_to(s.k_width, unit)), v_width(up_to(s.v_width, unit)), last(1.0f) {
    for (Matrix* m : {&q, &k}) *m = matrix(scratch, longest, s.k_width);
    k_turned = matrix(scratch, s.k_width, longest);
    for (Matrix* m : {&z, &x, &y}) *m = matrix(scratch, longest, s.v_width);
    for (Matrix* m : {&decays, &reads, &n}) *m = matrix(scratch, longest, longest);
    for (float** p : {&sums, &from, &to, &beta}) *p = scratch.take<float>(longest);
  }
};

struct Place {  // of a chunk's tokens: first row, their number, and a head
  int64_t row, count, head;
};

template <class T>
inline T* at(const ScanPart& part, int64_t row, int64_t head) { return row_of<T>(part.rows, row) + head * part.apart; }

// Rows of d values, with zeros up to the next multiples.
template <class T>
inline void read(const Matrix& to, const ScanPart& part, const Place& place, int64_t d) {
  for (int64_t r = 0; r < up_to(place.count, unit); ++r)
    for (int64_t c = 0; c < up_to(d, unit); c += width) {
      const int64_t n = r < place.count ? d - c : 0;
      store(to[r] + c, n >= width ? load(at<const T>(part, place.row + r, place.head) + c)
                       : n > 0    ? load_some(at<const T>(part, place.row + r, place.head) + c, n)
                                  : lanes{});
    }
}

template <class T>
inline void write(const ScanPart& part, const Matrix& from, const Place& place, int64_t d, bool add = false) {
  for (int64_t r = 0; r < place.count; ++r) {
    T* row = at<T>(part, place.row + r, place.head);
    each_register(d, [&](int64_t c, int64_t n) { put(row + c, add ? take(row + c, n) + load(from[r] + c) : load(from[r] + c), n); });
  }
}

inline lanes places_from(int64_t first) {
  lanes found;
  for (int64_t i = 0; i < width; ++i) found[i] = static_cast<float>(first + i);
  return found;
}

inline void read_gates(Chunk& chunk, const ScanRows& given, const Place& place) {
  float total = 0.0f;
  for (int64_t r = 0; r < longest; ++r) {
    const bool present = r < place.count;
    if (present) total += *at<const float>(given.log_decay, place.row + r, place.head);
    chunk.sums[r] = total;
    chunk.beta[r] = present ? *at<const float>(given.beta, place.row + r, place.head) : 0.0f;
  }
  for (int64_t r = 0; r < longest; r += width) {
    store(chunk.from + r, exp(load(chunk.sums + r)));
    store(chunk.to + r, exp(total - load(chunk.sums + r)));
  }
  chunk.last = exp(splat(total))[0];
}

// The tokens' parts and their products, without those of values.
inline void begin(Chunk& chunk, const ScanSizes& sizes, const ScanRows& given, const Place& place) {
  const Place shared{place.row, place.count, place.head / sizes.group()};
  chunk.rows = up_to(place.count, unit);
  read<float>(chunk.q, given.q, shared, sizes.k_width);
  read<float>(chunk.k, given.k, shared, sizes.k_width);
  read_gates(chunk, given, place);
  turn(chunk.k_turned, chunk.k, chunk.rows, chunk.k_width);
  multiply(chunk.reads, chunk.q.left(), chunk.k_turned, chunk.rows, chunk.rows, chunk.k_width, 0.0f);
  multiply(chunk.n, chunk.k.left(), chunk.k_turned, chunk.rows, chunk.rows, chunk.k_width, 0.0f);
  for (int64_t i = 0; i < chunk.rows; ++i)
    for (int64_t j = 0; j < chunk.rows; j += width) {
      const lanes decay = exp(chunk.sums[i] - load(chunk.sums + j)), place_j = places_from(j);
      const float own = static_cast<float>(i);
      store(chunk.decays[i] + j, place_j <= own ? decay : lanes{});
      store(chunk.reads[i] + j, place_j <= own ? decay * load(chunk.reads[i] + j) : lanes{});
      store(chunk.n[i] + j, place_j < own ? -decay * load(chunk.n[i] + j) : lanes{});
    }
}

// f(row, column) for every register of the first rows of a matrix.
template <class F>
inline void each(int64_t rows, int64_t columns, const F& f) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += width) f(r, c);
}

// Errors z and what is written, x, from values and the state before the chunk.
template <class T>
inline void find_errors(Chunk& chunk, const ScanSizes& sizes, const ScanPart& v, const Place& place, const Matrix& state) {
  const Matrix &z = chunk.z, &x = chunk.x, &n = chunk.n;
  read<T>(x, v, place, sizes.v_width);
  multiply(z, chunk.k.left(), state, chunk.rows, chunk.v_width, chunk.k_width, 0.0f);
  each(chunk.rows, chunk.v_width, [&](int64_t r, int64_t c) { store(z[r] + c, load(x[r] + c) - chunk.from[r] * load(z[r] + c)); });
  for (int64_t i = 0; i < chunk.rows; i += few) {
    multiply({z[i], z.stride}, {n[i], n.stride, 1}, x, few, chunk.v_width, i, 1.0f);
    for (int64_t c = 0; c < chunk.v_width; c += width)
      for (int64_t r = i; r < i + few; ++r) {
        lanes error = load(z[r] + c);
        for (int64_t s = i; s < r; ++s) error += n[r][s] * load(x[s] + c);
        store(z[r] + c, error);
        store(x[r] + c, chunk.beta[r] * error);
      }
  }
}

inline void find_outputs(Chunk& chunk, const Matrix& state) {
  const Matrix& y = chunk.y;
  multiply(y, chunk.q.left(), state, chunk.rows, chunk.v_width, chunk.k_width, 0.0f);
  each(chunk.rows, chunk.v_width, [&](int64_t r, int64_t c) { store(y[r] + c, chunk.from[r] * load(y[r] + c)); });
  multiply(y, chunk.reads.left(), chunk.x, chunk.rows, chunk.v_width, 1.0f, [](int64_t i) { return Depth{0, i + few}; });
}

// The state after the chunk. Changes x.
inline void advance(Chunk& chunk, const Matrix& state) {
  const Matrix& x = chunk.x;
  each(chunk.rows, chunk.v_width, [&](int64_t r, int64_t c) { store(x[r] + c, chunk.to[r] * load(x[r] + c)); });
  multiply(state, chunk.k.turned(), x, chunk.k_width, chunk.v_width, chunk.rows, chunk.last);
}

}  // namespace
}  // namespace veneer
