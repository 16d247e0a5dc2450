#include <algorithm>
#include <cstring>
#include <limits>

#include "sample/sample.h"
#include "step/instructions.h"

namespace veneer {
namespace {

constexpr int64_t alignment = 64, panel = panel_blocks * panel_block;
constexpr int64_t most_bytes = 1 << 18;  // of logits at a time: they stay in a core's second-level cache

int64_t padded(int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

// The runs of the rows that are picked, which come in their order.
std::vector<VersionRun> picked_runs(const Pass& pass) {
  std::vector<VersionRun> found;
  const int64_t *begin = pass.picked, *end = pass.picked + pass.n_picked;
  for (int64_t r = 0; r < pass.n_runs; ++r) {
    const VersionRun& run = pass.runs[r];
    found.push_back({run.version, std::lower_bound(begin, end, run.start) - begin, std::lower_bound(begin, end, run.stop) - begin});
  }
  return found;
}

}  // namespace

// The tokens of some rows. Logits are made for a stretch of the vocabulary after the other, and none is kept.
void HeadInstruction::run(const Pass& pass) const {
  if (pass.n_picked == 0) return;
  const PanelMatrix& all = head_.weight;
  const int64_t n = pass.n_picked, row_bytes = all.i * pass.bytes();
  const int64_t fit = most_bytes / (n * pass.bytes()) / panel * panel, at_once = fit < panel ? panel : fit;
  char* x = pass.rows.at_least(2 * padded(n * row_bytes) + padded(n * at_once * pass.bytes()) + n * sizeof(float));
  char* normed = x + padded(n * row_bytes);
  char* logits = normed + padded(n * row_bytes);
  float* values = reinterpret_cast<float*>(logits + padded(n * at_once * pass.bytes()));
  for (int64_t r = 0; r < n; ++r) {
    std::memcpy(x + r * row_bytes, pass.from_row(pass.registers[source_], pass.picked[r]).data, row_bytes);
    values[r] = -std::numeric_limits<float>::infinity();
    pass.tokens[r] = -1;
  }
  const bool has_norm = !norms_.base.weight.empty();
  if (has_norm) norms_.run(pass, picked_runs(pass), {x, all.i}, n, normed);
  const Rows read{has_norm ? normed : x, all.i};
  for (int64_t first = 0; first < all.o; first += at_once) {
    PanelMatrix some = all;
    some.o = all.o - first < at_once ? all.o - first : at_once;
    some.values = static_cast<char*>(all.values) + first * output_bytes_;
    const char* bias = static_cast<const char*>(head_.bias);
    const Rows y{logits, some.o}, onto{bias == nullptr ? nullptr : const_cast<char*>(bias) + first * pass.bytes(), 0};
    PanelMatrix next = some;
    if (first + some.o < all.o) next.values = static_cast<char*>(some.values) + some.o * output_bytes_;
    multiply_rows(pass, some, read, y, onto, n, &next);
    sample_kernels().likeliest({n, some.o, first, pass.dtype, y, scale_}, {values, pass.tokens});
  }
  for (int64_t r = 0; r < n; ++r)
    if (!(values[r] < std::numeric_limits<float>::infinity())) pass.tokens[r] = -1;
}

}  // namespace veneer
