#include <algorithm>

#include "paged_attention/paged_attention.h"
#include "rotary/rotary.h"
#include "step/instructions.h"

namespace veneer {
namespace {

// Where each thread's sequences begin, and the end; empty where a thread would have more than an eighth above its share: then
// threads take pieces of the work as they come to them.
std::vector<int64_t> even_shares(const PagedBatch& b, int64_t window, int threads) {
  constexpr int64_t keys_beside = 64;  // to read as many takes as long as what a row takes besides
  const auto work = [&](int64_t s) {
    const int64_t rows = b.first_row[s + 1] - b.first_row[s], keys = b.position[s] + rows;
    return rows * ((window > 0 ? std::min(keys, window + rows) : keys) + keys_beside);
  };
  int64_t all = 0, done = 0, begun = 0, most = 0;
  for (int64_t s = 0; s < b.n_sequences; ++s) all += work(s);
  std::vector<int64_t> bounds{0};
  for (int64_t s = 0; s < b.n_sequences; ++s) {
    if ((2 * done + work(s)) * threads > 2 * all * static_cast<int64_t>(bounds.size())) {
      bounds.push_back(s);
      begun = done;
    }
    done += work(s);
    most = std::max(most, done - begun);
  }
  bounds.push_back(b.n_sequences);
  return most * threads * 8 > all * 9 ? std::vector<int64_t>{} : bounds;
}

}  // namespace

Heads AttentionInstruction::heads(const Pass& pass, const HeadsAt& at) const {
  const Rows rows = pass.registers[at.source];
  return {{static_cast<char*>(rows.data) + at.first * pass.bytes(), rows.stride, at.apart}, at.of_key};
}

// Each head by itself, then all rows of the first head lie in front of those of the next; or all heads of a row at once.
Heads AttentionInstruction::normed(const Pass& pass, const NormParts& norm, const Heads& x, int64_t n_heads, char* memory) const {
  const int64_t d = norm.weight.size(), head_dim = parts_.head_dim, group = n_heads / parts_.kv_heads;
  if (d == 0) return x;
  if (d != head_dim) {
    normalize(pass, norm, {x.rows.data, x.rows.row_stride}, pass.n, memory);
    return {{memory, d, head_dim}, group * head_dim};
  }
  for (int64_t head = 0; head < n_heads; ++head) {
    const int64_t at = head / group * x.of_key + head % group * x.rows.head_stride;
    normalize(pass, norm, {x.rows.data + at * pass.bytes(), x.rows.row_stride}, pass.n, memory + head * pass.n * d * pass.bytes());
  }
  return {{memory, d, pass.n * d}, group * pass.n * d};
}

void AttentionInstruction::turn(const Pass& pass, const Heads& x, int64_t n_heads) const {
  const TurnTable& table = pass.turns[parts_.table];
  const int64_t group = n_heads / parts_.kv_heads;
  const bool even = x.of_key == group * x.rows.head_stride;
  const RotaryView view{x.rows.data, x.of_key, x.rows.head_stride, x.rows.row_stride};
  rotary_kernels().rotate({even ? 1 : parts_.kv_heads, even ? n_heads : group, pass.n, parts_.head_dim}, view, view,
                          {table.cos, table.sin, 0, parts_.half}, pass.dtype, parts_.interleaved);
}

void AttentionInstruction::run_rows(const Pass& pass) const {
  const int64_t q_bytes = heads_bytes(pass, parts_.q_heads);
  char* memory = pass.rows.at_least(q_bytes + heads_bytes(pass, parts_.kv_heads));
  Heads q = heads(pass, parts_.q), k = heads(pass, parts_.k);
  const auto norm = [&] {
    q = normed(pass, q_norm_, q, parts_.q_heads, memory);
    k = normed(pass, k_norm_, k, parts_.kv_heads, memory + q_bytes);
  };
  if (!parts_.norms_last) norm();
  if (parts_.table >= 0) {
    turn(pass, q, parts_.q_heads);
    turn(pass, k, parts_.kv_heads);
  }
  if (parts_.norms_last) norm();
  paged_attention_kernels().append(pass.store, parts_.layer, pass.batch, k.rows, heads(pass, parts_.v).rows);
  PagedCall call = call_of(pass, q);
  call.n_threads = threads_for(call);
  call.scratch = pass.scratch.at_least(paged_attention_kernels().scratch_bytes(call));
  paged_attention_kernels().attend(call);
}

PagedCall AttentionInstruction::call_of(const Pass& pass, const Heads& q) const {
  const Rows out = pass.registers[parts_.target];
  return {pass.store, parts_.layer, pass.batch, parts_.q_heads, q.rows, {static_cast<char*>(out.data), out.stride, parts_.head_dim},
          q.of_key, parts_.options, nullptr, 1};
}

// Sequences [begin, end) as a pass of their own.
struct AttentionInstruction::Share {
  std::vector<int64_t> first_row;
  std::vector<Rows> registers;
  std::vector<TurnTable> turns;
  Pass pass;

  Share(const Parts& parts, const Pass& all, int64_t begin, int64_t end, ThreadMemory::Own& own)
      : first_row(all.batch.first_row + begin, all.batch.first_row + end + 1),
        registers(1 + std::max({parts.q.source, parts.k.source, parts.v.source, parts.target})),
        turns(1 + parts.table),
        pass{0, all.dtype, registers.data(), all.store, {}, turns.data(), nullptr, 0, nullptr, nullptr, nullptr, 0, nullptr, own.scratch,
             own.rows, all.threads} {
    const int64_t first = first_row.front();
    for (int64_t& row : first_row) row -= first;
    for (int number : {parts.q.source, parts.k.source, parts.v.source, parts.target})
      registers[number] = all.from_row(all.registers[number], first);
    if (parts.table >= 0) {
      const TurnTable& whole = all.turns[parts.table];
      turns.back() = {whole.cos + first * parts.half, whole.sin + first * parts.half};
    }
    pass.n = first_row.back();
    pass.batch = {end - begin, all.batch.pages, all.batch.first_page + begin, first_row.data(), all.batch.position + begin};
  }
};

// Memory of a share is taken before its thread begins: an error within a team could not leave it.
void AttentionInstruction::make_room(const Pass& pass) const {
  const int64_t norms = 2 * pass.n * static_cast<int64_t>(sizeof(float));
  pass.rows.at_least(heads_bytes(pass, parts_.q_heads) + heads_bytes(pass, parts_.kv_heads));
  pass.scratch.at_least(std::max(norms, paged_attention_kernels().scratch_bytes(call_of(pass, {}))));
}

void AttentionInstruction::run(const Pass& pass) const {
  require_bias(parts_.options, pass.batch);
  const std::vector<int64_t> bounds = even_shares(pass.batch, parts_.options.window, threads_for(call_of(pass, {})));
  if (bounds.size() <= 2) return run_rows(pass);
  std::vector<std::unique_ptr<Share>> shares;
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    shares.push_back(std::make_unique<Share>(parts_, pass, bounds[i], bounds[i + 1], pass.threads.of(i)));
    make_room(shares.back()->pass);
  }
  parallel_for(static_cast<int64_t>(shares.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run_rows(shares[i]->pass);
  });
}

}  // namespace veneer
