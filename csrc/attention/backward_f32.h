// The backward kernel's float32 GEMMs, for inputs of any dtype.

#pragma once

#include "attention/backward_scores.h"
#include "gemm/gemm_backward_f32.h"

namespace raptax {
namespace RAPTAX_ISA {

// A block of keys against a block of queries:
//
//   scores = Q K^T,  d_weights = dO V^T;  dV += W^T dO,  dK += dS^T Q,  dQ += dS K.
//
// The first two read transposed panels of kBackPanel keys, the other three row-major
// data.
class BackFloat {
 public:
  static constexpr int64_t kQueries = 96, kKeys = 192, kAlign = kBackPanel;
  static_assert(kKeys % kBackPanel == 0 && kQueries % kBackRows == 0 &&
                    kBackPanel % kBackRows == 0,
                "blocks are made of whole panels");

  static size_t bytes(const Shape& shape) {
    return sizeof(float) * (lay_out(shape, nullptr, nullptr) + 16);
  }

  BackFloat(const BackwardParams& p, float* memory) : p_(p), shape_(p.forward.shape) {
    lay_out(shape_, this, memory);
  }

  // Whether dQ may be accumulated in the output itself.
  static bool direct(const BackwardParams& p) {
    return p.forward.type == Type::kF32 && p.forward.shape.D % kLanes == 0;
  }
  // The factor still to be applied to accumulated dQ.
  static float query_factor(const BackwardParams&) { return 1; }

  // Loads a block of keys and values, and clears dK and dV.
  void keys(int64_t b, int64_t kv, int64_t key, int64_t keys) {
    const ForwardParams& f = p_.forward;
    const int64_t row = (b * shape_.K + kv) * shape_.S + key;
    poison_ = nullptr;
    rows_of(f.key, row, keys, shape_.D, k_row_, key_);
    transpose_panels(key_, keys, shape_.D, k_row_, key_panels_);
    rows_of(f.value, row, keys, shape_.E, v_row_, d_value_);
    transpose_panels(d_value_, keys, shape_.E, v_row_, value_panels_);
    // dQ = scale * dS K: the scale is applied to K once.
    for (int64_t i = 0; i < keys * k_row_; ++i) key_[i] *= f.score_params.scale;
    memset(d_key_, 0, sizeof(float) * kKeys * k_row_);
    memset(d_value_, 0, sizeof(float) * kKeys * v_row_);
  }

  // By column: NaN where a key or value is not finite; null if all are.
  const float* poison() const { return poison_; }

  // Loads a block of queries. Adds NaN to `shift` where a query is not finite.
  void queries(const BackPlace& at, float* shift) {
    const ForwardParams& f = p_.forward;
    const int64_t first = (at.b * shape_.H + at.h) * shape_.T + at.row;
    rows_ = round_up(at.rows, kBackRows);
    for (int64_t r = 0; r < at.rows; ++r) {
      if (!back_row(f.query, f.type, (first + r) * shape_.D, shape_.D, k_row_,
                    query_ + r * k_row_)) {
        shift[r] += __builtin_nanf("");
      }
      back_row(p_.d_out, f.type, (first + r) * shape_.E, shape_.E, v_row_, d_out_ + r * v_row_);
    }
    memset(query_ + at.rows * k_row_, 0, sizeof(float) * (rows_ - at.rows) * k_row_);
    memset(d_out_ + at.rows * v_row_, 0, sizeof(float) * (rows_ - at.rows) * v_row_);
  }

  // Recomputes the weights, and the gradients of the scores.
  void compute_weights(const BackPlace& at, BackScores* scores, const BackRows& known) {
    for (int64_t c = at.from; c < at.to; c += kBackPanel) {
      back_gemm_columns<kBackVectors>(rows_, shape_.D, {query_, k_row_, false},
                                      key_panels_ + c * shape_.D, kBackPanel, weights_ + c,
                                      kRow, false);
      back_gemm_columns<kBackVectors>(rows_, shape_.E, {d_out_, v_row_, false},
                                      value_panels_ + c * shape_.E, kBackPanel, slopes_ + c,
                                      kRow, false);
    }
    scores->rows(0, at.rows, known, weights_, slopes_, kRow);
  }

  void add_to_keys(const BackPlace& at) {
    const int64_t count = at.to - at.from, c = at.from;
    back_gemm(count, v_size_, at.rows, {weights_ + c, kRow, true}, d_out_, v_row_,
              d_value_ + c * v_row_, v_row_, true);
    back_gemm(count, k_size_, at.rows, {slopes_ + c, kRow, true}, query_, k_row_,
              d_key_ + c * k_row_, k_row_, true);
  }

