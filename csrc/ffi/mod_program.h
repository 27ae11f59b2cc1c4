// Mod programs of a call: code as an attribute, arrays as operands.
#pragma once

#include <vector>

#include "api/mod_program.h"
#include "ffi/common.h"

namespace raptax {

using Code = ffi::Span<const int32_t>;

// The programs of one call. Their arrays are the call's last operands, one program after
// another.
class Programs {
 public:
  // Operands of the call from `first` on are arrays of programs.
  Programs(ffi::RemainingArgs args, size_t first) : args_(args), next_(first) {
    arrays_.reserve(args.size());  // programs point into it
  }

  // Reads the next program, whose arrays are the next `count` operands. Of no code, it
  // is no program, and `has` is false.
  ffi::Error read(Code code, int64_t count, bool reads_scores, Program& program, bool& has);

  // Whether every operand was an array of some program.
  bool finished() const { return next_ == args_.size(); }

 private:
  ffi::RemainingArgs args_;
  size_t next_;
  std::vector<Captured> arrays_;
};

}  // namespace raptax
