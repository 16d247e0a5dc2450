// Gradients of a chunk. That of a decay's logarithm is the sum of all that crosses the token: what later tokens and the
// state after the chunk read of earlier tokens and of the state before it. Parts that do not cross are never added, so
// nothing cancels. Internal to each kernels.cpp, for the reason that core/numeric.h gives.
#pragma once

#include "scan/chunk.h"

namespace veneer {
namespace {

struct Backward {
  Matrix dstate;  // with respect to the state after the chunk; `run` makes it that before the chunk
  Matrix dq, dk, dx, dz;
  Matrix dkey_reads, dreads;             // with respect to Sᵀ k and Sᵀ q
  Matrix on_side;                        // dkey_reads, dreads and x, tokens across
  Matrix dk_on_side, dq_on_side, dk_end;  // by way of the state, tokens across
  Matrix dm, dn;                         // with respect to the products of queries and keys, and of keys and keys
  float *key_reads, *writes;             // of a token: what it reads of the state before, and what remains of it after
  float *dlog_decay, *dbeta;

  static int64_t bytes(const ScanSizes& s) {
    return matrix_bytes(s.k_width, s.v_width) + 2 * matrix_bytes(longest, s.k_width) + 4 * matrix_bytes(longest, s.v_width) +
           matrix_bytes(s.v_width, 3 * longest) + 3 * matrix_bytes(s.k_width, longest) + 2 * matrix_bytes(longest, longest) +
           4 * longest * static_cast<int64_t>(sizeof(float));
  }
  Backward(const ScanSizes& s, Scratch& scratch) {
    dstate = matrix(scratch, s.k_width, s.v_width);
    for (Matrix* m : {&dq, &dk}) *m = matrix(scratch, longest, s.k_width);
    for (Matrix* m : {&dx, &dz, &dkey_reads, &dreads}) *m = matrix(scratch, longest, s.v_width);
    on_side = matrix(scratch, s.v_width, 3 * longest);
    for (Matrix* m : {&dk_on_side, &dq_on_side, &dk_end}) *m = matrix(scratch, s.k_width, longest);
    for (Matrix* m : {&dm, &dn}) *m = matrix(scratch, longest, longest);
    for (float** p : {&key_reads, &writes, &dlog_decay, &dbeta}) *p = scratch.take<float>(longest);
  }

  // The chunk has its products, its errors z, and the gradients of its outputs in y.
  void run(Chunk& chunk, const Matrix& state) const {
    each(chunk.rows, chunk.v_width, [&](int64_t r, int64_t c) { store(chunk.x[r] + c, chunk.beta[r] * load(chunk.z[r] + c)); });
    find_errors(chunk);
    find_reads(chunk, state);
    find_pairs(chunk);
    find_decays(chunk, state);
    multiply(dstate, chunk.k.turned(), dkey_reads, chunk.k_width, chunk.v_width, chunk.rows, chunk.last);
    multiply(dstate, chunk.q.turned(), dreads, chunk.k_width, chunk.v_width, chunk.rows, 1.0f);
  }

 private:
  // Of what is written and of errors, from the last token to the first.
  void find_errors(const Chunk& chunk) const {
    const Matrix& n = chunk.n;
    multiply(dx, chunk.k.left(), dstate, chunk.rows, chunk.v_width, chunk.k_width, 0.0f);
    for (int64_t r = 0; r < chunk.rows; ++r) writes[r] = chunk.to[r] * dot(chunk.x[r], dx[r], chunk.v_width);
    each(chunk.rows, chunk.v_width, [&](int64_t r, int64_t c) { store(dx[r] + c, chunk.to[r] * load(dx[r] + c)); });
    multiply(dx, chunk.reads.turned(), chunk.y, chunk.rows, chunk.v_width, 1.0f, [&](int64_t j) { return Depth{j, chunk.rows}; });
    for (int64_t i = chunk.rows - few; i >= 0; i -= few) {
      multiply({dx[i], dx.stride}, {n.data + i, 1, n.stride}, dz, few, chunk.v_width, 1.0f,
               [&](int64_t) { return Depth{i + few, chunk.rows}; });
      for (int64_t c = 0; c < chunk.v_width; c += width)
        for (int64_t r = i + few - 1; r >= i; --r) {
          lanes written = load(dx[r] + c);
          for (int64_t s = i + few - 1; s > r; --s) written += n[s][r] * load(dz[s] + c);
          store(dx[r] + c, written);
          store(dz[r] + c, chunk.beta[r] * written);
        }
    }
    for (int64_t r = 0; r < chunk.rows; ++r) dbeta[r] = dot(dx[r], chunk.z[r], chunk.v_width);
  }

