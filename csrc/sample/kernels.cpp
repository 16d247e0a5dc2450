#include "sample/sample.h"

#include "core/lanes.h"
#include "core/parallel.h"
#include "sample/draw.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t grain_values = 1 << 16;
constexpr float nothing = -__builtin_inff();

struct Found {
  float value;
  int64_t column;
};

template <class T>
Found likeliest_of(const T* row, int64_t d, float scale) {
  lanes best = splat(nothing);
  int_lanes at{}, odd{};
  each_register(d, [&](int64_t c, int64_t n) {
    const lanes x = take(row + c, n, nothing) * scale;
    const int_lanes more = x > best;
    odd |= x != x;
    best = more ? x : best;
    at = more ? int_lanes{} + static_cast<int32_t>(c) : at;
  });
  Found found{nothing, -1};
  for (int64_t i = 0; i < width; ++i) {
    if (odd[i] != 0) return {__builtin_nanf(""), -1};
    const int64_t column = at[i] + i;
    if (best[i] > found.value || (best[i] == found.value && best[i] > nothing && column < found.column)) found = {best[i], column};
  }
  return found;
}

template <class T>
void likeliest_typed(const LogitColumns& logits, const Likeliest& found) {
  parallel_for(logits.n, grain_values / (logits.d + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Found own = likeliest_of(row_of<const T>(logits.rows, r), logits.d, logits.scale);
      if (!(own.value <= found.values[r]) && found.values[r] == found.values[r]) {
        found.values[r] = own.value;
        found.columns[r] = own.column < 0 ? -1 : logits.first + own.column;
      }
    }
  });
}

void likeliest(const LogitColumns& logits, const Likeliest& found) {
  if (logits.dtype == Dtype::float32) return likeliest_typed<float>(logits, found);
  likeliest_typed<bf16>(logits, found);
}

template <class T>
void draw_typed(const LogitColumns& logits, const RowRule* rules, const Draws& found, char* scratch, int n_threads) {
  parallel_tasks(n_threads, [&](int thread, const auto& next) {
    int64_t first = 0, counted = 0;  // of the likeliest ids of rows before
    for (int64_t r = next(); r < logits.n; r = next()) {
      for (; counted < r; ++counted) first += rules[counted].n_likeliest > 0 ? rules[counted].n_likeliest : 0;
      draw_row(row_of<const T>(logits.rows, r), logits.d, rules[r], scratch + thread * Row::bytes(logits.d), r, first, found);
    }
  });
}

void draw(const LogitColumns& logits, const RowRule* rules, const Draws& found, char* scratch, int n_threads) {
  if (logits.dtype == Dtype::float32) return draw_typed<float>(logits, rules, found, scratch, n_threads);
  draw_typed<bf16>(logits, rules, found, scratch, n_threads);
}

int64_t scratch_bytes(int64_t d) { return Row::bytes(d); }

}  // namespace

const SampleKernels sample = {likeliest, scratch_bytes, draw};

}  // namespace VENEER_ISA
}  // namespace veneer
