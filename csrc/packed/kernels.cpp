// One kernel for one row and for a thousand: tiles of a few rows times the blocks of a panel, each sum in a register from
// the first input to the last (core/panels.h); on AMX tiles of up to 32 rows, which cost few rows as little as their weights.
#include "packed/packed.h"

#include "core/amx.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "packed/coded.h"
#include "packed/grouped.h"

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

int64_t rows_of_a_thread(const PanelMatrix& w) { return least_bytes / (w.i + 1) + 1; }

void pack_codes(const PanelMatrix& weight, const void* codes, const float* absmax, int64_t block_size) {
  const PanelMatrix w = weight;
  parallel_for(blocks_of(w.o) * panel_block, rows_of_a_thread(w), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (w.coding.numbers == Coding::int8)
        pack_int8_row(w, r, static_cast<const int8_t*>(codes), absmax);
      else
        pack_four_bit_row(w, r, static_cast<const uint8_t*>(codes), absmax, block_size);
    }
  });
}

void unpack_codes(const PanelMatrix& weight, void* codes) {
  const PanelMatrix w = weight;
  parallel_for(w.o, rows_of_a_thread(w), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (w.coding.numbers == Coding::int8)
        unpack_int8_row(w, r, static_cast<int8_t*>(codes));
      else
        unpack_four_bit_row(w, r, static_cast<uint8_t*>(codes));
    }
  });
}

// Some blocks of a panel, decoded a piece at a time, and laid down row by row.
template <class T>
void dequantize_blocks(const PanelMatrix& m, int64_t begin, int64_t end, T* rows) {
  const Decode<float> decode = decoder_of<T, float>(m);
  const int64_t first = begin * panel_block, stop = end * panel_block < m.o ? end * panel_block : m.o;
  constexpr int64_t inputs = piece_inputs<float>;
  alignas(64) float piece[inputs * panel_outputs];
  for (int64_t k = 0; k < m.i; k += inputs) {
    const int64_t n = m.i - k < inputs ? m.i - k : inputs;
    decode(m, begin, end, k, k + n, piece, panel_outputs);
    for (int64_t r = first; r < stop; ++r)
      for (int64_t j = 0; j < n; ++j) rows[r * m.i + k + j] = from_float<T>(piece[j * panel_outputs + r - first]);
  }
}

void dequantize_groups(const PanelMatrix& w, void* rows) {
  parallel_for(blocks_of(w.o), least_bytes / (w.i * panel_block + 1) + 1, [=](int64_t begin, int64_t stop) {
    for (int64_t end; begin < stop; begin = end) {
      end = (begin / panel_blocks + 1) * panel_blocks < stop ? (begin / panel_blocks + 1) * panel_blocks : stop;
      if (w.dtype == Dtype::float32)
        dequantize_blocks(w, begin, end, static_cast<float*>(rows));
      else
        dequantize_blocks(w, begin, end, static_cast<bf16*>(rows));
    }
  });
}

void dequantize(const PanelMatrix& weight, void* rows) {
  const PanelMatrix w = weight;
  if (is_grouped(w)) return dequantize_groups(w, rows);
  with_dtype(w.dtype, [=](auto t) {
    using T = decltype(t);
    parallel_for(w.o, rows_of_a_thread(w), [=](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) dequantize_row(w, r, static_cast<T*>(rows) + r * w.i);
    });
  });
}

// ---- products ---------------------------------------------------------------------------------------------------------

struct Operand {  // x as an engine reads it
  const void* data;
  int64_t stride;
};

// Puts the sums of one row and one block where they belong. The type of the output is looked at here, once for hundreds of
// products, and is no parameter of the tiles, which take a compiler longest.
struct Finish {
  const PackedProduct& call;
  int64_t first;  // of the weight's blocks, which is block 0 here

