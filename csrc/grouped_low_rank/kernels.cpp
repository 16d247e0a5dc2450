// Three products, each for 64 rows of one adapter: x Aᵀ for all layers that share x at once, its A's side by side; that
// times (scale B)ᵀ onto the output of each layer; and, for gradients, a factor's ranks times rows summed over the rows.
// Where masks lie in front of the A's of an adapter, each layer has an x of its own and a product of its own with it.
// Factors are packed first, once a call; what a block or a piece of a gradient holds does not depend on who computes it.
#include "grouped_low_rank/grouped_low_rank.h"

#include "core/parallel.h"
#include "core/scratch.h"
#include "grouped_low_rank/factors.h"
#include "grouped_low_rank/masks.h"
#include "grouped_low_rank/operands.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t outer_columns = low_rank_outer_columns;
constexpr int64_t tile = low_rank_tile;

template <class T, class Engine>
struct Pass {
  using E = typename Engine::Element;
  const LowRankCall& call;

  static E* elements(char* p) { return reinterpret_cast<E*>(p); }
  const LowRankPair& pair(int64_t layer, int64_t adapter) const { return call.pairs[layer * call.n_adapters + adapter]; }
  static int64_t depth_of(int64_t n) { return up_to(n, Engine::depth_unit); }
  static int64_t columns_of(int64_t n) { return up_to(n, Engine::column_unit); }

  struct Local {  // what one thread works in
    E *rows, *du;
    T* masked;
    float* sums;
  };
  Local local(int thread) const {
    Scratch scratch{call.scratch + thread * call.thread_bytes};
    int64_t widest = call.in_features;
    for (int64_t s = 0; s < call.n_layers; ++s) widest = call.out_features[s] > widest ? call.out_features[s] : widest;
    widest = widest > outer_columns ? widest : outer_columns;
    E* rows = scratch.take<E>(block * up_to(widest, 32));
    E* du = scratch.take<E>(block * (call.u_columns + 32));
    T* masked = scratch.take<T>(block * up_to(widest, tile));
    return {rows, du, masked, scratch.take<float>(outer_columns * (call.u_columns + tile))};
  }

  template <class F>
  void each(int64_t n, const F& f) const {
    parallel_tasks(call.n_threads, [&](int thread, auto next) {
      Engine::begin();
      for (int64_t i = next(); i < n; i = next()) f(thread, i);
      Engine::end();
    });
  }

  template <class F>
  void pack(int64_t index, bool backward) const {
    const int64_t layer = index / call.n_adapters, i = call.in_features, o = call.out_features[layer];
    const LowRankAdapter& adapter = call.adapters[index % call.n_adapters];
    const LowRankPair& p = call.pairs[index];
    if (p.rank == 0 || adapter.n_blocks == 0) return;
    const F *a = static_cast<const F*>(p.a), *b = static_cast<const F*>(p.b);
    E *joined = elements(adapter.joined), *packed = elements(p.packed);
    const int64_t depth = depth_of(p.rank);
    if (backward) {
      for (int64_t c = 0; c < i; c += tile)
        pack_rows<Engine>(joined + c * adapter.columns + p.first * tile, tile, a + c, i, p.rank, i - c, depth, 1.0f);
      pack_rows<Engine>(packed, columns_of(p.rank), b, p.rank, o, p.rank, depth_of(o), p.scale);
    } else {
      const int64_t wide = columns_of(adapter.columns), end = p.first + depth;
      const int64_t columns = end == adapter.columns ? wide - p.first : depth;
      pack_columns<Engine>(Engine::column(joined, p.first), wide, a, p.rank, i, columns, depth_of(i), 1.0f);
      for (int64_t c = 0; c < o; c += tile)
        pack_columns<Engine>(packed + c * depth, tile, b + c * p.rank, o - c, p.rank, tile, depth, p.scale);
    }
  }
  void pack_all(bool backward) const {
    each(call.n_layers * call.n_adapters, [&](int, int64_t index) {
      call.factor_dtype == Dtype::float32 ? pack<float>(index, backward) : pack<bf16>(index, backward);
    });
  }

