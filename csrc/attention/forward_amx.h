// The forward pass on AMX, of bfloat16, or of float32 in three bfloat16 parts: see
// pack_amx.h.
//
// A task is cut into QK blocks (kBlockRows query rows x one block of keys), which pass
// through three stages: scores = queries keys^T, their softmax, and output += weights
// values. Software pipelining: while the vector units do the softmax of one QK block,
// the tile unit computes the scores of the next and the output of the previous one.

#pragma once

#include "attention/online_softmax_amx.h"
#include "attention/visible_blocks.h"
#include "gemm/gemm_amx.h"

namespace raptax {
namespace RAPTAX_ISA {

constexpr int64_t kAmxTaskQueries = 512;  // query rows of a task, at most
constexpr int64_t kBlockRows = 64;        // query rows of a QK block
constexpr int64_t kProductRows = 32;      // rows of a tile product
constexpr int64_t kScoreStride =
    kBlockKeys + kLanes;  // not a power of 2, which would conflict in cache sets

// Sizes, in elements, of packed arrays.
template <int kParts>
struct AmxSizes {
  int64_t D, E;  // rounded up

  explicit AmxSizes(const Shape& shape)
      : D(round_up(shape.D, kTileDepth)), E(round_up(shape.E, kTileDepth)) {}

  int64_t keys() const { return kBlockKeys * kParts * D; }
  int64_t block() const { return kBlockKeys * kParts * (D + E); }
  int64_t query() const { return kParts * D; }
  int64_t out_stride() const { return E + kLanes; }
};

template <int kParts>
static void pack_block_amx_of(const ForwardParams& f, int64_t b, int64_t kv, int64_t block,
                              Bf16* packed) {
  const Shape& s = f.shape;
  int64_t row = (b * s.K + kv) * s.S + block * kBlockKeys;
  pack_block_amx<kParts>({f.type, f.key, row * s.D, s.D}, {f.type, f.value, row * s.E, s.E},
                         min(kBlockKeys, s.S - block * kBlockKeys), packed,
                         packed + AmxSizes<kParts>(s).keys());
}

// Up to kAmxQueries rows of one head. Its memory: see bytes().
template <int kParts>
class AmxTile {
  typedef AmxSizes<kParts> Sizes;

 public:
  static size_t bytes(const ForwardParams& f, int64_t rows) {
    Sizes sizes(f.shape);
    size_t bytes = kOwnBlocks * sizes.block() * sizeof(Bf16);      // when not packed before
    bytes += rows * sizes.query() * sizeof(Bf16);                  // query_
    bytes += rows * sizes.out_stride() * sizeof(float);            // out_
    bytes += 2 * kBlockRows * kScoreStride * sizeof(float);        // scores_
    bytes += 2 * kBlockRows * kParts * kBlockKeys * sizeof(Bf16);  // weights_
    bytes += rows * (kLanes + 2) * sizeof(float);  // row_sum_, row_max_, rescale_
    bytes += round_up(product_count(sizes) * sizeof(TileProduct), 64);
    return bytes + ScoreStage::bytes(f.score_params);
  }

  AmxTile(const ForwardParams& f, int64_t b, int64_t h, int64_t t, int64_t rows, char* memory)
      : f_(f),
        sizes_(f.shape),
        b_(b),
        h_(h),
        t_(t),
        rows_(min(rows, f.shape.T - t)),
        position_(f.score_params.first(b) + t),
        block_(take<Bf16>(&memory, kOwnBlocks * sizes_.block())),
        query_(take<Bf16>(&memory, rows * sizes_.query())),
        out_(take<float>(&memory, rows * sizes_.out_stride())),
        scores_(take<float>(&memory, 2 * kBlockRows * kScoreStride)),
        weights_(take<Bf16>(&memory, 2 * kBlockRows * kParts * kBlockKeys)),
        row_sum_(take<float>(&memory, rows * kLanes)),
        row_max_(take<float>(&memory, rows)),
        rescale_(take<float>(&memory, rows)),
        queue_(take<TileProduct>(&memory, product_count(sizes_))),
        stage_(f.score_params, b, h, memory) {}

