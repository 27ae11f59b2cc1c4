#include "targets/amx_support.h"

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace raptax {

#if defined(__linux__) && defined(__x86_64__)
static bool ask() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  bool tiles = (edx >> 24) & 1, bf16 = (edx >> 22) & 1;
  bool avx512 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512vnni");
  if (!tiles || !bf16 || !avx512) return false;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#else
static bool ask() { return false; }
#endif

bool amx_available() {
  static const bool here = ask();
  return here;
}

}  // namespace raptax
