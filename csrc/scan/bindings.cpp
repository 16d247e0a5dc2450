#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "scan/scan.h"

namespace nb = nanobind;

namespace veneer {

void bind_scan(nb::module_& m) {
  using Numbers = std::vector<int64_t>;
  // `sizes`: key heads, heads, their widths, dtype; `given`: address, stride of rows and of heads of each part.
  const auto sizes_of = [](const Numbers& sizes, const Numbers& bounds) {
    return ScanSizes{sizes[0], sizes[1], sizes[2], sizes[3], bounds.data(), static_cast<int64_t>(bounds.size()) - 1, Dtype(sizes[4])};
  };
  const auto part_of = [](const Numbers& given, size_t i) {
    return ScanPart{rows_at(given[3 * i], given[3 * i + 1]), given[3 * i + 2]};
  };
  const auto rows_of = [part_of](const Numbers& given) {
    return ScanRows{part_of(given, 0), part_of(given, 1), part_of(given, 2), part_of(given, 3), part_of(given, 4)};
  };
  m.def("scan_scratch_bytes", [sizes_of](const Numbers& sizes, const Numbers& bounds, bool backward) {
    return (scan_kernels().scratch_bytes(sizes_of(sizes, bounds), backward) + 63) / 64 * 64;
  });
  m.def(
      "scan_forward",
      [=](const Numbers& sizes, const Numbers& bounds, const Numbers& given, const Numbers& y, uintptr_t scratch, int n_threads) {
        scan_kernels().forward(sizes_of(sizes, bounds), rows_of(given), part_of(y, 0), reinterpret_cast<char*>(scratch), n_threads);
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "scan_backward",
      [=](const Numbers& sizes, const Numbers& bounds, const Numbers& given, const Numbers& dy, const Numbers& gradients,
          uintptr_t scratch, int n_threads) {
        scan_kernels().backward(sizes_of(sizes, bounds), rows_of(given), part_of(dy, 0), rows_of(gradients),
                                reinterpret_cast<char*>(scratch), n_threads);
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace veneer
