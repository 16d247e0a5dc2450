#include <nanobind/nanobind.h>

#include <new>

#include "core/workspace.h"
#include "paged_attention/paged_attention.h"

namespace nb = nanobind;

namespace veneer {
namespace {

PagedStore store_at(uintptr_t data, int dtype, int64_t block, int64_t layers, int64_t kv_heads, int64_t head_dim) {
  return {reinterpret_cast<char*>(data), Dtype(dtype), block, layers, kv_heads, head_dim};
}

PagedBatch batch_at(int64_t n_sequences, uintptr_t pages, uintptr_t first_page, uintptr_t first_row, uintptr_t position) {
  const auto numbers = [](uintptr_t at) { return reinterpret_cast<const int64_t*>(at); };
  return {n_sequences, numbers(pages), numbers(first_page), numbers(first_row), numbers(position)};
}

PagedRows rows_at(uintptr_t data, int64_t row_stride, int64_t head_stride) {
  return {reinterpret_cast<char*>(data), row_stride, head_stride};
}

}  // namespace

void bind_paged_attention(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "paged_attention_append",
      [](uintptr_t data, int dtype, int64_t block, int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t layer,
         int64_t n_sequences, uintptr_t pages, uintptr_t first_page, uintptr_t first_row, uintptr_t position, uintptr_t k,
         int64_t k_row, int64_t k_head, uintptr_t v, int64_t v_row, int64_t v_head) {
        paged_attention_kernels().append(store_at(data, dtype, block, layers, kv_heads, head_dim), layer,
                                         batch_at(n_sequences, pages, first_page, first_row, position),
                                         rows_at(k, k_row, k_head), rows_at(v, v_row, v_head));
      },
      release());
  m.def(
      "paged_attention_attend",
      [](uintptr_t data, int dtype, int64_t block, int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t layer,
         int64_t n_sequences, uintptr_t pages, uintptr_t first_page, uintptr_t first_row, uintptr_t position,
         int64_t q_heads, uintptr_t q, int64_t q_row, int64_t q_head, uintptr_t out, int64_t out_row, int64_t out_head,
         float scale, int64_t window, float softcap, uintptr_t bias, int64_t positions, uintptr_t sinks) {
        PagedCall call{store_at(data, dtype, block, layers, kv_heads, head_dim), layer,
                       batch_at(n_sequences, pages, first_page, first_row, position), q_heads,
                       rows_at(q, q_row, q_head), rows_at(out, out_row, out_head), q_heads / kv_heads * q_head,
                       {scale, window, softcap, reinterpret_cast<const float*>(bias), positions, reinterpret_cast<const float*>(sinks)}, nullptr, 1};
        require_bias(call.options, call.batch);
        call.n_threads = threads_for(call);
        call.scratch = static_cast<char*>(workspace(paged_attention_kernels().scratch_bytes(call)));
        if (call.scratch == nullptr) throw std::bad_alloc();
        paged_attention_kernels().attend(call);
      },
      release());
}

}  // namespace veneer
