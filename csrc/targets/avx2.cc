#define RAPTAX_ISA avx2
#define RAPTAX_RUNS_HERE (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#include "targets/kernels.inl"
