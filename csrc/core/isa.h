// Which build of the kernels runs. Each family's kernels.cpp is compiled once per instruction set, into the namespace of
// that set; the best one that the CPU has is chosen when the module is loaded. A family that has no code of its own for a
// set is not built for it (CMakeLists.txt), and its build for the next lower one runs.
#pragma once

#include <string>
#include <vector>

namespace veneer {

enum class Isa { generic, avx2, avx512, avx512_bf16, amx };

Isa current_isa();
const char* isa_name(Isa isa);
std::vector<std::string> built_isas();       // weakest first
std::vector<std::string> usable_isas();      // those of them that this CPU supports
bool use_isa(const std::string& name);       // false where it is not usable

}  // namespace veneer

// VENEER_KERNELS(Table, name): declares `name` of type Table in the namespace of each instruction set, to be defined in
// kernels.cpp, and `name_kernels()`, the one in use. Write it inside namespace veneer.
#ifdef VENEER_ISA  // in kernels.cpp, which defines one of them
#define VENEER_KERNELS(Table, name) \
  namespace VENEER_ISA { extern const Table name; }
#else
namespace veneer {

// Sets of instruction sets, a bit each.
template <class... Isas>
constexpr unsigned isas(Isas... some) { return (0u | ... | (1u << static_cast<int>(some))); }
constexpr bool has(unsigned some, Isa isa) { return (some & isas(isa)) != 0; }

// The build that runs now of a family that is built for these; generic is always among them.
inline Isa build_of(unsigned built) {
  const unsigned no_higher = built & (2u * isas(current_isa()) - 1u);
  return static_cast<Isa>(31 - __builtin_clz(no_higher));
}

// families.inc, written by CMake: FAMILY(name, the sets for which it is built).
#define FAMILY(name, ...) constexpr unsigned name##_built = isas(__VA_ARGS__);
#include "families.inc"
#undef FAMILY

}  // namespace veneer

#define VENEER_KERNELS_OF(isa, name) \
  if constexpr (has(name##_built, Isa::isa)) \
    if (build == Isa::isa) return isa::name;

#define VENEER_KERNELS(Table, name)                  \
  namespace generic { extern const Table name; }     \
  namespace avx2 { extern const Table name; }        \
  namespace avx512 { extern const Table name; }      \
  namespace avx512_bf16 { extern const Table name; } \
  namespace amx { extern const Table name; }         \
  inline const Table& name##_kernels() {             \
    const Isa build = build_of(name##_built);        \
    VENEER_KERNELS_OF(amx, name)                     \
    VENEER_KERNELS_OF(avx512_bf16, name)             \
    VENEER_KERNELS_OF(avx512, name)                  \
    VENEER_KERNELS_OF(avx2, name)                    \
    return generic::name;                            \
  }
#endif
