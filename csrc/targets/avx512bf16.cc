#define RAPTAX_ISA avx512bf16
#define RAPTAX_RUNS_HERE                                                         \
  (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") && \
   __builtin_cpu_supports("avx512vnni"))
#include "targets/kernels.inl"
