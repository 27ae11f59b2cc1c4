// The score stage of the backward pass: recomputes weights from scores, and turns
// d_weights into gradients of the scores, for one block.

#pragma once

#include "attention/mod_runner.h"
#include "gemm/gemm_backward_f32.h"
#include "simd/convert_rows.h"

namespace raptax {
namespace RAPTAX_ISA {

// One block of the scores: queries row .. row + rows - 1 of head (b, h) and keys
// key .. key + keys - 1. Columns count from `key`; those outside [from, to) are empty.
struct BackPlace {
  int64_t b, h;
  int64_t row, rows;
  int64_t key, keys;
  int64_t from = 0, to = 0;  // multiples of the `align` of back_visible()
  bool cut = false;          // whether some row sees less than [from, to)
  bool band = false;         // whether the band is one reason
  bool programs = false;     // whether the mask program has to run
};

// The kind of a block of scores.
static BlockKind back_block_kind(const BlockKinds& kinds, const BackPlace& at, int64_t first,
                                 int64_t last) {
  if (kinds.data == nullptr) return kPartial;
  bool any_nonempty = false, all_full = true;
  for (int64_t i = at.row / kinds.queries; i * kinds.queries < at.row + at.rows; ++i) {
    for (int64_t j = first / kinds.keys; j * kinds.keys <= last; ++j) {
      BlockKind kind = kinds.at(at.b, at.h, i, j);
      any_nonempty |= kind != kEmpty;
      all_full &= kind == kFull;
    }
  }
  return all_full ? kFull : any_nonempty ? kPartial : kEmpty;
}

// Sets the visible columns of a block. Returns whether there are any.
static bool back_visible(const ScoreParams& score_params, int64_t align, BackPlace* at) {
  int64_t first = score_params.first(at->b) + at->row, last = first + at->rows - 1;
  int64_t low = first - score_params.band.left, high = last + score_params.band.right;
  if (low < at->key) low = at->key;
  if (high >= at->key + at->keys) high = at->key + at->keys - 1;
  if (low > high) return false;
  BlockKind kind = back_block_kind(score_params.kinds, *at, low, high);
  if (kind == kEmpty) return false;
  at->from = round_down(low - at->key, align);
  at->to = round_up(high + 1 - at->key, align);
  // Columns that alignment has added must be masked by the band again.
  int64_t end = at->to < at->keys ? at->to : at->keys;
  at->band = at->key + at->from < last - score_params.band.left ||
             at->key + end - 1 > first + score_params.band.right;
  at->programs = kind != kFull && score_params.mask_program != nullptr;
  at->cut = at->band || at->from != low - at->key || at->to != high + 1 - at->key;
  return true;
}

// Per-row and per-column constants of a block.
struct BackRows {
  const float* shift;   // by row: log2 of the sum of exponentials; inf for an empty row
  const float* delta;   // by row: sum(dO * O) - dL
  const float* poison;  // by column: NaN or 0; null if all are 0
};

// Columns visible to some of several rows, aligned; outside, all weights are 0.
struct Strip {
  int64_t from = 0, to = 0;
};

// Processes rows of one block. Owns only the runners of mod programs.
class BackScores {
 public:
  static constexpr int64_t kStrip = 16;  // rows per call of a program

  // Memory for places of at most `columns` columns, a multiple of kLanes.
  static size_t bytes(const BackwardParams& p, int64_t columns) {
    const ScoreParams& score_params = p.forward.score_params;
    const Program* programs[] = {score_params.score_program, p.slope_program,
                                 score_params.mask_program};
    size_t size = 64;
    for (const Program* program : programs) {
      if (program != nullptr) size += round_up(Runner::bytes(*program, columns), 64);
    }
    return size + sizeof(float) * kStrip * columns;
  }

  BackScores(const BackwardParams& p, int64_t columns, char* memory);

  // Selects a block.
  void begin(const BackPlace& at);

