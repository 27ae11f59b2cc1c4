// Mod programs: a mask_mod or score_mod compiled to instructions that an interpreter
// runs on rows of scores.
//
// src/raptax/mod_compiler compiles, mod_program.cc validates, mod_runner.h
// interprets.
//
// A program is a list of instructions of four int32: an operation and its operands a,
// b, c. Instruction n defines value n, operands are indices of earlier values, and the
// last value is the result. Values are float32 or int32; a boolean is 0 or -1 (all bits
// set).
#pragma once

#include <cstdint>

#include "api/inline.h"

namespace raptax {

// clang-format off
// X(name, number of operands). src/raptax/mod_compiler/ir.py has the same list; a test compares them.
#define RAPTAX_OPERATIONS(X)                                                      \
  /* Indices of the score, and kKey - kQuery; positions lie within 2**30 of 0.  \
     The score itself. The number whose bits are `a`. */                          \
  X(kSequence, 0) X(kHead, 0) X(kQuery, 0) X(kKey, 0) X(kDistance, 0)             \
  X(kScore, 0) X(kConstant, 0)                                                    \
  /* Entry b of array a, the first or last one if there is no such entry. */      \
  X(kGather, 1)                                                                   \
  /* b where a is true, else c; a * b + c; c * tanh(a * b); c * (1 - t * t) for   \
     that t = tanh(a * b). */                                                     \
  X(kSelect, 3) X(kMulAdd, 3) X(kSoftCap, 3) X(kSoftCapSlope, 3)                  \
  /* floats to floats */                                                          \
  X(kNeg, 1) X(kAbs, 1) X(kSign, 1) X(kFloor, 1) X(kCeil, 1) X(kRound, 1)         \
  X(kRoundEven, 1) X(kExp, 1) X(kExp2, 1) X(kExpm1, 1) X(kLog, 1) X(kLog1p, 1)    \
  X(kTanh, 1) X(kLogistic, 1) X(kSqrt, 1) X(kRsqrt, 1) X(kSin, 1) X(kCos, 1)      \
  X(kTan, 1) X(kAtan, 1) X(kSinh, 1) X(kCosh, 1) X(kErf, 1) X(kErfc, 1)           \
  X(kCbrt, 1)                                                                     \
  X(kAdd, 2) X(kSub, 2) X(kMul, 2) X(kDiv, 2) X(kMax, 2) X(kMin, 2) X(kPow, 2)    \
  X(kRem, 2) X(kAtan2, 2)                                                         \
  /* floats to booleans */                                                        \
  X(kLess, 2) X(kLessEqual, 2) X(kEqual, 2) X(kNotEqual, 2) X(kIsFinite, 1)       \
  /* between floats and whole numbers */                                          \
  X(kToFloat, 1) X(kToInt, 1)                                                     \
  /* whole numbers; division as XLA has it, and rounded down as Python has it */  \
  X(kIntNeg, 1) X(kIntAbs, 1) X(kIntSign, 1) X(kNot, 1)                           \
  X(kIntAdd, 2) X(kIntSub, 2) X(kIntMul, 2) X(kIntMax, 2) X(kIntMin, 2)           \
  X(kIntDiv, 2) X(kIntRem, 2) X(kFloorDiv, 2) X(kFloorRem, 2)                     \
  X(kAnd, 2) X(kOr, 2) X(kXor, 2)                                                 \
  X(kShiftLeft, 2) X(kShiftRight, 2) X(kShiftRightLogical, 2)                     \
  /* whole numbers to booleans */                                                 \
  X(kIntLess, 2) X(kIntLessEqual, 2) X(kIntEqual, 2) X(kIntNotEqual, 2)

// clang-format on
enum class Op : int32_t {
#define RAPTAX_NAME(name, operands) name,
  RAPTAX_OPERATIONS(RAPTAX_NAME)
#undef RAPTAX_NAME
      kEnd
};

struct Instruction {
  Op op;
  int32_t a, b, c;

  // Operands are in order. A gather's is its second word: the first names an array.
  RAPTAX_API_INLINE int operands() const {
    static constexpr int8_t kCount[] = {
#define RAPTAX_COUNT(name, operands) operands,
        RAPTAX_OPERATIONS(RAPTAX_COUNT)
#undef RAPTAX_COUNT
    };
    return kCount[static_cast<int32_t>(op)];
  }
  RAPTAX_API_INLINE int32_t operand(int n) const {
    if (op == Op::kGather) return b;
    return n == 0 ? a : n == 1 ? b : c;
  }
};

// Element type of a captured array; read as float32, int32 or boolean.
enum class Entry : int32_t { kF32, kBF16, kF16, kI32, kI8, kU8, kBool };

// An array that a mod carries or captures.
struct Captured {
  const void* data;
  Entry entry;
  int64_t size;  // elements
};

// A program as the attribute and the operands of a call hold it; nothing is copied.
struct Program {
  static constexpr int64_t kMaxInstructions = 512;

  const int32_t* code = nullptr;
  int64_t code_size = 0;  // int32s, four per instruction
  const Captured* arrays = nullptr;
  int64_t array_count = 0;

  RAPTAX_API_INLINE int64_t size() const { return code_size / 4; }
  RAPTAX_API_INLINE Instruction at(int64_t n) const {
    const int32_t* word = code + 4 * n;
    return {static_cast<Op>(word[0]), word[1], word[2], word[3]};
  }
};

// Why the program is invalid, in words, or null if it is valid. Called on every program
// before a Runner is made of it. Only programs with `reads_scores` may use kScore.
const char* unsupported_reason(const Program& program, bool reads_scores);

// Runs a program over whole arrays, for tests: out[b, h, t, s] from scores[b, h, t, s]
// of query first + t and key s.
struct ProgramRun {
  enum What : int32_t { kScoreMod, kSlope, kMask };

  Program program;
  What what;
  bool along_queries;
  int64_t B, H, T, S;
  int64_t first;
  int64_t columns, rows;  // of one call of the Runner
  const float* scores;
  float* out;  // of kMask: scores, or -inf where not allowed
};

}  // namespace raptax
