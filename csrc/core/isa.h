// Which build of the kernels runs. Each family's kernels.cpp is compiled once per instruction set, into the namespace of
// that set; the best one that the CPU has is chosen when the module is loaded.
#pragma once

#include <string>
#include <vector>

namespace veneer {

enum class Isa { generic, avx2, avx512, avx512_bf16, amx };

Isa current_isa();
const char* isa_name(Isa isa);
std::vector<std::string> usable_isas();      // built and supported by this CPU, weakest first
bool use_isa(const std::string& name);       // false where it is not usable

}  // namespace veneer

#ifdef VENEER_BUILT_AVX2
#define VENEER_IF_AVX2(x) x
#else
#define VENEER_IF_AVX2(x)
#endif
#ifdef VENEER_BUILT_AVX512
#define VENEER_IF_AVX512(x) x
#else
#define VENEER_IF_AVX512(x)
#endif
#ifdef VENEER_BUILT_AVX512_BF16
#define VENEER_IF_AVX512_BF16(x) x
#else
#define VENEER_IF_AVX512_BF16(x)
#endif
#ifdef VENEER_BUILT_AMX
#define VENEER_IF_AMX(x) x
#else
#define VENEER_IF_AMX(x)
#endif

// VENEER_KERNELS(Table, name): declares `name` of type Table in the namespace of each instruction set, to be defined in
// kernels.cpp, and `name_kernels()`, the one in use. Write it inside namespace veneer.
#define VENEER_KERNELS(Table, name)                                                       \
  namespace generic { extern const Table name; }                                          \
  VENEER_IF_AVX2(namespace avx2 { extern const Table name; })                             \
  VENEER_IF_AVX512(namespace avx512 { extern const Table name; })                         \
  VENEER_IF_AVX512_BF16(namespace avx512_bf16 { extern const Table name; })               \
  VENEER_IF_AMX(namespace amx { extern const Table name; })                               \
  inline const Table& name##_kernels() {                                                  \
    switch (current_isa()) {                                                              \
      VENEER_IF_AVX2(case Isa::avx2: return avx2::name;)                                  \
      VENEER_IF_AVX512(case Isa::avx512: return avx512::name;)                            \
      VENEER_IF_AVX512_BF16(case Isa::avx512_bf16: return avx512_bf16::name;)             \
      VENEER_IF_AMX(case Isa::amx: return amx::name;)                                     \
      default: return generic::name;                                                      \
    }                                                                                     \
  }
