// Online softmax: block by block of keys, one row of scores at a time.
//
// The running maximum and sum are enough to add further keys without the earlier scores
// (Milakov & Gimelshein 2018, arXiv:1805.02867). Exponentials are of base 2. Lazy
// rescaling: the running row maximum is updated only when it is exceeded by more than
// kRescaleThreshold (log2), so outputs are rarely rescaled. This costs no precision:
// float32 holds weights far above 2^kRescaleThreshold.

#pragma once

#include "api/attention_params.h"
#include "gemm/pack_f32.h"

namespace raptax {
namespace RAPTAX_ISA {

constexpr float kRescaleThreshold = 8;

// Columns first <= j < last of a block of scores.
struct Columns {
  int64_t first, last;
  bool empty() const { return first >= last; }
};

// The columns that the band lets a query at `position` see, of `count` keys from
// `first_key` on.
static inline Columns visible_columns(const Band& band, int64_t position, int64_t first_key,
                                      int64_t count) {
  return {max(0, position - band.left - first_key),
          min(count, position + band.right + 1 - first_key)};
}

// How stored scores become exponents of base 2. Products of queries and keys are scaled
// on the way. Modified scores are compared before log2(e) is multiplied: a bias may
// have made them so large that their product is far from exact.
struct Exponents {
  bool modified;
  float scale;  // 1 if modified

  float exponent_of(float row_max) const { return modified ? row_max : row_max * kLog2OfE; }
  float rescale(float before, float now) const {
    float by = modified ? (before - now) * kLog2OfE : exponent_of(before) - exponent_of(now);
    return exp2_fast(broadcast(by))[0];
  }
};

template <bool kModified>
static inline F32 exponent(F32 x, F32 unit, F32 row_max) {
  return kModified ? (x - row_max) * unit : x * unit - row_max;
}

// The result of a row: weights are exp(score - row_max), and their sum is row_sum.
struct RowResult {
  float row_max, row_sum;

  // row_max - row_max is NaN where a score was infinite, as the quotient would be.
  float normalizer() const { return row_sum == 0 ? 0.0f : row_sum + (row_max - row_max); }
  float log_sum_exp() const { return row_sum == 0 ? -kInf : row_max + __builtin_logf(row_sum); }
};

// The running state of a row: the lanes of row_sum add up to `one` per weight of 1.
struct RowState {
  float* row_max;
  float* row_sum;  // kLanes of them
  float one = 1;

  // Initialises with the attention sink, a key whose value is 0.
  void begin(const float* sink) {
    *row_max = sink == nullptr ? -kInf : *sink;
    store(row_sum, F32{});
    row_sum[0] = *row_max == -kInf ? 0.0f : one;
  }
  RowResult result() const { return {*row_max, reduce_add(load(row_sum)) / one}; }
};

template <bool kCut>
static inline F32 max_of(const float* scores, Columns visible, Columns whole) {
  F32 largest = broadcast(-kInf);
  for (int64_t j = whole.first; j < whole.last; j += kLanes) {
    F32 x = load(scores + j);
    if (kCut) x = select_lanes(visible.first - j, visible.last - j, x, broadcast(-kInf));
    largest = max(x, largest);  // ignores NaN
  }
  return largest;
}

static inline bool any_nan(const float* scores, Columns visible) {
  for (int64_t j = visible.first; j < visible.last; ++j) {
    if (scores[j] != scores[j]) return true;
  }
  return false;
}

// Updates the maximum if it is exceeded by kRescaleThreshold, and returns the factor by
// which sums and output so far have to be rescaled.
template <bool kCut>
static inline float update_max(const float* scores, Columns visible, Columns whole,
                               Exponents to, float& row_max) {
  F32 largest = max_of<kCut>(scores, visible, whole) * to.scale;
  if (row_max == -kInf) {  // and the sums are 0
    float now = reduce_max(largest);
    row_max = now == -kInf && any_nan(scores, visible) ? 0.0f : now;
    return 1;
  }
  if (!any_greater(largest, broadcast(row_max + kRescaleThreshold))) return 1;
  float now = reduce_max(largest), rescale = to.rescale(row_max, now);
  row_max = now;
  return rescale;
}

template <bool kModified, bool kCut>
static inline F32 exp_row(float* scores, Columns visible, Columns whole, F32 unit,
                          F32 row_max) {
  F32 sum = F32{};
  for (int64_t j = whole.first; j < whole.last; j += kLanes) {
    F32 x = exponent<kModified>(load(scores + j), unit, row_max);
    if (kCut) x = select_lanes(visible.first - j, visible.last - j, x, broadcast(-kInf));
    F32 weight = exp2_fast(x);
    sum += weight;
    store(scores + j, weight);
  }
  return sum;
}

template <bool kCut>
static float softmax_step_cut(float* scores, Columns visible, Columns whole, Exponents to,
                              RowState row) {
  float rescale = update_max<kCut>(scores, visible, whole, to, *row.row_max);
  if (*row.row_max == -kInf) {
    for (int64_t j = whole.first; j < whole.last; j += kLanes) store(scores + j, F32{});
    return 1;
  }
  F32 unit = broadcast(to.scale * kLog2OfE), row_max = broadcast(to.exponent_of(*row.row_max));
  F32 sum = to.modified ? exp_row<true, kCut>(scores, visible, whole, unit, row_max)
                        : exp_row<false, kCut>(scores, visible, whole, unit, row_max);
  store(row.row_sum, load(row.row_sum) * rescale + sum);
  return rescale;
}

// Adds scores[visible]. Overwrites the columns `whole`, which are full vectors, with
// weights, 0 outside `visible`. Returns the factor that rescales the output so far.
static float softmax_step(float* scores, Columns visible, Columns whole, Exponents to,
                          RowState row) {
  bool cut = visible.first > whole.first || visible.last < whole.last;
  return cut ? softmax_step_cut<true>(scores, visible, whole, to, row)
             : softmax_step_cut<false>(scores, visible, whole, to, row);
}

// Counter-based dropout, a hash of (key, b, h, q, k): see src/raptax/kernels/dropout.py.
class Dropout {
 public:
  Dropout(const DropoutParams& dropout, int64_t b, int64_t h)
      : rate_(dropout.rate), keep_(static_cast<float>(1.0 / (1.0 - dropout.rate))) {
    U32 state = U32{};
    for (int64_t i = 0; i < dropout.count; ++i) state = mixed(state, dropout.words[i]);
    state_ = mixed(mixed(state, static_cast<uint32_t>(b)), static_cast<uint32_t>(h));
  }

  // Multiplies the weights of a row, columns first <= j < last, from key first_key on.
  void apply(int64_t position, int64_t first_key, float* weights, Columns at) const {
    U32 row = mixed(state_, static_cast<uint32_t>(position));
    for (int64_t j = at.first; j < at.last; j += kLanes) {
      U32 key = (U32)(lane_indices() + static_cast<int32_t>(first_key + j));
      U32 state = mixed(row, key);
      F32 uniform = __builtin_convertvector((I32)(state >> 8), F32) * 0x1p-24f;
      F32 factor = (uniform >= rate_) ? broadcast(keep_) : F32{};
      store(weights + j, load(weights + j) * factor);
    }
  }

 private:
  template <typename Word>
  static U32 mixed(U32 state, Word word) {
    U32 x = state ^ word;  // MurmurHash3's finaliser (Appleby 2011)
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return (x ^ (x >> 16)) + 0x9e3779b9u;
  }

  float rate_, keep_;
  U32 state_;
};

}  // namespace RAPTAX_ISA
}  // namespace raptax
