#include "conv/conv.h"

#include "core/activations.h"
#include "core/lanes.h"
#include "core/parallel.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t grain_values = 1 << 13;

inline lanes rounded(const float*, lanes x) { return x; }
inline lanes rounded(const bf16*, lanes x) { return (lanes)(bf16_bits(x) << 16); }

// The convolution's input in a row: rounded, for that is how a state keeps it.
template <class T>
inline lanes input(const GatedRows& given, int64_t r, int64_t c, int64_t n) {
  const T* x = row_of<const T>(given.x, r) + c;
  return given.before.data ? rounded(x, take(row_of<const T>(given.before, r) + c, n) * take(x, n)) : take(x, n);
}

// The rows that a row sees, itself first.
struct Seen {
  int64_t count = 0;
  int64_t rows[longest_conv];

  Seen(const ConvSizes& sizes, int64_t r) {
    for (; r >= 0 && count < sizes.kernel; r = sizes.previous[r]) rows[count++] = r;
  }
};

template <class T>
inline ValueAndSlope convolved(const ConvSizes& sizes, const GatedRows& given, const Seen& seen, int64_t c, int64_t n) {
  lanes total = sizes.bias ? take(sizes.bias + c, n) : lanes{};
  for (int64_t j = seen.count - 1; j >= 0; --j) total += take(sizes.weight + j * sizes.d + c, n) * input<T>(given, seen.rows[j], c, n);
  return sizes.silu ? Silu::at(total) : Identity::at(total);
}

template <class T>
void forward_typed(const ConvSizes& sizes, const GatedRows& given, const Rows& y) {
  parallel_for(sizes.n, (grain_values + sizes.d - 1) / sizes.d, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Seen seen(sizes, r);
      T* out = row_of<T>(y, r);
      each_register(sizes.d, [&](int64_t c, int64_t n) {
        const lanes value = convolved<T>(sizes, given, seen, c, n).value;
        put(out + c, given.after.data ? take(row_of<const T>(given.after, r) + c, n) * value : value, n);
      });
    }
  });
}

// A thread takes columns: what it reads of earlier rows it has written itself.
template <class T>
void windowed_typed(const ConvSizes& sizes, const ConvWindows& windows, const PagedBatch& batch, const GatedRows& given, const Rows& y) {
  const int64_t columns = (sizes.d + width - 1) / width;
  parallel_for(columns, (grain_values + sizes.n * width - 1) / (sizes.n * width + 1), [&](int64_t begin, int64_t end) {
    for (int64_t s = 0; s < batch.n_sequences; ++s) {
      const int64_t* pages = batch.pages + batch.first_page[s];
      const auto at = [&](int64_t position) {
        const int64_t row = (pages[position / windows.block] * windows.layers + windows.layer) * windows.block + position % windows.block;
        return reinterpret_cast<T*>(windows.data) + row * sizes.d;
      };
      for (int64_t r = batch.first_row[s]; r < batch.first_row[s + 1]; ++r) {
        const int64_t position = batch.position[s] + r - batch.first_row[s];
        const int64_t count = position < sizes.kernel ? position + 1 : sizes.kernel;
        T* seen[longest_conv];
        for (int64_t j = 0; j < count; ++j) seen[j] = at(position - j);
        for (int64_t column = begin; column < end; ++column) {
          const int64_t c = column * width, n = c + width <= sizes.d ? width : sizes.d - c;
          put(seen[0] + c, input<T>(given, r, c, n), n);
          lanes total = sizes.bias ? take(sizes.bias + c, n) : lanes{};
          for (int64_t j = count - 1; j >= 0; --j) total += take(sizes.weight + j * sizes.d + c, n) * take(seen[j] + c, n);
          const lanes value = sizes.silu ? Silu::at(total).value : total;
          put(row_of<T>(y, r) + c, given.after.data ? take(row_of<const T>(given.after, r) + c, n) * value : value, n);
        }
      }
    }
  });
}

// A thread takes columns and goes through the rows from the last to the first: when it comes to a row, the gradients
// of all rows that see it are in its sum, and nothing before it reads what is overwritten.
template <class T>
void backward_row(const ConvSizes& sizes, const Rows& dy, const GatedRows& given, float* sums, const GatedRows& gradients,
                  const Rows& y, const Seen& seen, int64_t c, int64_t n) {
  const int64_t r = seen.rows[0];
  const ValueAndSlope made = convolved<T>(sizes, given, seen, c, n);
  const lanes gradient = take(row_of<const T>(dy, r) + c, n);
  lanes slope = gradient * made.slope, value = made.value;
  if (given.after.data) {
    const lanes after = take(row_of<const T>(given.after, r) + c, n);
    put(row_of<T>(gradients.after, r) + c, gradient * made.value, n);
    slope *= after, value *= after;
  }
  put(row_of<T>(y, r) + c, value, n);
  for (int64_t j = 1; j < seen.count; ++j) {
    float* sum = sums + seen.rows[j] * sizes.d + c;
    put(sum, take(sum, n) + slope * take(sizes.weight + j * sizes.d + c, n), n);
  }
  const lanes total = take(sums + r * sizes.d + c, n) + slope * take(sizes.weight + c, n);
  if (!given.before.data) return put(row_of<T>(gradients.x, r) + c, total, n);
  const lanes x = take(row_of<const T>(given.x, r) + c, n), before = take(row_of<const T>(given.before, r) + c, n);
  put(row_of<T>(gradients.before, r) + c, total * x, n);
  put(row_of<T>(gradients.x, r) + c, total * before, n);
}

template <class T>
void backward_typed(const ConvSizes& sizes, const Rows& dy, const GatedRows& given, float* sums, const GatedRows& gradients,
                    const Rows& y) {
  const int64_t columns = (sizes.d + width - 1) / width;
  parallel_for(columns, (grain_values + sizes.n * width - 1) / (sizes.n * width + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < sizes.n; ++r)
      for (int64_t c = begin * width; c < end * width && c < sizes.d; ++c) sums[r * sizes.d + c] = 0.0f;
    for (int64_t r = sizes.n - 1; r >= 0; --r) {
      const Seen seen(sizes, r);
      for (int64_t column = begin; column < end; ++column) {
        const int64_t c = column * width;
        backward_row<T>(sizes, dy, given, sums, gradients, y, seen, c, c + width <= sizes.d ? width : sizes.d - c);
      }
    }
  });
}

void forward(const ConvSizes& sizes, const GatedRows& given, const Rows& y) {
  sizes.dtype == Dtype::float32 ? forward_typed<float>(sizes, given, y) : forward_typed<bf16>(sizes, given, y);
}

void windowed(const ConvSizes& sizes, const ConvWindows& windows, const PagedBatch& batch, const GatedRows& given, const Rows& y) {
  sizes.dtype == Dtype::float32 ? windowed_typed<float>(sizes, windows, batch, given, y)
                                : windowed_typed<bf16>(sizes, windows, batch, given, y);
}

void backward(const ConvSizes& sizes, const Rows& dy, const GatedRows& given, float* sums, const GatedRows& gradients, const Rows& y) {
  sizes.dtype == Dtype::float32 ? backward_typed<float>(sizes, dy, given, sums, gradients, y)
                                : backward_typed<bf16>(sizes, dy, given, sums, gradients, y);
}

}  // namespace

const ConvKernels conv = {forward, windowed, backward};

}  // namespace VENEER_ISA
}  // namespace veneer
