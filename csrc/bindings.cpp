// The Python face of the CPU kernels. Tensors cross as raw pointers; veneer.ops checks them first.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

NB_MODULE(_kernels, m) {
  m.doc() = "veneer's CPU kernels";
  m.def("abi_version", [] { return 1; });
}
