// The online softmax of online_softmax.h, with weights stored as left operands of tile
// products.
//
// bfloat16 weights are truncated instead of rounded, after multiplication by kRaised,
// which makes the mean error 0. The sum of the weights guards the lazy maximum: while
// it is below kSumLimit no score exceeded the running maximum by much, and the scan for
// the new maximum is skipped.

#pragma once

#include "attention/online_softmax.h"
#include "gemm/gemm_amx.h"

namespace raptax {
namespace RAPTAX_ISA {

constexpr float kRaised = 1.002818f;  // 1 + 2^-8 * mean of 1 / m for log-uniform m
constexpr float kSumLimit = 4096;

// kRaised * 2^x to within 7.5e-5, for bfloat16. x is any number, or -Inf.
static inline F32 exp2_raised(F32 x) {
  F32 f = (F32)_mm512_reduce_ps((__m512)x, 1);
  F32 y = broadcast(0.0780245215f * kRaised) * f + 0.226067156f * kRaised;
  y = y * f + 0.695833564f * kRaised;
  y = y * f + 0.999925196f * kRaised;
  return (F32)_mm512_scalef_ps((__m512)y, (__m512)x);
}

template <int kParts>
static inline F32 weight_of(F32 x) {
  return kParts == 1 ? exp2_raised(x) : exp2_fast(x);
}

// Columns j .. j + 31 of a row of weights.
template <int kParts>
static inline void store_weights(Bf16* row, int64_t j, F32 first, F32 second) {
  Pairs parts[kParts];
  if (kParts == 1) {
    parts[0] = upper_halves(first, second);
  } else {
    split(first, second, parts);
  }
  Bf16* to = row + j / kTileDepth * kParts * kTileNumbers;
  for (int p = 0; p < kParts; ++p) memcpy(to + p * kTileNumbers, parts + p, 64);
}

// Weights of scores[whole] under the running maximum; without `kCut` all are visible.
// Returns false, and leaves the sum unchanged, if a score exceeds it by far.
template <int kParts, bool kModified, bool kCut>
static inline bool softmax_step_known_max(const float* scores, Bf16* weights, Columns visible,
                                          Columns whole, Exponents to, RowState row,
                                          Interleaver<kParts>* interleaver) {
  F32 first = F32{}, second = F32{}, nothing = broadcast(-kInf);
  F32 unit = broadcast(to.scale * kLog2OfE), row_max = broadcast(to.exponent_of(*row.row_max));
  for (int64_t j = whole.first; j < whole.last; j += kTileDepth) {
    F32 x = exponent<kModified>(load(scores + j), unit, row_max);
    F32 y = exponent<kModified>(load(scores + j + kLanes), unit, row_max);
    if (kCut) {
      x = select_lanes(visible.first - j, visible.last - j, x, nothing);
      y = select_lanes(visible.first - j - kLanes, visible.last - j - kLanes, y, nothing);
    }
    x = weight_of<kParts>(x);
    y = weight_of<kParts>(y);
    first += x;
    second += y;
    store_weights<kParts>(weights, j, x, y);
    interleaver->tick();
  }
  first += second;
  __mmask16 over = _mm512_cmp_ps_mask((__m512)first, _mm512_set1_ps(kSumLimit), _CMP_GT_OQ);
  if (over != 0) return false;
  store(row.row_sum, load(row.row_sum) + first);
  return true;
}

// As softmax_step() of online_softmax.h: determines the maximum first.
template <int kParts, bool kModified, bool kCut>
static inline float softmax_step_new_max(const float* scores, Bf16* weights, Columns visible,
                                         Columns whole, Exponents to, RowState row,
                                         Interleaver<kParts>* interleaver) {
  float rescale = update_max<kCut>(scores, visible, whole, to, *row.row_max);
  F32 unit = broadcast(to.scale * kLog2OfE), row_max = broadcast(to.exponent_of(*row.row_max));
  F32 sum = load(row.row_sum) * rescale, nothing = broadcast(-kInf);
  bool none = *row.row_max == -kInf;
  for (int64_t j = whole.first; j < whole.last; j += kTileDepth) {
    F32 x[2];
    for (int i = 0; i < 2; ++i) {
      int64_t at = j + i * kLanes;
      x[i] = exponent<kModified>(load(scores + at), unit, row_max);
      if (kCut) x[i] = select_lanes(visible.first - at, visible.last - at, x[i], nothing);
      x[i] = none ? F32{} : weight_of<kParts>(x[i]);
      sum += x[i];
    }
    store_weights<kParts>(weights, j, x[0], x[1]);
    interleaver->tick();
  }
  store(row.row_sum, sum);
  return rescale;
}

// One row: scores to weights. Returns the factor that rescales the output so far. Where
// the maximum was updated in the previous block, as under ALiBi, `max_increased` skips
// the attempt with the running maximum.
template <int kParts, bool kModified, bool kCut>
RAPTAX_INLINE float softmax_step_tiles_as(const float* scores, Bf16* weights, Columns visible,
                                          Columns whole, Exponents to, RowState row,
                                          bool* max_increased,
                                          Interleaver<kParts>* interleaver) {
  if (!*max_increased && *row.row_max > -kInf &&
      softmax_step_known_max<kParts, kModified, kCut>(scores, weights, visible, whole, to, row,
                                                      interleaver)) {
    return 1;
  }
  float by = softmax_step_new_max<kParts, kModified, kCut>(scores, weights, visible, whole, to,
                                                           row, interleaver);
  *max_increased = by != 1;
  return by;
}

template <int kParts>
static inline float softmax_step_tiles(const float* scores, Bf16* weights, Columns visible,
                                       Columns whole, Exponents to, RowState row,
                                       bool* max_increased, Interleaver<kParts>* interleaver) {
#define RAPTAX_STEP(modified, cut)                                                       \
  softmax_step_tiles_as<kParts, modified, cut>(scores, weights, visible, whole, to, row, \
                                               max_increased, interleaver)
  bool cut = visible.first > whole.first || visible.last < whole.last;
  if (to.modified) return cut ? RAPTAX_STEP(true, true) : RAPTAX_STEP(true, false);
  return cut ? RAPTAX_STEP(false, true) : RAPTAX_STEP(false, false);
#undef RAPTAX_STEP
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