  // ---- forward

  void forward() const {
    pack_all(false);
    each(call.n_blocks, [&](int thread, int64_t index) { forward_block(index, local(thread)); });
  }

  void forward_block(int64_t index, const Local& own) const {
    const LowRankBlock& at = call.blocks[index];
    const LowRankAdapter& adapter = call.adapters[at.adapter];
    const int64_t rows = up_to(at.n_rows, Engine::row_unit), wide = columns_of(adapter.columns), ldu = call.u_columns;
    if (adapter.masked) {
      for (int64_t layer = 0; layer < call.n_layers; ++layer) project_masked(layer, at, own);
    } else {
      const auto x = left<T, Engine>(call.x, call.in_features, at, own.rows);
      Engine::product(own.sums, wide, x.data, x.stride, elements(adapter.joined), wide, rows, wide,
                      depth_of(call.in_features), false);
    }
    E* u = elements(call.u) + index * block * ldu;
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t c = 0; c < wide; c += width) Engine::put_a(u + t * ldu + c, load(own.sums + t * wide + c));
    for (int64_t layer = 0; layer < call.n_layers; ++layer) {
      const LowRankPair& p = pair(layer, at.adapter);
      if (p.rank == 0) continue;
      const int64_t o = call.out_features[layer];
      each_tile(o, [&](int64_t first, int64_t columns) {
        const int64_t depth = depth_of(p.rank);
        Engine::product(own.sums, tile, u + p.first, ldu, elements(p.packed) + first * depth, tile, rows, columns, depth,
                        false);
        const int64_t present = o - first < columns ? o - first : columns;
        call.y_dtype == Dtype::float32 ? add<float>(call.ys[layer], at, first, present, own.sums)
                                       : add<bf16>(call.ys[layer], at, first, present, own.sums);
      });
    }
  }

  // x of one layer times its a, into its columns of the sums.
  void project_masked(int64_t layer, const LowRankBlock& at, const Local& own) const {
    const LowRankPair& p = pair(layer, at.adapter);
    if (p.rank == 0) return;
    const LowRankAdapter& adapter = call.adapters[at.adapter];
    const int64_t i = call.in_features, wide = columns_of(adapter.columns), columns = columns_of(p.rank);
    const auto x = own_x(p, at, own);
    float* sums = own.sums + block * wide;  // with what a unit of columns takes of the next layer
    const int64_t rows = up_to(at.n_rows, Engine::row_unit);
    Engine::product(sums, columns, x.data, x.stride, Engine::column(elements(adapter.joined), p.first), wide, rows, columns,
                    depth_of(i), false);
    for (int64_t t = 0; t < rows; ++t)
      std::memcpy(own.sums + t * wide + p.first, sums + t * columns, depth_of(p.rank) * sizeof(float));
  }

  // The rows of a block as a pair sees them, as a left operand.
  Operand<E> own_x(const LowRankPair& p, const LowRankBlock& at, const Local& own) const {
    const int64_t i = call.in_features;
    if (p.threshold == 0) return left<T, Engine>(call.x, i, at, own.rows);
    masked_rows<T>(call.x, p, at, 0, i, own.masked, i);
    return left<T, Engine>({reinterpret_cast<char*>(own.masked), i}, i, {at.adapter, at.n_rows, in_order, true}, own.rows);
  }

  template <class F>
  static void each_tile(int64_t n, const F& f) {
    for (int64_t first = 0; first < n; first += tile) f(first, n - first < tile ? columns_of(n - first) : tile);
  }

  template <class Y>
  static void add(const RowsView& y, const LowRankBlock& at, int64_t first, int64_t columns, const float* sums) {
    for (int64_t t = 0; t < at.n_rows; ++t) {
      Y* row = const_cast<Y*>(row_of<Y>(y, at.rows[t])) + first;
      each_register(columns, [=](int64_t c, int64_t n) {
        put_rounded<Y, Engine>(row + c, take(row + c, n) + load(sums + t * tile + c), n);
      });
    }
  }

  // ---- backward

  void backward() const {
    pack_all(true);
    each(call.n_blocks, [&](int thread, int64_t index) { backward_block(index, local(thread)); });
    each(call.n_outers, [&](int thread, int64_t index) { outer(call.outers[index], local(thread)); });
  }

  // The gradient in x, and u and its gradient lying as `outer` reads them.
  void backward_block(int64_t index, const Local& own) const {
    const LowRankBlock& at = call.blocks[index];
    const LowRankAdapter& adapter = call.adapters[at.adapter];
    const int64_t rows = up_to(at.n_rows, Engine::row_unit), ldu = call.u_columns + 32;
    for (int64_t layer = 0; layer < call.n_layers; ++layer) {
      const LowRankPair& p = pair(layer, at.adapter);
      if (p.rank == 0) continue;
      const int64_t o = call.out_features[layer], wide = columns_of(p.rank);
      const auto dy = left<T, Engine>(call.ys[layer], o, at, own.rows);
      Engine::product(own.sums, wide, dy.data, dy.stride, elements(p.packed), wide, rows, wide, depth_of(o), false);
      for (int64_t t = 0; t < rows; ++t)  // what goes past its own columns is written over by the next layer
        for (int64_t c = 0; c < wide; c += width)
          Engine::put_a(own.du + t * ldu + p.first + c, load(own.sums + t * wide + c));
    }
    const int64_t stride = adapter.n_blocks * block, place = (index - adapter.first_block) * block;
    const E* u = elements(call.u) + index * block * call.u_columns;
    turn(elements(adapter.du_t) + place, stride, own.du, ldu, rows, adapter.columns);
    turn(elements(adapter.u_t) + place, stride, u, call.u_columns, rows, adapter.columns);
    if (call.dx.data == nullptr) return;
    const int64_t i = call.in_features;
    each_tile(i, [&](int64_t first, int64_t columns) {
      if (adapter.masked)
        project_back_masked(at, own, first, columns);
      else
        Engine::product(own.sums, tile, own.du, ldu, elements(adapter.joined) + first * adapter.columns, tile, rows, columns,
                        adapter.columns, false);
      const int64_t present = i - first < columns ? i - first : columns;
      for (int64_t t = 0; t < at.n_rows; ++t) {
        T* row = const_cast<T*>(row_of<T>(call.dx, at.rows[t])) + first;
        each_register(present, [=](int64_t c, int64_t n) {
          put_rounded<T, Engine>(row + c, load(own.sums + t * tile + c), n);
        });
      }
    });
  }

  // A tile of the gradient in x: of each layer what its mask lets through.
  void project_back_masked(const LowRankBlock& at, const Local& own, int64_t first, int64_t columns) const {
    const LowRankAdapter& adapter = call.adapters[at.adapter];
    const int64_t rows = up_to(at.n_rows, Engine::row_unit), ldu = call.u_columns + 32;
    float* part = own.sums + block * tile;
    std::memset(own.sums, 0, block * tile * sizeof(float));
    for (int64_t layer = 0; layer < call.n_layers; ++layer) {
      const LowRankPair& p = pair(layer, at.adapter);
      if (p.rank == 0) continue;
      const E* a = elements(adapter.joined) + first * adapter.columns + p.first * tile;
      Engine::product(part, tile, own.du + p.first, ldu, a, tile, rows, columns, depth_of(p.rank), false);
      if (p.threshold == 0) {
        for (int64_t c = 0; c < at.n_rows * tile; c += width) store(own.sums + c, load(own.sums + c) + load(part + c));
        continue;
      }
      each_draw(p, at, first, tile, [&](int64_t t, int64_t, const uint16_t* draws) {
        float* total = own.sums + t * tile;
        for (int64_t c = 0; c < tile; c += width) {
          const lanes more = load(part + t * tile + c), before = load(total + c);
          store(total + c, draws_at(draws + c) >= p.threshold ? before + more : before);
        }
      });
    }
  }

  // Rows become columns; what pads the rows of the block is zero.
  static void turn(E* to, int64_t stride, const E* from, int64_t ld, int64_t rows, int64_t columns) {
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t t = 0; t < rows; ++t) to[c * stride + t] = from[t * ld + c];
      if (rows < block) std::memset(static_cast<void*>(to + c * stride + rows), 0, (block - rows) * sizeof(E));
    }
  }

  void outer(const LowRankOuter& piece, const Local& own) const {
    const LowRankAdapter& adapter = call.adapters[piece.adapter];
    const bool of_a = piece.of_a, alone = piece.layer >= 0;
    const RowsView& view = of_a ? call.x : call.ys[piece.layer];
    const int64_t features = of_a ? call.in_features : call.out_features[piece.layer], left_over = features - piece.column;
    const int64_t columns = left_over < outer_columns ? columns_of(left_over) : outer_columns;
    const int64_t present = left_over < columns ? left_over : columns;
    const int64_t stride = adapter.n_blocks * block, first = alone ? pair(piece.layer, piece.adapter).first : 0;
    const int64_t ranks = up_to(alone ? pair(piece.layer, piece.adapter).rank : adapter.columns, Engine::row_unit);
    const E* turned = elements(of_a ? adapter.du_t : adapter.u_t) + first * stride;
    if (adapter.n_blocks == 0) std::memset(own.sums, 0, ranks * columns * sizeof(float));
    for (int64_t index = 0; index < adapter.n_blocks; ++index) {
      const LowRankBlock& at = call.blocks[adapter.first_block + index];
      const int64_t depth = depth_of(at.n_rows);
      if (of_a && alone && pair(piece.layer, piece.adapter).threshold > 0) {
        masked_rows<T>(view, pair(piece.layer, piece.adapter), at, piece.column, present, own.masked, outer_columns);
        right<T, Engine>({reinterpret_cast<char*>(own.masked), outer_columns}, 0, present,
                         {at.adapter, at.n_rows, in_order, true}, columns, depth, own.rows);
      } else {
        right<T, Engine>(view, piece.column, features, at, columns, depth, own.rows);
      }
      Engine::product(own.sums, columns, turned + index * block, stride, own.rows, columns, ranks, columns, depth, index > 0);
    }
    if (!of_a) return write_db(pair(piece.layer, piece.adapter), piece.column, present, own.sums, columns);
    for (int64_t layer = alone ? piece.layer : 0; layer < (alone ? piece.layer + 1 : call.n_layers); ++layer) {
      const LowRankPair& p = pair(layer, piece.adapter);
      for (int64_t r = 0; r < p.rank; ++r)
        std::memcpy(p.da + r * features + piece.column, own.sums + (p.first - first + r) * columns, present * sizeof(float));
    }
  }

  static void write_db(const LowRankPair& p, int64_t first, int64_t present, const float* sums, int64_t columns) {
    float* db = p.db + first * p.rank;
    for (int64_t c = 0; c < present; ++c)
      for (int64_t r = 0; r < p.rank; ++r) db[c * p.rank + r] = p.scale * sums[r * columns + c];
  }
};

template <class Engine>
LowRankUnits units_of() {
  return {Engine::row_unit, Engine::column_unit, Engine::depth_unit, sizeof(typename Engine::Element)};
}

LowRankUnits units(Dtype dtype) { return dtype == Dtype::float32 ? units_of<PlainEngine>() : units_of<HalfEngine>(); }

void forward(const LowRankCall& call) {
  if (call.dtype == Dtype::float32) return Pass<float, PlainEngine>{call}.forward();
  Pass<bf16, HalfEngine>{call}.forward();
}

void backward(const LowRankCall& call) {
  if (call.dtype == Dtype::float32) return Pass<float, PlainEngine>{call}.backward();
  Pass<bf16, HalfEngine>{call}.backward();
}

}  // namespace

const GroupedLowRankKernels grouped_low_rank = {units, forward, backward};

}  // namespace VENEER_ISA
}  // namespace veneer
