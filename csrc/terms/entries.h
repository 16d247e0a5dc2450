// A weight times the product of two factors, entry by entry, for a training step: the matrix, and the factors' gradients.
// Rows are taken in pieces of a fixed size, in their order: no result depends on the number of threads.
// Internal to kernels.cpp, for the reason that numeric.h gives.
#pragma once

#include "terms/many.h"

namespace veneer {
namespace {

constexpr int64_t entry_rows = 16;   // of the weight at once: their entries stay in a core's own cache
constexpr int64_t most_pieces = 16;  // of a gradient in A, each of which is kept until all are summed

struct EntrySizes {
  int64_t o, i, r, wide, piece;  // piece: its rows

  explicit EntrySizes(const FormAt& f)
      : o(f.sizes[0]), i(f.sizes[1]), r(f.sizes[2]), wide(padded(i)), piece(up_to((o + most_pieces - 1) / most_pieces, piece_rows)) {}
  int64_t pieces() const { return (o + piece - 1) / piece; }
  int64_t of_thread() const { return entry_rows * (wide + r * width); }
};

float* padded_a(const FormAt& f, const EntrySizes& s, Scratch& scratch) {
  float* a = scratch.take<float>(s.r * s.wide);
  widen<float>({const_cast<float*>(f.values), s.i}, 0, s.r, 0, s.i, s.wide, a);
  return a;
}

template <class T>
void entries_typed(const EntriesCall& call) {
  const EntrySizes s(call.form);
  Scratch scratch{static_cast<char*>(call.scratch)};
  const float* a = padded_a(call.form, s, scratch);
  parallel_for((s.o + entry_rows - 1) / entry_rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * entry_rows; row < end * entry_rows && row < s.o; row += entry_rows) {
      const int64_t n = s.o - row < entry_rows ? s.o - row : entry_rows;
      each_sum(call.form.second + row * s.r, s.r, n, s.r, a, s.wide, s.i, {1, 0, 0}, [&](int64_t r, int64_t c, int64_t m, lanes sum) {
        const T* w = row_of<const T>(call.weight, row + r) + c;
        T* to = static_cast<T*>(call.out) + (row + r) * s.i + c;
        if (m == width) store(to, load(w) * sum);
        else put_first(to, take_first(w, m) * sum, m);
      });
    }
  });
}

template <class T>
void entry_gradients_typed(const EntryGradients& call) {
  const EntrySizes s(call.form);
  const float* b = call.form.second;
  Scratch scratch{static_cast<char*>(call.scratch)};
  const float* a = padded_a(call.form, s, scratch);
  float *found = scratch.take<float>(s.pieces() * s.r * s.wide), *memory = scratch.take<float>(max_threads() * s.of_thread());
  parallel_for_indexed(s.pieces(), [&](int thread, int64_t begin, int64_t end) {
    float *product = memory + thread * s.of_thread(), *sums = product + entry_rows * s.wide;
    std::memset(found + begin * s.r * s.wide, 0, (end - begin) * s.r * s.wide * sizeof(float));
    for (int64_t row = begin * s.piece; row < end * s.piece && row < s.o; row += entry_rows) {
      const int64_t n = s.o - row < entry_rows ? s.o - row : entry_rows;
      widen<T>(call.gradient, row, n, 0, s.i, s.wide, product);
      for (int64_t r = 0; r < n; ++r)
        each_register(s.i, [&](int64_t c, int64_t m) {
          const T* w = row_of<const T>(call.weight, row + r) + c;
          float* to = product + r * s.wide + c;
          store(to, load(to) * (m == width ? load(w) : take_first(w, m)));
        });
      add_outer(b + row * s.r, s.r, product, s.wide, n, s.r, s.wide, found + row / s.piece * s.r * s.wide, s.wide);
      std::memset(sums, 0, n * s.r * width * sizeof(float));
      add_inner(product, n, a, s.r, s.wide, 1, sums);
      for (int64_t k = 0; k < n * s.r; ++k) call.second[row * s.r + k] = sum(load(sums + k * width));
    }
  });
  for (int64_t l = 0; l < s.r; ++l) {
    float* to = call.values + l * s.i;
    std::memcpy(to, found + l * s.wide, s.i * sizeof(float));
    for (int64_t piece = 1; piece < s.pieces(); ++piece)
      for (int64_t c = 0; c < s.i; ++c) to[c] += found[(piece * s.r + l) * s.wide + c];
  }
}

int64_t entries_bytes(const FormAt& f) {
  const EntrySizes s(f);
  return s.r * s.wide * static_cast<int64_t>(sizeof(float));
}

int64_t entry_gradient_bytes(const FormAt& f) {
  const EntrySizes s(f);
  constexpr int64_t apart = 64;
  return ((s.pieces() + 1) * s.r * s.wide + max_threads() * s.of_thread()) * static_cast<int64_t>(sizeof(float)) + 2 * apart;
}

void entries(const EntriesCall& call) {
  switch (call.dtype) {
    case Dtype::float32: return entries_typed<float>(call);
    case Dtype::bfloat16: return entries_typed<bf16>(call);
    case Dtype::float16: return entries_typed<fp16>(call);
  }
}

void entry_gradients(const EntryGradients& call) {
  switch (call.dtype) {
    case Dtype::float32: return entry_gradients_typed<float>(call);
    case Dtype::bfloat16: return entry_gradients_typed<bf16>(call);
    case Dtype::float16: return entry_gradients_typed<fp16>(call);
  }
}

}  // namespace
}  // namespace veneer
