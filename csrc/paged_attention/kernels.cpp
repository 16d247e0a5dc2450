// A task is some queries of one sequence and the query heads of one key head; it runs over the keys 64 at a time with the
// running softmax of Dao (2022, arXiv 2205.14135). Keys come in splits of 512, each with a softmax of its own, and splits
// are merged in their order: where a sequence has few rows its splits are tasks apart, otherwise one task does them all.
// So a row's result depends on its own sequence alone, not on companions, chunks of the prompt or the number of threads.
#include "paged_attention/paged_attention.h"

#include <cmath>

#include "core/amx.h"
#include "core/panels.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t key_block = panel_block, chunk_keys = 64, split_keys = 512, chunk_blocks = chunk_keys / key_block;
constexpr int64_t rows_at_once = 48;  // queries times heads, at least one query
constexpr int64_t few_rows = 8;       // of a sequence whose splits are tasks apart
constexpr float lowest = -1e30f;      // a score below all, whose difference to itself is a number
#if defined(__AMX_BF16__)
constexpr int64_t spare_rows = tile_rows;  // which the last tile of some rows may read and write beyond them
#else
constexpr int64_t spare_rows = 0;
#endif

// ---- where keys and values lie ------------------------------------------------------------------------------------------

inline int64_t padded_dim(const PagedStore& s) { return up_to(s.head_dim, key_block); }

template <class T>
inline T* head_keys(const PagedStore& s, int64_t page, int64_t layer, int64_t head) {
  return reinterpret_cast<T*>(s.data) + ((page * s.layers + layer) * s.kv_heads + head) * 2 * s.block * padded_dim(s);
}
template <class T>
inline T* head_values(const PagedStore& s, int64_t page, int64_t layer, int64_t head) {
  return head_keys<T>(s, page, layer, head) + s.block * padded_dim(s);
}

template <class T>
inline T* row_at(const PagedRows& rows, int64_t row, int64_t head) {
  return reinterpret_cast<T*>(rows.data) + row * rows.row_stride + head * rows.head_stride;
}

// One key, in the column of its slot. In bfloat16 the neighbours of a pair are written at once.
inline void append_key(float* keys, const float* key, int64_t d, int64_t block, int64_t slot) {
  for (int64_t c = 0; c < d; ++c) keys[c * block + slot] = key[c];
}
inline void append_key(bf16* keys, const bf16* key, int64_t d, int64_t block, int64_t slot) {
  bf16* to = keys + 2 * slot;
  for (int64_t c = 0; c + 2 <= d; c += 2) std::memcpy(static_cast<void*>(to + c * block), key + c, 2 * sizeof(bf16));
  if (d % 2 != 0) to[(d - 1) * block] = key[d - 1];
}

// The last value's pair is written too, as zero: what a former holder of the page left there might not be a number.
template <class T>
void append_row(const PagedStore& s, int64_t page, int64_t layer, int64_t slot, const PagedRows& k, const PagedRows& v,
                int64_t row, bool last) {
  const int64_t d = s.head_dim, across = padded_dim(s);
  for (int64_t head = 0; head < s.kv_heads; ++head) {
    T *keys = head_keys<T>(s, page, layer, head), *values = head_values<T>(s, page, layer, head);
    const T *key = row_at<const T>(k, row, head), *value = row_at<const T>(v, row, head);
    append_key(keys, key, d, s.block, slot);
    for (int64_t c = d; c < across; ++c) keys[place<T>(s.block, c, slot)] = T{};
    for (int64_t c = 0; c < d; ++c) values[place<T>(across, slot, c)] = value[c];
    for (int64_t c = d; c < across; ++c) values[place<T>(across, slot, c)] = T{};
    if (sizeof(T) == 2 && last && slot % 2 == 0)
      for (int64_t c = 0; c < across; ++c) values[place<T>(across, slot + 1, c)] = T{};
  }
}

