// Mod programs: what a mask_mod or score_mod became, to be run on rows of scores.
//
// src/raptax/kernels/mod_program.py translates; program.inl runs.
#pragma once

#include <cstdint>

namespace raptax {

// An array that a mod carries or captures.
struct Captured {
  const void* data;
  int32_t kind;  // see mod_program.py
  int64_t size;  // elements
};

// A program as the attribute and the operands of a call hold it; nothing is copied.
struct Program {
  const int32_t* code = nullptr;
  int64_t code_size = 0;
  const Captured* arrays = nullptr;
  int64_t array_count = 0;
};

}  // namespace raptax
