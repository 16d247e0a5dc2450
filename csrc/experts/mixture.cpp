#include "experts/mixture.h"

#include <cstring>

#include "core/parallel.h"
#include "core/scratch.h"
#include "glu/glu.h"

namespace veneer {
namespace {

constexpr int64_t most_rows_of_a_task = 96;  // what they read and write stays in a core's second-level cache

struct Task {  // rows [start, start + n) of those sorted by expert
  int64_t expert, start, n;
};

int64_t most_tasks(const Mixture& m, int64_t n) {
  const int64_t pairs = n * m.k;
  return (pairs < m.n_experts ? pairs : m.n_experts) + pairs / most_rows_of_a_task;
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Rows of one expert, one behind the other, and the pairs that are added to what its weight makes of them.
struct PairRows {
  PairsSegment segment;
  PairsRows y;
  PairsCall call;

  PairRows(const PanelMatrix& weight, const ExpertPairs& pairs, int64_t expert, int64_t n, Dtype dtype, char* x, char* out)
      : segment{pairs.factors, &pairs.rank, 0, n, nullptr}, y{out, weight.o},
        call{weight.dtype, dtype, dtype, weight.i, 1, 1, &weight.o, &segment, {x, weight.i}, &y, rows_at_once(n), nullptr, 1} {
    segment.factors += expert * pair_bytes(weight.dtype, weight.o, weight.i, pairs.rank);
  }
  PairRows(const PairRows&) = delete;
  PairRows& operator=(const PairRows&) = delete;

  static int64_t rows_at_once(int64_t n) { return n < 1 ? 1 : n > most_pair_rows ? most_pair_rows : n; }
  static constexpr int64_t most_pair_rows = 48;
};

// Memory of one thread's task: the rows, what both layers write, and scratch of the products.
struct TaskMemory {
  int64_t x, inner, acted, product;

  TaskMemory(const Mixture& m, const MixtureRows& of) {
    const Dtype dtype = of.dtype;
    const int64_t pairs = of.n * m.k;  // all may be of one expert: a row may name it more than once
    const int64_t rows = pairs < most_rows_of_a_task ? pairs : most_rows_of_a_task, bytes = size_of(dtype);
    x = up_to(rows * m.inner.first.i * bytes, 64);
    inner = up_to(rows * m.inner.first.o * bytes, 64);
    acted = up_to(rows * m.down.first.i * bytes, 64);
    product = 64;
    for (const PanelMatrix& weight : {m.inner.first, m.down.first})
      for (int64_t some : {int64_t{1}, rows}) {  // few rows take other memory than many
        const PackedProduct call{weight, some, {nullptr, weight.i, dtype}, {nullptr, weight.o, dtype}, {nullptr, 0, dtype}, nullptr};
        const int64_t needed = packed_kernels().scratch_bytes(call);
        product = needed > product ? needed : product;
      }
    for (const MixtureSegment& each : of.segments)
      for (bool first : {true, false}) {
        const PairRows added((first ? m.inner : m.down).first, first ? each.inner : each.down, 0, rows, dtype, nullptr, nullptr);
        const int64_t needed = pairs_kernels().scratch_bytes(added.call);
        product = needed > product ? needed : product;
      }
    product = up_to(product, 64);
  }
  int64_t all() const { return x + inner + acted + product; }
};

// Rows sorted by expert: of each its token, for each token and choice its place among them, and the tasks.
struct Sorted {
  int64_t *tokens, *places, n_tasks = 0;
  Task* tasks;

  Sorted(const Mixture& m, const MixtureRows& rows, Scratch& scratch)
      : tokens(scratch.take<int64_t>(rows.n * m.k)), places(scratch.take<int64_t>(rows.n * m.k)),
        tasks(scratch.take<Task>(most_tasks(m, rows.n))) {
    int64_t* next = scratch.take<int64_t>(m.n_experts);
    std::memset(next, 0, m.n_experts * sizeof(int64_t));
    for (int64_t pair = 0; pair < rows.n * m.k; ++pair) ++next[rows.ids[pair]];
    int64_t start = 0;
    for (int64_t expert = 0; expert < m.n_experts; ++expert) {
      const int64_t n = next[expert], parts = (n + most_rows_of_a_task - 1) / most_rows_of_a_task;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = n * part / parts, last = n * (part + 1) / parts;
        tasks[n_tasks++] = {expert, start + first, last - first};
      }
      next[expert] = start;
      start += n;
    }
    for (int64_t pair = 0; pair < rows.n * m.k; ++pair) {
      places[pair] = next[rows.ids[pair]]++;
      tokens[places[pair]] = pair / m.k;
    }
  }
};

void multiply(const ExpertStack& stack, int64_t expert, int64_t n, Dtype dtype, const void* x, void* y, char* scratch, const PanelMatrix* after) {
  const PanelMatrix weight = stack.of(expert);
  char* bias = stack.bias == nullptr ? nullptr : stack.bias + expert * weight.o * size_of(dtype);
  PackedProduct call{weight, n, {const_cast<void*>(x), weight.i, dtype}, {y, weight.o, dtype}, {bias, 0, dtype}, scratch, after};
  packed_kernels().matmul(call);
}

struct Run {
  const Mixture& m;
  const MixtureRows& rows;
  const Sorted& sorted;
  const TaskMemory& memory;
  char* out;  // of all sorted rows

