#include "stream/stream.h"

#include "core/lanes.h"
#include "core/parallel.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t grain_values = 1 << 14;

template <class T>
inline lanes rounded(lanes x) {
  T out[width];
  store(out, x);
  return load(out);
}

template <class T>
void add_typed(const StreamSizes& sizes, float multiplier, const Rows& half, const Rows& h) {
  parallel_for(sizes.n, grain_values / (sizes.d + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* from = row_of<const T>(half, r);
      T* to = row_of<T>(h, r);
      each_register(sizes.d, [=](int64_t c, int64_t n) {
        put(to + c, take(to + c, n) + rounded<T>(take(from + c, n) * multiplier), n);
      });
    }
  });
}

void add(const StreamSizes& sizes, float multiplier, const Rows& half, const Rows& h) {
  if (sizes.dtype == Dtype::float32) return add_typed<float>(sizes, multiplier, half, h);
  add_typed<bf16>(sizes, multiplier, half, h);
}

}  // namespace

const StreamKernels stream = {add};

}  // namespace VENEER_ISA
}  // namespace veneer