  // Of queries and keys that read or write the state.
  void find_reads(const Chunk& chunk, const Matrix& state) const {
    each(chunk.rows, chunk.v_width, [&](int64_t r, int64_t c) {
      store(dkey_reads[r] + c, -chunk.from[r] * load(dz[r] + c));
      store(dreads[r] + c, chunk.from[r] * load(chunk.y[r] + c));
    });
    const Matrix queries{on_side.data + longest, on_side.stride};
    turn(on_side, dkey_reads, chunk.rows, chunk.v_width);
    turn(queries, dreads, chunk.rows, chunk.v_width);
    turn(written(), chunk.x, chunk.rows, chunk.v_width);
    multiply(dk_on_side, state.left(), on_side, chunk.k_width, chunk.rows, chunk.v_width, 0.0f);
    multiply(dq_on_side, state.left(), queries, chunk.k_width, chunk.rows, chunk.v_width, 0.0f);
    multiply(dk_end, dstate.left(), written(), chunk.k_width, chunk.rows, chunk.v_width, 0.0f);
    for (int64_t c = 0; c < chunk.rows; c += width) {
      lanes total{};
      for (int64_t r = 0; r < chunk.k_width; ++r) {
        total += load(dk_on_side[r] + c) * load(chunk.k_turned[r] + c);
        store(dk_on_side[r] + c, load(dk_on_side[r] + c) + load(chunk.to + c) * load(dk_end[r] + c));
      }
      store(key_reads + c, total);
    }
    turn(dq, dq_on_side, chunk.k_width, chunk.rows);
    turn(dk, dk_on_side, chunk.k_width, chunk.rows);
    for (int64_t r = 0; r < chunk.rows; ++r) key_reads[r] += dot(chunk.q[r], dq[r], chunk.k_width);
  }

  // Of queries and keys that meet in the chunk. Leaves in `dm` what the decays between them multiply.
  void find_pairs(const Chunk& chunk) const {
    const int64_t rows = chunk.rows, d = chunk.k_width;
    multiply(dm, chunk.y.left(), written(), rows, rows, chunk.v_width, 0.0f);
    multiply(dn, dz.left(), written(), rows, rows, chunk.v_width, 0.0f);
    const Matrix &pairs = chunk.reads, &keys = chunk.n;  // read for the last time: they take the gradients
    each(rows, rows, [&](int64_t i, int64_t j) {
      const lanes of_query = load(dm[i] + j), of_key = load(dn[i] + j), decay = load(chunk.decays[i] + j);
      store(dm[i] + j, of_query * load(pairs[i] + j) + of_key * load(keys[i] + j));
      store(pairs[i] + j, of_query * decay);
      store(keys[i] + j, places_from(j) < static_cast<float>(i) ? -of_key * decay : lanes{});
    });
    const auto before = [](int64_t i) { return Depth{0, i + few}; };
    const auto after = [rows](int64_t j) { return Depth{j, rows}; };
    multiply(dq, pairs.left(), chunk.k, rows, d, 1.0f, before);
    multiply(dk, pairs.turned(), chunk.q, rows, d, 1.0f, after);
    multiply(dk, keys.left(), chunk.k, rows, d, 1.0f, before);
    multiply(dk, keys.turned(), chunk.k, rows, d, 1.0f, after);
  }

  void find_decays(const Chunk& chunk, const Matrix& state) const {
    lanes all{};
    each(chunk.k_width, chunk.v_width, [&](int64_t r, int64_t c) { all += load(state[r] + c) * load(dstate[r] + c); });
    float from_start = chunk.last * sum(all);
    for (int64_t t = chunk.rows - 1; t >= 0; --t) {
      from_start += key_reads[t];
      lanes crossing{};
      for (int64_t j = 0; j < chunk.rows; j += width) {
        const lanes later = load(dm[t] + j) + (t + 1 < chunk.rows ? load(dm[t + 1] + j) : lanes{});
        store(dm[t] + j, later);
        crossing += places_from(j) < static_cast<float>(t) ? later + load(writes + j) : lanes{};
      }
      dlog_decay[t] = from_start + sum(crossing);
    }
  }

  Matrix written() const { return {on_side.data + 2 * longest, on_side.stride}; }
};

}  // namespace
}  // namespace veneer
