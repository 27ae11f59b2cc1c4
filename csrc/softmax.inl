// The softmax that is computed block by block of keys, one row of scores at a time.
//
// With the maximum and the sum so far at hand, taking in more keys never needs the
// earlier scores again (Milakov & Gimelshein 2018, arXiv:1805.02867). Exponents are of
// base 2. The maximum that weights refer to follows the true one only when that is more
// than kSlack above it: then the output so far need not be scaled with every new block,
// and nothing is lost, as float32 has room for far more than 2^kSlack.

#pragma once

#include "pack.inl"
#include "problem.h"

namespace raptax {
namespace RAPTAX_ISA {

constexpr float kSlack = 8;
constexpr float kLog2OfE = 1.44269504f;

// Columns first <= j < last of a block of scores.
struct Columns {
  int64_t first, last;
  bool empty() const { return first >= last; }
};

// The keys that the band lets a query at `position` see, of `count` keys from
// `first_key` on.
static inline Columns seen_by(const Band& band, int64_t position, int64_t first_key,
                              int64_t count) {
  return {most(0, position - band.left - first_key),
          least(count, position + band.right + 1 - first_key)};
}

// How numbers in memory become exponents of base 2. Products of queries and keys take a
// scale on the way. Scores that have been changed are compared before they are scaled: a
// bias may have made them so large that a product, rounded or not, is far from exact.
struct Exponents {
  bool changed;
  float scale;  // 1 if changed

  float high_of(float high) const { return changed ? high : high * kLog2OfE; }
  float shrink(float before, float now) const {
    float by = changed ? (before - now) * kLog2OfE : high_of(before) - high_of(now);
    return exp2_of(all(by))[0];
  }
};

template <bool kChanged>
static inline F32 exponent(F32 x, F32 unit, F32 high) {
  return kChanged ? (x - high) * unit : x * unit - high;
}

// How a row of the softmax ends: weights are exp(score - high), and add up to total.
struct Ended {
  float high, total;

  // high - high is NaN where a score was infinite, as the quotient would be.
  float sum() const { return total == 0 ? 0.0f : total + (high - high); }
  float log_sum_exp() const {
    return total == 0 ? -kInf : high + __builtin_logf(total);
  }
};

// What it knows on the way: the lanes of total add up to `one` for every weight of 1.
struct Running {
  float* high;
  float* total;  // kLanes of them
  float one = 1;

  // A row starts with its sink, a key whose value is 0.
  void begin(const float* sink) {
    *high = sink == nullptr ? -kInf : *sink;
    store(total, F32{});
    total[0] = *high == -kInf ? 0.0f : one;
  }
  Ended end() const { return {*high, sum_of(load(total)) / one}; }
};

template <bool kCut>
static inline F32 largest_in(const float* scores, Columns seen, Columns whole) {
  F32 most = all(-kInf);
  for (int64_t j = whole.first; j < whole.last; j += kLanes) {
    F32 x = load(scores + j);
    if (kCut) x = between(seen.first - j, seen.last - j, x, all(-kInf));
    most = larger(x, most);  // passes over NaN
  }
  return most;
}

static inline bool any_nan(const float* scores, Columns seen) {
  for (int64_t j = seen.first; j < seen.last; ++j) {
    if (scores[j] != scores[j]) return true;
  }
  return false;
}

// Finds out whether the maximum has to follow, and returns what the sums so far have to be
// multiplied with.
template <bool kCut>
static inline float follow(const float* scores, Columns seen, Columns whole, Exponents to,
                           float& high) {
  F32 most = largest_in<kCut>(scores, seen, whole) * to.scale;
  if (high == -kInf) {  // and the sums are 0
    float now = largest_of(most);
    high = now == -kInf && any_nan(scores, seen) ? 0.0f : now;
    return 1;
  }
  if (!any_above(most, all(high + kSlack))) return 1;
  float now = largest_of(most), shrink = to.shrink(high, now);
  high = now;
  return shrink;
}

template <bool kChanged, bool kCut>
static inline F32 weigh_as(float* scores, Columns seen, Columns whole, F32 unit, F32 high) {
  F32 sum = F32{};
  for (int64_t j = whole.first; j < whole.last; j += kLanes) {
    F32 x = exponent<kChanged>(load(scores + j), unit, high);
    if (kCut) x = between(seen.first - j, seen.last - j, x, all(-kInf));
    F32 weight = exp2_of(x);
    sum += weight;
    store(scores + j, weight);
  }
  return sum;
}

template <bool kCut>
static float weigh_by(float* scores, Columns seen, Columns whole, Exponents to,
                      Running row) {
  float shrink = follow<kCut>(scores, seen, whole, to, *row.high);
  if (*row.high == -kInf) {
    for (int64_t j = whole.first; j < whole.last; j += kLanes) store(scores + j, F32{});
    return 1;
  }
  F32 unit = all(to.scale * kLog2OfE), high = all(to.high_of(*row.high));
  F32 sum = to.changed ? weigh_as<true, kCut>(scores, seen, whole, unit, high)
                       : weigh_as<false, kCut>(scores, seen, whole, unit, high);
  store(row.total, load(row.total) * shrink + sum);
  return shrink;
}

// Takes in scores[seen]. Overwrites the columns `whole`, which are full vectors, with
// weights; those outside of `seen` are 0. Returns what the output so far has to be
// multiplied with.
static float weigh(float* scores, Columns seen, Columns whole, Exponents to, Running row) {
  bool cut = seen.first > whole.first || seen.last < whole.last;
  return cut ? weigh_by<true>(scores, seen, whole, to, row)
             : weigh_by<false>(scores, seen, whole, to, row);
}

// Dropout by a hash of the place: see dropout.py.
class Dropping {
 public:
  Dropping(const Dropout& dropout, int64_t b, int64_t h)
      : rate_(dropout.rate), keep_(static_cast<float>(1.0 / (1.0 - dropout.rate))) {
    U32 state = U32{};
    for (int64_t i = 0; i < dropout.count; ++i) state = mixed(state, dropout.words[i]);
    state_ = mixed(mixed(state, static_cast<uint32_t>(b)), static_cast<uint32_t>(h));
  }

  // Multiplies the weights of a row, columns first <= j < last, from key first_key on.
  void apply(int64_t position, int64_t first_key, float* weights, Columns at) const {
    U32 row = mixed(state_, static_cast<uint32_t>(position));
    for (int64_t j = at.first; j < at.last; j += kLanes) {
      U32 key = (U32)(counting() + static_cast<int32_t>(first_key + j));
      U32 state = mixed(row, key);
      F32 uniform = __builtin_convertvector((I32)(state >> 8), F32) * 0x1p-24f;
      F32 factor = (uniform >= rate_) ? all(keep_) : F32{};
      store(weights + j, load(weights + j) * factor);
    }
  }

 private:
  template <typename Word>
  static U32 mixed(U32 state, Word word) {
    U32 x = state ^ word;  // MurmurHash3's finaliser
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return (x ^ (x >> 16)) + 0x9e3779b9u;
  }

  float rate_, keep_;
  U32 state_;
};

}  // namespace RAPTAX_ISA
}  // namespace raptax