template <class T>
void append_typed(const PagedStore& s, int64_t layer, const PagedBatch& b, const PagedRows& k, const PagedRows& v) {
  const int64_t grain = 4096 / (s.kv_heads * padded_dim(s)) + 1;
  parallel_for(b.first_row[b.n_sequences], grain, [&, layer](int64_t begin, int64_t end) {
    for (int64_t q = 0; q < b.n_sequences; ++q) {
      const int64_t first = b.first_row[q], from = first < begin ? begin : first;
      const int64_t to = b.first_row[q + 1] < end ? b.first_row[q + 1] : end;
      for (int64_t row = from; row < to; ++row) {
        const int64_t position = b.position[q] + row - first;
        append_row<T>(s, b.pages[b.first_page[q] + position / s.block], layer, position % s.block, k, v, row,
                      row + 1 == b.first_row[q + 1]);
      }
    }
  });
}

void append(const PagedStore& s, int64_t layer, const PagedBatch& b, const PagedRows& k, const PagedRows& v) {
  if (s.dtype == Dtype::float32) return append_typed<float>(s, layer, b, k, v);
  append_typed<bf16>(s, layer, b, k, v);
}

// ---- tasks ----------------------------------------------------------------------------------------------------------------

struct Task {
  int64_t sequence, head, query, n_queries;  // key head; the first query among those of its sequence
  int64_t first_key, end_key, split;         // keys that one of its queries sees; -1: all splits
  float* part;                               // where a split's state goes; null: the task writes the result
};

struct Layout {  // of a call
  int64_t d, group, queries_at_once, rows, part_values, taken_rows;
  explicit Layout(const PagedCall& call)
      : d(padded_dim(call.store)),
        group(call.q_heads / call.store.kv_heads),
        queries_at_once(rows_at_once / group > 1 ? rows_at_once / group : 1),
        rows(queries_at_once * group),
        part_values(up_to(rows * (d + 2), 16)),
        taken_rows(rows + spare_rows) {}
  int64_t thread_bytes() const {
    return up_to(taken_rows * d * 4, 64) * 3 + up_to(taken_rows * chunk_keys * 4, 64) * 2 + up_to(rows * (width + 1) * 4, 64) * 2 +
           up_to(key_block * d * 4, 64) + 4 * 64;
  }
};

// Calls f(task, parts) for each task; where a task's result is one of several parts, the first of them has split 0.
template <class F>
void each_task(const PagedCall& call, const Layout& layout, const F& f) {
  const PagedBatch& b = call.batch;
  for (int64_t s = 0; s < b.n_sequences; ++s) {
    const int64_t n = b.first_row[s + 1] - b.first_row[s];
    for (int64_t query = 0; query < n; query += layout.queries_at_once) {
      const int64_t left = n - query, queries = left < layout.queries_at_once ? left : layout.queries_at_once;
      const int64_t position = b.position[s] + query, end = position + queries, window = call.options.window;
      const int64_t first = window > 0 && position - window + 1 > 0 ? position - window + 1 : 0;
      const int64_t splits = (end - 1) / split_keys - first / split_keys + 1;
      const bool apart = n <= few_rows && splits > 1;
      for (int64_t head = 0; head < call.store.kv_heads; ++head)
        for (int64_t split = 0; split < (apart ? splits : 1); ++split)
          f(Task{s, head, query, queries, first, end, apart ? split : -1, nullptr}, apart ? splits : 1);
    }
  }
}

struct Counts {
  int64_t tasks = 0, parts = 0;
};
Counts count(const PagedCall& call, const Layout& layout) {
  Counts found;
  each_task(call, layout, [&](const Task&, int64_t parts) {
    ++found.tasks;
    if (parts > 1) ++found.parts;
  });
  return found;
}

int64_t scratch_bytes(const PagedCall& call) {
  const Layout layout(call);
  const Counts counts = count(call, layout);
  return up_to(counts.tasks * static_cast<int64_t>(sizeof(Task)), 64) + counts.parts * layout.part_values * 4 +
         layout.thread_bytes() * call.n_threads + 64;
}

// ---- products -------------------------------------------------------------------------------------------------------------

