#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "conv/conv.h"

namespace nb = nanobind;

namespace veneer {
namespace {

// What the rows share: n, d, the kernel's length, dtype and activation, then the addresses of previous rows, weight and bias.
ConvSizes sizes_of(const std::vector<int64_t>& s) {
  return {s[0], s[1], s[2], Dtype(s[3]), s[4] != 0, reinterpret_cast<const int32_t*>(s[5]),
          reinterpret_cast<const float*>(s[6]), reinterpret_cast<const float*>(s[7])};
}

Rows rows_of(const std::vector<int64_t>& places, size_t number) { return rows_at(places[2 * number], places[2 * number + 1]); }

GatedRows gated_at(const std::vector<int64_t>& places) { return {rows_of(places, 0), rows_of(places, 1), rows_of(places, 2)}; }

}  // namespace

void bind_conv(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "conv_forward",
      [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& given, const std::vector<int64_t>& y) {
        conv_kernels().forward(sizes_of(sizes), gated_at(given), rows_of(y, 0));
      },
      release());
  m.def(
      "conv_windowed",  // `windows`: address, layers, tokens of a page, layer; `batch`: sequences, then four addresses
      [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& windows, const std::vector<int64_t>& batch,
         const std::vector<int64_t>& given, const std::vector<int64_t>& y) {
        const auto numbers = [&](size_t i) { return reinterpret_cast<const int64_t*>(batch[i]); };
        conv_kernels().windowed(sizes_of(sizes), {reinterpret_cast<char*>(windows[0]), windows[1], windows[2], windows[3]},
                                {batch[0], numbers(1), numbers(2), numbers(3), numbers(4)}, gated_at(given), rows_of(y, 0));
      },
      release());
  m.def(
      "conv_backward",
      [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& dy, const std::vector<int64_t>& given, uintptr_t sums,
         const std::vector<int64_t>& gradients, const std::vector<int64_t>& y) {
        conv_kernels().backward(sizes_of(sizes), rows_of(dy, 0), gated_at(given), reinterpret_cast<float*>(sums),
                                gated_at(gradients), rows_of(y, 0));
      },
      release());
}

}  // namespace veneer
