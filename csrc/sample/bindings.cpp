#include <nanobind/nanobind.h>

#include <new>
#include <stdexcept>
#include <vector>

#include "core/parallel.h"
#include "core/workspace.h"
#include "sample/sample.h"

namespace nb = nanobind;

namespace veneer {
namespace {

constexpr int64_t numbers_a_rule = 18, reals_a_rule = 6;

template <class T>
const T* pointer(int64_t address) { return reinterpret_cast<const T*>(static_cast<uintptr_t>(address)); }

// In the order in which veneer/ops/cpu/sample.py writes them.
RowRule rule_of(const int64_t* n, const double* x) {
  return {{pointer<uint32_t>(n[0]), pointer<uint32_t>(n[1])},
          pointer<int32_t>(n[2]), n[3],
          pointer<int32_t>(n[4]), pointer<float>(n[5]), n[6],
          pointer<int32_t>(n[7]), n[8],
          pointer<int32_t>(n[9]), pointer<int32_t>(n[10]), n[11],
          static_cast<float>(x[0]), static_cast<float>(x[1]), static_cast<float>(x[2]),
          x[3], x[4], n[12], x[5],
          {static_cast<uint64_t>(n[13]), static_cast<uint64_t>(n[14])}, static_cast<uint64_t>(n[15]),
          n[16], n[17]};
}

void require_ids(const int32_t* ids, int64_t n, int64_t d) {
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] < 0 || ids[i] >= d) throw std::out_of_range("an id is beyond the vocabulary");
}

void require_ids(const RowRule& rule, int64_t d) {
  require_ids(rule.banned, rule.n_banned, d);
  require_ids(rule.biased, rule.n_biased, d);
  require_ids(rule.seen, rule.n_seen, d);
  require_ids(rule.counted, rule.n_counted, d);
  if (rule.target >= d) throw std::out_of_range("an id is beyond the vocabulary");
}

}  // namespace

void bind_sample(nb::module_& m) {
  m.def(
      "sample_likeliest",
      [](int64_t n, int64_t d, int dtype, uintptr_t logits, int64_t stride, uintptr_t values, uintptr_t columns) {
        sample_kernels().likeliest({n, d, 0, Dtype(dtype), rows_at(logits, stride), 1.0f},
                                   {reinterpret_cast<float*>(values), reinterpret_cast<int64_t*>(columns)});
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "sample_draw",
      [](int64_t n, int64_t d, int dtype, uintptr_t logits, int64_t stride, uintptr_t numbers, uintptr_t reals, uintptr_t tokens,
         uintptr_t logprobs, uintptr_t ranks, uintptr_t likeliest, uintptr_t likeliest_logprobs) {
        std::vector<RowRule> rules;
        for (int64_t r = 0; r < n; ++r)
          rules.push_back(rule_of(reinterpret_cast<const int64_t*>(numbers) + r * numbers_a_rule,
                                  reinterpret_cast<const double*>(reals) + r * reals_a_rule));
        for (const RowRule& rule : rules) require_ids(rule, d);
        const int n_threads = max_threads() < n ? max_threads() : static_cast<int>(n);
        char* scratch = static_cast<char*>(workspace(n_threads * sample_kernels().scratch_bytes(d)));
        if (scratch == nullptr) throw std::bad_alloc();
        sample_kernels().draw({n, d, 0, Dtype(dtype), rows_at(logits, stride), 1.0f}, rules.data(),
                              {reinterpret_cast<int64_t*>(tokens), reinterpret_cast<double*>(logprobs),
                               reinterpret_cast<int64_t*>(ranks), reinterpret_cast<int64_t*>(likeliest),
                               reinterpret_cast<double*>(likeliest_logprobs)},
                              scratch, n_threads);
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace veneer
