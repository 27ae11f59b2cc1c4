#include "api/mod_program.h"

namespace raptax {

const char* unsupported_reason(const Program& program, bool reads_scores) {
  if (program.code_size % 4 != 0) return "a program's code is cut off";
  if (program.size() < 1) return "a program has no instructions";
  if (program.size() > Program::kMaxInstructions) {
    return "a program has too many instructions";
  }
  for (int64_t i = 0; i < program.array_count; ++i) {
    const Captured& array = program.arrays[i];
    if (array.data == nullptr || array.size < 1 || array.size > INT32_MAX) {
      return "an array of a program is empty or too long";
    }
  }
  for (int64_t n = 0; n < program.size(); ++n) {
    const Instruction step = program.at(n);
    if (step.op < Op{} || step.op >= Op::kEnd) {
      return "a program has an unknown operation";
    }
    if (step.op == Op::kScore && !reads_scores) return "a mask reads the scores";
    if (step.op == Op::kGather && (step.a < 0 || step.a >= program.array_count)) {
      return "a program reads an array that it does not have";
    }
    for (int i = 0; i < step.operands(); ++i) {
      if (step.operand(i) < 0 || step.operand(i) >= n) {
        return "a program reads a value before it is there";
      }
    }
  }
  return nullptr;
}

}  // namespace raptax
