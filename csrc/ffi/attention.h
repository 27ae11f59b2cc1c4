// Shared by the forward and backward handlers: operands and attributes to the structs
// of attention_params.h.
#pragma once

#include <string>

#include "api/kernel_table.h"
#include "ffi/common.h"
#include "ffi/mod_program.h"

namespace raptax {

// Operands by the names of attention_params.h; without elements where there is no such array.
struct Operands {
  ffi::AnyBuffer query;           // (B, H, T, D)
  ffi::AnyBuffer key;             // (B, K, S, D)
  ffi::AnyBuffer value;           // (B, K, S, E)
  ffi::Buffer<ffi::S32> start;    // (1) or (B)
  ffi::Buffer<ffi::S32> band;     // (2): left, right; INT32_MAX is no limit
  ffi::Buffer<ffi::F32> factors;  // scale of the products; rate of dropout, if any
  ffi::Buffer<ffi::S8> kinds;     // (#B, #H, tiles of queries, tiles of keys)
  ffi::Buffer<ffi::PRED> mask;    // (#B, #H, #T, #S)
  ffi::Buffer<ffi::F32> bias;     // (#B, #H, #T, #S)
  ffi::Buffer<ffi::F32> sinks;    // (H)
  ffi::Buffer<ffi::U32> words;    // of the dropout's key
};

ffi::Error invalid_argument(const std::string& what);

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

// Reads `operands`, and tile_queries and tile_keys of `attributes`. Changes only `to`,
// which then points into the operands.
ffi::Error read(const Operands& operands, const ffi::Dictionary& attributes, ForwardParams* to);

// The programs of mask_mod and score_mod. ScoreParams points into it.
struct Mods {
  explicit Mods(const ffi::RemainingArgs& arrays) : programs(arrays, 0) {}

  Programs programs;
  Program mask, score;
};

// Reads `mods`, whose arrays are the operands that remain, the mask's first: of
// `attributes`, mask_code, mask_arrays, score_code and score_arrays.
ffi::Error read_mods(const ffi::Dictionary& attributes, Mods* mods, ScoreParams* to);

}  // namespace raptax