// C (rows, 16 blocks) = A (rows, depth) times blocks of keys, each of which lies somewhere. `soon` are as many blocks that
// are read next: lines of them are fetched at the pace at which those of keys are read, where `fetching`.
template <class Engine, bool fetching, int rows, int blocks>
void score_tile(const typename Engine::X* a, int64_t lda, const typename Engine::W* const* keys, int64_t across, int64_t depth,
                float* c, const typename Engine::W* const* soon) {
  constexpr int registers = blocks * vectors;
  lanes sums[rows][registers];
  for (int r = 0; r < rows; ++r)
    for (int s = 0; s < registers; ++s) sums[r][s] = lanes{};
  for (int64_t k = 0; k < depth; k += Engine::depth_unit) {
    typename Engine::Weights weights[registers];
    if (fetching)
      for (int b = 0; b < blocks; ++b) fetch(reinterpret_cast<const char*>(soon[b] + k * key_block));
    for (int s = 0; s < registers; ++s) weights[s] = Engine::weights(keys[s / vectors], across, k, s % vectors);
    for (int r = 0; r < rows; ++r) {
      const auto value = Engine::values(a + r * lda + k);
      for (int s = 0; s < registers; ++s) sums[r][s] = Engine::add(sums[r][s], value, weights[s]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int s = 0; s < registers; ++s) store(c + r * chunk_keys + s * width, sums[r][s]);
}

// C (rows, 16 blocks) += A (rows, n) times values in blocks of keys, one after the other; `soon` as above.
template <class Engine, bool fetching, int rows, int blocks>
void value_tile(const typename Engine::X* a, const typename Engine::W* const* values, int64_t across, int64_t n, float* c,
                int64_t ldc, const typename Engine::W* const* soon) {
  constexpr int registers = blocks * vectors;
  lanes sums[rows][registers];
  for (int r = 0; r < rows; ++r)
    for (int s = 0; s < registers; ++s) sums[r][s] = load(c + r * ldc + s * width);
  for (int64_t first = 0; first < n; first += key_block) {
    const typename Engine::W *block = *values++, *next = fetching ? *soon++ : block;
    const int64_t present = n - first < key_block ? n - first : key_block;
    for (int64_t k = 0; k < present; k += Engine::depth_unit) {
      typename Engine::Weights weights[registers];
      if (fetching)
        for (int b = 0; b < blocks; ++b) fetch(reinterpret_cast<const char*>(next + k * across + b * key_block * Engine::depth_unit));
      for (int s = 0; s < registers; ++s) weights[s] = Engine::weights(block, across, k, s);
      for (int r = 0; r < rows; ++r) {
        const auto value = Engine::values(a + r * chunk_keys + first + k);
        for (int s = 0; s < registers; ++s) sums[r][s] = Engine::add(sums[r][s], value, weights[s]);
      }
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int s = 0; s < registers; ++s) store(c + r * ldc + s * width, sums[r][s]);
}

template <class Engine, bool fetching>
struct Scores {
  const typename Engine::X* queries;
  int64_t lda;
  const typename Engine::W* const* keys;
  int64_t across, depth;
  float* scores;
  const typename Engine::W* const* soon;
  template <int rows, int blocks>
  void tile(int64_t row, int64_t block) const {
    score_tile<Engine, fetching, rows, blocks>(queries + row * lda, lda, keys + block, across, depth,
                                               scores + row * chunk_keys + block * key_block, soon + block);
  }
};

template <class Engine, bool fetching>
struct Weighted {
  typename Engine::X* p;
  const typename Engine::W* const* values;
  int64_t across, n;
  float* sums;
  const typename Engine::W* const* soon;
  template <int rows, int blocks>
  void tile(int64_t row, int64_t block) const {
    const typename Engine::W *places[chunk_blocks], *later[chunk_blocks];
    for (int64_t b = 0; b * key_block < n; ++b) {
      places[b] = values[b] + place<typename Engine::W>(across, 0, block * key_block);
      later[b] = fetching ? soon[b] + block * key_block * Engine::depth_unit : nullptr;
    }
    value_tile<Engine, fetching, rows, blocks>(p + row * chunk_keys, places, across, n,
                                               sums + row * across + block * key_block, across, later);
  }
};

template <class Engine>
struct ShapedTiles {  // of a thread, while it works
  static constexpr bool whole_blocks = false;  // values are read to the end of a block, beyond the last key
};

template <bool fetching, class Product>
void multiply(int64_t rows, int64_t blocks, const Product& product) {
  tiles<fetching ? 1 : least_of_several>(0, rows, 0, blocks, product);
}

#if defined(__AMX_BF16__)
// ---- products on AMX --------------------------------------------------------------------------------------------------------

// Sums lie in tiles 0 to 3, rows in 4 and 5, keys or values in 6 and 7. Each product is sixteen deep, so that a right operand
// is one block of keys or values: the next may lie on any page. Rows beyond the last are computed with it.
struct TileEngine : PairEngine {};
constexpr int64_t tile_step = key_block;

template <>
struct ShapedTiles<TileEngine> {
  static constexpr bool whole_blocks = true;
  ShapedTiles() {
    TileShape shape;
    for (int t : {4, 5}) shape.row_bytes[t] = tile_step * sizeof(bf16);
    for (int t : {6, 7}) shape.rows[t] = tile_step / 2;
    asm volatile("" : : "r"(&shape) : "memory");
    _tile_loadconfig(&shape);
  }
  ~ShapedTiles() { amx_end(); }
};

template <bool fetching>
struct KeyTiles {
  const Scores<TileEngine, fetching>& of;
  const bf16* at(int64_t step, int64_t block) const { return of.keys[block] + step * tile_step * of.across; }
  const bf16* soon(int64_t step, int64_t block) const { return of.soon[block] + step * tile_step * key_block; }
};

template <bool fetching>
struct ValueTiles {
  const Weighted<TileEngine, fetching>& of;
  const bf16* at(int64_t step, int64_t block) const { return of.values[step] + 2 * block * key_block; }
  const bf16* soon(int64_t step, int64_t block) const { return of.soon[step] + block * tile_step * key_block; }
};

// Two tiles of rows where `tall`, times two blocks where `wide`.
template <bool fetching, bool adding, class Right>
void tile_corner(const bf16* a, int64_t lda, int64_t steps, const Right& right, int64_t across, int64_t block, bool tall, bool wide,
                 float* c, int64_t ldc) {
  const auto fetch_tile = [&](int64_t step, int64_t b) {
    if (fetching)
      for (int64_t line = 0; line < tile_step / 2; ++line) fetch(reinterpret_cast<const char*>(right.soon(step, b) + 32 * line));
  };
  float* below = c + tile_rows * ldc;
  amx_fence();
  if (adding) {
    _tile_loadd(0, c, ldc * 4);
    if (wide) _tile_loadd(1, c + 16, ldc * 4);
    if (tall) _tile_loadd(2, below, ldc * 4);
    if (tall && wide) _tile_loadd(3, below + 16, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k) {
    _tile_loadd(4, a + k * tile_step, lda * 2);
    _tile_loadd(6, right.at(k, block), across * 4);
    fetch_tile(k, block);
    _tile_dpbf16ps(0, 4, 6);
    if (wide) {
      _tile_loadd(7, right.at(k, block + 1), across * 4);
      fetch_tile(k, block + 1);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (tall) {
      _tile_loadd(5, a + tile_rows * lda + k * tile_step, lda * 2);
      _tile_dpbf16ps(2, 5, 6);
      if (wide) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, ldc * 4);
  if (wide) _tile_stored(1, c + 16, ldc * 4);
  if (tall) _tile_stored(2, below, ldc * 4);
  if (tall && wide) _tile_stored(3, below + 16, ldc * 4);
  amx_fence();
}

template <class F>
void each_corner(int64_t rows, int64_t blocks, const F& f) {
  for (int64_t row = 0; row < rows; row += 2 * tile_rows)
    for (int64_t block = 0; block < blocks; block += 2) f(row, block, row + tile_rows < rows, block + 1 < blocks);
}

template <bool fetching>
void multiply(int64_t rows, int64_t blocks, const Scores<TileEngine, fetching>& f) {
  each_corner(rows, blocks, [&](int64_t row, int64_t block, bool tall, bool wide) {
    tile_corner<fetching, false>(f.queries + row * f.lda, f.lda, f.lda / tile_step, KeyTiles<fetching>{f}, f.across, block, tall, wide,
                                 f.scores + row * chunk_keys + block * key_block, chunk_keys);
  });
}
template <bool fetching>
void multiply(int64_t rows, int64_t blocks, const Weighted<TileEngine, fetching>& f) {
  const int64_t steps = up_to(f.n, key_block) / key_block;
  for (int64_t r = rows; r % tile_rows != 0; ++r)  // whose sums stay as they are
    std::memset(static_cast<void*>(f.p + r * chunk_keys), 0, steps * key_block * sizeof(bf16));
  each_corner(rows, blocks, [&](int64_t row, int64_t block, bool tall, bool wide) {
    tile_corner<fetching, true>(f.p + row * chunk_keys, chunk_keys, steps, ValueTiles<fetching>{f}, f.across, block, tall, wide,
                                f.sums + row * f.across + block * key_block, f.across);
  });
}
#endif

// ---- softmax --------------------------------------------------------------------------------------------------------------

struct State {  // of each row: the weighted values, the largest score, and the sum of the weights, in a register
  float *sums, *top, *total;
};

struct Seen {  // keys from `first` to before `end`, counted from the first score
  int64_t first, end;
};

enum class Form { plain, capped, biased };  // of scores

// Scores [begin, end) of one row, whole registers, become weights relative to the running maximum. `bias`: of the first key;
// `own`: of the query.
template <class Engine, bool masked, Form form>
__attribute__((noinline)) void weigh(const PagedOptions& options, float* scores, typename Engine::X* p, int64_t begin, int64_t end, Seen seen,
                                     const float* bias, float own, float* sums, int64_t d, float* top_of_row, float* total) {
  int_lanes step;
  for (int32_t i = 0; i < width; ++i) step[i] = i;
  const float before = *top_of_row;
  lanes most = splat(before);
  for (int64_t k = begin; k < end; k += width) {
    lanes s = load(scores + k) * options.scale;
    if (form == Form::capped) s = options.softcap * tanh(s / options.softcap);
    if (form == Form::biased) s += load(bias + k) - own;
    if (masked) {
      const int_lanes key = step + static_cast<int32_t>(k);
      s = (key >= static_cast<int32_t>(seen.first)) & (key < static_cast<int32_t>(seen.end)) ? s : splat(-INFINITY);
    }
    store(scores + k, s);
    most = larger(s, most);
  }
  const float top = largest(most);
  lanes added{};
  for (int64_t k = begin; k < end; k += width) {
    const lanes weight = Engine::exp_kept(load(scores + k) - top);
    Engine::keep(p + k, weight);
    added += weight;
  }
  if (top != before) {
    const lanes fade = exp(splat(before - top));
    for (int64_t c = 0; c < d; c += width) store(sums + c, load(sums + c) * fade);
    store(total, load(total) * fade);
  }
  store(total, load(total) + added);
  *top_of_row = top;
}

// The state of one row takes in that of the split behind it.
__attribute__((noinline)) void merge(float* sums, float& top, float& total, const float* sums_b, float top_b, float total_b, int64_t d) {
  const float most = top > top_b ? top : top_b;
  const lanes fade = exp(splat(top - most)), fade_b = exp(splat(top_b - most));
  for (int64_t c = 0; c < d; c += width) store(sums + c, load(sums + c) * fade + load(sums_b + c) * fade_b);
  total = total * fade[0] + total_b * fade_b[0];
  top = most;
}

struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

// ---- one thread's work ------------------------------------------------------------------------------------------------------

template <class T, class Engine>
struct Worker {
  using X = typename Engine::X;
  using W = typename Engine::W;
  const PagedCall& call;
  const Layout& layout;
  X *queries{}, *p{};
  W* cleared{};
  float* scores{};
  State whole{}, part{};
  const Task* next_task{};

  void lay_out(Scratch scratch) {
    queries = scratch.take<X>(layout.taken_rows * layout.d);
    p = scratch.take<X>(layout.taken_rows * chunk_keys);
    scores = scratch.take<float>(layout.taken_rows * chunk_keys);
    cleared = scratch.take<W>(key_block * layout.d);
    for (State* state : {&whole, &part}) {
      state->sums = scratch.take<float>(layout.taken_rows * layout.d);
      state->top = scratch.take<float>(layout.rows);
      state->total = scratch.take<float>(layout.rows * width);
    }
  }

  void run(const Task& task, const Task* following) {
    next_task = following;
    read_queries(task);
    const int64_t first = task.first_key / split_keys, last = (task.end_key - 1) / split_keys;
    if (task.split >= 0) {
      run_split(task, first + task.split, whole);
      return write_part(task);
    }
    run_split(task, first, whole);
    for (int64_t split = first + 1; split <= last; ++split) {
      run_split(task, split, part);
      for (int64_t r = 0; r < n_rows(task); ++r)
        merge(whole.sums + r * layout.d, whole.top[r], whole.total[r], part.sums + r * layout.d, part.top[r], part.total[r],
              layout.d);
    }
    for (int64_t r = 0; r < n_rows(task); ++r) write_row(task, r, whole.sums + r * layout.d, whole.top[r], whole.total[r]);
  }

  int64_t n_rows(const Task& task) const { return task.n_queries * layout.group; }
  int64_t row_of(const Task& task, int64_t r) const {
    return call.batch.first_row[task.sequence] + task.query + r / layout.group;
  }
  int64_t head_of(const Task& task, int64_t r) const { return task.head * layout.group + r % layout.group; }

  void read_queries(const Task& task) {
    for (int64_t r = 0; r < n_rows(task); ++r) {
      const T* from = row_at<const T>(call.q, row_of(task, r), r % layout.group) + task.head * call.q_of_key;
      X* to = queries + r * layout.d;
      for (int64_t c = 0; c < layout.d; ++c) to[c] = from_float<X>(c < call.store.head_dim ? to_float(from[c]) : 0.0f);
    }
  }

  // Afterwards `total` holds one number a row.
  void run_split(const Task& task, int64_t split, const State& state) {
    const int64_t rows = n_rows(task);
    std::memset(state.sums, 0, rows * layout.d * sizeof(float));
    std::memset(state.total, 0, rows * width * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) state.top[r] = lowest;
    const int64_t first = split * split_keys, stop = first + split_keys;
    const int64_t begin = task.first_key > first ? task.first_key : first, end = task.end_key < stop ? task.end_key : stop;
    for (int64_t chunk = begin / chunk_keys * chunk_keys; chunk < end; chunk += chunk_keys)
      run_chunk(task, chunk, begin > chunk ? begin - chunk : 0, end - chunk < chunk_keys ? end - chunk : chunk_keys, state);
    for (int64_t r = 0; r < rows; ++r) state.total[r] = sum(load(state.total + r * width));
  }

  // Keys [begin, end) of the 64 from `chunk` on, seen from the queries that see one of them.
  void run_chunk(const Task& task, int64_t chunk, int64_t begin, int64_t end, const State& state) {
    const PagedStore& s = call.store;
    const int64_t position = call.batch.position[task.sequence] + task.query, window = call.options.window;
    const int64_t first_query = chunk > position ? chunk - position : 0;
    int64_t end_query = task.n_queries;
    if (window > 0 && chunk + chunk_keys - 1 + window - position < end_query) end_query = chunk + chunk_keys - 1 + window - position;
    if (first_query >= end_query) return;
    const int64_t first_block = begin / key_block, blocks = (end + key_block - 1) / key_block - first_block;
    const W *keys[chunk_blocks], *values[chunk_blocks];
    for (int64_t b = 0; b < blocks; ++b) find(task, chunk + (first_block + b) * key_block, keys[b], values[b]);
    const int64_t row = first_query * layout.group, n = end_query * layout.group - row, at = row * chunk_keys + first_block * key_block;
    const bool few = n <= most_rows;
    const W* next[chunk_blocks];
    if (few) find_next(task, chunk, next);
    const auto score = [&](auto fetching) {
      constexpr bool fetches = decltype(fetching)::value;
      multiply<fetches>(n, blocks, Scores<Engine, fetches>{queries + row * layout.d, layout.d, keys, s.block, s.head_dim, scores + at, values});
    };
    few ? score(Yes{}) : score(No{});
    for (int64_t r = row; r < row + n; ++r) {
      const int64_t here = position + r / layout.group - chunk;  // where the query itself would be
      const Seen seen{window > 0 ? here - window + 1 : 0, here + 1};
      weigh_any(task, r, chunk, first_block * key_block, (first_block + blocks) * key_block, seen, state);
    }
    if (ShapedTiles<Engine>::whole_blocks && end % key_block != 0) values[blocks - 1] = clear(values[blocks - 1], end % key_block);
    const auto add = [&](auto fetching) {
      constexpr bool fetches = decltype(fetching)::value;
      multiply<fetches>(n, layout.d / key_block,
                        Weighted<Engine, fetches>{p + at, values, layout.d, end - first_block * key_block, state.sums + row * layout.d, next});
    };
    few ? add(Yes{}) : add(No{});
  }

  // A copy of the first values of a block, with zeros behind them: a former holder of the page may have left what is no number.
  const W* clear(const W* values, int64_t present) const {
    const int64_t n = up_to(present, 2) * layout.d;
    std::memcpy(static_cast<void*>(cleared), values, n * sizeof(W));
    std::memset(static_cast<void*>(cleared + n), 0, (key_block * layout.d - n) * sizeof(W));
    return cleared;
  }

  int64_t first_chunk(const Task& task) const {
    const int64_t split = task.first_key / split_keys + task.split, first = split * split_keys;
    return (task.split > 0 && first > task.first_key ? first : task.first_key) / chunk_keys * chunk_keys;
  }

  // The keys of the chunk behind this one, of this task or the next.
  void find_next(const Task& task, int64_t chunk, const W* (&keys)[chunk_blocks]) const {
    const bool stays = chunk + chunk_keys < task.end_key && (task.split < 0 || (chunk + chunk_keys) % split_keys != 0);
    const Task& owner = stays || next_task == nullptr ? task : *next_task;
    const int64_t first = stays ? chunk + chunk_keys : next_task == nullptr ? chunk : first_chunk(owner);
    const W* values;
    for (int64_t b = 0; b < chunk_blocks; ++b) {
      const int64_t key = first + b * key_block;
      find(owner, key < owner.end_key && key >= owner.first_key / key_block * key_block ? key : owner.end_key - 1, keys[b], values);
    }
  }

  void find(const Task& task, int64_t key, const W*& keys, const W*& values) const {
    const PagedStore& s = call.store;
    const int64_t page = call.batch.pages[call.batch.first_page[task.sequence] + key / s.block], slot = key % s.block;
    keys = head_keys<W>(s, page, call.layer, task.head) + place<W>(s.block, 0, slot);
    values = head_values<W>(s, page, call.layer, task.head) + place<W>(layout.d, slot, 0);
  }

  void weigh_any(const Task& task, int64_t r, int64_t chunk, int64_t begin, int64_t end, Seen seen, const State& state) {
    const PagedOptions& options = call.options;
    const bool masked = seen.first > begin || seen.end < end;
    const auto run = options.softcap != 0.0f ? weigh<Engine, true, Form::capped>
                     : options.bias != nullptr ? weigh<Engine, true, Form::biased>
                     : masked ? weigh<Engine, true, Form::plain>
                              : weigh<Engine, false, Form::plain>;
    const float* bias = options.bias == nullptr ? nullptr : options.bias + head_of(task, r) * options.positions + chunk;
    run(options, scores + r * chunk_keys, p + r * chunk_keys, begin, end, seen, bias, bias == nullptr ? 0.0f : bias[seen.end - 1],
        state.sums + r * layout.d, layout.d, state.top + r, state.total + r * width);
  }

  void write_part(const Task& task) const {
    const int64_t rows = n_rows(task);
    std::memcpy(task.part, whole.sums, rows * layout.d * sizeof(float));
    std::memcpy(task.part + layout.rows * layout.d, whole.top, rows * sizeof(float));
    std::memcpy(task.part + layout.rows * (layout.d + 1), whole.total, rows * sizeof(float));
  }

  // All parts of one task, the first of which this is.
  void merge_parts(const Task& task, int64_t parts) const {
    float* first = task.part;
    float *tops = first + layout.rows * layout.d, *totals = tops + layout.rows;
    for (int64_t r = 0; r < n_rows(task); ++r) {
      for (int64_t i = 1; i < parts; ++i) {
        const float *other = first + i * layout.part_values, *others = other + layout.rows * layout.d;
        merge(first + r * layout.d, tops[r], totals[r], other + r * layout.d, others[r], others[layout.rows + r], layout.d);
      }
      write_row(task, r, first + r * layout.d, tops[r], totals[r]);
    }
  }

  void write_row(const Task& task, int64_t r, const float* sums, float top, float total) const {
    const int64_t head = head_of(task, r);
    T* out = row_at<T>(call.out, row_of(task, r), head);
    if (call.options.sinks != nullptr) total += std::exp(call.options.sinks[head] - top);
    const float share = 1.0f / total;
    each_register(call.store.head_dim, [=](int64_t c, int64_t n) { put(out + c, load(sums + c) * share, n); });
  }
};

template <class T, class Engine>
void attend_typed(const PagedCall& call) {
  const Layout layout(call);
  const Counts counts = count(call, layout);
  Scratch scratch{call.scratch};
  Task* tasks = scratch.take<Task>(counts.tasks);
  float* parts = scratch.take<float>(counts.parts * layout.part_values);
  Task* task = tasks;
  each_task(call, layout, [&](Task found, int64_t n_parts) {
    if (n_parts > 1) {
      found.part = parts;
      parts += layout.part_values;
    }
    *task++ = found;
  });
  char* own = reinterpret_cast<char*>(parts);
  const int64_t thread_bytes = layout.thread_bytes();
  parallel_tasks(call.n_threads, [&](int thread, auto next) {
    Worker<T, Engine> worker{call, layout};
    worker.lay_out({own + thread * thread_bytes});
    [[maybe_unused]] const ShapedTiles<Engine> shaped;
    for (int64_t i = next(), following; i < counts.tasks; i = following) {
      following = next();
      worker.run(tasks[i], following < counts.tasks ? tasks + following : nullptr);
    }
  });
  if (counts.parts == 0) return;
  parallel_for(counts.tasks, 16, [&](int64_t begin, int64_t end) {
    const Worker<T, Engine> worker{call, layout};
    for (int64_t i = begin; i < end; ++i) {
      if (tasks[i].split != 0) continue;
      int64_t n = 1;
      while (i + n < counts.tasks && tasks[i + n].split == n) ++n;
      worker.merge_parts(tasks[i], n);
    }
  });
}

void attend(const PagedCall& call) {
  if (call.store.dtype == Dtype::float32) return attend_typed<float, FloatEngine<float>>(call);
#if defined(__AMX_BF16__)
  attend_typed<bf16, TileEngine>(call);
#elif defined(__AVX512BF16__)
  attend_typed<bf16, PairEngine>(call);
#else
  attend_typed<bf16, FloatEngine<bf16>>(call);
#endif
}

}  // namespace

const PagedAttentionKernels paged_attention = {append, scratch_bytes, attend};

}  // namespace VENEER_ISA
}  // namespace veneer
