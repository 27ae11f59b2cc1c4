// What the handlers of attention share: operands and attributes as XLA hands them over
// become the plain arrays of problem.h.
#pragma once

#include <string>

#include "ffi_door.h"
#include "ffi_program.h"
#include "kernels.h"

namespace raptax {

// Operands by the names of problem.h. One without elements says that there is none.
struct Operands {
  ffi::AnyBuffer query;               // (B, H, T, D)
  ffi::AnyBuffer key;                 // (B, K, S, D)
  ffi::AnyBuffer value;               // (B, K, S, E)
  ffi::Buffer<ffi::S32> start;        // (1) or (B)
  ffi::Buffer<ffi::S32> band;         // (2): left, right; INT32_MAX is no limit
  ffi::Buffer<ffi::F32> factors;      // (2): scale of the products, rate of dropout
  ffi::Buffer<ffi::S8> kinds;         // (#B, #H, tiles of queries, tiles of keys)
  ffi::Buffer<ffi::PRED> mask;        // (#B, #H, #T, #S)
  ffi::Buffer<ffi::F32> bias;         // (#B, #H, #T, #S)
  ffi::Buffer<ffi::F32> sinks;        // (H)
  ffi::Buffer<ffi::U32> words;        // of the dropout's key
};

ffi::Error wrong(const std::string& what);

// Whether an array has these axes.
template <typename Array>
bool has_shape(const Array& x, std::initializer_list<int64_t> axes) {
  auto dims = x.dimensions();
  if (dims.size() != axes.size()) return false;
  size_t i = 0;
  for (int64_t axis : axes) {
    if (dims[i++] != axis) return false;
  }
  return true;
}

// Reads `operands`, and of `attributes` tile_queries and tile_keys. Changes nothing but `to`, which points into the operands from then on.
ffi::Error read(const Operands& operands, const ffi::Dictionary& attributes, Forward* to);

// The programs of masks and of score changes. Rules point into it.
struct Mods {
  explicit Mods(const ffi::RemainingArgs& arrays) : programs(arrays, 0) {}

  Programs programs;
  Program mask, score;
};

// Reads `mods`, whose arrays are the operands that remain, the mask's first: of
// `attributes`, mask_code, mask_arrays, score_code and score_arrays.
ffi::Error read_mods(const ffi::Dictionary& attributes, Mods* mods, Rules* to);

}  // namespace raptax
