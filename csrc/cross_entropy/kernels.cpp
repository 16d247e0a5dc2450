#include "cross_entropy/cross_entropy.h"

#include <math.h>

#include "core/lanes.h"
#include "core/parallel.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t grain_values = 1 << 14;
constexpr int64_t stretch = 16 * width;  // columns that are summed in float; their sums in double
constexpr float lowest = -INFINITY;

template <class T, bool capped>
inline lanes logits_at(const T* row, int64_t n, float cap) {
  const lanes x = take(row, n, lowest);
  return capped ? cap * tanh(x / cap) : x;
}

// Past the end of a row tanh has made a finite number of minus infinity: take it out again.
template <bool capped>
inline lanes exp_some(lanes x, int64_t n) {
  lanes e = exp(x);
  if (capped && n < width)
    for (int64_t i = n; i < width; ++i) e[i] = 0.0f;
  return e;
}

template <class T, bool capped>
float row_loss(T* row, int64_t v, int64_t label, float cap, bool write_grad) {
  lanes tops = splat(lowest);
  each_register(v, [&](int64_t c, int64_t n) { tops = larger(tops, logits_at<T, capped>(row + c, n, cap)); });
  const float top = largest(tops);
  double total = 0.0;
  for (int64_t start = 0; start < v; start += stretch) {
    lanes totals{};
    each_register(v - start < stretch ? v - start : stretch, [&](int64_t c, int64_t n) {
      totals += exp_some<capped>(logits_at<T, capped>(row + start + c, n, cap) - top, n);
    });
    total += sum(totals);
  }
  const float log_z = logf(static_cast<float>(total));
  float chosen = to_float(row[label]);
  if (capped) chosen = cap * tanhf(chosen / cap);
  const float loss = log_z - (chosen - top);
  if (!write_grad) return loss;
  const float chosen_grad = (expf(-loss) - 1.0f) * (capped ? 1.0f - (chosen / cap) * (chosen / cap) : 1.0f);
  each_register(v, [=](int64_t c, int64_t n) {
    const lanes x = logits_at<T, capped>(row + c, n, cap);
    const lanes p = exp((x - top) - log_z);
    put(row + c, capped ? p * (1.0f - (x / cap) * (x / cap)) : p, n);
  });
  row[label] = from_float<T>(chosen_grad);
  return loss;
}

template <class T>
void softmax_typed(const LogitRows& logits, const int64_t* labels, float softcap, bool write_grad, float* losses) {
  parallel_for(logits.n, (grain_values + logits.v - 1) / logits.v, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* row = static_cast<T*>(logits.data) + r * logits.stride;
      losses[r] = softcap == 0.0f ? row_loss<T, false>(row, logits.v, labels[r], 0.0f, write_grad)
                                  : row_loss<T, true>(row, logits.v, labels[r], softcap, write_grad);
    }
  });
}

void softmax(const LogitRows& logits, const int64_t* labels, float softcap, bool write_grad, float* losses) {
  if (logits.dtype == Dtype::float32) return softmax_typed<float>(logits, labels, softcap, write_grad, losses);
  softmax_typed<bf16>(logits, labels, softcap, write_grad, losses);
}

}  // namespace

const CrossEntropyKernels cross_entropy = {softmax};

}  // namespace VENEER_ISA
}  // namespace veneer
