// The score stage between Q K^T and the softmax: scale, bias, score_mod, mask.

#pragma once

#include "attention/mod_runner.h"
#include "attention/online_softmax.h"

namespace raptax {
namespace RAPTAX_ISA {

// The kind of a rectangle of scores, from the kinds of the tiles that it overlaps.
static BlockKind block_kind(const BlockKinds& kinds, int64_t b, int64_t h, int64_t t,
                            int64_t rows, int64_t s, int64_t columns) {
  if (kinds.data == nullptr) return kPartial;
  bool any_nonempty = false, all_full = true;
  for (int64_t i = t / kinds.queries; i * kinds.queries < t + rows; ++i) {
    for (int64_t j = s / kinds.keys; j * kinds.keys < s + columns; ++j) {
      BlockKind kind = kinds.at(b, h, i, j);
      any_nonempty |= kind != kEmpty;
      all_full &= kind == kFull;
    }
  }
  return !any_nonempty ? kEmpty : all_full ? kFull : kPartial;
}

// The score stage of one head, applied to one block of keys at a time.
class ScoreStage {
 public:
  static size_t bytes(const ScoreParams& params) {
    return bytes_of(params.score_program) + bytes_of(params.mask_program);
  }

  ScoreStage(const ScoreParams& params, int64_t b, int64_t h, char* memory)
      : params_(params), b_(b), h_(h) {
    score_ = make_runner(params.score_program, memory, score_place_);
    mask_ =
        make_runner(params.mask_program, memory + bytes_of(params.score_program), mask_place_);
  }

  // Selects keys first_key .. first_key + count - 1. Returns whether rows need apply();
  // if not, scores only have to be multiplied by the scale.
  bool begin_block(int64_t first_key, int64_t count, BlockKind kind) {
    first_key_ = first_key;
    count_ = count;
    masked_ = mask_ != nullptr && kind != kFull;
    if (score_ != nullptr) score_->columns(first_key, count);
    if (masked_) mask_->columns(first_key, count);
    // The softmax of unmodified scores takes the maximum before scaling: needs scale >
    // 0.
    return params_.scale <= 0 || params_.bias.data != nullptr || score_ != nullptr ||
           params_.mask.data != nullptr || masked_;
  }

  // Turns products into scores, -inf where masked, in rows `stride` apart; the caller
  // applies the band. `position` is the absolute position of query t.
  void apply(int64_t t, int64_t position, int64_t rows, float* scores, int64_t stride,
             Columns at) {
    at.last = min(at.last, count_);
    bool scale = params_.scale != 1 || params_.bias.data != nullptr;
    for (int64_t r = 0; r < rows && scale; ++r) scale_row(t + r, scores + r * stride, at);
    if (score_ != nullptr) score_->apply_score_mod(position, rows, scores, stride);
    for (int64_t r = 0; r < rows && params_.mask.data != nullptr; ++r) {
      apply_mask(t + r, scores + r * stride, at);
    }
    if (masked_ && !mask_->apply_mask(position, rows, scores, stride)) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = at.first; j < at.last; ++j) scores[r * stride + j] = -kInf;
      }
    }
  }

 private:
  void scale_row(int64_t t, float* scores, Columns at) {
    int64_t j = at.first / kLanes * kLanes;
    if (params_.bias.data == nullptr) {
      for (; j < at.last; j += kLanes) store(scores + j, load(scores + j) * params_.scale);
      return;
    }
    int64_t stride = params_.bias.stride[3];
    const float* bias = params_.bias.row(b_, h_, t) + first_key_ * stride;
    for (; stride == 1 && j + kLanes <= at.last; j += kLanes) {
      store(scores + j, load(scores + j) * params_.scale + load(bias + j));
    }
    for (; j < at.last; ++j) scores[j] = scores[j] * params_.scale + bias[j * stride];
  }
  void apply_mask(int64_t t, float* scores, Columns at) {
    int64_t stride = params_.mask.stride[3], j = at.first;
    const uint8_t* mask = params_.mask.row(b_, h_, t) + first_key_ * stride;
    for (; stride == 1 && j + kLanes <= at.last; j += kLanes) {
      U8 bytes;
      memcpy(&bytes, mask + j, sizeof bytes);
      I32 visible = __builtin_convertvector(bytes, I32) != 0;
      store(scores + j, visible ? load(scores + j) : broadcast(-kInf));
    }
    for (; j < at.last; ++j) {
      scores[j] = mask[j * stride] != 0 ? scores[j] : -kInf;
    }
  }

  static size_t bytes_of(const Program* program) {
    return program == nullptr ? 0 : round_up(Runner::bytes(*program, kBlockKeys), 64);
  }
  Runner* make_runner(const Program* program, char* memory, char* place) {
    if (program == nullptr) return nullptr;
    Runner runner(*program, Along::kKeys, kBlockKeys, memory);
    runner.begin(b_, h_);
    memcpy(static_cast<void*>(place), &runner, sizeof runner);
    return reinterpret_cast<Runner*>(place);
  }

  const ScoreParams& params_;
  int64_t b_, h_, first_key_ = 0, count_ = 0;
  bool masked_ = false;
  Runner *score_, *mask_;
  alignas(Runner) char score_place_[sizeof(Runner)];
  alignas(Runner) char mask_place_[sizeof(Runner)];
};

}  // namespace RAPTAX_ISA
}  // namespace raptax
