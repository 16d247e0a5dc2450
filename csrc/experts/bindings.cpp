#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <vector>

#include "core/workspace.h"
#include "experts/mixture.h"

namespace nb = nanobind;

namespace veneer {
void bind_experts(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "experts_route",
      [](int64_t n_experts, int64_t k, bool by_sigmoid, bool normalized, int64_t n_groups, int64_t kept_groups, float scale,
         uintptr_t bias, int64_t n, int dtype, uintptr_t scores, int64_t stride, uintptr_t ids, uintptr_t weights) {
        experts_kernels().route(
            {n_experts, k, by_sigmoid, normalized, n_groups, kept_groups, scale, reinterpret_cast<const float*>(bias)},
            {n, Dtype(dtype), rows_at(scores, stride), reinterpret_cast<int64_t*>(ids), reinterpret_cast<float*>(weights)});
      },
      release());
  m.def(
      "experts_mix",
      [](int64_t n_experts, int64_t k, int weight_dtype, const std::vector<int64_t>& inner, const std::vector<int64_t>& down, int activation, int64_t n,
         int dtype, uintptr_t x, int64_t x_stride, uintptr_t ids, uintptr_t weights, uintptr_t shared, int64_t shared_stride,
         uintptr_t shared_gate, int64_t gate_stride, uintptr_t y, int64_t y_stride, const std::vector<int64_t>& segments) {
        const Mixture mixture{n_experts, k, stack_at(Dtype(weight_dtype), inner), stack_at(Dtype(weight_dtype), down), Activation(activation)};
        MixtureRows rows{n, Dtype(dtype), rows_at(x, x_stride), reinterpret_cast<const int64_t*>(ids),
                               reinterpret_cast<const float*>(weights), rows_at(shared, shared_stride),
                               rows_at(shared_gate, gate_stride), rows_at(y, y_stride), {}};
        const auto pairs = [](const int64_t* at) { return ExpertPairs{reinterpret_cast<const char*>(at[0]), at[1]}; };
        // Of each its first row, the row behind its last, and of both stacks the address of factors and the rank.
        for (const int64_t* s = segments.data(); s < segments.data() + segments.size(); s += 6)
          rows.segments.push_back({s[0], s[1], pairs(s + 2), pairs(s + 4)});
        void* scratch = workspace(mixture_bytes(mixture, rows));
        if (scratch == nullptr) throw std::bad_alloc();
        run_mixture(mixture, rows, static_cast<char*>(scratch));
      },
      release());
}

}  // namespace veneer