  // Turns scores, raw products of q and k, into weights after dropout, and d_weights,
  // raw products of d_out and v, into the gradient of base, for rows [first, last) of
  // the place. Both are 0 where nothing is to be seen, and are left alone outside
  // [at.from, at.to). Rows lie `stride` floats apart.
  void rows(int64_t first, int64_t last, const BackRows& known, float* scores, float* d_weights,
            int64_t stride) {
    if (is_plain(known)) {
      for (int64_t r = first; r < last; ++r) {
        plain_row(r, known, scores + (r - first) * stride, d_weights + (r - first) * stride);
      }
      return;
    }
    for (int64_t r = first; r < last; r += kStrip) {
      int64_t end = last - r < kStrip ? last : r + kStrip, skip = (r - first) * stride;
      strip(r, end, known, scores + skip, d_weights + skip, stride);
    }
  }

  // Whether the block has only a scale and perhaps a band.
  bool is_plain(const BackRows& known) const {
    return plain_ && !at_.programs && known.poison == nullptr;
  }

  // Columns visible to rows [first, last), by band and sequence end.
  Strip visible(int64_t first, int64_t last, int64_t align) const {
    if (!at_.cut) return {at_.from, at_.to};
    int64_t low, high, other;
    if (last > at_.rows) last = at_.rows;
    visible_columns(first, &low, &other);
    visible_columns(last - 1, &other, &high);
    if (low < at_.from) low = at_.from;
    if (high > at_.to) high = at_.to;
    if (low >= high) return {at_.from, at_.from};
    return {round_down(low, align), round_up(high, align)};
  }

  // Columns [*low, *high) visible to row r, by band and sequence end.
  void visible_columns(int64_t r, int64_t* low, int64_t* high) const {
    *low = 0, *high = at_.keys;
    if (!at_.band) return;
    int64_t position = first_ + at_.row + r - at_.key;
    if (*low < position - score_params_.band.left) *low = position - score_params_.band.left;
    if (*high > position + score_params_.band.right + 1)
      *high = position + score_params_.band.right + 1;
  }

 private:
  void plain_row(int64_t r, const BackRows& known, float* scores, float* d_weights);
  void strip(int64_t first, int64_t last, const BackRows& known, float* scores,
             float* d_weights, int64_t stride);
  void base_row(int64_t r, const BackRows& known, float* scores);
  void mask_row(int64_t r, float* scores);
  void weight_row(int64_t r, const BackRows& known, const float* slope, float* scores,
                  float* d_weights);
  F32 dropout_factor(U32 state, int64_t column) const;
  static U32 mix(U32 x) {
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
  }
  static U32 hash_word(U32 state, uint32_t word) {
    return mix(state ^ (U32{} + word)) + 0x9E3779B9u;
  }
  Runner* make(const Program* program, Runner* place, char** memory, int64_t columns);

