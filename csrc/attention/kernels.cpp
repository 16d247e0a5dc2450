// Blocks of 64 queries against blocks of 64 keys, scores transposed: keys down, queries across the lanes, so that every
// step of the softmax is lane by lane. Forward: Dao 2023 (arXiv 2307.08691), algorithm 1; backward: its algorithm 2 with
// the loops exchanged. One task is a sequence and a key head; the query heads of its group come one after another.
#include "attention/attention.h"

#include <math.h>

#include "core/engine.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t block = 64;    // queries and keys that are worked on at a time
constexpr float lowest = -1e30f;  // finite: a query that has seen no key yet must not give infinity - infinity

struct Task {
  int64_t start, length, kv_head;  // tokens start to start + length
};

template <class T>
inline T* row_at(const HeadsView& view, int64_t token, int64_t head) {
  return static_cast<T*>(view.data) + token * view.token_stride + head * view.head_stride;
}

inline void convert(float* to, const float* from, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }
inline void convert(bf16* to, const bf16* from, int64_t n) { std::memcpy(to, from, n * sizeof(bf16)); }
inline void convert(float* to, const bf16* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

// Rows of one head, padded with zeros to (rows, width_padded).
template <class T, class E>
void copy_rows(E* to, const HeadsView& view, int64_t token, int64_t head, int64_t present, int64_t rows, int64_t d,
               int64_t d_padded) {
  for (int64_t t = 0; t < rows; ++t) {
    E* row = to + t * d_padded;
    const int64_t filled = t < present ? d : 0;
    if (filled) convert(row, row_at<const T>(view, token + t, head), d);
    if (filled < d_padded) std::memset(static_cast<void*>(row + filled), 0, (d_padded - filled) * sizeof(E));
  }
}

template <class E>
void transpose(E* to, const E* from, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
}

// Rows of one head written from (d, block) or (rows, d_padded) sums.
template <class T>
void write_transposed(const HeadsView& view, int64_t token, int64_t head, int64_t present, int64_t d,
                      const float* sums, const float* factors) {
  for (int64_t t = 0; t < present; ++t) {
    T* row = row_at<T>(view, token + t, head);
    for (int64_t c = 0; c < d; ++c) row[c] = from_float<T>(sums[c * block + t] * factors[t]);
  }
}
template <class T>
void write_rows(const HeadsView& view, const Task& task, int64_t d, int64_t d_padded, const float* sums) {
  for (int64_t t = 0; t < task.length; ++t) {
    T* row = row_at<T>(view, task.start + t, task.kv_head);
    each_register(d, [=](int64_t c, int64_t n) { put(row + c, take(sums + t * d_padded + c, n), n); });
  }
}

struct Span {  // one block of keys seen from one block of queries
  int64_t first_query, first_key, window;
  bool masked() const {
    return first_key + block - 1 > first_query || (window && first_query + block - 1 - first_key >= window);
  }
  // Which queries of a register see a key.
  int_lanes sees(int64_t key, int64_t column) const {
    int_lanes step;
    for (int32_t i = 0; i < width; ++i) step[i] = i;
    const int_lanes ahead = step + static_cast<int32_t>(first_query + column - first_key - key);
    const int_lanes seen = ahead >= 0;
    return window && window < INT32_MAX ? seen & (ahead < static_cast<int32_t>(window)) : seen;
  }
};

int64_t first_block(int64_t first_query, int64_t window) {
  const int64_t oldest = window ? first_query - window + 1 : 0;
  return oldest > 0 ? oldest / block * block : 0;
}

struct ForwardState {  // of one block of queries; sums is (d_padded, block)
  float *scores, *sums, *top, *total;
};

// Scores become probabilities relative to the running maximum, in `p`, laid out as B.
template <class Engine, bool masked, bool capped>
void softmax_block(const Span& span, const AttentionOptions& options, const ForwardState& state,
                   typename Engine::Element* p, int64_t d_padded) {
  for (int64_t column = 0; column < block; column += width) {
    float* scores = state.scores + column;
    const lanes before = load(state.top + column);
    lanes top = before;
    for (int64_t key = 0; key < block; ++key) {
      lanes s = load(scores + key * block) * options.scale;
      if (capped) s = options.softcap * tanh(s / options.softcap);
      if (masked) s = span.sees(key, column) ? s : splat(-INFINITY);
      store(scores + key * block, s);
      top = larger(s, top);
    }
    lanes total{};
    for (int64_t key = 0; key < block; key += 2) {
      const lanes first = exp(load(scores + key * block) - top), second = exp(load(scores + (key + 1) * block) - top);
      total += first + second;
      Engine::put_b(p, block, key, column, first, second);
    }
    const lanes fade = exp(before - top);
    store(state.total + column, load(state.total + column) * fade + total);
    store(state.top + column, top);
    for (int64_t c = 0; c < d_padded; ++c)
      store(state.sums + c * block + column, load(state.sums + c * block + column) * fade);
  }
}

template <class Engine>
void softmax_any(const Span& span, const AttentionOptions& options, const ForwardState& state,
                 typename Engine::Element* p, int64_t d_padded) {
  if (options.softcap != 0.0f) return softmax_block<Engine, true, true>(span, options, state, p, d_padded);
  if (span.masked()) return softmax_block<Engine, true, false>(span, options, state, p, d_padded);
  softmax_block<Engine, false, false>(span, options, state, p, d_padded);
}

template <class T, class Engine>
struct ForwardTask {
  using E = typename Engine::Element;
  const AttentionSizes& sizes;
  const AttentionOptions& options;
  const AttentionForward& tensors;
  Task task;
  int64_t d_padded, rows;
  E *keys{}, *values_t{}, *queries{}, *queries_b{}, *p{};
  ForwardState state{};

  void lay_out(Scratch scratch) {
    keys = scratch.take<E>(rows * d_padded);
    values_t = scratch.take<E>(rows * d_padded);
    queries = scratch.take<E>(rows * d_padded);  // also where the values lie before they are transposed
    queries_b = scratch.take<E>(block * d_padded);
    p = scratch.take<E>(block * block);
    state.scores = scratch.take<float>(block * block);
    state.sums = scratch.take<float>(block * d_padded);
    state.top = scratch.take<float>(block);
    state.total = scratch.take<float>(block);
  }

  void run() {
    const int64_t d = sizes.d;
    copy_rows<T>(keys, tensors.k, task.start, task.kv_head, task.length, rows, d, d_padded);
    copy_rows<T>(queries, tensors.v, task.start, task.kv_head, task.length, rows, d, d_padded);
    transpose(values_t, queries, rows, d_padded);
    const int64_t group = sizes.q_heads / sizes.kv_heads;
    for (int64_t head = task.kv_head * group; head < (task.kv_head + 1) * group; ++head)
      for (int64_t first = 0; first < task.length; first += block) run_queries(head, first);
  }

  void run_queries(int64_t head, int64_t first) {
    const int64_t present = task.length - first < block ? task.length - first : block;
    copy_rows<T>(queries, tensors.q, task.start + first, head, present, block, sizes.d, d_padded);
    Engine::pack_columns(queries_b, queries, block, d_padded);
    for (int64_t t = 0; t < block; ++t) state.top[t] = lowest, state.total[t] = 0.0f;
    std::memset(state.sums, 0, block * d_padded * sizeof(float));
    for (int64_t key = first_block(first, options.window); key <= first; key += block) {
      Engine::product(state.scores, block, keys + key * d_padded, d_padded, queries_b, block, block, block, d_padded,
                      false);
      softmax_any<Engine>({first, key, options.window}, options, state, p, d_padded);
      Engine::product(state.sums, block, values_t + key, rows, p, block, d_padded, block, block, true);
    }
    float* lse = tensors.lse + head * sizes.bounds[sizes.n_sequences] + task.start + first;
    for (int64_t t = 0; t < present; ++t) {
      lse[t] = state.top[t] + logf(state.total[t]);
      state.total[t] = 1.0f / state.total[t];
    }
    write_transposed<T>(tensors.out, task.start + first, head, present, sizes.d, state.sums, state.total);
  }
};

struct BackwardBlock {  // (key, query) of one block, and what each query needs
  float *scores, *dp;
  const float *lse, *delta;
};

// Scores and dP become P and dS: P as A, dS as A and as B.
template <class Engine, bool masked, bool capped>
void gradient_block(const Span& span, const AttentionOptions& options, const BackwardBlock& at,
                    typename Engine::Element* p, typename Engine::Element* ds, typename Engine::Element* ds_b) {
  for (int64_t column = 0; column < block; column += width) {
    const lanes lse = load(at.lse + column), delta = load(at.delta + column);
    for (int64_t key = 0; key < block; key += 2) {
      lanes slope[2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t place = (key + i) * block + column;
        lanes s = load(at.scores + place) * options.scale, cap_slope = splat(options.scale);
        if (capped) {
          const lanes bent = tanh(s / options.softcap);
          s = options.softcap * bent;
          cap_slope = cap_slope * (1.0f - bent * bent);
        }
        if (masked) s = span.sees(key + i, column) ? s : splat(-INFINITY);
        const lanes probability = exp(s - lse);
        slope[i] = probability * (load(at.dp + place) - delta) * cap_slope;
        Engine::put_a(p + place, probability);
        Engine::put_a(ds + place, slope[i]);
      }
      Engine::put_b(ds_b, block, key, column, slope[0], slope[1]);
    }
  }
}

template <class Engine>
void gradient_any(const Span& span, const AttentionOptions& options, const BackwardBlock& at,
                  typename Engine::Element* p, typename Engine::Element* ds, typename Engine::Element* ds_b) {
  if (options.softcap != 0.0f) return gradient_block<Engine, true, true>(span, options, at, p, ds, ds_b);
  if (span.masked()) return gradient_block<Engine, true, false>(span, options, at, p, ds, ds_b);
  gradient_block<Engine, false, false>(span, options, at, p, ds, ds_b);
}

template <class T, class Engine>
struct BackwardTask {
  using E = typename Engine::Element;
  const AttentionSizes& sizes;
  const AttentionOptions& options;
  const AttentionBackward& tensors;
  Task task;
  int64_t d_padded, rows;
  E *keys{}, *keys_t{}, *values{}, *queries{}, *douts{}, *queries_r{}, *queries_c{}, *douts_r{}, *douts_c{}, *p{}, *ds{}, *ds_b{};
  float *scores{}, *dp{}, *dq{}, *dk{}, *dv{}, *lse{}, *delta{}, *ones{};

  void lay_out(Scratch scratch) {
    for (E** all : {&keys, &keys_t, &values}) *all = scratch.take<E>(rows * d_padded);
    for (E** some : {&queries, &douts, &queries_r, &queries_c, &douts_r, &douts_c})
      *some = scratch.take<E>(block * d_padded);
    for (E** square : {&p, &ds, &ds_b}) *square = scratch.take<E>(block * block);
    for (float** square : {&scores, &dp}) *square = scratch.take<float>(block * block);
    dq = scratch.take<float>(block * d_padded);
    for (float** all : {&dk, &dv}) *all = scratch.take<float>(rows * d_padded);
    for (float** line : {&lse, &delta, &ones}) *line = scratch.take<float>(block);
  }

  void run() {
    const int64_t d = sizes.d;
    copy_rows<T>(keys, tensors.k, task.start, task.kv_head, task.length, rows, d, d_padded);
    copy_rows<T>(values, tensors.v, task.start, task.kv_head, task.length, rows, d, d_padded);
    transpose(keys_t, keys, rows, d_padded);
    for (float* sums : {dk, dv}) std::memset(sums, 0, rows * d_padded * sizeof(float));
    for (int64_t t = 0; t < block; ++t) ones[t] = 1.0f;
    const int64_t group = sizes.q_heads / sizes.kv_heads;
    for (int64_t head = task.kv_head * group; head < (task.kv_head + 1) * group; ++head)
      for (int64_t first = 0; first < task.length; first += block) run_queries(head, first);
    write_rows<T>(tensors.dk, task, d, d_padded, dk);
    write_rows<T>(tensors.dv, task, d, d_padded, dv);
  }

  void read_queries(int64_t head, int64_t first, int64_t present) {
    const int64_t token = task.start + first, d = sizes.d;
    copy_rows<T>(queries, tensors.q, token, head, present, block, d, d_padded);
    copy_rows<T>(douts, tensors.dout, token, head, present, block, d, d_padded);
    Engine::pack_columns(queries_c, queries, block, d_padded);
    Engine::pack_rows(queries_r, queries, block, d_padded);
    Engine::pack_columns(douts_c, douts, block, d_padded);
    Engine::pack_rows(douts_r, douts, block, d_padded);
    const float* given = tensors.lse + head * sizes.bounds[sizes.n_sequences] + token;
    for (int64_t t = 0; t < block; ++t) {
      lse[t] = t < present ? given[t] : INFINITY;  // no probability for what is past the end
      lanes along{};
      if (t < present) {
        const T *o = row_at<const T>(tensors.out, token + t, head), *g = row_at<const T>(tensors.dout, token + t, head);
        each_register(d, [&](int64_t c, int64_t n) { along += take(o + c, n) * take(g + c, n); });
      }
      delta[t] = sum(along);
    }
  }

  void run_queries(int64_t head, int64_t first) {
    const int64_t present = task.length - first < block ? task.length - first : block;
    read_queries(head, first, present);
    std::memset(dq, 0, block * d_padded * sizeof(float));
    for (int64_t key = first_block(first, options.window); key <= first; key += block) {
      const int64_t place = key * d_padded;
      Engine::product(scores, block, keys + place, d_padded, queries_c, block, block, block, d_padded, false);
      Engine::product(dp, block, values + place, d_padded, douts_c, block, block, block, d_padded, false);
      gradient_any<Engine>({first, key, options.window}, options, {scores, dp, lse, delta}, p, ds, ds_b);
      Engine::product(dv + place, d_padded, p, block, douts_r, d_padded, block, d_padded, block, true);
      Engine::product(dk + place, d_padded, ds, block, queries_r, d_padded, block, d_padded, block, true);
      Engine::product(dq, block, keys_t + key, rows, ds_b, block, d_padded, block, block, true);
    }
    write_transposed<T>(tensors.dq, task.start + first, head, present, sizes.d, dq, ones);
  }
};

int64_t longest(const AttentionSizes& sizes) {
  int64_t most = 0;
  for (int64_t s = 0; s < sizes.n_sequences; ++s) {
    const int64_t length = sizes.bounds[s + 1] - sizes.bounds[s];
    most = length > most ? length : most;
  }
  return up_to(most, block);
}

int64_t scratch_bytes(const AttentionSizes& sizes, bool backward) {
  const int64_t d = up_to(sizes.d, 32), element = 4, line = 64;
  const int64_t wide = longest(sizes) * d * element, narrow = block * d * element, square = block * block * 4;
  return (backward ? 5 * wide + 7 * narrow + 5 * square : 3 * wide + 2 * narrow + 2 * square) + 6 * block * 4 + 24 * line;
}

// Sequences differ in length, so tasks are taken one by one. Who takes which changes no result.
template <template <class, class> class TaskOf, class T, class Engine, class Tensors>
void run_tasks(const AttentionSizes& sizes, const AttentionOptions& options, const Tensors& tensors, char* scratch,
               int64_t thread_bytes, int n_threads) {
  const int64_t n_tasks = sizes.n_sequences * sizes.kv_heads;
  parallel_tasks(n_threads, [&](int thread, auto next) {
    Engine::begin();
    for (int64_t i = next(); i < n_tasks; i = next()) {
      const int64_t s = i / sizes.kv_heads, start = sizes.bounds[s], length = sizes.bounds[s + 1] - start;
      TaskOf<T, Engine> task{sizes, options, tensors, {start, length, i % sizes.kv_heads},
                             up_to(sizes.d, 32), up_to(length, block)};
      task.lay_out({scratch + thread * thread_bytes});
      task.run();
    }
    Engine::end();
  });
}

void forward(const AttentionSizes& sizes, const AttentionOptions& options, const AttentionForward& tensors,
             char* scratch, int n_threads) {
  const int64_t bytes = up_to(scratch_bytes(sizes, false), 64);
  if (sizes.dtype == Dtype::float32)
    return run_tasks<ForwardTask, float, PlainEngine>(sizes, options, tensors, scratch, bytes, n_threads);
  run_tasks<ForwardTask, bf16, HalfEngine>(sizes, options, tensors, scratch, bytes, n_threads);
}

void backward(const AttentionSizes& sizes, const AttentionOptions& options, const AttentionBackward& tensors,
              char* scratch, int n_threads) {
  const int64_t bytes = up_to(scratch_bytes(sizes, true), 64);
  if (sizes.dtype == Dtype::float32)
    return run_tasks<BackwardTask, float, PlainEngine>(sizes, options, tensors, scratch, bytes, n_threads);
  run_tasks<BackwardTask, bf16, HalfEngine>(sizes, options, tensors, scratch, bytes, n_threads);
}

}  // namespace

const AttentionKernels attention = {scratch_bytes, forward, backward};

}  // namespace VENEER_ISA
}  // namespace veneer