  // `packed` holds the blocks of the kv head from the one of key 0 on, or is null.
  void run(const Bf16* packed) {
    begin();
    QKBlock before{}, now{}, next = first_qk_block(packed);
    while (before.rows != 0 || now.rows != 0 || next.rows != 0) {
      queue_.clear();
      if (before.rows != 0) queue_values(before);
      if (next.rows != 0) queue_keys(next);
      if (now.rows != 0) softmax(now);
      queue_.finish();
      if (now.rows != 0) rescale(now);
      before = now;
      now = next;
      if (next.rows != 0) next = next_qk_block(next, packed);
    }
    finish();
  }

 private:
  // Query rows row .. row + rows - 1 of the tile against one block of keys. `side`
  // selects its half of the double-buffered scores_ and weights_.
  struct QKBlock {
    int64_t row, rows;  // 0: no block
    int64_t block, count;
    BlockKind kind;
    const Bf16* packed;
    int64_t side;
    bool sees_all;  // every row sees every key of a full block

    int64_t first_key() const { return block * kBlockKeys; }
  };

  template <typename T>
  static T* take(char** memory, int64_t count) {
    T* taken = reinterpret_cast<T*>(*memory);
    *memory += round_up(count * sizeof(T), 64);
    return taken;
  }
  static int64_t product_count(const Sizes& sizes) {
    return kBlockRows / kProductRows * (kBlockKeys / kTileDepth + sizes.E / kTileDepth);
  }

  void begin() {
    const Shape& s = f_.shape;
    int64_t row = (b_ * s.H + h_) * s.T + t_;
    for (int64_t r = 0; r < rows_; r += 16) {
      pack_left<kParts>({f_.type, f_.query, (row + r) * s.D, s.D}, min(16, rows_ - r),
                        query_ + r * sizes_.query());
    }
    const float* sink = f_.score_params.sinks == nullptr ? nullptr : f_.score_params.sinks + h_;
    for (int64_t r = 0; r < rows_; ++r) row_state(r).begin(sink);
    blocks_ = visible_blocks(f_, b_, t_, rows_);
  }

  RowState row_state(int64_t r) { return {row_max_ + r, row_sum_ + r * kLanes, kOne}; }

  QKBlock first_qk_block(const Bf16* packed) {
    return qk_block_from(blocks_.first, 0, 0, packed);
  }
  QKBlock next_qk_block(const QKBlock& qk, const Bf16* packed) {
    return qk_block_from(qk.block, qk.row + kBlockRows, 1 - qk.side, packed);
  }

  // The first QK block from key block `block` and row `row` on with a visible score.
  QKBlock qk_block_from(int64_t block, int64_t row, int64_t side, const Bf16* packed) {
    for (; block < blocks_.last; ++block, row = 0) {
      int64_t count = min(kBlockKeys, f_.shape.S - block * kBlockKeys);
      for (; row < rows_; row += kBlockRows) {
        QKBlock qk = {row,  min(kBlockRows, rows_ - row), block, count, kFull, nullptr, side,
                      false};
        if (panels(qk, row, qk.rows).empty()) continue;
        qk.kind =
            block_kind(f_.score_params.kinds, b_, h_, t_ + row, qk.rows, qk.first_key(), count);
        if (qk.kind == kEmpty) continue;
        qk.sees_all = sees_all(qk);
        qk.packed = keys_and_values(block, packed);
        return qk;
      }
    }
    return {};
  }

  const Bf16* keys_and_values(int64_t block, const Bf16* packed) {
    if (packed != nullptr) return packed + block * sizes_.block();
    // The previous block's values are still needed by queued products.
    Bf16* own = block_ + block % kOwnBlocks * sizes_.block();
    if (block != packed_block_) {
      pack_block_amx_of<kParts>(f_, b_, h_ / (f_.shape.H / f_.shape.K), block, own);
    }
    packed_block_ = block;
    return own;
  }

  // Columns that rows row .. row + rows - 1 of the tile may see, in whole steps.
  Columns panels(const QKBlock& qk, int64_t row, int64_t rows) const {
    if (qk.sees_all) return {0, kBlockKeys};
    const Band& band = f_.score_params.band;
    Columns first = visible_columns(band, position_ + row, qk.first_key(), qk.count);
    Columns last = visible_columns(band, position_ + row + rows - 1, qk.first_key(), qk.count);
    if (first.first >= last.last) return {0, 0};
    return {first.first / kTileDepth * kTileDepth, round_up(last.last, kTileDepth)};
  }
  int64_t rows_of(const QKBlock& qk, int64_t group) const {
    return min(kProductRows, qk.rows - group);
  }

