#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <new>

#include "core/workspace.h"
#include "pairs/pairs.h"

namespace nb = nanobind;

namespace veneer {
namespace {

using Numbers = std::vector<int64_t>;

}  // namespace

void bind_pairs(nb::module_& m) {
  // `table`: of each segment the address of its factors, start, stop, what there is between and behind its products (0: nothing;
  // the numbers of `middle_at`), and the rank at each layer. `ys`: of each output address and stride.
  m.def(
      "pairs_add",
      [](int dtype, int x_dtype, int y_dtype, int64_t in_features, Numbers out_features, uintptr_t table,
         int64_t n_segments, uintptr_t x, int64_t x_stride, Numbers ys) {
        const int64_t layers = static_cast<int64_t>(out_features.size());
        std::vector<PairsSegment> found;
        std::vector<PairsMiddle> middles(n_segments);
        std::vector<PairsRows> outs;
        for (int64_t at = 0; at < n_segments; ++at) {
          const int64_t* s = reinterpret_cast<const int64_t*>(table) + at * (layers + 9);
          middles[at] = middle_at(s + 3);
          found.push_back({reinterpret_cast<const char*>(s[0]), s + 9, s[1], s[2], s[3] != 0 ? &middles[at] : nullptr});
        }
        for (size_t l = 0; l < ys.size(); l += 2) outs.push_back({reinterpret_cast<char*>(ys[l]), ys[l + 1]});
        PairsCall call{Dtype(dtype), Dtype(x_dtype), Dtype(y_dtype), in_features, layers,
                       static_cast<int64_t>(found.size()), out_features.data(), found.data(),
                       {reinterpret_cast<char*>(x), x_stride}, outs.data(), 0, nullptr, 1};
        share_out(call);
        call.scratch = static_cast<char*>(workspace(pairs_kernels().scratch_bytes(call)));
        if (call.scratch == nullptr) throw std::bad_alloc();
        pairs_kernels().add(call);
      },
      nb::call_guard<nb::gil_scoped_release>());
  // `table`: of each factor the address, stride and dtype of its rows, how many, their values; the address, o, depth and dtype of the
  // matrix, and the first of its outputs that they are.
  m.def(
      "pairs_pack",
      [](const Numbers& table, const std::vector<float>& scales) {
        std::vector<PairsFactor> factors;
        for (size_t f = 0; f < scales.size(); ++f) {
          const int64_t* t = table.data() + 10 * f;
          factors.push_back({reinterpret_cast<const void*>(t[0]), t[1], Dtype(t[2]), t[3], t[4], scales[f],
                             {t[6], t[4], t[7], Dtype(t[8]), reinterpret_cast<void*>(t[5])}, t[9]});
        }
        pairs_kernels().pack(factors.data(), static_cast<int64_t>(factors.size()));
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace veneer
