// A task is some rows of one segment: u = A x for all layers at once, then (scale B) u onto the output of each. It keeps u
// to itself, so that no thread waits for another, and reads each factor once, in one stream.
#include "pairs/pairs.h"

#include "core/parallel.h"
#include "core/scratch.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

int64_t even(const PairsCall& call, int64_t n) { return call.dtype == Dtype::bfloat16 ? n + n % 2 : n; }

int64_t columns_of(const PairsCall& call, const int64_t* ranks) {  // of u
  int64_t sum = 0;
  for (int64_t layer = 0; layer < call.n_layers; ++layer) sum += even(call, ranks[layer]);
  return sum;
}

int64_t widest(const PairsCall& call) {
  int64_t most = 0;
  for (int64_t s = 0; s < call.n_segments; ++s) {
    const int64_t columns = columns_of(call, call.segments[s].ranks);
    most = columns > most ? columns : most;
  }
  return up_to(most, panel_block);
}

int64_t thread_bytes(const PairsCall& call) {
  return call.rows_at_once * 4 * (up_to(call.in_features, 32) + widest(call)) + 128;
}

int64_t scratch_bytes(const PairsCall& call) { return up_to(thread_bytes(call), 64) * call.n_threads; }

template <class Engine>
struct Keep {  // u, rounded to what the second product reads
  typename Engine::X* u;
  int64_t stride;
  void operator()(int64_t row, int64_t block, const lanes* sums) const {
    for (int64_t v = 0; v < vectors; ++v) Engine::keep(u + row * stride + block * panel_block + v * width, sums[v]);
  }
};

template <class Y>
struct Add {
  Y* y;
  int64_t stride, o;
  void operator()(int64_t row, int64_t block, const lanes* sums) const {
    Y* at = y + row * stride + block * panel_block;
    const int64_t left = o - block * panel_block;
    for (int64_t v = 0; v < vectors && v * width < left; ++v) {
      const int64_t n = left - v * width < width ? left - v * width : width;
      put(at + v * width, take(at + v * width, n) + sums[v], n);
    }
  }
};

template <class Engine, class T>
struct Worker {
  using X = typename Engine::X;
  using W = typename Engine::W;
  const PairsCall& call;
  X *own_x, *u;

  void run(const PairsSegment& segment, int64_t start, int64_t n) {
    const T* x = reinterpret_cast<const T*>(call.x.data) + start * call.x.stride;
    int64_t stride = call.x.stride;
    const X* from = read(x, n, stride);
    const int64_t columns = columns_of(call, segment.ranks), u_stride = up_to(columns, panel_block);
    PanelMatrix matrix{columns, call.in_features, even(call, call.in_features), call.dtype, const_cast<char*>(segment.factors)};
    multiply_panels<Engine>(matrix, from, stride, 0, n, 0, blocks_of(columns), Keep<Engine>{u, u_stride});
    int64_t first = 0;
    for (int64_t layer = 0; layer < call.n_layers; ++layer) {
      if (segment.ranks[layer] == 0) continue;
      W* next = static_cast<W*>(matrix.values) + values_of(matrix);
      matrix = {call.out_features[layer], segment.ranks[layer], even(call, segment.ranks[layer]), call.dtype, next};
      add(matrix, first, u_stride, call.ys[layer], start, n);
      first += matrix.depth;
    }
  }

  void add(const PanelMatrix& b, int64_t first, int64_t u_stride, const PairsRows& y, int64_t start, int64_t n) const {
    if (call.y_dtype == Dtype::float32) return add_typed<float>(b, first, u_stride, y, start, n);
    add_typed<bf16>(b, first, u_stride, y, start, n);
  }
  template <class Y>
  void add_typed(const PanelMatrix& b, int64_t first, int64_t u_stride, const PairsRows& y, int64_t start, int64_t n) const {
    Y* rows = reinterpret_cast<Y*>(y.data) + start * y.stride;
    multiply_panels<Engine>(b, u + first, u_stride, 0, n, 0, blocks_of(b.o), Add<Y>{rows, y.stride, b.o});
  }

  // Rows as the engine reads them: where they lie, or a copy in its type, of whole pairs.
  const X* read(const X* x, int64_t n, int64_t& stride) const {
    if (call.in_features % Engine::depth_unit == 0) return x;
    const int64_t i = call.in_features, own = up_to(i, 32);
    for (int64_t r = 0; r < n; ++r) {
      std::memcpy(static_cast<void*>(own_x + r * own), x + r * stride, i * sizeof(X));
      std::memset(static_cast<void*>(own_x + r * own + i), 0, (own - i) * sizeof(X));
    }
    stride = own;
    return own_x;
  }
  template <class Other>
  const X* read(const Other* x, int64_t n, int64_t& stride) const {
    const int64_t i = call.in_features, own = up_to(i, 32);
    for (int64_t r = 0; r < n; ++r) {
      const Other* from = x + r * stride;
      X* to = own_x + r * own;
      each_register(i, [=](int64_t k, int64_t left) { put(to + k, take(from + k, left), left); });
    }
    stride = own;
    return own_x;
  }
};

template <class Engine, class T>
void add_typed(const PairsCall& call) {
  const int64_t height = call.rows_at_once, bytes = up_to(thread_bytes(call), 64);
  parallel_tasks(call.n_threads, [&](int thread, auto next) {
    Scratch scratch{call.scratch + thread * bytes};
    using X = typename Engine::X;
    X* own_x = scratch.template take<X>(height * up_to(call.in_features, 32));
    Worker<Engine, T> worker{call, own_x, scratch.template take<X>(height * widest(call))};
    int64_t task = next(), before = 0;
    for (int64_t s = 0; s < call.n_segments; ++s) {
      const PairsSegment& segment = call.segments[s];
      const int64_t tasks = (segment.stop - segment.start + height - 1) / height;
      for (; task < before + tasks; task = next()) {
        const int64_t start = segment.start + (task - before) * height, left = segment.stop - start;
        worker.run(segment, start, left < height ? left : height);
      }
      before += tasks;
    }
  });
}

template <class W>
void add_to(const PairsCall& call) {
  if (call.x_dtype == Dtype::float32) return add_typed<FloatEngine<W>, float>(call);
#if defined(__AVX512BF16__)
  if constexpr (sizeof(W) == 2) return add_typed<PairEngine, bf16>(call);
#endif
  add_typed<FloatEngine<W>, bf16>(call);
}

void add(const PairsCall& call) {
  if (call.dtype == Dtype::float32) return add_to<float>(call);
  add_to<bf16>(call);
}

}  // namespace

const PairsKernels pairs = {scratch_bytes, add};

}  // namespace VENEER_ISA
}  // namespace veneer
