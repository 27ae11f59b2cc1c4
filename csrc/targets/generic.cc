#define RAPTAX_ISA generic
#define RAPTAX_RUNS_HERE true
#include "targets/kernels.inl"
