#include "core/amx.h"

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace veneer {
namespace {

bool ask() {
#if defined(__linux__) && defined(__x86_64__) && defined(VENEER_BUILT_AMX)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d >> 22 & 1, tile = d >> 24 & 1;
  constexpr int arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
  return bf16 && tile && syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
#else
  return false;
#endif
}

}  // namespace

bool amx_ready() {
  static const bool ready = ask();
  return ready;
}

}  // namespace veneer
