// The backward pass: FlashAttention-2 (Dao 2023, arXiv:2307.08691). See BackwardParams
// in attention_params.h.
//
// A task is a block of keys of one kv head. It loops over all query blocks of the
// group, recomputes the weights, accumulates dK and dV locally, and adds to dQ.
// Determinism: the tasks of a head add to a block of dQ in the order of their keys,
// each waiting on an ordered counter, so sums do not depend on thread timing. Tasks
// start staggered by one block and so seldom wait.

#pragma once

#if defined(__AMX_BF16__)
#include "attention/backward_amx.h"
#endif
#include "api/kernel_table.h"
#include "attention/backward_f32.h"
#include "runtime/ordered_counter.h"
#include "runtime/scratch.h"
#include "runtime/thread_pool.h"

namespace raptax {
namespace RAPTAX_ISA {

// Bytes of dQ accumulators over all heads; beyond it, dQ is computed in a second pass.
constexpr int64_t kBackSums = int64_t{24} << 20;

template <typename Engine>
class BackPass {
 public:
  BackPass(const BackwardParams& p, const ThreadPool& threads)
      : p_(p), shape_(p.forward.shape), threads_(threads) {
    group_ = shape_.H / shape_.K;
    key_blocks_ = (shape_.S + Engine::kKeys - 1) / Engine::kKeys;
    query_blocks_ = (shape_.T + Engine::kQueries - 1) / Engine::kQueries;
    width_ = round_up(shape_.D, 32);
    sum_rows_ = query_blocks_ * Engine::kQueries;
    head_sums_ = group_ * sum_rows_ * width_;
    direct_ = Engine::direct(p);
    separate_dq_ = !direct_ && head_sums_ * 4 > kBackSums;
    const auto& stride = p.d_bias.stride;
    const bool bias = p.d_bias.data != nullptr;
    shared_bias_ =
        bias && ((stride[0] == 0 && shape_.B > 1) || (stride[1] == 0 && shape_.H > 1));
    // Blocks of different queries add to the same element of d_bias.
    serial_ = bias && stride[2] == 0 && (shared_bias_ || stride[3] == 0);
  }

  void run() {
    const int64_t heads = shape_.B * shape_.K, rows = shape_.B * shape_.H * shape_.T;
    slots_ = direct_ || separate_dq_ ? 0 : kBackSums / (head_sums_ * 4);
    if (slots_ > threads_.threads() + 1) slots_ = threads_.threads() + 1;
    if (slots_ > heads) slots_ = heads;
    Buffer known(sizeof(float) * 2 * rows);
    Buffer sums(sizeof(float) * slots_ * head_sums_);
    const int64_t sequences =
        shared_bias_ ? query_blocks_ : shape_.B * shape_.H * query_blocks_;
    Buffer counts(sizeof(int32_t) * (sequences + heads));
    shift_ = known.as<float>();
    delta_ = shift_ + rows;
    sums_ = sums.as<float>();
    sequences_ = counts.as<int32_t>();
    head_done_ = sequences_ + sequences;
    memset(sequences_, 0, sizeof(int32_t) * (sequences + heads));

    threads_.parallel_for(shape_.B * shape_.H, [this](int64_t n) { prepare_rows(n); });
    const auto work = [this](int64_t n) { task(n); };
    if (serial_) {
      for (int64_t n = 0; n < heads * key_blocks_; ++n) work(n);
    } else {
      threads_.parallel_for(heads * key_blocks_, work);
    }
    if (separate_dq_) {
      const int64_t parts = (query_blocks_ + kRange - 1) / kRange;
      threads_.parallel_for(shape_.B * shape_.H * parts,
                            [this, parts](int64_t n) { queries(n / parts, n % parts); });
    }
    if (p_.d_sinks != nullptr) sinks();
  }

 private:
  static constexpr int64_t kRange = 16;  // query blocks per task of the dQ pass

  // Scratch and state of one task.
  struct Worker {
    Buffer memory;
    Engine engine;
    BackScores scores;

