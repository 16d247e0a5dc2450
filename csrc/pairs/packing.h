// The factors of many pairs into their panels, rounded once on the way.
#pragma once

#include "core/panels.h"
#include "pairs/pairs.h"

namespace veneer {
namespace {

// Values in four bytes of a panel, which are neighbours in i.
template <class T>
constexpr int64_t in_word() { return 4 / sizeof(T); }

// The first n of a row's values, scaled and rounded; of what is left of a tile's row, zeros.
template <class T, class From>
inline void round_row(const From* row, int64_t n, float scale, T* to, int64_t space) {
  each_register(n, [=](int64_t c, int64_t left) { put(to + c, take(row + c, left) * splat(scale), left); });
  for (int64_t c = n; c < space; ++c) to[c] = T{};
}

// n rows of a factor that lie in one block of outputs, the first of them at `to`. A tile is turned on its side, so that what is
// written at a time is contiguous.
template <class T, class From>
inline void pack_beside(const PairsFactor& f, const From* rows, int64_t n, T* to, int64_t across) {
  constexpr int64_t word = in_word<T>(), at_once = 16 * word;
  T tile[panel_block][at_once];
  for (int64_t k = 0; k < f.i; k += at_once) {
    const int64_t values = f.i - k < at_once ? f.i - k : at_once;
    for (int64_t j = 0; j < n; ++j) round_row(rows + j * f.stride + k, values, f.scale, tile[j], at_once);
    for (int64_t c = 0; c < values; c += word, to += across * word)
      for (int64_t j = 0; j < n; ++j) std::memcpy(static_cast<void*>(to + j * word), tile[j] + c, 4);
  }
}

template <class T, class From>
void pack_factor(const PairsFactor& f) {
  const From* rows = static_cast<const From*>(f.rows);
  for (int64_t done = 0, n; done < f.n; done += n) {
    const int64_t row = f.first + done, inside = row % panel_block, left = f.n - done;
    n = left < panel_block - inside ? left : panel_block - inside;
    const Panel panel = panel_of(f.to, row / panel_block);
    T* to = static_cast<T*>(f.to.values) + panel.start + (panel.first + inside) * in_word<T>();
    pack_beside(f, rows + done * f.stride, n, to, panel.across);
  }
}

template <class T>
void pack_factor_as(const PairsFactor& f) {
  switch (f.dtype) {
    case Dtype::float32: return pack_factor<T, float>(f);
    case Dtype::bfloat16: return pack_factor<T, bf16>(f);
    case Dtype::float16: return pack_factor<T, fp16>(f);
  }
}

}  // namespace
}  // namespace veneer
