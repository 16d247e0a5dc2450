#include "experts/experts.h"

#include "core/lanes.h"
#include "core/parallel.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t grain_values = 1 << 13;
constexpr int64_t most_experts = 1024;  // as veneer.ops.experts has it

// The k largest of n values, the first of equal ones in front, by one walk: most values are less than the least of them.
struct Best {
  int64_t k, held = 0;
  int64_t* ids;
  float values[most_experts];

  void offer(int64_t id, float value) {
    if (held == k && !(value > values[k - 1])) return;
    int64_t at = held < k ? held++ : k - 1;
    for (; at > 0 && value > values[at - 1]; --at) {
      values[at] = values[at - 1];
      ids[at] = ids[at - 1];
    }
    values[at] = value;
    ids[at] = id;
  }
};

// values = e^(score - the largest), and 1 / their sum.
float exponentials(int64_t n, float* values) {
  lanes most = splat(-__builtin_inff());
  each_register(n, [&](int64_t c, int64_t m) { most = larger(take(values + c, m, -__builtin_inff()), most); });
  const float top = largest(most);
  lanes total{};
  each_register(n, [&](int64_t c, int64_t m) {
    const lanes e = exp(take(values + c, m, -__builtin_inff()) - top);
    put(values + c, e, m);
    total += e;
  });
  return 1.0f / sum(total);
}

// Experts of other groups than those with the largest sums of their two best values are never chosen.
void keep_groups(const Router& router, float* choice) {
  const int64_t size = router.n_experts / router.n_groups;
  int64_t kept[most_experts];
  bool keeps[most_experts] = {};
  Best groups{router.kept_groups, 0, kept, {}};
  for (int64_t g = 0; g < router.n_groups; ++g) {
    int64_t two[2];
    Best best{size < 2 ? size : 2, 0, two, {}};
    for (int64_t e = 0; e < size; ++e) best.offer(e, choice[g * size + e]);
    groups.offer(g, best.held > 1 ? best.values[0] + best.values[1] : best.values[0]);
  }
  for (int64_t j = 0; j < groups.held; ++j) keeps[kept[j]] = true;
  for (int64_t e = 0; e < router.n_experts; ++e)
    if (!keeps[e / size]) choice[e] = -__builtin_inff();
}

template <class T>
void route_row(const Router& router, const T* scores, int64_t* ids, float* weights) {
  float values[most_experts], biased[most_experts];
  float *choice = values, factor = 1.0f;
  each_register(router.n_experts, [&](int64_t c, int64_t m) { put(values + c, take(scores + c, m), m); });
  if (router.by_sigmoid)
    each_register(router.n_experts, [&](int64_t c, int64_t m) { put(values + c, sigmoid(take(values + c, m)).value, m); });
  else
    factor = exponentials(router.n_experts, values);
  if (router.bias != nullptr || router.n_groups > 1) {
    choice = biased;
    for (int64_t e = 0; e < router.n_experts; ++e) choice[e] = values[e] * factor + (router.bias == nullptr ? 0.0f : router.bias[e]);
    if (router.n_groups > 1) keep_groups(router, choice);
  }
  Best best{router.k, 0, ids, {}};
  for (int64_t e = 0; e < router.n_experts; ++e) best.offer(e, choice[e]);
  float total = 0.0f;
  for (int64_t j = 0; j < router.k; ++j) total += values[ids[j]];
  if (router.normalized) factor = 1.0f / (total > 1e-20f ? total : total + 1e-20f);
  for (int64_t j = 0; j < router.k; ++j) weights[j] = values[ids[j]] * factor * router.scale;
}

template <class T>
void route_typed(const Router& router, const RouteRows& rows) {
  parallel_for(rows.n, grain_values / (8 * router.n_experts) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      route_row(router, row_of<const T>(rows.scores, r), rows.ids + r * router.k, rows.weights + r * router.k);
  });
}

void route(const Router& router, const RouteRows& rows) {
  if (rows.dtype == Dtype::float32) return route_typed<float>(router, rows);
  route_typed<bf16>(router, rows);
}

template <class T>
void combine_typed(const CombinedRows& rows) {
  parallel_for(rows.n, grain_values / (rows.d * rows.k + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t* places = rows.places + r * rows.k;
      const float* weights = rows.weights + r * rows.k;
      const T* shared = rows.shared.data == nullptr ? nullptr : row_of<const T>(rows.shared, r);
      const lanes factor =
          rows.shared_gate.data == nullptr ? splat(1.0f) : splat(sigmoid(splat(to_float(*row_of<const T>(rows.shared_gate, r)))).value[0]);
      T* y = row_of<T>(rows.y, r);
      each_register(rows.d, [&](int64_t c, int64_t n) {
        lanes total{};
        for (int64_t j = 0; j < rows.k; ++j) total += weights[j] * take(static_cast<const T*>(rows.rows) + places[j] * rows.d + c, n);
        if (shared != nullptr) total += factor * take(shared + c, n);
        put(y + c, total, n);
      });
    }
  });
}

void combine(const CombinedRows& rows) {
  if (rows.dtype == Dtype::float32) return combine_typed<float>(rows);
  combine_typed<bf16>(rows);
}

}  // namespace

const ExpertsKernels experts = {route, combine};

}  // namespace VENEER_ISA
}  // namespace veneer
