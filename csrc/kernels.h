// The kernels of one instruction set, and the choice among the sets.
#pragma once

#include "paged.h"
#include "parallel.h"
#include "problem.h"

namespace raptax {

struct Kernels {
  const char* name;
  bool (*runs_here)();  // whether this machine has the instructions
  void (*forward)(const Forward&, const Parallel&);
  void (*backward)(const Backward&, const Parallel&);
  // Returns -1; or, with nothing done, the entry of the table that names no page and has
  // a key which the mask program lets a row see.
  int64_t (*paged)(const Paged&, const Parallel&);
  void (*run_program)(const ProgramRun&);  // for tests of mod programs
};

// Best first; the last one runs everywhere.
extern const Kernels* const kAllKernels[];
extern const int kKernelCount;

// The best set that this machine has, or the one that RAPTAX_ISA names. Null if it names
// none, or one that does not run here.
const Kernels* chosen_kernels();

}  // namespace raptax
