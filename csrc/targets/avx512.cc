#define RAPTAX_ISA avx512
#define RAPTAX_RUNS_HERE                                                      \
  (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
#include "targets/kernels.inl"
