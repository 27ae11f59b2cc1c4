#include "api/kernel_table.h"

#include <cstdlib>
#include <cstring>

namespace raptax {

namespace generic {
extern const Kernels kernels;
}
#ifdef RAPTAX_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
#endif

const Kernels* const kAllKernels[] = {
#ifdef RAPTAX_X86
    &amx::kernels,     &avx512bf16::kernels, &avx512::kernels, &avx2::kernels,
#endif
    &generic::kernels,
};
const int kKernelCount = sizeof kAllKernels / sizeof kAllKernels[0];

static const Kernels* choose() {
  const char* wanted = std::getenv("RAPTAX_ISA");
  for (const Kernels* kernels : kAllKernels) {
    if (wanted != nullptr && std::strcmp(wanted, kernels->name) != 0) continue;
    if (kernels->runs_here()) return kernels;
  }
  return nullptr;
}

const Kernels* chosen_kernels() {
  static const Kernels* const kernels = choose();
  return kernels;
}

}  // namespace raptax
