#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <vector>

#include "core/workspace.h"
#include "delta/delta.h"

namespace nb = nanobind;

namespace veneer {

void bind_delta(nb::module_& m) {
  using Numbers = std::vector<int64_t>;
  m.def(
      "delta_in_pages",  // `sizes`: key heads, value heads, their widths, the kernel's length, dtype; `states`: address, layers,
                         // tokens of a page, layer; `batch`: sequences, then four addresses; `given`: address, stride of rows and of heads
                         // of each part
      [](const Numbers& sizes, float eps, float beta_scale, const Numbers& weights, const Numbers& states, const Numbers& batch,
         const Numbers& given, const Numbers& y) {
        const auto weight = [&](size_t i) { return reinterpret_cast<const float*>(weights[i]); };
        const auto numbers = [&](size_t i) { return reinterpret_cast<const int64_t*>(batch[i]); };
        const auto part = [&](size_t i) { return DeltaPart{rows_at(given[3 * i], given[3 * i + 1]), given[3 * i + 2]}; };
        const DeltaSizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], Dtype(sizes[5]), eps, beta_scale};
        char* scratch = static_cast<char*>(workspace(delta_kernels().scratch_bytes(s)));
        if (scratch == nullptr) throw std::bad_alloc();
        delta_kernels().in_pages(s, {weight(0), weight(1), weight(2), weight(3), weight(4)},
                                 {reinterpret_cast<float*>(states[0]), states[1], states[2], states[3]},
                                 {batch[0], numbers(1), numbers(2), numbers(3), numbers(4)}, {part(0), part(1), part(2), part(3), part(4), part(5)},
                                 rows_at(y[0], y[1]), scratch);
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace veneer
