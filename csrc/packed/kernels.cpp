// One kernel for one row and for a thousand: tiles of a few rows times a few panels, each sum in a register from the first
// input to the last. Few rows leave room for more panels beside each other, which hides the latency of a sum.
#include "packed/packed.h"

#include "core/amx.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "packed/engines.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t rows_at_once = 96;       // their x stays in a core's second-level cache
constexpr int64_t least_bytes = 1 << 16;   // of weights; reading less is not worth waking a thread

// ---- panels -----------------------------------------------------------------------------------------------------------

// The panel in which a block of outputs lies: where it starts, its outputs, and the first of the block among them.
struct Panel {
  int64_t start, across, first;
};
inline Panel panel_of(const PackedMatrix& w, int64_t block) {
  const int64_t before = block / packed_blocks * packed_blocks, left = packed_all_blocks(w.o) - before;
  return {before * packed_block * packed_depth(w.i, w.dtype), (left < packed_blocks ? left : packed_blocks) * packed_block,
          (block - before) * packed_block};
}

// Where the weight of output j of a panel and input k lies.
template <class T>
inline int64_t place(const Panel& p, int64_t j, int64_t k) { return k * p.across + j; }
template <>
inline int64_t place<bf16>(const Panel& p, int64_t j, int64_t k) { return k / 2 * 2 * p.across + 2 * j + k % 2; }

template <class T>
void pack_typed(const PackedMatrix& w, const T* rows, int64_t stride) {
  const int64_t depth = packed_depth(w.i, w.dtype);
  parallel_for(packed_all_blocks(w.o), least_bytes / (depth * packed_block + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const Panel panel = panel_of(w, block);
      T* to = static_cast<T*>(w.panels) + panel.start;
      for (int64_t j = 0; j < packed_block; ++j) {
        const int64_t row = block * packed_block + j, present = row < w.o ? w.i : 0;
        for (int64_t k = 0; k < present; ++k) to[place<T>(panel, panel.first + j, k)] = rows[row * stride + k];
        for (int64_t k = present; k < depth; ++k) to[place<T>(panel, panel.first + j, k)] = T{};
      }
    }
  });
}

template <class T>
void unpack_typed(const PackedMatrix& w, T* rows) {
  parallel_for(w.o, least_bytes / (w.i + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Panel panel = panel_of(w, r / packed_block);
      const T* from = static_cast<const T*>(w.panels) + panel.start;
      for (int64_t k = 0; k < w.i; ++k) rows[r * w.i + k] = from[place<T>(panel, panel.first + r % packed_block, k)];
    }
  });
}

template <class F>
void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32: return f(float{});
    case Dtype::bfloat16: return f(bf16{});
    case Dtype::float16: return f(fp16{});
  }
}

void pack(const PackedMatrix& weight, const void* rows, int64_t stride) {
  with_dtype(weight.dtype, [&](auto t) { pack_typed(weight, static_cast<const decltype(t)*>(rows), stride); });
}

void unpack(const PackedMatrix& weight, void* rows) {
  with_dtype(weight.dtype, [&](auto t) { unpack_typed(weight, static_cast<decltype(t)*>(rows)); });
}

// ---- products ---------------------------------------------------------------------------------------------------------

struct Operand {  // x as an engine reads it
  const void* data;
  int64_t stride;
};

// What becomes of the sums of one row and one block.
template <class Out>
inline void finish(const PackedProduct& call, int64_t row, int64_t block, const lanes* sums) {
  const int64_t column = block * packed_block, left = call.weight.o - column;
  Out* out = static_cast<Out*>(call.out.data) + row * call.out.stride + column;
  const Out* onto = static_cast<const Out*>(call.onto.data);
  if (onto != nullptr) onto += row * call.onto.stride + column;
  for (int64_t v = 0; v < vectors && v * width < left; ++v) {
    const int64_t n = left - v * width < width ? left - v * width : width;
    put(out + v * width, onto != nullptr ? sums[v] + take(onto + v * width, n) : sums[v], n);
  }
}