  void operator()(int64_t row, int64_t block, const lanes* sums) const {
    if (call.out.dtype == Dtype::float32) return finish<float>(row, block, sums);
    finish<bf16>(row, block, sums);
  }
  template <class Out>
  void finish(int64_t row, int64_t block, const lanes* sums) const {
    const int64_t column = (first + block) * panel_block, left = call.weight.o - column;
    Out* out = static_cast<Out*>(call.out.data) + row * call.out.stride + column;
    const Out* onto = static_cast<const Out*>(call.onto.data);
    if (onto != nullptr) onto += row * call.onto.stride + column;
    if (left >= panel_block) {
      for (int64_t v = 0; v < vectors; ++v) store(out + v * width, onto != nullptr ? sums[v] + load(onto + v * width) : sums[v]);
      return;
    }
    for (int64_t v = 0; v < vectors && v * width < left; ++v) {
      const int64_t n = left - v * width < width ? left - v * width : width;
      put(out + v * width, onto != nullptr ? sums[v] + take(onto + v * width, n) : sums[v], n);
    }
  }
};

// Some rows and blocks at a time, shared out among the threads; of rows as many each time as there can be, so that threads
// have as much to do.
template <class F>
void each_piece(const PackedProduct& call, const F& f) {
  const int64_t blocks = blocks_of(call.weight.o), heights = (call.n + rows_at_once - 1) / rows_at_once;
  const int64_t height = call.n / heights;
  const int64_t grain = least_bytes / (call.weight.i * panel_block * (1 + height / 4) + 1) + 1;
  parallel_for(heights * blocks, grain, [&, blocks](int64_t at, int64_t stop) {
    while (at < stop) {
      const int64_t part = at / blocks, begin = at % blocks;
      const int64_t end = blocks - begin < stop - at ? blocks : begin + stop - at;
      f(call.n * part / heights, call.n * (part + 1) / heights, begin, end);
      at += end - begin;
    }
  });
}

// Where a thread whose blocks begin here is likely to go on in the matrix that comes after.
const char* after_from(const PackedProduct& call, int64_t begin) {
  if (call.after == nullptr || is_coded(*call.after)) return nullptr;
  const PanelMatrix& m = *call.after;
  const int64_t block = begin * blocks_of(m.o) / blocks_of(call.weight.o);
  return static_cast<const char*>(m.values) + panel_of(m, block).start * (m.dtype == Dtype::float32 ? 4 : 2);
}

template <class Engine>
void product(const PackedProduct& call, const Operand& x) {
  const Finish finish{call, 0};
  each_piece(call, [&](int64_t row, int64_t stop, int64_t begin, int64_t end) {
    multiply_panels<Engine>(call.weight, static_cast<const typename Engine::X*>(x.data), x.stride, row, stop, begin, end, finish,
                            after_from(call, begin));
  });
}

#if defined(__AMX_BF16__)
constexpr int64_t tiles_ahead = 16384;  // bytes

