// A task is some rows of one segment: u = A x for all layers at once, then (scale B) u onto the output of each. It keeps u
// to itself, so that no thread waits for another, and reads each factor once, in one stream.
#include "pairs/pairs.h"

#include "core/parallel.h"
#include "core/scratch.h"
#include "pairs/packing.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

int64_t even(const PairsCall& call, int64_t n) { return call.dtype == Dtype::bfloat16 ? n + n % 2 : n; }

int64_t columns_of(const PairsCall& call, const PairsSegment& segment) {  // of A x
  if (segment.middle != nullptr && segment.middle->shares_a) return even(call, segment.ranks[0]);
  int64_t sum = 0;
  for (int64_t layer = 0; layer < call.n_layers; ++layer) sum += even(call, segment.ranks[layer]);
  return sum;
}

int64_t widest(const PairsCall& call) {
  int64_t most = 0;
  for (int64_t s = 0; s < call.n_segments; ++s) {
    const int64_t columns = columns_of(call, call.segments[s]);
    most = columns > most ? columns : most;
  }
  return up_to(most, panel_block);
}

int64_t thread_bytes(const PairsCall& call) {
  return call.rows_at_once * 4 * (up_to(call.in_features, 32) + 2 * widest(call)) + 192;
}

int64_t scratch_bytes(const PairsCall& call) { return up_to(thread_bytes(call), 64) * call.n_threads; }

enum class Goes : int {
  rounded,   // u, as what the second product reads
  wide,      // A x in float, before what there is between the two products
  to_float,  // added to y
  to_bf16
};

// Where sums go. A value and no type: a tile of products takes a compiler longest, and is the same for all of them.
template <class Engine>
struct Sink {
  Goes goes;
  void* to;
  int64_t stride, o = 0;
  const float *scale = nullptr, *bias = nullptr;  // null: none
  bool scales_y = false;

  void operator()(int64_t row, int64_t block, const lanes* sums) const {
    const int64_t column = block * panel_block, at = row * stride + column;
    switch (goes) {
      case Goes::rounded:
        for (int64_t v = 0; v < vectors; ++v) Engine::keep(static_cast<typename Engine::X*>(to) + at + v * width, sums[v]);
        return;
      case Goes::wide:
        for (int64_t v = 0; v < vectors; ++v) store(static_cast<float*>(to) + at + v * width, sums[v]);
        return;
      case Goes::to_float: return add(static_cast<float*>(to) + at, column, sums);
      case Goes::to_bf16: return add(static_cast<bf16*>(to) + at, column, sums);
    }
  }

  template <class Y>
  void add(Y* at, int64_t column, const lanes* sums) const {
    const int64_t left = o - column;
    for (int64_t v = 0; v < vectors && v * width < left; ++v) {
      const int64_t n = left - v * width < width ? left - v * width : width;
      const lanes y = take(at + v * width, n);
      lanes sum = scales_y ? y + sums[v] : sums[v];
      if (scale != nullptr) sum *= take(scale + column + v * width, n);
      if (bias != nullptr) sum += take(bias + column + v * width, n);
      put(at + v * width, scales_y ? sum : y + sum, n);
    }
  }
};

template <class Engine, class T>
struct Worker {
  using X = typename Engine::X;
  using W = typename Engine::W;
  const PairsCall& call;
  X *own_x, *u;
  float* wide;

  void run(const PairsSegment& segment, int64_t start, int64_t n) {
    const T* x = reinterpret_cast<const T*>(call.x.data) + start * call.x.stride;
    int64_t stride = call.x.stride;
    const X* from = read(x, n, stride);
    const int64_t columns = columns_of(call, segment), u_stride = up_to(columns, panel_block);
    const PanelMatrix a{columns, call.in_features, even(call, call.in_features), call.dtype, const_cast<char*>(segment.factors)};
    Sink<Engine> sink{Goes::rounded, u, u_stride};
    if (segment.middle != nullptr) sink = {Goes::wide, wide, u_stride};
    multiply_panels<Engine>(a, from, stride, 0, n, 0, blocks_of(columns), sink);
    add_layers(segment, a, u_stride, start, n);
  }

  void add_layers(const PairsSegment& segment, const PanelMatrix& a, int64_t u_stride, int64_t start, int64_t n) const {
    PanelMatrix matrix = a;
    const PairsMiddle* middle = segment.middle;
    int64_t first = 0, output = 0;
    for (int64_t layer = 0; layer < call.n_layers; output += call.out_features[layer++]) {
      const bool scales_y = middle != nullptr && middle->scales_y, has_pair = segment.ranks[layer] != 0;
      if (!has_pair && !scales_y) continue;
      const bool scaled = middle != nullptr && middle->out_scale != nullptr, moved = middle != nullptr && middle->out_bias != nullptr;
      const float *scale = scaled ? middle->out_scale + output : nullptr, *bias = moved ? middle->out_bias + output : nullptr;
      const PairsRows& y = call.ys[layer];
      const bool is_float = call.y_dtype == Dtype::float32;
      char* to = reinterpret_cast<char*>(y.data) + start * y.stride * (is_float ? 4 : 2);
      const Sink<Engine> sink{is_float ? Goes::to_float : Goes::to_bf16, to, y.stride, call.out_features[layer], scale, bias, scales_y};
      if (!has_pair) {
        const lanes nothing[vectors] = {};
        for (int64_t row = 0; row < n; ++row)
          for (int64_t block = 0; block < blocks_of(sink.o); ++block) sink(row, block, nothing);
        continue;
      }
      W* next = static_cast<W*>(matrix.values) + values_of(matrix);
      matrix = {sink.o, segment.ranks[layer], even(call, segment.ranks[layer]), call.dtype, next};
      const X* own = u + first;
      if (middle != nullptr) {
        own = u;
        between(*middle, first, matrix.depth, u_stride, n);
      }
      multiply_panels<Engine>(matrix, own, u_stride, 0, n, 0, blocks_of(matrix.o), sink);
      first += matrix.depth;
    }
  }

  // u of one layer, whose places begin at `first`, from A x.
  void between(const PairsMiddle& middle, int64_t first, int64_t depth, int64_t stride, int64_t n) const {
    with_activation(middle.activation, [&](auto act) {
      for (int64_t r = 0; r < n; ++r)
        each_register(depth, [&](int64_t c, int64_t left) {
          lanes x = take(wide + r * stride + (middle.shares_a ? 0 : first) + c, left);
          if (middle.core != nullptr) x *= take(middle.core + first + c, left);
          if (middle.bias != nullptr) x += take(middle.bias + first + c, left);
          Engine::keep(u + r * stride + c, decltype(act)::at(x).value);
        });
    });
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
    X* u = scratch.template take<X>(height * widest(call));
    Worker<Engine, T> worker{call, own_x, u, scratch.template take<float>(height * widest(call))};
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

void pack(const PairsFactor* factors, int64_t n) {
  for (const PairsFactor* f = factors; f < factors + n; ++f)
    f->to.dtype == Dtype::float32 ? pack_factor_as<float>(*f) : pack_factor_as<bf16>(*f);
}

}  // namespace

const PairsKernels pairs = {scratch_bytes, add, pack};

}  // namespace VENEER_ISA
}  // namespace veneer