// Blocks of one panel.
template <class Engine, class Out, int rows, int blocks>
void tile(const PackedProduct& call, const Operand& x, int64_t row, int64_t block) {
  constexpr int64_t registers = blocks * vectors, unit = Engine::depth_unit;
  const Panel panel = panel_of(call.weight, block);
  const int64_t depth = call.weight.i, stride = x.stride, across = panel.across;
  const auto* w = static_cast<const typename Engine::W*>(call.weight.panels) + panel.start +
                  place<typename Engine::W>(panel, panel.first, 0);
  const auto* from = static_cast<const typename Engine::X*>(x.data) + row * stride;
  lanes sums[rows][registers];
  for (int r = 0; r < rows; ++r)
    for (int s = 0; s < registers; ++s) sums[r][s] = lanes{};
  const auto one = [&](int64_t k) __attribute__((always_inline)) {
    typename Engine::Weights weights[registers];
    for (int s = 0; s < registers; ++s) weights[s] = Engine::weights(w, across, k, s);
    for (int r = 0; r < rows; ++r) {
      const auto value = Engine::values(from + r * stride + k);
      for (int s = 0; s < registers; ++s) sums[r][s] = Engine::add(sums[r][s], value, weights[s]);
    }
  };
  int64_t k = 0;
  for (; k + 2 * unit <= depth; k += 2 * unit) {
    one(k);
    one(k + unit);
  }
  for (; k < depth; k += unit) one(k);
  for (int r = 0; r < rows; ++r)
    for (int b = 0; b < blocks; ++b) finish<Out>(call, row + r, block + b, sums[r] + b * vectors);
}

// Blocks [begin, end) of one panel.
template <class Engine, class Out, int rows, int blocks>
void strip(const PackedProduct& call, const Operand& x, int64_t row, int64_t begin, int64_t end) {
  for (; begin + blocks <= end; begin += blocks) tile<Engine, Out, rows, blocks>(call, x, row, begin);
  if constexpr (blocks > 1)
    if (begin < end) strip<Engine, Out, rows, blocks / 2>(call, x, row, begin, end);
}

template <class Engine, class Out, int rows = most_rows>
void some_rows(const PackedProduct& call, const Operand& x, int64_t row, int n, int64_t begin, int64_t end) {
  if constexpr (rows > 1)
    if (n < rows) return some_rows<Engine, Out, rows - 1>(call, x, row, n, begin, end);
  strip<Engine, Out, rows, blocks_beside(rows)>(call, x, row, begin, end);
}

// Rows [row, stop), in tiles of as equal a height as there can be, times blocks [begin, end): panel by panel, which then
// stays in cache for all the rows.
template <class Engine, class Out>
void piece(const PackedProduct& call, const Operand& x, int64_t row, int64_t stop, int64_t begin, int64_t end) {
  const int64_t n = stop - row, tiles = (n + most_rows - 1) / most_rows;
  while (begin < end) {
    const int64_t after = (begin / packed_blocks + 1) * packed_blocks, next = after < end ? after : end;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = row + n * t / tiles, last = row + n * (t + 1) / tiles;
      some_rows<Engine, Out>(call, x, first, static_cast<int>(last - first), begin, next);
    }
    begin = next;
  }
}

// Some rows and blocks at a time, shared out among the threads.
template <class F>
void each_piece(const PackedProduct& call, const F& f) {
  const int64_t blocks = packed_all_blocks(call.weight.o), heights = (call.n + rows_at_once - 1) / rows_at_once;
  const int64_t height = call.n < rows_at_once ? call.n : rows_at_once;
  const int64_t grain = least_bytes / (call.weight.i * packed_block * (1 + height / 4) + 1) + 1;
  parallel_for(heights * blocks, grain, [&, blocks](int64_t at, int64_t stop) {
    while (at < stop) {
      const int64_t row = at / blocks * rows_at_once, begin = at % blocks, last = row + rows_at_once;
      const int64_t end = blocks - begin < stop - at ? blocks : begin + stop - at;
      f(row, last < call.n ? last : call.n, begin, end);
      at += end - begin;
    }
  });
}

template <class Engine>
void product(const PackedProduct& call, const Operand& x) {
  if (call.out.dtype == Dtype::float32)
    return each_piece(call, [&](int64_t row, int64_t stop, int64_t begin, int64_t end) {
      piece<Engine, float>(call, x, row, stop, begin, end);
    });
  each_piece(call, [&](int64_t row, int64_t stop, int64_t begin, int64_t end) {
    piece<Engine, bf16>(call, x, row, stop, begin, end);
  });
}

