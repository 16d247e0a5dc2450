// The Python face of the CPU kernels. Tensors cross as raw pointers; veneer.ops checks them first.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "core/isa.h"
#include "core/parallel.h"

namespace nb = nanobind;

namespace veneer {

#define FAMILY(name, ...) void bind_##name(nb::module_& m);
#include "families.inc"
#undef FAMILY
void bind_step(nb::module_& m);

nb::dict builds() {
  nb::dict found;
#define FAMILY(name, ...) found[#name] = isa_name(build_of(name##_built));
#include "families.inc"
#undef FAMILY
  return found;
}

}  // namespace veneer

NB_MODULE(_kernels, m) {
  m.doc() = "veneer's CPU kernels";
  m.def("isa", [] { return veneer::isa_name(veneer::current_isa()); }, "The instruction set in use.");
  m.def("isas", &veneer::usable_isas, "The instruction sets that are built and that this CPU has, weakest first.");
  m.def("built_isas", &veneer::built_isas, "The instruction sets that are built, weakest first.");
  m.def("builds", &veneer::builds, "For each family the build of it that runs on the instruction set in use.");
  m.def("use_isa", [](const std::string& name) {
    if (!veneer::use_isa(name)) throw nb::value_error("no such instruction set in this build or CPU; see isas()");
  });
  m.def("share_threads", &veneer::share_threads, nb::arg("torch_library"));
  m.def("max_threads", &veneer::max_threads);
#define FAMILY(name, ...) veneer::bind_##name(m);
#include "families.inc"
#undef FAMILY
  veneer::bind_step(m);
}
