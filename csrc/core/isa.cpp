#include "core/isa.h"

#include <atomic>

#if defined(VENEER_BUILT_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace veneer {
namespace {

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

#if defined(VENEER_BUILT_AVX512_BF16) || defined(VENEER_BUILT_AMX)  // older compilers do not know these names
// Permutations of bytes (VBMI) came to all CPUs with bf16 products but one, which runs the avx512 build.
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"); }
#endif

#ifdef VENEER_BUILT_AMX
// Tiles need the CPU (leaf 7: bf16 products in bit 22, tiles in bit 24) and leave from the kernel, asked once a process. Code that
// computes on halves needs bit 23 too, which all CPUs with tiles have.
bool tiles_usable() {
#if defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned tiles = (1u << 22) | (1u << 24);
#ifdef VENEER_BUILT_AVX512_FP16
  constexpr unsigned all = tiles | (1u << 23);
#else
  constexpr unsigned all = tiles;
#endif
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & all) != all) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

constexpr Isa built[] = {
    Isa::generic,
#ifdef VENEER_BUILT_AVX2
    Isa::avx2,
#endif
#ifdef VENEER_BUILT_AVX512
    Isa::avx512,
#endif
#ifdef VENEER_BUILT_AVX512_BF16
    Isa::avx512_bf16,
#endif
#ifdef VENEER_BUILT_AMX
    Isa::amx,
#endif
};

bool usable(Isa isa) {
  switch (isa) {
#ifdef VENEER_BUILT_AVX2
    case Isa::avx2: return has_avx2();
#endif
#ifdef VENEER_BUILT_AVX512
    case Isa::avx512: return has_avx512();
#endif
#ifdef VENEER_BUILT_AVX512_BF16
    case Isa::avx512_bf16: return has_avx512_bf16();
#endif
#ifdef VENEER_BUILT_AMX
    case Isa::amx: {
      static const bool tiles = tiles_usable();
      return has_avx512_bf16() && tiles;
    }
#endif
    default: return isa == Isa::generic;
  }
}

Isa best() {
  Isa found = Isa::generic;
  for (Isa isa : built)
    if (usable(isa)) found = isa;
  return found;
}

std::atomic<Isa> chosen{best()};

}  // namespace

Isa current_isa() { return chosen.load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::amx: return "amx";
    default:
#if defined(__aarch64__)
      return "neon";
#else
      return "generic";
#endif
  }
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (Isa isa : built) names.emplace_back(isa_name(isa));
  return names;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (Isa isa : built)
    if (usable(isa)) names.emplace_back(isa_name(isa));
  return names;
}

bool use_isa(const std::string& name) {
  for (Isa isa : built)
    if (usable(isa) && name == isa_name(isa)) {
      chosen.store(isa, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace veneer
