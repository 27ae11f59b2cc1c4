#include "targets/amx_support.h"
#define RAPTAX_ISA amx
#define RAPTAX_RUNS_HERE amx_available()
#include "targets/kernels.inl"