// Up to 32 rows times two blocks of one panel. Tiles have as many rows as there are; few cost as much as their weights.
// `fetching` lines of weights as far ahead as a core's stream needs: no hardware does it for rows of tiles.
template <bool fetching>
void tile_corner(const PanelMatrix& weight, const Operand& x, int64_t row, int n, int64_t block, int blocks, const Finish& finish) {
  const Panel panel = panel_of(weight, block);
  const bf16* w = static_cast<const bf16*>(weight.values) + panel.start + 2 * panel.first;
  const bf16* first = static_cast<const bf16*>(x.data) + row * x.stride;
  const bf16* second = first + 16 * x.stride;
  const int64_t depth = weight.depth, step = panel.across * tile_depth;
  alignas(64) float c[4][256];
  amx_fence();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; k += tile_depth, w += step) {
    if (fetching)
      for (int64_t pair = 0; pair < tile_depth / 2; ++pair)
        for (int64_t at = 0; at < panel.across * 4; at += line) fetch(reinterpret_cast<const char*>(w + pair * 2 * panel.across) + at + tiles_ahead);
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

// Panel by panel, which then stays in cache for all the rows. `fetching`: the weights come from memory.
template <bool fetching>
void tile_piece(const PanelMatrix& weight, const Operand& x, int64_t start, int64_t stop, int64_t begin, int64_t end, const Finish& finish) {
  int shaped = 0;
  for (int64_t next; begin < end; begin = next) {
    const int64_t after = (begin / panel_blocks + 1) * panel_blocks;
    next = after < end ? after : end;
    for (int64_t row = start; row < stop; row += 32) {
      const int n = static_cast<int>(stop - row < 32 ? stop - row : 32);
      if (n != shaped) shape_tiles(shaped = n);
      for (int64_t block = begin, two; block < next; block = two) {
        two = block / 2 * 2 + 2 < next ? block / 2 * 2 + 2 : next;
        const auto corner = fetching && row == start && block == begin ? tile_corner<true> : tile_corner<false>;
        corner(weight, x, row, n, block, static_cast<int>(two - block), finish);
      }
    }
  }
  amx_end();
}

void tile_product(const PackedProduct& call, const Operand& x) {
  each_piece(call, [&](int64_t row, int64_t stop, int64_t begin, int64_t end) {
    tile_piece<true>(call.weight, x, row, stop, begin, end, Finish{call, 0});
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

int64_t operand_bytes(const PackedProduct& call) {
  return 64 + (is_copied(call) ? call.n * copied_stride(call) * (reads_pairs(call) ? 2 : 4) : 0);
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

// ---- products with weights in codes --------------------------------------------------------------------------------------

// Rows that are multiplied straight from the codes; for more, panels are decoded into cache. Tiles have no other way.
#if defined(__AVX512F__)
constexpr int most_direct = 2 * most_rows;
#else
constexpr int most_direct = 2;
#endif
constexpr int most_direct_height = most_direct < most_rows ? most_direct : most_rows;

bool is_direct(const PackedProduct& call) {
#if defined(__AMX_BF16__)
  if (reads_pairs(call)) return false;
#endif
  return call.n <= (is_grouped(call.weight) ? most_by_pieces : most_direct);
}

int threads_of(const PackedProduct& call) {
  const int64_t work = call.weight.o * call.weight.i * (4 + call.n) / 8;
  return work < 2 * least_bytes ? 1 : max_threads();
}

int64_t dense_depth(const PanelMatrix& m) { return m.dtype == Dtype::bfloat16 ? up_to(m.i, 32) : m.i; }
int64_t panel_bytes(const PanelMatrix& m) {
  return up_to(panel_blocks * panel_block * dense_depth(m) * (m.dtype == Dtype::bfloat16 ? 2 : 4), 64);
}

// Some blocks of one panel, decoded, times all rows.
template <class W, class Decoder>
void decoded_product(const PackedProduct& call, const Operand& x, int64_t begin, int64_t end, char* memory, const Decoder& decode) {
  const PanelMatrix& m = call.weight;
  const PanelMatrix dense{(end - begin) * panel_block, m.i, dense_depth(m), m.dtype, memory};
  const Finish finish{call, begin};
  decode(m, begin, end, dense);
#if defined(__AMX_BF16__)
  if (reads_pairs(call)) {
    // Tiles read whole groups of 32 inputs; the memory held something else before, and 0 times NaN is NaN.
    const int64_t decoded = dense.o * up_to(m.i, 2), all = dense.o * dense.depth;
    std::memset(memory + decoded * 2, 0, static_cast<size_t>(all - decoded) * 2);
    return tile_piece<false>(dense, x, 0, call.n, 0, end - begin, finish);
  }
#elif defined(__AVX512BF16__)
  if (reads_pairs(call))
    return multiply_panels<PairEngine>(dense, static_cast<const bf16*>(x.data), x.stride, 0, call.n, 0, end - begin, finish);
#endif
  multiply_panels<FloatEngine<W>>(dense, static_cast<const float*>(x.data), x.stride, 0, call.n, 0, end - begin, finish);
}

template <class Codes, class W>
void direct_product(const PackedProduct& call, const Operand& x, int64_t begin, int64_t end) {
  const Finish finish{call, 0};
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
  if constexpr (sizeof(W) == 2)
    if (reads_pairs(call)) {
      const CodedPairProduct<Codes, Finish> product{call.weight, static_cast<const bf16*>(x.data), x.stride, finish};
      return tiles<1, most_direct_height>(0, call.n, begin, end, product);
    }
#endif
  const CodedProduct<Codes, W, Finish> product{call.weight, static_cast<const float*>(x.data), x.stride, finish};
  tiles<1, most_direct_height>(0, call.n, begin, end, product);
}

// few(begin, end) or many(begin, end, memory) for some blocks of one panel at a time.
template <class Few, class Many>
void each_panel(const PackedProduct& call, const Few& few, const Many& many) {
  const int64_t blocks = blocks_of(call.weight.o), threads = threads_of(call), bytes = panel_bytes(call.weight);
  char* memory = static_cast<char*>(call.scratch) + operand_bytes(call);
  memory += -reinterpret_cast<uintptr_t>(memory) % 64;
  const bool direct = is_direct(call);
  parallel_for(threads, 1, [&, blocks, threads, bytes, memory, direct](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      const int64_t stop = blocks * (thread + 1) / threads;
      for (int64_t begin = blocks * thread / threads, end; begin < stop; begin = end) {
        end = (begin / panel_blocks + 1) * panel_blocks < stop ? (begin / panel_blocks + 1) * panel_blocks : stop;
        if (direct)
          few(begin, end);
        else
          many(begin, end, memory + thread * bytes);
      }
    }
  });
}

template <class Codes, class W>
void coded_typed(const PackedProduct& call, const Operand& x) {
  const auto few = [&](int64_t begin, int64_t end) { direct_product<Codes, W>(call, x, begin, end); };
  each_panel(call, few, [&](int64_t begin, int64_t end, char* memory) {
    decoded_product<W>(call, x, begin, end, memory, decode_blocks<Codes, W>);
  });
}

template <class Codes>
void coded_product(const PackedProduct& call, const Operand& x) {
  if (call.weight.dtype == Dtype::float32) return coded_typed<Codes, float>(call, x);
  coded_typed<Codes, bf16>(call, x);
}

template <class W>
void grouped_few(const PackedProduct& call, const Operand& x, int64_t begin, int64_t end) {
  const PanelMatrix& m = call.weight;
  const Finish finish{call, 0};
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
  if constexpr (sizeof(W) == 2)
    if (reads_pairs(call)) {
      const bf16* rows = static_cast<const bf16*>(x.data);
      if (call.n == 1) return multiply_row(m, decoder_of<W, RowSums>(m), rows, begin, end, finish);
      return multiply_pieces<PairEngine>(m, decoder_of<W, W>(m), rows, x.stride, call.n, begin, end, finish);
    }
#endif
  multiply_pieces<FloatEngine<float>>(m, decoder_of<W, float>(m), static_cast<const float*>(x.data), x.stride, call.n, begin, end, finish);
}

template <class W>
void grouped_typed(const PackedProduct& call, const Operand& x) {
  const Decode<W> decode = decoder_of<W, W>(call.weight);
  const auto whole = [=](const PanelMatrix& m, int64_t begin, int64_t end, const PanelMatrix& dense) {
    decode(m, begin, end, 0, m.i, static_cast<W*>(dense.values), dense.o);
  };
  each_panel(call, [&](int64_t begin, int64_t end) { grouped_few<W>(call, x, begin, end); },
             [&](int64_t begin, int64_t end, char* memory) { decoded_product<W>(call, x, begin, end, memory, whole); });
}

void grouped_product(const PackedProduct& call, const Operand& x) {
  if (call.weight.dtype == Dtype::float32) return grouped_typed<float>(call, x);
  grouped_typed<bf16>(call, x);
}

// ---- all of them ---------------------------------------------------------------------------------------------------------

int64_t scratch_bytes(const PackedProduct& call) {
  const bool decodes = is_coded(call.weight) && !is_direct(call);
  return operand_bytes(call) + 64 + (decodes ? threads_of(call) * panel_bytes(call.weight) : 0);
}

void matmul(const PackedProduct& call) {
  if (call.n == 0 || call.weight.o == 0) return;
  const Operand x = operand(call);
  if (is_grouped(call.weight)) return grouped_product(call, x);
  if (call.weight.coding.numbers == Coding::int8) return coded_product<EightBits>(call, x);
  if (is_coded(call.weight)) return coded_product<FourBits>(call, x);
#if defined(__AMX_BF16__)
  if (reads_pairs(call)) return tile_product(call, x);
#elif defined(__AVX512BF16__)
  if (reads_pairs(call)) return product<PairEngine>(call, x);
#endif
  with_dtype(call.weight.dtype, [&](auto t) { product<FloatEngine<decltype(t)>>(call, x); });
}

}  // namespace

const PackedKernels packed = {pack, unpack, pack_codes, unpack_codes, dequantize, scratch_bytes, matmul};

}  // namespace VENEER_ISA
}  // namespace veneer
