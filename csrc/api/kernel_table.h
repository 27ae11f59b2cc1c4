// The table of kernels per instruction set, and their dispatch at run time.
#pragma once

#include "api/attention_params.h"
#include "api/packed_linear_params.h"
#include "api/paged_params.h"

namespace raptax {

class ThreadPool;

struct Kernels {
  const char* name;
  bool (*runs_here)();  // whether this machine has the instructions
  void (*forward)(const ForwardParams&, const ThreadPool&);
  void (*backward)(const BackwardParams&, const ThreadPool&);
  // Returns -1; or, with nothing written, the flat index of a table entry whose page is
  // missing and needed: the mask program lets a query read one of its keys.
  int64_t (*paged)(const PagedParams&, const ThreadPool&);
  void (*packed_linear)(const PackedLinearParams&, const ThreadPool&);
  void (*run_program)(const ProgramRun&);  // for tests of mod programs
};

// Best first; the last one runs everywhere.
extern const Kernels* const kAllKernels[];
extern const int kKernelCount;

// The best set that this machine has, or the one that RAPTAX_ISA names. Null if it names
// none, or one that does not run here.
const Kernels* chosen_kernels();

}  // namespace raptax
