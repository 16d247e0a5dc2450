#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <new>

#include "core/parallel.h"
#include "core/workspace.h"
#include "grouped_low_rank/grouped_low_rank.h"

namespace nb = nanobind;

namespace veneer {
namespace {

using Numbers = std::vector<int64_t>;

constexpr int64_t least_work = 1 << 21;  // multiplications; less is not worth waking a thread

int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// What Python says of a call, as numbers: element types of x, factors and y; the widths of input and outputs; of each
// layer, adapter by adapter, the addresses of a and b and the rank, and of the mask the key, the threshold (0: there is
// none) and the address of the rows' ids; of each run of rows its adapter, start and stop, ordered by adapter.
struct Given {
  std::vector<int> dtypes;
  int64_t in_features;
  Numbers out_features, pairs, masks;
  std::vector<float> scales;
  Numbers runs;
};

// The blocks of all adapters, and where everything lies. Addresses in scratch are offsets until `place` is called.
struct Plan {
  const Given& given;
  LowRankUnits units;
  std::vector<LowRankPair> pairs;
  std::vector<LowRankAdapter> adapters;
  std::vector<LowRankBlock> blocks;
  std::vector<LowRankOuter> outers;
  Numbers rows;
  std::vector<RowsView> ys;
  LowRankCall call{};

  explicit Plan(const Given& g) : given(g), units(grouped_low_rank_kernels().units(Dtype(g.dtypes.at(0)))) {
    call.dtype = Dtype(g.dtypes.at(0));
    call.factor_dtype = Dtype(g.dtypes.at(1));
    call.y_dtype = Dtype(g.dtypes.at(2));
    call.in_features = g.in_features;
    call.n_layers = static_cast<int64_t>(g.out_features.size());
    call.n_adapters = static_cast<int64_t>(g.scales.size()) / call.n_layers;
    call.out_features = g.out_features.data();
    lay_out_ranks();
    lay_out_blocks();
    call.n_threads = work() < least_work ? 1 : max_threads();
  }

  int64_t u_bytes() const { return call.n_blocks * low_rank_block * call.u_columns * units.element; }

  // Takes scratch for one pass and says where each part of it is.
  void place(bool backward) {
    int64_t size = 0;
    const auto take = [&size](int64_t bytes) {
      const int64_t at = size;
      size += padded(bytes, 64);
      return reinterpret_cast<char*>(at);
    };
    for (int64_t k = 0; k < call.n_adapters; ++k) {
      LowRankAdapter& adapter = adapters[k];
      if (adapter.n_blocks == 0) continue;
      const int64_t i = call.in_features, columns = padded(adapter.columns, units.columns);
      adapter.joined = take(units.element * (backward ? adapter.columns * padded(i, low_rank_tile) : columns * padded(i, units.depth)));
      const int64_t turned = (adapter.columns + units.rows) * adapter.n_blocks * low_rank_block * units.element;
      adapter.u_t = backward ? take(turned) : nullptr;
      adapter.du_t = backward ? take(turned) : nullptr;
      for (int64_t layer = 0; layer < call.n_layers; ++layer) {
        LowRankPair& p = pairs[layer * call.n_adapters + k];
        const int64_t o = call.out_features[layer], r = p.rank;
        p.packed = take(units.element * (backward ? padded(o, units.depth) * padded(r, units.columns)
                                                  : padded(r, units.depth) * padded(o, low_rank_tile)));
      }
    }
    call.thread_bytes = thread_bytes();
    call.scratch = take(call.thread_bytes * call.n_threads);
    char* base = static_cast<char*>(workspace(size));
    if (base == nullptr) throw std::bad_alloc();
    const auto found = [base](char*& part) { part = base + reinterpret_cast<intptr_t>(part); };
    found(call.scratch);
    for (LowRankAdapter& adapter : adapters)
      for (char** part : {&adapter.joined, &adapter.u_t, &adapter.du_t}) found(*part);
    for (LowRankPair& p : pairs) found(p.packed);
    call.pairs = pairs.data(), call.adapters = adapters.data();
    call.blocks = blocks.data(), call.outers = outers.data();
  }

  void read_ys(const Numbers& places) {
    for (size_t layer = 0; layer * 2 < places.size(); ++layer)
      ys.push_back({reinterpret_cast<char*>(places[2 * layer]), places[2 * layer + 1]});
    call.ys = ys.data();
  }

 private:
  void lay_out_ranks() {
    adapters.resize(call.n_adapters);
    pairs.resize(call.n_layers * call.n_adapters);
    for (int64_t k = 0; k < call.n_adapters; ++k) {
      for (int64_t layer = 0; layer < call.n_layers; ++layer) {
        const int64_t at = layer * call.n_adapters + k;
        LowRankPair& p = pairs[at];
        p.a = reinterpret_cast<const void*>(given.pairs.at(3 * at));
        p.b = reinterpret_cast<const void*>(given.pairs.at(3 * at + 1));
        p.rank = given.pairs.at(3 * at + 2);
        p.scale = given.scales.at(at);
        p.key = static_cast<uint64_t>(given.masks.at(3 * at));
        p.threshold = static_cast<uint32_t>(given.masks.at(3 * at + 1));
        p.ids = reinterpret_cast<const int64_t*>(given.masks.at(3 * at + 2));
        adapters[k].masked |= p.rank > 0 && p.threshold > 0;
        p.first = adapters[k].columns;
        adapters[k].columns += padded(p.rank, units.depth);
      }
      const int64_t columns = padded(adapters[k].columns, units.columns);
      call.u_columns = columns > call.u_columns ? columns : call.u_columns;
    }
  }

