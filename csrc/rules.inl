// What happens to a row of scores between the product and the softmax.

#pragma once

#include "program.inl"
#include "softmax.inl"

namespace raptax {
namespace RAPTAX_ISA {

// What the whole mask leaves of a rectangle of scores, from the tiles that it touches.
static Kind kind_of(const TileKinds& kinds, int64_t b, int64_t h, int64_t t, int64_t rows,
                    int64_t s, int64_t columns) {
  if (kinds.data == nullptr) return kPartial;
  bool some = false, every = true;
  for (int64_t i = t / kinds.queries; i * kinds.queries < t + rows; ++i) {
    for (int64_t j = s / kinds.keys; j * kinds.keys < s + columns; ++j) {
      Kind kind = kinds.at(b, h, i, j);
      some |= kind != kEmpty;
      every &= kind == kFull;
    }
  }
  return !some ? kEmpty : every ? kFull : kPartial;
}

// The rules of one head, ready for one block of keys after another.
class Changes {
 public:
  static size_t bytes(const Rules& rules) {
    return bytes_of(rules.score_program) + bytes_of(rules.mask_program);
  }

  Changes(const Rules& rules, int64_t b, int64_t h, char* memory)
      : rules_(rules), b_(b), h_(h) {
    score_ = made(rules.score_program, memory, score_place_);
    mask_ = made(rules.mask_program, memory + bytes_of(rules.score_program), mask_place_);
  }

  // Keys first_key .. first_key + count - 1 are next. Returns whether rows of them need
  // change(); if not, scores only have to be multiplied with the scale.
  bool keys(int64_t first_key, int64_t count, Kind kind) {
    first_key_ = first_key;
    count_ = count;
    masked_ = mask_ != nullptr && kind != kFull;
    if (score_ != nullptr) score_->columns(first_key, count);
    if (masked_) mask_->columns(first_key, count);
    // The softmax without changes asks for a scale that leaves the largest the largest.
    return rules_.scale <= 0 || rules_.bias.data != nullptr || score_ != nullptr ||
           rules_.mask.data != nullptr || masked_;
  }

  // Products to scores, -inf where masked, in rows `stride` apart; the band is the
  // caller's. Query t of the sequence stands at `position`.
  void change(int64_t t, int64_t position, int64_t rows, float* scores, int64_t stride,
              Columns at) {
    at.last = least(at.last, count_);
    bool scale = rules_.scale != 1 || rules_.bias.data != nullptr;
    for (int64_t r = 0; r < rows && scale; ++r) scale_row(t + r, scores + r * stride, at);
    if (score_ != nullptr) score_->change(position, rows, scores, stride);
    for (int64_t r = 0; r < rows && rules_.mask.data != nullptr; ++r) {
      apply_mask(t + r, scores + r * stride, at);
    }
    if (masked_ && !mask_->mask(position, rows, scores, stride)) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = at.first; j < at.last; ++j) scores[r * stride + j] = -kInf;
      }
    }
  }

 private:
  void scale_row(int64_t t, float* scores, Columns at) {
    int64_t j = at.first / kLanes * kLanes;
    if (rules_.bias.data == nullptr) {
      for (; j < at.last; j += kLanes) store(scores + j, load(scores + j) * rules_.scale);
      return;
    }
    int64_t stride = rules_.bias.stride[3];
    const float* bias = rules_.bias.row(b_, h_, t) + first_key_ * stride;
    for (; stride == 1 && j + kLanes <= at.last; j += kLanes) {
      store(scores + j, load(scores + j) * rules_.scale + load(bias + j));
    }
    for (; j < at.last; ++j) scores[j] = scores[j] * rules_.scale + bias[j * stride];
  }
  void apply_mask(int64_t t, float* scores, Columns at) {
    int64_t stride = rules_.mask.stride[3], j = at.first;
    const uint8_t* mask = rules_.mask.row(b_, h_, t) + first_key_ * stride;
    for (; stride == 1 && j + kLanes <= at.last; j += kLanes) {
      U8 bytes;
      memcpy(&bytes, mask + j, sizeof bytes);
      I32 seen = __builtin_convertvector(bytes, I32) != 0;
      store(scores + j, seen ? load(scores + j) : all(-kInf));
    }
    for (; j < at.last; ++j) {
      scores[j] = mask[j * stride] != 0 ? scores[j] : -kInf;
    }
  }

  static size_t bytes_of(const Program* program) {
    return program == nullptr ? 0 : rounded_up(Runner::bytes(*program, kKeys), 64);
  }
  Runner* made(const Program* program, char* memory, char* place) {
    if (program == nullptr) return nullptr;
    Runner runner(*program, Along::kKeys, kKeys, memory);
    runner.begin(b_, h_);
    memcpy(static_cast<void*>(place), &runner, sizeof runner);
    return reinterpret_cast<Runner*>(place);
  }

  const Rules& rules_;
  int64_t b_, h_, first_key_ = 0, count_ = 0;
  bool masked_ = false;
  Runner *score_, *mask_;
  alignas(Runner) char score_place_[sizeof(Runner)];
  alignas(Runner) char mask_place_[sizeof(Runner)];
};

}  // namespace RAPTAX_ISA
}  // namespace raptax
