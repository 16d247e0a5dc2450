#include "pairs/pairs.h"
#include "step/instructions.h"

namespace veneer {

void add_pairs(const Pass& pass, const Segments& segments, const Rows& x, int64_t in_features, const Rows* ys,
               const std::vector<int64_t>& heights) {
  if (segments.parts.empty()) return;
  std::vector<PairsRows> outs;
  for (size_t i = 0; i < heights.size(); ++i) outs.push_back({static_cast<char*>(ys[i].data), ys[i].stride});
  PairsCall call{pass.dtype, pass.dtype, pass.dtype, in_features, static_cast<int64_t>(heights.size()),
                 static_cast<int64_t>(segments.parts.size()), heights.data(), segments.parts.data(), {static_cast<char*>(x.data), x.stride},
                 outs.data(), 0, nullptr, 1};
  share_out(call);
  call.scratch = pass.scratch.at_least(pairs_kernels().scratch_bytes(call));
  pairs_kernels().add(call);
}

void change_halves(const Pass& pass, const Bottlenecks& bottlenecks, int64_t d, const Rows& x, const Rows& y) {
  Segments serial(pass.n_runs), parallel(pass.n_runs);
  for (int64_t r = 0; r < pass.n_runs; ++r) {
    const Bottleneck* found = bottlenecks.of(pass.runs[r].version);
    if (found != nullptr) (found->reads_output ? serial : parallel).add(found->pairs, nullptr, pass.runs[r].start, pass.runs[r].stop);
  }
  add_pairs(pass, serial, y, d, &y, {d});
  add_pairs(pass, parallel, x, d, &y, {d});
}

}  // namespace veneer