  const BackwardParams& p_;
  const ScoreParams& score_params_;
  bool plain_;
  BackPlace at_{};
  int64_t first_ = 0;
  int64_t columns_;
  float* slope_;
  U32 head_state_{};
  alignas(64) char runners_[3][sizeof(Runner)];
  Runner* score_runner_;
  Runner* slope_runner_;
  Runner* mask_runner_;
};

inline Runner* BackScores::make(const Program* program, Runner* place, char** memory,
                                int64_t columns) {
  if (program == nullptr) return nullptr;
  static_assert(__is_trivially_copyable(Runner), "a runner lives where it is copied to");
  Runner made(*program, Along::kKeys, columns, *memory);
  memcpy(static_cast<void*>(place), &made, sizeof made);
  *memory += round_up(Runner::bytes(*program, columns), 64);
  return place;
}

inline BackScores::BackScores(const BackwardParams& p, int64_t columns, char* memory)
    : p_(p), score_params_(p.forward.score_params), columns_(columns) {
  plain_ = score_params_.score_program == nullptr && score_params_.bias.data == nullptr &&
           score_params_.mask.data == nullptr && score_params_.dropout.words == nullptr &&
           p.d_bias.data == nullptr;
  slope_ = reinterpret_cast<float*>(memory);
  memory += sizeof(float) * kStrip * columns;
  auto place = [this](int n) { return reinterpret_cast<Runner*>(runners_[n]); };
  score_runner_ = make(score_params_.score_program, place(0), &memory, columns);
  slope_runner_ = make(p.slope_program, place(1), &memory, columns);
  mask_runner_ = make(score_params_.mask_program, place(2), &memory, columns);
}

inline void BackScores::begin(const BackPlace& at) {
  bool same_head = at.b == at_.b && at.h == at_.h && at_.rows > 0;
  bool same_keys = same_head && at.key == at_.key && at.keys == at_.keys &&
                   at.from == at_.from && at.to == at_.to;
  at_ = at;
  first_ = score_params_.first(at.b);
  int64_t visible = (at.to < at.keys ? at.to : at.keys) - at.from;
  Runner* runners[] = {score_runner_, slope_runner_, mask_runner_};
  for (Runner* runner : runners) {
    if (runner == nullptr) continue;
    if (!same_head) runner->begin(at.b, at.h);
    if (!same_keys) runner->columns(at.key + at.from, visible);
  }
  if (score_params_.dropout.words != nullptr && !same_head) {
    head_state_ = U32{};
    for (int64_t i = 0; i < score_params_.dropout.count; ++i) {
      head_state_ = hash_word(head_state_, score_params_.dropout.words[i]);
    }
    head_state_ = hash_word(head_state_, static_cast<uint32_t>(at.b));
    head_state_ = hash_word(head_state_, static_cast<uint32_t>(at.h));
  }
}

inline void BackScores::plain_row(int64_t r, const BackRows& known, float* scores,
                                  float* d_weights) {
  const F32 factor = broadcast(score_params_.scale * kLog2OfE);
  const F32 shift = broadcast(known.shift[r]), delta = broadcast(known.delta[r]);
  int64_t low = at_.from, high = at_.to;
  if (at_.cut) visible_columns(r, &low, &high);
  for (int64_t c = at_.from; c < at_.to; c += kLanes) {
    if (c + kLanes <= low || c >= high) {
      store(scores + c, F32{});
      store(d_weights + c, F32{});
      continue;
    }
    F32 weight = exp2_fast(load(scores + c) * factor - shift);
    F32 gradient = weight * (load(d_weights + c) - delta);
    if (c < low || c + kLanes > high) {
      weight = select_lanes(low - c, high - c, weight, F32{});
      gradient = select_lanes(low - c, high - c, gradient, F32{});
    }
    store(scores + c, weight);
    store(d_weights + c, gradient);
  }
}

// Dropout factors of a vector of columns.
inline F32 BackScores::dropout_factor(U32 state, int64_t column) const {
  U32 key = (U32)lane_indices() + static_cast<uint32_t>(at_.key + column);
  U32 bits = (mix(state ^ key) + 0x9E3779B9u) >> 8;
  F32 uniform = __builtin_convertvector((I32)bits, F32) * broadcast(5.9604644775390625e-8f);
  const float rate = score_params_.dropout.rate;
  const float keep_factor = static_cast<float>(1.0 / (1.0 - static_cast<double>(rate)));
  return uniform >= broadcast(rate) ? broadcast(keep_factor) : F32{};
}

// Scores to base: scaled, biased, and NaN where a key or value is not finite.
inline void BackScores::base_row(int64_t r, const BackRows& known, float* scores) {
  const F32 factor = broadcast(score_params_.scale);
  for (int64_t c = at_.from; c < at_.to; c += kLanes) {
    store(scores + c, load(scores + c) * factor);
  }
  const int64_t high = at_.to < at_.keys ? at_.to : at_.keys;
  if (score_params_.bias.data != nullptr) {
    const int64_t step = score_params_.bias.stride[3];
    const float* bias = score_params_.bias.row(at_.b, at_.h, at_.row + r) + at_.key * step;
    for (int64_t c = at_.from; c < high; ++c) scores[c] += bias[c * step];
  }
  if (known.poison != nullptr) {
    for (int64_t c = at_.from; c < high; ++c) scores[c] += known.poison[c];
  }
}

// -inf where the band, the sequence end or the mask array forbids.
inline void BackScores::mask_row(int64_t r, float* scores) {
  int64_t low = at_.from, high = at_.to;
  if (at_.cut) visible_columns(r, &low, &high);
  if (low < at_.from) low = at_.from;
  if (low > at_.to) low = at_.to;
  if (high > at_.to) high = at_.to;
  if (high < low) high = low;
  for (int64_t c = at_.from; c < low; ++c) scores[c] = -kInf;
  for (int64_t c = high; c < at_.to; ++c) scores[c] = -kInf;
  if (score_params_.mask.data == nullptr) return;
  const int64_t step = score_params_.mask.stride[3];
  const uint8_t* mask = score_params_.mask.row(at_.b, at_.h, at_.row + r) + at_.key * step;
  for (int64_t c = low; c < high; ++c) {
    if (!mask[c * step]) scores[c] = -kInf;
  }
}

inline void BackScores::weight_row(int64_t r, const BackRows& known, const float* slope,
                                   float* scores, float* d_weights) {
  const F32 factor = broadcast(kLog2OfE), shift = broadcast(known.shift[r]),
            delta = broadcast(known.delta[r]);
  const bool drops = score_params_.dropout.words != nullptr;
  const uint32_t position = static_cast<uint32_t>(first_ + at_.row + r);
  const U32 state = drops ? hash_word(head_state_, position) : U32{};
  for (int64_t c = at_.from; c < at_.to; c += kLanes) {
    F32 score = load(scores + c);
    I32 visible = score != broadcast(-kInf);
    F32 weight = exp2_fast(score * factor - shift), d_weight = load(d_weights + c);
    F32 kept = weight;
    if (drops) {
      F32 drop = dropout_factor(state, c);
      kept = weight * drop;
      d_weight = d_weight * drop;
    }
    F32 gradient = weight * (d_weight - delta);
    if (slope != nullptr) gradient = gradient * load(slope + c);
    store(scores + c, visible ? kept : F32{});
    store(d_weights + c, visible ? gradient : F32{});
  }
  if (p_.d_bias.data == nullptr) return;
  const int64_t step = p_.d_bias.stride[3];
  float* d_bias = p_.d_bias.row(at_.b, at_.h, at_.row + r) + at_.key * step;
  const int64_t high = at_.to < at_.keys ? at_.to : at_.keys;
  for (int64_t c = at_.from; c < high; ++c) d_bias[c * step] += d_weights[c];
}

inline void BackScores::strip(int64_t first, int64_t last, const BackRows& known, float* scores,
                              float* d_weights, int64_t stride) {
  const int64_t count = last - first, position = first_ + at_.row + first;
  for (int64_t n = 0; n < count; ++n) base_row(first + n, known, scores + n * stride);
  float* from = scores + at_.from;
  if (slope_runner_ != nullptr) {
    for (int64_t n = 0; n < count; ++n) {
      slope_runner_->apply_slope(position + n, from + n * stride,
                                 slope_ + n * columns_ + at_.from);
    }
  }
  if (score_runner_ != nullptr) score_runner_->apply_score_mod(position, count, from, stride);
  if (at_.programs) mask_runner_->apply_mask(position, count, from, stride);
  for (int64_t n = 0; n < count; ++n) {
    mask_row(first + n, scores + n * stride);
    const float* slope = slope_runner_ == nullptr ? nullptr : slope_ + n * columns_;
    weight_row(first + n, known, slope, scores + n * stride, d_weights + n * stride);
  }
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
