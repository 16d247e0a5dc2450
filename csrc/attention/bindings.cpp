#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include "attention/attention.h"

namespace nb = nanobind;

namespace veneer {
namespace {

// One tensor (n, heads, d): address, stride of a token, stride of a head.
using Place = std::array<int64_t, 3>;

HeadsView view_at(const Place& place) { return {reinterpret_cast<void*>(place[0]), place[1], place[2]}; }

AttentionSizes sizes_of(const std::vector<int64_t>& bounds, int64_t q_heads, int64_t kv_heads, int64_t d, int dtype) {
  return {static_cast<int64_t>(bounds.size()) - 1, q_heads, kv_heads, d, bounds.data(), Dtype(dtype)};
}

}  // namespace

void bind_attention(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def("attention_scratch_bytes", [](std::vector<int64_t> bounds, int64_t q_heads, int64_t kv_heads, int64_t d,
                                      int dtype, bool backward) {
    return (attention_kernels().scratch_bytes(sizes_of(bounds, q_heads, kv_heads, d, dtype), backward) + 63) / 64 * 64;
  });
  m.def(
      "attention_forward",
      [](std::vector<int64_t> bounds, int64_t q_heads, int64_t kv_heads, int64_t d, int dtype, float scale,
         int64_t window, float softcap, std::vector<Place> qkvo, uintptr_t lse, uintptr_t scratch, int n_threads) {
        const AttentionForward tensors{view_at(qkvo.at(0)), view_at(qkvo.at(1)), view_at(qkvo.at(2)),
                                       view_at(qkvo.at(3)), reinterpret_cast<float*>(lse)};
        attention_kernels().forward(sizes_of(bounds, q_heads, kv_heads, d, dtype), {scale, softcap, window}, tensors,
                                    reinterpret_cast<char*>(scratch), n_threads);
      },
      release());
  m.def(
      "attention_backward",
      [](std::vector<int64_t> bounds, int64_t q_heads, int64_t kv_heads, int64_t d, int dtype, float scale,
         int64_t window, float softcap, std::vector<Place> at, uintptr_t lse, uintptr_t scratch, int n_threads) {
        const AttentionBackward tensors{view_at(at.at(0)), view_at(at.at(1)), view_at(at.at(2)), view_at(at.at(3)),
                                        view_at(at.at(4)), view_at(at.at(5)), view_at(at.at(6)), view_at(at.at(7)),
                                        reinterpret_cast<const float*>(lse)};
        attention_kernels().backward(sizes_of(bounds, q_heads, kv_heads, d, dtype), {scale, softcap, window}, tensors,
                                     reinterpret_cast<char*>(scratch), n_threads);
      },
      release());
}

}  // namespace veneer