  // Adds to `sums`, or overwrites them. They have rows of `stride` floats.
  void add_to_queries(const BackPlace& at, float* sums, int64_t stride, bool add) {
    const int64_t c = at.from, keys = (at.to < at.keys ? at.to : at.keys) - c;
    const int64_t whole = round_down(at.rows, kBackRows);
    const float* key = key_ + c * k_row_;
    back_gemm(whole, k_size_, keys, {slopes_ + c, kRow, false}, key, k_row_, sums, stride, add);
    if (whole == at.rows) return;
    // The last, partial block of rows, in the memory of the queries, now unused.
    float* part = query_;
    back_gemm(kBackRows, k_size_, keys, {slopes_ + whole * kRow + c, kRow, false}, key, k_row_,
              part, k_row_, false);
    for (int64_t r = whole; r < at.rows; ++r, part += k_row_) {
      float* to = sums + r * stride;
      for (int64_t d = 0; d < k_size_; ++d) to[d] = add ? to[d] + part[d] : part[d];
    }
  }

  // Writes dK and dV of the block.
  void finish(int64_t b, int64_t kv, int64_t key, int64_t keys) {
    const ForwardParams& f = p_.forward;
    const int64_t row = (b * shape_.K + kv) * shape_.S + key;
    for (int64_t r = 0; r < keys; ++r) {
      back_put_row(d_key_ + r * k_row_, f.score_params.scale, p_.d_key, f.type,
                   (row + r) * shape_.D, shape_.D);
      back_put_row(d_value_ + r * v_row_, 1, p_.d_value, f.type, (row + r) * shape_.E,
                   shape_.E);
    }
  }

 private:
  static constexpr int64_t kRow = kKeys + 16;  // floats between rows of scores

  // Row stride in floats: an odd number of cache lines, which avoids conflicts between
  // rows in the sets of the L1 cache.
  static int64_t odd_lines(int64_t size) {
    const int64_t lines = round_up(size, 16) / 16;
    return 16 * (lines % 2 == 0 ? lines + 1 : lines);
  }

  // Assigns scratch memory; returns its size in floats.
  static int64_t lay_out(const Shape& shape, BackFloat* self, float* memory) {
    const int64_t k = odd_lines(shape.D), v = odd_lines(shape.E);
    int64_t used = 0;
    auto take = [&](float* BackFloat::* array, int64_t size) {
      if (self != nullptr) self->*array = memory + used;
      used += round_up(size, 16);
    };
    take(&BackFloat::key_, kKeys * k);
    take(&BackFloat::key_panels_, kKeys * shape.D);
    take(&BackFloat::value_panels_, kKeys * shape.E);
    take(&BackFloat::d_key_, kKeys * k);
    take(&BackFloat::d_value_, kKeys * v);
    take(&BackFloat::query_, kQueries * k);
    take(&BackFloat::d_out_, kQueries * v);
    take(&BackFloat::weights_, kQueries * kRow);
    take(&BackFloat::slopes_, kQueries * kRow);
    take(&BackFloat::poison_room_, kKeys);
    if (self != nullptr) {
      self->k_size_ = round_up(shape.D, kLanes), self->v_size_ = round_up(shape.E, kLanes);
      self->k_row_ = k, self->v_row_ = v;
    }
    return used;
  }

  void rows_of(const void* from, int64_t row, int64_t keys, int64_t size, int64_t padded,
               float* to) {
    for (int64_t r = 0; r < keys; ++r) {
      if (back_row(from, p_.forward.type, (row + r) * size, size, padded, to + r * padded)) {
        continue;
      }
      if (poison_ == nullptr) memset(poison_room_, 0, sizeof(float) * kKeys);
      poison_room_[r] = __builtin_nanf("");
      poison_ = poison_room_;
    }
  }

  // Rows of keys to panels: panels[n][d][c] is entry d of key n * kBackPanel + c.
  static void transpose_panels(const float* rows, int64_t keys, int64_t size, int64_t stride,
                               float* panels) {
    for (int64_t n = 0; n < keys; n += kLanes) {
      float* to = panels + n / kBackPanel * kBackPanel * size + n % kBackPanel;
      for (int64_t d = 0; d < size; d += kLanes) {
        F32 block[kLanes];
        for (int64_t c = 0; c < kLanes; ++c) {
          block[c] = n + c < keys ? load(rows + (n + c) * stride + d) : F32{};
        }
        transpose(block);
        for (int64_t i = 0; i < kLanes && d + i < size; ++i) {
          store(to + (d + i) * kBackPanel, block[i]);
        }
      }
    }
    for (int64_t n = round_up(keys, kLanes); n < round_up(keys, kBackPanel); n += kLanes) {
      float* to = panels + n / kBackPanel * kBackPanel * size + n % kBackPanel;
      for (int64_t d = 0; d < size; ++d) store(to + d * kBackPanel, F32{});
    }
  }

  const BackwardParams& p_;
  const Shape& shape_;
  int64_t k_size_ = 0, v_size_ = 0;  // D and E, in whole vectors
  int64_t k_row_ = 0, v_row_ = 0;    // floats between rows of them
  int64_t rows_ = 0;                 // of queries, rounded up to kBackRows
  float *key_ = nullptr, *key_panels_ = nullptr, *value_panels_ = nullptr;
  float *d_key_ = nullptr, *d_value_ = nullptr;
  float *query_ = nullptr, *d_out_ = nullptr;
  float *weights_ = nullptr, *slopes_ = nullptr;
  float *poison_room_ = nullptr, *poison_ = nullptr;
};

}  // namespace RAPTAX_ISA
}  // namespace raptax