  float* scores(const QKBlock& qk, int64_t row) {
    return scores_ + (qk.side * kBlockRows + row) * kScoreStride;
  }
  // Weights of 16 rows are kBlockKeys / kTileDepth tiles, times kParts.
  Bf16* weights(const QKBlock& qk, int64_t row) {
    int64_t group = (qk.side * kBlockRows + row) / 16;
    return weights_ + group * 16 * kParts * kBlockKeys + row % 16 * kTileDepth;
  }

  void queue_keys(const QKBlock& qk) {
    int64_t steps = sizes_.D / kTileDepth, second = steps * kParts * kTileBytes;
    for (int64_t j = 0; j < qk.count; j += kTileDepth) {
      for (int64_t g = 0; g < qk.rows; g += kProductRows) {
        Columns whole = panels(qk, qk.row + g, rows_of(qk, g));
        if (j < whole.first || j >= whole.last) continue;
        const Bf16* a = query_ + (qk.row + g) * sizes_.query();
        const Bf16* b = qk.packed + j * kParts * sizes_.D;
        queue_.push({bytes_at(a), second, bytes_at(b), second, steps, scores(qk, g) + j,
                     kScoreStride * 4, false});
      }
    }
  }

  void queue_values(const QKBlock& qk) {
    constexpr int64_t kSecond = kBlockKeys / kTileDepth * kParts * kTileBytes;
    const Bf16* values = qk.packed + sizes_.keys();
    for (int64_t e = 0; e < sizes_.E; e += kTileDepth) {
      for (int64_t g = 0; g < qk.rows; g += kProductRows) {
        Columns whole = panels(qk, qk.row + g, rows_of(qk, g));
        if (whole.empty()) continue;
        int64_t skipped = whole.first / kTileDepth * kParts * kTileNumbers;
        const Bf16* a = weights(qk, g) + skipped;
        const Bf16* b = values + e * kParts * kBlockKeys + skipped;
        queue_.push({bytes_at(a), kSecond, bytes_at(b), kSecond,
                     (whole.last - whole.first) / kTileDepth,
                     out_ + (qk.row + g) * sizes_.out_stride() + e, sizes_.out_stride() * 4,
                     started_[(qk.row + g) / kProductRows]});
      }
    }
    for (int64_t g = 0; g < qk.rows; g += kProductRows) {
      bool& started = started_[(qk.row + g) / kProductRows];
      started |= !panels(qk, qk.row + g, rows_of(qk, g)).empty();
    }
  }
  static const char* bytes_at(const Bf16* x) { return reinterpret_cast<const char*>(x); }

  // The softmax of a QK block, interleaved with the queued products.
  void softmax(const QKBlock& qk) {
    bool modified = stage_.begin_block(qk.first_key(), qk.count, qk.kind);
    Interleaver<kParts> interleaver(&queue_, ticks(qk));
    Exponents exponents = {modified, modified ? 1.0f : f_.score_params.scale};
    rescaled_ = false;
    if (!modified && qk.sees_all) {
      for (int64_t r = 0; r < qk.rows; ++r) {
        softmax_row<false>(qk, r, {0, kBlockKeys}, {0, kBlockKeys}, exponents, &interleaver);
      }
      return;
    }
    for (int64_t g = 0; g < qk.rows; g += kProductRows) {
      Columns whole = panels(qk, qk.row + g, rows_of(qk, g));
      if (whole.empty()) continue;
      int64_t last = g + rows_of(qk, g);
      for (int64_t r = g; r < last; ++r) {
        int64_t position = position_ + qk.row + r;
        if (modified && r % 8 == 0) {
          stage_.apply(t_ + qk.row + r, position, min(8, last - r), scores(qk, r), kScoreStride,
                       whole);
        }
        Columns visible =
            visible_columns(f_.score_params.band, position, qk.first_key(), qk.count);
        softmax_row<true>(qk, r, visible, whole, exponents, &interleaver);
      }
    }
  }