  // `apart`: as many tasks further on lies what the thread is likely to do next.
  void task(int64_t number, char* own, int64_t apart) const {
    const Task& t = sorted.tasks[number];
    const int64_t d = m.inner.first.i, width = m.down.first.i, bytes = size_of(rows.dtype);
    char *x = own, *inner = x + memory.x, *acted = inner + memory.inner, *scratch = acted + memory.acted;
    for (int64_t r = 0; r < t.n; ++r)
      std::memcpy(x + r * d * bytes, static_cast<const char*>(rows.x.data) + sorted.tokens[t.start + r] * rows.x.stride * bytes, d * bytes);
    const PanelMatrix down = m.down.of(t.expert);
    multiply(m.inner, t.expert, t.n, rows.dtype, x, inner, scratch, &down);
    add_pairs(t, true, x, inner, scratch);
    const GluSizes sizes{t.n, width, rows.dtype, m.activation};
    if (m.activation == Activation::swiglu_oai) glu_kernels().clamped_forward(sizes, {inner, 2 * width}, {acted, width});
    else glu_kernels().forward(sizes, {inner, 2 * width}, {inner + width * bytes, 2 * width}, {acted, width});
    const PanelMatrix next = m.inner.of(sorted.tasks[number + apart < sorted.n_tasks ? number + apart : number].expert);
    char* y = out + t.start * down.o * bytes;
    multiply(m.down, t.expert, t.n, rows.dtype, acted, y, scratch, &next);
    add_pairs(t, false, acted, y, scratch);
  }

  // Rows of one expert have the order of their tokens, and so those of a segment lie one behind the other.
  void add_pairs(const Task& t, bool first, char* x, char* y, char* scratch) const {
    const PanelMatrix& weight = (first ? m.inner : m.down).first;
    const int64_t* tokens = sorted.tokens + t.start;
    int64_t r = 0;
    for (const MixtureSegment& each : rows.segments) {
      while (r < t.n && tokens[r] < each.start) ++r;
      const int64_t start = r;
      while (r < t.n && tokens[r] < each.stop) ++r;
      const ExpertPairs& pairs = first ? each.inner : each.down;
      if (r == start || pairs.rank == 0) continue;
      const int64_t bytes = size_of(rows.dtype);
      PairRows added(weight, pairs, t.expert, r - start, rows.dtype, x + start * weight.i * bytes, y + start * weight.o * bytes);
      added.call.scratch = scratch;
      pairs_kernels().add(added.call);
    }
  }
};

}  // namespace

ExpertStack stack_at(Dtype dtype, const std::vector<int64_t>& n) {
  return {{n[0], n[1], n[2], dtype, reinterpret_cast<void*>(n[3]), Coding(n[5]), n[6]}, n[4], reinterpret_cast<char*>(n[7])};
}

int64_t mixture_bytes(const Mixture& m, const MixtureRows& rows) {
  const int64_t n = rows.n, pairs = n * m.k;
  const int64_t sorted = 2 * up_to(pairs * 8, 64) + up_to(most_tasks(m, n) * static_cast<int64_t>(sizeof(Task)), 64) + up_to(m.n_experts * 8, 64);
  return 64 + sorted + up_to(pairs * m.down.first.o * size_of(rows.dtype), 64) + max_threads() * TaskMemory(m, rows).all();
}

// Threads take experts as they come to them, each through both layers; where there are too few of these, the products
// themselves are shared out.
void run_mixture(const Mixture& m, const MixtureRows& rows, char* scratch) {
  if (rows.n == 0) return;
  Scratch memory{scratch + -reinterpret_cast<uintptr_t>(scratch) % 64};
  const Sorted sorted(m, rows, memory);
  const TaskMemory of_task(m, rows);
  char* out = memory.take<char>(rows.n * m.k * m.down.first.o * size_of(rows.dtype));
  char* own = memory.take<char>(0);
  const Run run{m, rows, sorted, of_task, out};
  const int threads = max_threads();
  if (threads > 1 && sorted.n_tasks >= 2 * threads) {
    parallel_tasks(threads, [&](int thread, const auto& next) {
      for (int64_t task = next(); task < sorted.n_tasks; task = next()) run.task(task, own + thread * of_task.all(), threads);
    });
  } else {
    for (int64_t task = 0; task < sorted.n_tasks; ++task) run.task(task, own, 1);
  }
  experts_kernels().combine({rows.n, m.down.first.o, m.k, rows.dtype, out, sorted.places, rows.weights, rows.shared, rows.shared_gate, rows.y});
}

}  // namespace veneer