    explicit Worker(const BackwardParams& p)
        : memory(Engine::bytes(p.forward.shape) + 64 + BackScores::bytes(p, Engine::kKeys)),
          engine(p, memory.as<float>()),
          scores(p, Engine::kKeys,
                 memory.as<char>() + round_up(Engine::bytes(p.forward.shape), 64)) {}
  };

  // Per-row constants: shift = log2(e) * lse, delta = sum(dO * O) - dL.
  void prepare_rows(int64_t head) {
    FlushDenormals quiet;
    const ForwardParams& f = p_.forward;
    for (int64_t row = head * shape_.T; row < (head + 1) * shape_.T; ++row) {
      if (f.lse[row] == -kInf) {  // an empty row: all weights are 0
        shift_[row] = kInf;
        delta_[row] = 0;
        continue;
      }
      shift_[row] = f.lse[row] * kLog2OfE;
      delta_[row] = back_dot(p_.d_out, f.out, f.type, row * shape_.E, shape_.E) - p_.d_lse[row];
    }
  }

  // d sink = -sum of exp(sink - lse) * delta.
  void sinks() {
    for (int64_t h = 0; h < shape_.H; ++h) {
      const float sink = p_.forward.score_params.sinks[h] * kLog2OfE;
      float sum = 0;
      for (int64_t b = 0; b < shape_.B; ++b) {
        const int64_t row = (b * shape_.H + h) * shape_.T;
        for (int64_t t = 0; t < shape_.T; ++t) {
          if (shift_[row + t] == kInf) continue;
          sum += exp2_fast(broadcast(sink - shift_[row + t]))[0] * delta_[row + t];
        }
      }
      p_.d_sinks[h] = -sum;
    }
  }

  BackPlace place(int64_t b, int64_t h, int64_t i, int64_t j) const {
    BackPlace at{};
    at.b = b, at.h = h;
    at.row = i * Engine::kQueries, at.key = j * Engine::kKeys;
    at.rows = shape_.T - at.row < Engine::kQueries ? shape_.T - at.row : Engine::kQueries;
    at.keys = shape_.S - at.key < Engine::kKeys ? shape_.S - at.key : Engine::kKeys;
    return at;
  }

  // Weights and score gradients of one block.
  void compute_weights(Worker* worker, const BackPlace& at) {
    const int64_t row = (at.b * shape_.H + at.h) * shape_.T + at.row;
    float shift[Engine::kQueries];
    memcpy(shift, shift_ + row, sizeof(float) * at.rows);
    worker->engine.queries(at, shift);
    worker->scores.begin(at);
    worker->engine.compute_weights(at, &worker->scores,
                                   {shift, delta_ + row, worker->engine.poison()});
  }

  // Key block j of a kv head.
  void task(int64_t n) {
    FlushDenormals quiet;
    const int64_t head = n / key_blocks_, j = n % key_blocks_;
    const int64_t b = head / shape_.K, kv = head % shape_.K;
    if (slots_ > 0 && head >= slots_) wait_for(head_done_ + head - slots_, 1);
    Worker worker(p_);
    const BackPlace first = place(b, kv * group_, 0, j);
    worker.engine.keys(b, kv, first.key, first.keys);
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t h = kv * group_ + g;
      const int64_t sequence = shared_bias_ ? n * group_ + g : j;
      int32_t* sequences = sequences_ + (shared_bias_ ? 0 : (b * shape_.H + h) * query_blocks_);
      for (int64_t i = 0; i < query_blocks_; ++i) {
        visit(&worker, place(b, h, i, j), sequences + i, static_cast<int32_t>(sequence));
      }
    }
    worker.engine.finish(b, kv, first.key, first.keys);
    if (j == key_blocks_ - 1) publish(head_done_ + head, 1);
  }

  void visit(Worker* worker, BackPlace at, int32_t* sequences, int32_t sequence) {
    const bool any_visible = back_visible(p_.forward.score_params, Engine::kAlign, &at);
    const bool bias = p_.d_bias.data != nullptr;
    if (any_visible) {
      if (bias) wait_for(sequences, sequence);
      compute_weights(worker, at);
      worker->engine.add_to_keys(at);
    }
    if (separate_dq_ && !bias) return;
    wait_for(sequences, sequence);
    if (!separate_dq_) add_to_queries(worker, at, any_visible);
    publish(sequences, sequence + 1);
  }