  bool sees_all(const QKBlock& qk) const {
    const Band& band = f_.score_params.band;
    int64_t first = position_ + qk.row, last = first + qk.rows - 1;
    return qk.count == kBlockKeys && last - band.left <= qk.first_key() &&
           first + band.right >= qk.first_key() + kBlockKeys - 1;
  }

  // Number of kTileDepth-column steps of the softmax.
  int64_t ticks(const QKBlock& qk) const {
    int64_t count = 0;
    for (int64_t g = 0; g < qk.rows; g += kProductRows) {
      Columns whole = panels(qk, qk.row + g, rows_of(qk, g));
      count += rows_of(qk, g) * (whole.last - whole.first) / kTileDepth;
    }
    return count;
  }

  // Without `kAny` scores are unmodified and all visible.
  template <bool kAny>
  void softmax_row(const QKBlock& qk, int64_t r, Columns visible, Columns whole,
                   Exponents exponents, Interleaver<kParts>* interleaver) {
    int64_t row = qk.row + r;
    const float* from = scores(qk, r);
    Bf16* to = weights(qk, r);
    bool* max_increased = max_increased_ + row;
    float by = kAny ? softmax_step_tiles<kParts>(from, to, visible, whole, exponents,
                                                 row_state(row), max_increased, interleaver)
                    : softmax_step_tiles_as<kParts, false, false>(from, to, visible, whole,
                                                                  exponents, row_state(row),
                                                                  max_increased, interleaver);
    if (by == 1) return;
    for (int64_t n = 0; n < qk.rows && !rescaled_; ++n) rescale_[qk.row + n] = 1;
    rescaled_ = true;
    rescale_[row] = by;
  }

  // Rescales the output to the new maxima, after all queued products.
  void rescale(const QKBlock& qk) {
    if (!rescaled_) return;
    for (int64_t r = qk.row; r < qk.row + qk.rows; ++r) {
      if (rescale_[r] == 1) continue;
      float* out = out_ + r * sizes_.out_stride();
      for (int64_t e = 0; e < sizes_.E; e += kLanes) {
        store(out + e, load(out + e) * rescale_[r]);
      }
    }
  }

  void finish() {
    const Shape& s = f_.shape;
    int64_t first = (b_ * s.H + h_) * s.T + t_;
    for (int64_t r = 0; r < rows_; ++r) {
      RowResult row = row_state(r).result();
      float sum = row.normalizer(), inverse = sum == 0 ? 0.0f : 1 / sum;
      float* out = out_ + r * sizes_.out_stride();
      if (!started_[r / kProductRows]) memset(out, 0, sizes_.E * sizeof(float));
      // Truncation cancels the factor kOne of the weights, so the output needs no
      // correction.
      for (int64_t e = 0; e < s.E; e += kLanes) {
        F32 x = load(out + e) * inverse;
        store_some(f_.type, f_.out, (first + r) * s.E + e, x, s.E - e);
      }
      rescale_[r] = row.row_sum;
    }
    for (int64_t r = 0; r < rows_; r += kLanes) {  // lanes beyond rows_ are unused
      F32 sum = load(rescale_ + r), finite = load(row_max_ + r) + log(sum);
      F32 lse = sum == 0.0f ? broadcast(-kInf) : finite;
      memcpy(f_.lse + first + r, &lse, min(kLanes, rows_ - r) * sizeof(float));
    }
  }

  static constexpr int64_t kOwnBlocks = 3;
  static constexpr float kOne = kParts == 1 ? kRaised : 1;

  TileUnit tiles_;
  const ForwardParams& f_;
  Sizes sizes_;
  int64_t b_, h_, t_, rows_, position_, packed_block_ = -1;
  BlockRange blocks_{0, 0};
  Bf16 *block_, *query_;
  float *out_, *scores_;
  Bf16* weights_;
  float *row_sum_, *row_max_, *rescale_;               // of each row
  bool started_[kAmxTaskQueries / kProductRows] = {};  // whether out_ has been written
  bool rescaled_ = false;                              // whether a row has to be rescaled
  bool max_increased_[kAmxTaskQueries] = {};  // whether the last block raised the maximum
  TileQueue<kParts> queue_;
  ScoreStage stage_;
};

}  // namespace RAPTAX_ISA
}  // namespace raptax
