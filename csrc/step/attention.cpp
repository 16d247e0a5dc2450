#include "paged_attention/paged_attention.h"
#include "rotary/rotary.h"
#include "step/step.h"

namespace veneer {

PagedRows AttentionInstruction::heads(const Pass& pass, const HeadsAt& at) const {
  const Rows rows = pass.registers[at.source];
  return {static_cast<char*>(rows.data) + at.first * pass.bytes(), rows.stride, at.apart};
}

// Each head by itself, then all rows of the first head lie in front of those of the next; or all heads of a row at once.
PagedRows AttentionInstruction::normed(const Pass& pass, const NormParts& norm, const PagedRows& x, int64_t n_heads,
                                       char* memory) const {
  const int64_t d = norm.weight.size(), head_dim = parts_.head_dim;
  if (d == 0) return x;
  if (d != head_dim) {
    normalize(pass, norm, {x.data, x.row_stride}, pass.n, memory);
    return {memory, d, head_dim};
  }
  for (int64_t head = 0; head < n_heads; ++head)
    normalize(pass, norm, {x.data + head * x.head_stride * pass.bytes(), x.row_stride}, pass.n, memory + head * pass.n * d * pass.bytes());
  return {memory, d, pass.n * d};
}

void AttentionInstruction::turn(const Pass& pass, const PagedRows& x, int64_t n_heads) const {
  const TurnTable& table = pass.turns[parts_.table];
  const RotaryView view{x.data, 0, x.head_stride, x.row_stride};
  rotary_kernels().rotate({1, n_heads, pass.n, parts_.head_dim}, view, view, {table.cos, table.sin, 0, parts_.half}, pass.dtype,
                          parts_.interleaved);
}

void AttentionInstruction::run(const Pass& pass) const {
  const int64_t q_bytes = pass.n * parts_.q_heads * parts_.head_dim * pass.bytes();
  const int64_t k_bytes = pass.n * parts_.kv_heads * parts_.head_dim * pass.bytes();
  char* memory = pass.rows.at_least(q_bytes + k_bytes);
  const PagedRows q = normed(pass, q_norm_, heads(pass, parts_.q), parts_.q_heads, memory);
  const PagedRows k = normed(pass, k_norm_, heads(pass, parts_.k), parts_.kv_heads, memory + q_bytes);
  if (parts_.table >= 0) {
    turn(pass, q, parts_.q_heads);
    turn(pass, k, parts_.kv_heads);
  }
  paged_attention_kernels().append(pass.store, parts_.layer, pass.batch, k, heads(pass, parts_.v));
  attend(pass, q);
}

void AttentionInstruction::attend(const Pass& pass, const PagedRows& q) const {
  const Rows out = pass.registers[parts_.target];
  PagedCall call{pass.store, parts_.layer, pass.batch, parts_.q_heads, q, {static_cast<char*>(out.data), out.stride, parts_.head_dim},
                 parts_.options, nullptr, 1};
  call.n_threads = threads_for(call);
  call.scratch = pass.scratch.at_least(paged_attention_kernels().scratch_bytes(call));
  paged_attention_kernels().attend(call);
}

}  // namespace veneer
