// One kernel for one row and for a thousand: tiles of a few rows times the blocks of a panel, each sum in a register from
// the first input to the last (core/panels.h); on AMX tiles of up to 32 rows, which cost few rows as little as their weights.
#include "packed/packed.h"

#include "core/amx.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t rows_at_once = 96;       // their x stays in a core's second-level cache
constexpr int64_t least_bytes = 1 << 16;   // of weights; reading less is not worth waking a thread

// ---- packing ----------------------------------------------------------------------------------------------------------

template <class T>
void pack_typed(const PanelMatrix& w, const T* rows, int64_t stride) {
  parallel_for(blocks_of(w.o), least_bytes / (w.depth * panel_block + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) pack_block(w, block, rows, stride);
  });
}

template <class T>
void unpack_typed(const PanelMatrix& w, T* rows) {
  parallel_for(w.o, least_bytes / (w.i + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) unpack_row(w, r, rows + r * w.i);
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

void pack(const PanelMatrix& weight, const void* rows, int64_t stride) {
  with_dtype(weight.dtype, [&](auto t) { pack_typed(weight, static_cast<const decltype(t)*>(rows), stride); });
}

void unpack(const PanelMatrix& weight, void* rows) {
  with_dtype(weight.dtype, [&](auto t) { unpack_typed(weight, static_cast<decltype(t)*>(rows)); });
}

// ---- products ---------------------------------------------------------------------------------------------------------

struct Operand {  // x as an engine reads it
  const void* data;
  int64_t stride;
};

// What becomes of the sums of one row and one block.
template <class Out>
struct Finish {
  const PackedProduct& call;

  void operator()(int64_t row, int64_t block, const lanes* sums) const {
    const int64_t column = block * panel_block, left = call.weight.o - column;
    Out* out = static_cast<Out*>(call.out.data) + row * call.out.stride + column;
    const Out* onto = static_cast<const Out*>(call.onto.data);
    if (onto != nullptr) onto += row * call.onto.stride + column;
    for (int64_t v = 0; v < vectors && v * width < left; ++v) {
      const int64_t n = left - v * width < width ? left - v * width : width;
      put(out + v * width, onto != nullptr ? sums[v] + take(onto + v * width, n) : sums[v], n);
    }
  }
};

// Some rows and blocks at a time, shared out among the threads.
template <class F>
void each_piece(const PackedProduct& call, const F& f) {
  const int64_t blocks = blocks_of(call.weight.o), heights = (call.n + rows_at_once - 1) / rows_at_once;
  const int64_t height = call.n < rows_at_once ? call.n : rows_at_once;
  const int64_t grain = least_bytes / (call.weight.i * panel_block * (1 + height / 4) + 1) + 1;
  parallel_for(heights * blocks, grain, [&, blocks](int64_t at, int64_t stop) {
    while (at < stop) {
      const int64_t row = at / blocks * rows_at_once, begin = at % blocks, last = row + rows_at_once;
      const int64_t end = blocks - begin < stop - at ? blocks : begin + stop - at;
      f(row, last < call.n ? last : call.n, begin, end);
      at += end - begin;
    }
  });
}

template <class Engine, class Out>
void product_typed(const PackedProduct& call, const Operand& x) {
  const Finish<Out> finish{call};
  each_piece(call, [&](int64_t row, int64_t stop, int64_t begin, int64_t end) {
    multiply_panels<Engine>(call.weight, static_cast<const typename Engine::X*>(x.data), x.stride, row, stop, begin, end, finish);
  });
}

template <class Engine>
void product(const PackedProduct& call, const Operand& x) {
  if (call.out.dtype == Dtype::float32) return product_typed<Engine, float>(call, x);
  product_typed<Engine, bf16>(call, x);
}

#if defined(__AMX_BF16__)
// Up to 32 rows times two blocks of one panel. Tiles have as many rows as there are; few cost as much as their weights.
template <class Out>
void tile_corner(const PackedProduct& call, const Operand& x, int64_t row, int n, int64_t block, int blocks) {
  const Panel panel = panel_of(call.weight, block);
  const bf16* w = static_cast<const bf16*>(call.weight.values) + panel.start + 2 * panel.first;
  const bf16* first = static_cast<const bf16*>(x.data) + row * x.stride;
  const bf16* second = first + 16 * x.stride;
  const int64_t depth = call.weight.depth, step = panel.across * tile_depth;
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
  const Finish<Out> finish{call};
  for (int r = 0; r < n; ++r)
    for (int b = 0; b < blocks; ++b) {
      const lanes sums = load(c[r / 16 * 2 + b] + r % 16 * 16);
      finish(row + r, block + b, &sums);
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
int64_t copied_stride(const PackedProduct& call) { return up_to(call.weight.i, 32); }

int64_t scratch_bytes(const PackedProduct& call) {
  if (!is_copied(call)) return 64;
  return 64 + call.n * copied_stride(call) * (reads_pairs(call) ? 2 : 4);
}

Operand operand(const PackedProduct& call) {
  if (!is_copied(call)) return {call.x.data, call.x.stride};
  const int64_t i = call.weight.i, stride = copied_stride(call);
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