  void add_to_queries(Worker* worker, const BackPlace& at, bool any_visible) {
    const bool first = at.key == 0, last = at.key + at.keys == shape_.S;
    const int64_t row = (at.b * shape_.H + at.h) * shape_.T + at.row;
    float* sums;
    if (direct_) {
      sums = static_cast<float*>(p_.d_query) + row * shape_.D;
    } else {
      const int64_t slot = (at.b * shape_.K + at.h / group_) % slots_;
      sums = sums_ + slot * head_sums_ + ((at.h % group_) * sum_rows_ + at.row) * width_;
    }
    const int64_t stride = direct_ ? shape_.D : width_;
    if (any_visible) {
      worker->engine.add_to_queries(at, sums, stride, !first);
    } else if (first) {
      memset(sums, 0, sizeof(float) * at.rows * stride);
    }
    if (last && !direct_) put_queries(sums, row, at.rows);
  }

  void put_queries(const float* sums, int64_t row, int64_t rows) {
    const float factor = Engine::query_factor(p_);
    for (int64_t r = 0; r < rows; ++r) {
      back_put_row(sums + r * width_, factor, p_.d_query, p_.forward.type, (row + r) * shape_.D,
                   shape_.D);
    }
  }

  // The dQ pass, for one range of query blocks of a head.
  void queries(int64_t head, int64_t part) {
    FlushDenormals quiet;
    const int64_t b = head / shape_.H, h = head % shape_.H;
    const int64_t end =
        (part + 1) * kRange < query_blocks_ ? (part + 1) * kRange : query_blocks_;
    BackwardParams plain = p_;
    plain.d_bias.data = nullptr;
    Worker worker(plain);
    Buffer memory(sizeof(float) * kRange * Engine::kQueries * width_);
    memset(memory.as<float>(), 0, sizeof(float) * kRange * Engine::kQueries * width_);
    for (int64_t j = 0; j < key_blocks_; ++j) {
      bool loaded = false;
      for (int64_t i = part * kRange; i < end; ++i) {
        BackPlace at = place(b, h, i, j);
        if (!back_visible(p_.forward.score_params, Engine::kAlign, &at)) continue;
        if (!loaded) worker.engine.keys(b, h / group_, at.key, at.keys);
        loaded = true;
        compute_weights(&worker, at);
        float* sums = memory.as<float>() + (i - part * kRange) * Engine::kQueries * width_;
        worker.engine.add_to_queries(at, sums, width_, true);
      }
    }
    for (int64_t i = part * kRange; i < end; ++i) {
      const BackPlace at = place(b, h, i, 0);
      put_queries(memory.as<float>() + (i - part * kRange) * Engine::kQueries * width_,
                  head * shape_.T + at.row, at.rows);
    }
  }

  const BackwardParams& p_;
  const Shape& shape_;
  const ThreadPool& threads_;
  int64_t group_, key_blocks_, query_blocks_;
  int64_t width_;      // of a row of sums of dQ
  int64_t sum_rows_;   // of them for a head, in whole blocks
  int64_t head_sums_;  // floats of the sums of a group
  int64_t slots_ = 0;  // kv heads with dQ accumulators at a time
  bool direct_;        // dQ is accumulated in the output itself
  bool separate_dq_;   // dQ is computed in a second pass
  bool shared_bias_;   // heads or sequences add to the same d_bias
  bool serial_;        // tasks must run one after another
  float *shift_ = nullptr, *delta_ = nullptr, *sums_ = nullptr;
  int32_t *sequences_ = nullptr, *head_done_ = nullptr;
};

static void backward(const BackwardParams& p, const ThreadPool& threads) {
#if defined(__AMX_BF16__)
  if (p.forward.type == Type::kBF16) return BackPass<BackAmx<1>>(p, threads).run();
  if (worth_parts(p.forward.shape)) return BackPass<BackAmx<3>>(p, threads).run();
#endif
  BackPass<BackFloat>(p, threads).run();
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
