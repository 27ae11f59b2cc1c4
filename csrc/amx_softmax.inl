// The softmax of softmax.inl with weights as left operands of tile products.
//
// Weights in bfloat16 are made a little too large and then cut off instead of rounded, so
// that on average nothing is lost. The sum of the weights is also the guard: as long as it
// is not too large no score was far above the maximum so far, and nobody looks for the new
// one.

#pragma once

#include "amx_products.inl"
#include "softmax.inl"

namespace raptax {
namespace RAPTAX_ISA {

constexpr float kRaised = 1.002818f;  // 1 + 2^-8 * mean of 1 / m for log-uniform m
constexpr float kMuch = 4096;

// kRaised * 2^x to within 7.5e-5, for bfloat16. x is any number, or -Inf.
static inline F32 exp2_raised(F32 x) {
  F32 f = (F32)_mm512_reduce_ps((__m512)x, 1);
  F32 y = all(0.0780245215f * kRaised) * f + 0.226067156f * kRaised;
  y = y * f + 0.695833564f * kRaised;
  y = y * f + 0.999925196f * kRaised;
  return (F32)_mm512_scalef_ps((__m512)y, (__m512)x);
}

template <int kParts>
static inline F32 weight_of(F32 x) {
  return kParts == 1 ? exp2_raised(x) : exp2_of(x);
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
  Bf16* to = row + j / kStep * kParts * kTileNumbers;
  for (int p = 0; p < kParts; ++p) memcpy(to + p * kTileNumbers, parts + p, 64);
}

// Weighs scores[whole] by a maximum that is known; unless `kCut`, all of them are seen.
// Returns false, and leaves the sum alone, if some score is far above it.
template <int kParts, bool kChanged, bool kCut>
static inline bool weigh_known(const float* scores, Bf16* weights, Columns seen,
                               Columns whole, Exponents to, Running row,
                               Beside<kParts>* beside) {
  F32 first = F32{}, second = F32{}, nothing = all(-kInf);
  F32 unit = all(to.scale * kLog2OfE), high = all(to.high_of(*row.high));
  for (int64_t j = whole.first; j < whole.last; j += kStep) {
    F32 x = exponent<kChanged>(load(scores + j), unit, high);
    F32 y = exponent<kChanged>(load(scores + j + kLanes), unit, high);
    if (kCut) {
      x = between(seen.first - j, seen.last - j, x, nothing);
      y = between(seen.first - j - kLanes, seen.last - j - kLanes, y, nothing);
    }
    x = weight_of<kParts>(x);
    y = weight_of<kParts>(y);
    first += x;
    second += y;
    store_weights<kParts>(weights, j, x, y);
    beside->portion();
  }
  first += second;
  __mmask16 much = _mm512_cmp_ps_mask((__m512)first, _mm512_set1_ps(kMuch), _CMP_GT_OQ);
  if (much != 0) return false;
  store(row.total, load(row.total) + first);
  return true;
}

// As weigh() of softmax.inl: looks for the maximum first.
template <int kParts, bool kChanged, bool kCut>
static inline float weigh_some_by(const float* scores, Bf16* weights, Columns seen,
                                  Columns whole, Exponents to, Running row,
                                  Beside<kParts>* beside) {
  float shrink = follow<kCut>(scores, seen, whole, to, *row.high);
  F32 unit = all(to.scale * kLog2OfE), high = all(to.high_of(*row.high));
  F32 sum = load(row.total) * shrink, nothing = all(-kInf);
  bool none = *row.high == -kInf;
  for (int64_t j = whole.first; j < whole.last; j += kStep) {
    F32 x[2];
    for (int i = 0; i < 2; ++i) {
      int64_t at = j + i * kLanes;
      x[i] = exponent<kChanged>(load(scores + at), unit, high);
      if (kCut) x[i] = between(seen.first - at, seen.last - at, x[i], nothing);
      x[i] = none ? F32{} : weight_of<kParts>(x[i]);
      sum += x[i];
    }
    store_weights<kParts>(weights, j, x[0], x[1]);
    beside->portion();
  }
  store(row.total, sum);
  return shrink;
}

// One row: from scores to weights. Returns what the output so far has to be multiplied
// with. A row that `climbs`, as under ALiBi, had to follow the last time; trying it by the
// maximum so far would be for nothing.
template <int kParts, bool kChanged, bool kCut>
RAPTAX_INLINE float weigh_tiles_by(const float* scores, Bf16* weights, Columns seen,
                                   Columns whole, Exponents to, Running row, bool* climbs,
                                   Beside<kParts>* beside) {
  if (!*climbs && *row.high > -kInf &&
      weigh_known<kParts, kChanged, kCut>(scores, weights, seen, whole, to, row, beside)) {
    return 1;
  }
  float by = weigh_some_by<kParts, kChanged, kCut>(scores, weights, seen, whole, to, row, beside);
  *climbs = by != 1;
  return by;
}

template <int kParts>
static inline float weigh_tiles(const float* scores, Bf16* weights, Columns seen,
                                Columns whole, Exponents to, Running row, bool* climbs,
                                Beside<kParts>* beside) {
#define RAPTAX_WEIGH(changed, cut) \
  weigh_tiles_by<kParts, changed, cut>(scores, weights, seen, whole, to, row, climbs, beside)
  bool cut = seen.first > whole.first || seen.last < whole.last;
  if (to.changed) return cut ? RAPTAX_WEIGH(true, true) : RAPTAX_WEIGH(true, false);
  return cut ? RAPTAX_WEIGH(false, true) : RAPTAX_WEIGH(false, false);
#undef RAPTAX_WEIGH
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