#if defined(__AMX_BF16__)
// Up to 32 rows times two blocks of one panel. Tiles have as many rows as there are; few cost as much as their weights.
template <class Out>
void tile_corner(const PackedProduct& call, const Operand& x, int64_t row, int n, int64_t block, int blocks) {
  const Panel panel = panel_of(call.weight, block);
  const bf16* w = static_cast<const bf16*>(call.weight.panels) + panel.start + 2 * panel.first;
  const bf16* first = static_cast<const bf16*>(x.data) + row * x.stride;
  const bf16* second = first + 16 * x.stride;
  const int64_t depth = packed_depth(call.weight.i, Dtype::bfloat16), step = panel.across * tile_depth;
  alignas(64) float c[4][256];
  amx_fence();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; k += tile_depth, w += step) {
    _tile_loadd(4, first + k, x.stride * 2);
    _tile_loadd(6, w, panel.across * 4);
    _tile_dpbf16ps(0, 4, 6);
    if (blocks > 1) {
      _tile_loadd(7, w + 32, panel.across * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (n > 16) {
      _tile_loadd(5, second + k, x.stride * 2);
      _tile_dpbf16ps(2, 5, 6);
      if (blocks > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c[0], 64);
  _tile_stored(1, c[1], 64);
  _tile_stored(2, c[2], 64);
  _tile_stored(3, c[3], 64);
  amx_fence();
  for (int r = 0; r < n; ++r)
    for (int b = 0; b < blocks; ++b) {
      const lanes sums = load(c[r / 16 * 2 + b] + r % 16 * 16);
      finish<Out>(call, row + r, block + b, &sums);
    }
}

// Tiles 0, 1, 4 with as many rows as the first sixteen of n rows, tiles 2, 3, 5 with the others.
void shape_tiles(int n) {
  TileShape shape;
  const int first = n < 16 ? n : 16, second = n > 16 ? n - 16 : 1;
  for (int t : {0, 1, 4}) shape.rows[t] = static_cast<uint8_t>(first);
  for (int t : {2, 3, 5}) shape.rows[t] = static_cast<uint8_t>(second);
  asm volatile("" : : "r"(&shape) : "memory");
  _tile_loadconfig(&shape);
}

template <class Out>
void tile_piece(const PackedProduct& call, const Operand& x, int64_t row, int64_t stop, int64_t begin, int64_t end) {
  for (; row < stop; row += 32) {
    const int n = static_cast<int>(stop - row < 32 ? stop - row : 32);
    shape_tiles(n);
    for (int64_t block = begin, next; block < end; block = next) {
      next = block / 2 * 2 + 2 < end ? block / 2 * 2 + 2 : end;
      tile_corner<Out>(call, x, row, n, block, static_cast<int>(next - block));
    }
  }
  amx_end();
}

void tile_product(const PackedProduct& call, const Operand& x) {
  each_piece(call, [&](int64_t row, int64_t stop, int64_t begin, int64_t end) {
    if (call.out.dtype == Dtype::float32) return tile_piece<float>(call, x, row, stop, begin, end);
    tile_piece<bf16>(call, x, row, stop, begin, end);
  });
}
#endif

bool reads_pairs(const PackedProduct& call) {
#if defined(__AVX512BF16__)
  return call.weight.dtype == Dtype::bfloat16 && call.x.dtype == Dtype::bfloat16;
#else
  return call.weight.i < 0 && call.n < 0;
#endif
}

#if defined(__AMX_BF16__)
constexpr int64_t pair_unit = tile_depth;
#else
constexpr int64_t pair_unit = 2;
#endif

// x where it lies if the engine can read it there, or copied: rows of pairs filled up with zeros, or float32.
bool is_copied(const PackedProduct& call) {
  return reads_pairs(call) ? call.weight.i % pair_unit != 0 : call.x.dtype != Dtype::float32;
}

int64_t scratch_bytes(const PackedProduct& call) {
  if (!is_copied(call)) return 64;
  return call.n * up_to(call.weight.i, packed_depth_unit) * (reads_pairs(call) ? 2 : 4);
}

Operand operand(const PackedProduct& call) {
  if (!is_copied(call)) return {call.x.data, call.x.stride};
  const int64_t i = call.weight.i, stride = up_to(i, packed_depth_unit);
  const bf16* x = static_cast<const bf16*>(call.x.data);
  const bool pairs = reads_pairs(call);
  parallel_for(call.n, least_bytes / stride + 1, [&, pairs, i, stride, x](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const bf16* from = x + r * call.x.stride;
      if (pairs) {
        bf16* to = static_cast<bf16*>(call.scratch) + r * stride;
        std::memcpy(static_cast<void*>(to), from, i * sizeof(bf16));
        std::memset(static_cast<void*>(to + i), 0, (stride - i) * sizeof(bf16));
      } else {
        float* to = static_cast<float*>(call.scratch) + r * stride;
        each_register(i, [=](int64_t k, int64_t n) { put(to + k, take(from + k, n), n); });
      }
    }
  });
  return {call.scratch, stride};
}

void matmul(const PackedProduct& call) {
  if (call.n == 0 || call.weight.o == 0) return;
  const Operand x = operand(call);
#if defined(__AMX_BF16__)
  if (reads_pairs(call)) return tile_product(call, x);
#elif defined(__AVX512BF16__)
  if (reads_pairs(call)) return product<PairEngine>(call, x);
#endif
  with_dtype(call.weight.dtype, [&](auto t) { product<FloatEngine<decltype(t)>>(call, x); });
}

}  // namespace

const PackedKernels packed = {pack, unpack, scratch_bytes, matmul};

}  // namespace VENEER_ISA
}  // namespace veneer
