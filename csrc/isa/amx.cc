#include "amx_here.h"
#define RAPTAX_ISA amx
#define RAPTAX_RUNS_HERE amx_available()
#include "../kernels.inl"
