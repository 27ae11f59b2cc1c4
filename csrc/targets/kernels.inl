// The kernels, compiled once per instruction set: targets/*.cc define RAPTAX_ISA, the
// namespace, and RAPTAX_RUNS_HERE, the check of the CPU, and include this.

#pragma once

#include "api/kernel_table.h"
#include "attention/backward.h"
#include "attention/forward.h"
#include "attention/mod_run.h"
#include "attention/paged.h"
#include "linear/packed_linear.h"

namespace raptax {
namespace RAPTAX_ISA {

#define RAPTAX_STRING_OF(x) #x
#define RAPTAX_STRING(x) RAPTAX_STRING_OF(x)

extern const Kernels kernels;
const Kernels kernels = {
    RAPTAX_STRING(RAPTAX_ISA),
    [] { return static_cast<bool>(RAPTAX_RUNS_HERE); },
    forward,
    backward,
    pages::paged,
    packed_linear,
    run_program,
};

}  // namespace RAPTAX_ISA
}  // namespace raptax
