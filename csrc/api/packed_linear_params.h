// Parameters of y = x W^T with W packed as codes, row-interleaved for the kernels. The
// layout is that of src/raptax/quant/packed.py.
#pragma once

#include <cstdint>

#include "api/attention_params.h"
#include "api/inline.h"

namespace raptax {

constexpr int64_t kTileRows = 16;  // rows of W that lie side by side
constexpr int64_t kMaxParts = 8;   // weights of one call

// W[o, c] = scale * factor * (code - zero) + offset * offset_factor.
struct PackedWeight {
  int64_t O, C;   // outputs, inputs
  int64_t tiles;  // of kTileRows rows; those beyond O are zeros
  int64_t bits;   // of a code: 4, unsigned, or 8, signed and with zero = 0
  int64_t zero;
  int64_t group;  // inputs that share factors: 16 or 32
  int64_t block;  // inputs that share a scale and an offset: `group` times a power of 2

  const uint8_t* codes;                     // (tiles, C * bits / 32, kTileRows, 4)
  Type scale_type;                          // float16 or float32, of offsets too
  const void* scales;                       // (tiles, C / block, kTileRows)
  const int8_t* factors = nullptr;          // (tiles, C / group, kTileRows)
  const void* offsets = nullptr;            // as scales
  const uint8_t* offset_factors = nullptr;  // as factors

  RAPTAX_API_INLINE int64_t code_bytes() const { return C * bits / 8 * kTileRows; }
};

struct PackedLinearParams {
  int64_t M, C, O;  // rows of x, inputs, outputs of all parts
  Type type;        // of x and y
  const void* x;    // (M, C)
  void* y;          // (M, O)
  bool int8;        // round x to int8, 32 inputs to a scale
  int64_t count;    // of parts, whose outputs follow each other in y
  PackedWeight parts[kMaxParts];
};

}  // namespace raptax