  void lay_out_blocks() {
    Numbers adapter_of;  // of each row in `rows`
    for (size_t run = 0; run < given.runs.size(); run += 3) {
      if (adapters.at(given.runs[run]).columns == 0) continue;
      for (int64_t row = given.runs[run + 1]; row < given.runs[run + 2]; ++row) {
        adapter_of.push_back(given.runs[run]);
        rows.push_back(row);
      }
    }
    const int64_t n = static_cast<int64_t>(rows.size());
    for (int64_t first = 0, end; first < n; first = end) {
      const int64_t k = adapter_of[first];
      for (end = first; end < n && end - first < low_rank_block && adapter_of[end] == k;) ++end;
      if (adapters[k].n_blocks++ == 0) adapters[k].first_block = static_cast<int64_t>(blocks.size());
      const bool together = rows[end - 1] - rows[first] == end - first - 1;
      blocks.push_back({k, end - first, rows.data() + first, together});
    }
    call.n_blocks = static_cast<int64_t>(blocks.size());
    for (int64_t k = 0; k < call.n_adapters; ++k) {
      if (!adapters[k].masked && adapters[k].columns > 0) lay_out_outers(k, -1, true);
      for (int64_t layer = 0; layer < call.n_layers; ++layer) {
        if (pairs[layer * call.n_adapters + k].rank == 0) continue;
        if (adapters[k].masked) lay_out_outers(k, layer, true);
        lay_out_outers(k, layer, false);
      }
    }
    call.n_outers = static_cast<int64_t>(outers.size());
  }

  void lay_out_outers(int64_t adapter, int64_t layer, bool of_a) {
    const int64_t features = of_a ? call.in_features : call.out_features[layer];
    for (int64_t c = 0; c < features; c += low_rank_outer_columns) outers.push_back({adapter, layer, c, of_a});
  }

  int64_t thread_bytes() const {
    int64_t widest = call.in_features > low_rank_outer_columns ? call.in_features : low_rank_outer_columns;
    for (int64_t o : given.out_features) widest = o > widest ? o : widest;
    const int64_t row_values = low_rank_block * (padded(widest, 32) + call.u_columns + 32);
    const int64_t masked_values = low_rank_block * padded(widest, low_rank_tile);
    return padded(row_values * units.element, 64) + masked_values * 4 +
           low_rank_outer_columns * (call.u_columns + low_rank_block) * 4 + 256;
  }

  int64_t work() const {
    int64_t widths = 0;
    for (int64_t o : given.out_features) widths += o;
    return static_cast<int64_t>(rows.size()) * (call.in_features + widths / call.n_layers) * call.u_columns;
  }
};

Given given_of(std::vector<int> dtypes, int64_t in_features, Numbers outs, Numbers pairs, Numbers masks,
               std::vector<float> scales, Numbers runs) {
  return {std::move(dtypes), in_features,       std::move(outs), std::move(pairs),
          std::move(masks),  std::move(scales), std::move(runs)};
}

}  // namespace

void bind_grouped_low_rank(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def("grouped_low_rank_u_bytes",
        [](std::vector<int> dtypes, int64_t in_features, Numbers outs, Numbers pairs, Numbers masks,
           std::vector<float> scales, Numbers runs) {
          const Given given = given_of(dtypes, in_features, outs, pairs, masks, scales, runs);
          return Plan(given).u_bytes();
        });
  m.def(
      "grouped_low_rank_forward",
      [](std::vector<int> dtypes, int64_t in_features, Numbers outs, Numbers pairs, Numbers masks,
         std::vector<float> scales, Numbers runs, uintptr_t x, int64_t x_stride, Numbers ys, uintptr_t u) {
        const Given given = given_of(dtypes, in_features, outs, pairs, masks, scales, runs);
        Plan plan(given);
        plan.place(false);
        plan.read_ys(ys);
        plan.call.x = {reinterpret_cast<char*>(x), x_stride};
        plan.call.u = reinterpret_cast<char*>(u);
        grouped_low_rank_kernels().forward(plan.call);
      },
      release());
  m.def(
      "grouped_low_rank_backward",
      [](std::vector<int> dtypes, int64_t in_features, Numbers outs, Numbers pairs, Numbers masks,
         std::vector<float> scales, Numbers runs, uintptr_t x, int64_t x_stride, Numbers dys, uintptr_t u, uintptr_t dx, Numbers gradients) {
        const Given given = given_of(dtypes, in_features, outs, pairs, masks, scales, runs);
        Plan plan(given);
        plan.place(true);
        plan.read_ys(dys);
        plan.call.x = {reinterpret_cast<char*>(x), x_stride};
        plan.call.dx = {reinterpret_cast<char*>(dx), in_features};
        plan.call.u = reinterpret_cast<char*>(u);
        for (size_t at = 0; at < plan.pairs.size(); ++at) {
          plan.pairs[at].da = reinterpret_cast<float*>(gradients.at(2 * at));
          plan.pairs[at].db = reinterpret_cast<float*>(gradients.at(2 * at + 1));
        }
        grouped_low_rank_kernels().backward(plan.call);
      },
      release());
}

}  // namespace veneer
