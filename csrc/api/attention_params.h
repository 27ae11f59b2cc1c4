// Parameters of dense attention, forward and backward, as plain arrays. Semantics and
// axis letters are those of AttentionFn in src/raptax/_core/types.py.
#pragma once

#include <cstdint>

#include "api/inline.h"
#include "api/mod_program.h"

namespace raptax {

enum class Type : int32_t { kF32, kBF16, kF16 };

RAPTAX_API_INLINE int64_t bytes_of(Type type) { return type == Type::kF32 ? 4 : 2; }

struct Shape {
  int64_t B, H, K;  // sequences, query heads, key/value heads; H % K == 0
  int64_t T, S;     // queries, keys
  int64_t D, E;     // head sizes of keys and of values
};

// An array that broadcasts to the scores (B, H, T, S): axes of length 1 have stride 0.
// Strides count elements. `data` is null where there is no such array.
template <typename T>
struct Broadcast {
  T* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};

  RAPTAX_API_INLINE T* row(int64_t b, int64_t h, int64_t t) const {
    return data + b * stride[0] + h * stride[1] + t * stride[2];
  }
};

// A query at absolute position p sees the keys p - left .. p + right.
struct Band {
  static constexpr int64_t kUnlimited = int64_t{1} << 40;
  int64_t left = kUnlimited;
  int64_t right = kUnlimited;
};

// The band of an operand (left, right); INT32_MAX means unlimited.
RAPTAX_API_INLINE Band band_of(const int32_t* limits) {
  const auto limit = [](int32_t n) { return n == INT32_MAX ? Band::kUnlimited : n; };
  return {limit(limits[0]), limit(limits[1])};
}

enum BlockKind : int8_t { kEmpty = 0, kPartial = 1, kFull = 2 };

// Block kinds: what the mask (band and mask program, not the mask array) leaves of tile
// (i, j) of the scores, which starts at query row i * queries and key j * keys. `data`
// is null where kinds were not computed; then every tile counts as partial.
struct BlockKinds {
  const int8_t* data = nullptr;
  int64_t queries = 0, keys = 0;  // rows and columns of a tile
  int64_t across = 0;             // tiles in a row of tiles
  int64_t stride_b = 0, stride_h = 0;

  RAPTAX_API_INLINE BlockKind at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (data == nullptr) return kPartial;
    return static_cast<BlockKind>(data[b * stride_b + h * stride_h + i * across + j]);
  }
};

// Counter-based dropout, a hash of (key, b, h, q, k): see src/raptax/kernels/dropout.py.
struct DropoutParams {
  const uint32_t* words = nullptr;
  int64_t count = 0;
  float rate = 0;
};

// How products become masked scores, the same forward and backward:
//
//   base = scale * q . k + bias;  score = score_mod(base), or -inf where masked.
//
// A score is masked unless the band, `mask` and `mask_program` all allow it.
struct ScoreParams {
  float scale = 1;
  const int32_t* start = nullptr;  // absolute position of the first query
  int64_t starts = 1;              // one for all sequences, or B of them
  Band band;
  BlockKinds kinds;
  Broadcast<const uint8_t> mask;
  Broadcast<const float> bias;
  const float* sinks = nullptr;  // (H)
  const Program* mask_program = nullptr;
  const Program* score_program = nullptr;
  DropoutParams dropout;

  RAPTAX_API_INLINE int64_t first(int64_t b) const { return start[starts == 1 ? 0 : b]; }
};

struct ForwardParams {
  Shape shape;
  Type type;
  const void* query;  // (B, H, T, D)
  const void* key;    // (B, K, S, D)
  const void* value;  // (B, K, S, E)
  ScoreParams score_params;
  void* out;   // (B, H, T, E)
  float* lse;  // (B, H, T), natural logarithm, sinks included; -inf for an empty row
};

struct BackwardParams {
  ForwardParams forward;                   // out and lse are its results
  const void* d_out;                       // (B, H, T, E), of `type`
  const float* d_lse;                      // (B, H, T)
  const Program* slope_program = nullptr;  // d score / d base, of base; null means 1
  void* d_query;                           // (B, H, T, D), of `type`
  void* d_key;                             // (B, K, S, D), of `type`
  void* d_value;                           // (B, K, S, E), of `type`
  Broadcast<float> d_bias;                 // cleared by the caller; null if there is none
  float* d_sinks = nullptr;                // (H)
};

}  // namespace raptax
