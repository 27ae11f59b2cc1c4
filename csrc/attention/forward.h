// The forward pass: the two loops of FlashAttention-2 (Dao 2023, arXiv:2307.08691) on
// vector units; forward_amx.h has the AMX schedule. Operands are float32, or bfloat16
// where there are dot products of them.
//
// A task is a tile of query rows of one head; it loops over blocks of keys. Keys and
// values are packed once per kv head for all tasks where they fit kPackedBytes,
// otherwise by each task.

#pragma once

#include "attention/visible_blocks.h"
#if defined(__AMX_BF16__)
#include "attention/forward_amx.h"
#endif
#include "api/kernel_table.h"
#include "attention/score_stage.h"
#include "gemm/gemm_f32.h"
#include "gemm/pack_bf16.h"
#include "runtime/scratch.h"
#include "runtime/thread_pool.h"

namespace raptax {
namespace RAPTAX_ISA {

// Sizes, in words, of packed arrays.
template <typename Pack>
struct PackedSizes {
  int64_t keys, values, query, out;  // of a block, of a block, of a row, of a row

  explicit PackedSizes(const Shape& shape)
      : keys(kBlockKeys * Pack::words(shape.D)),
        values(Pack::words(kBlockKeys) * round_up(shape.E, kLanes)),
        query(Pack::query_words(shape.D)),
        out(round_up(shape.E, kLanes)) {}

  int64_t block() const { return keys + values; }
};

template <typename Pack>
static void pack_block_of(const ForwardParams& f, int64_t b, int64_t kv, int64_t block,
                          typename Pack::Word* packed) {
  const Shape& s = f.shape;
  int64_t row = (b * s.K + kv) * s.S + block * kBlockKeys;
  int64_t count = min(kBlockKeys, s.S - block * kBlockKeys);
  pack_block<Pack>({f.type, f.key, row * s.D, s.D}, {f.type, f.value, row * s.E, s.E}, count,
                   packed, packed + PackedSizes<Pack>(s).keys);
}

// Up to kQueries rows of one head. Its memory: see bytes(). Product and Pack are those of
// one kind of words, of 4 bytes.
template <typename Product, typename Pack>
class Tile {
 public:
  typedef typename Pack::Word Word;
  static_assert(sizeof(Word) == sizeof(float), "scores become weights in place");

  static size_t bytes(const ForwardParams& f, int64_t rows) {
    PackedSizes<Pack> sizes(f.shape);
    int64_t words = sizes.block() + rows * (sizes.query + sizes.out + kBlockKeys);
    return words * sizeof(Word) + ScoreStage::bytes(f.score_params);
  }

  Tile(const ForwardParams& f, int64_t b, int64_t h, int64_t t, int64_t rows, char* memory)
      : f_(f),
        sizes_(f.shape),
        b_(b),
        h_(h),
        t_(t),
        rows_(min(rows, f.shape.T - t)),
        position_(f.score_params.first(b) + t),
        block_(reinterpret_cast<Word*>(memory)),
        query_(block_ + sizes_.block()),
        out_(reinterpret_cast<float*>(query_ + rows * sizes_.query)),
        scores_(out_ + rows * sizes_.out),
        stage_(f.score_params, b, h, reinterpret_cast<char*>(scores_ + rows * kBlockKeys)),
        dropout_(f.score_params.dropout, b, h) {}

  // `packed` holds the blocks of the kv head from the one of key 0 on, or is null.
  void run(const Word* packed) {
    const Shape& s = f_.shape;
    int64_t row = (b_ * s.H + h_) * s.T + t_;
    Pack::queries({f_.type, f_.query, row * s.D, s.D}, rows_, query_, sizes_.query);
    const float* sink = f_.score_params.sinks == nullptr ? nullptr : f_.score_params.sinks + h_;
    for (int64_t r = 0; r < rows_; ++r) row_state(r).begin(sink);
    for (int64_t i = 0; i < rows_ * sizes_.out; i += kLanes) store(out_ + i, F32{});
    BlockRange blocks = visible_blocks(f_, b_, t_, rows_);
    for (int64_t j = blocks.first; j < blocks.last; ++j) {
      int64_t count = min(kBlockKeys, s.S - j * kBlockKeys);
      BlockKind kind =
          block_kind(f_.score_params.kinds, b_, h_, t_, rows_, j * kBlockKeys, count);
      if (kind == kEmpty) continue;
      const Word* block = block_;
      if (packed != nullptr) {
        block = packed + j * sizes_.block();
      } else {
        pack_block_of<Pack>(f_, b_, h_ / (s.H / s.K), j, block_);
      }
      next_ = block + sizes_.block();
      unprefetched_ = packed == nullptr || j + 1 == blocks.last ? 0 : sizes_.block();
      process_block(j * kBlockKeys, count, kind, block);
    }
    finish(row);
  }

 private:
  RowState row_state(int64_t r) { return {row_max_ + r, row_sum_ + r * kLanes}; }

  // Columns that the rows r .. r + rows - 1 may see, in whole panels.
  Columns panels(int64_t r, int64_t rows) const {
    const Band& band = f_.score_params.band;
    Columns first = visible_columns(band, position_ + r, first_key_, count_);
    Columns last = visible_columns(band, position_ + r + rows - 1, first_key_, count_);
    if (first.first >= last.last) return {0, 0};
    return {first.first / kPanel * kPanel, round_up(last.last, kPanel)};
  }

  void process_block(int64_t first_key, int64_t count, BlockKind kind, const Word* block) {
    first_key_ = first_key;
    count_ = count;
    multiply_keys(block);
    bool modified = stage_.begin_block(first_key, count, kind);
    for (int64_t r = 0; r < rows_; r += kMicroRows) {
      int64_t rows = min(kMicroRows, rows_ - r);
      Columns whole = panels(r, rows);
      if (whole.empty()) continue;
      if (modified) {
        stage_.apply(t_ + r, position_ + r, rows, scores_ + r * kBlockKeys, kBlockKeys, whole);
      }
      for (int64_t i = r; i < r + rows; ++i) softmax_row(i, whole, modified);
    }
    multiply_values(block + sizes_.keys);
  }

  // scores = queries keys^T, panel by panel: a panel of keys stays in the L1 cache.
  void multiply_keys(const Word* keys) {
    int64_t words = Pack::words(f_.shape.D);
    for (int64_t j = 0; j < count_; j += kPanel) {
      for (int64_t r = 0; r < rows_; r += kMicroRows) {
        int64_t rows = min(kMicroRows, rows_ - r);
        Columns whole = panels(r, rows);
        if (j < whole.first || j >= whole.last) continue;
        prefetch_next(sizes_.block() / 64);
        gemm<Product>(rows, kPanel, query_ + r * sizes_.query, sizes_.query, keys + j * words,
                      words, scores_ + r * kBlockKeys + j, kBlockKeys, false);
      }
    }
  }

  // Prefetches a part of the next block.
  void prefetch_next(int64_t count) {
    count = min(count, unprefetched_);
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(next_ + i, 0, 2);
    next_ += count;
    unprefetched_ -= count;
  }

  void softmax_row(int64_t r, Columns whole, bool modified) {
    float* scores = scores_ + r * kBlockKeys;
    int64_t position = position_ + r;
    Columns visible = visible_columns(f_.score_params.band, position, first_key_, count_);
    Exponents to = {modified, modified ? 1.0f : f_.score_params.scale};
    float rescale = softmax_step(scores, visible, whole, to, row_state(r));
    if (rescale != 1) {
      float* out = out_ + r * sizes_.out;
      for (int64_t e = 0; e < sizes_.out; e += kLanes) {
        store(out + e, load(out + e) * rescale);
      }
    }
    if (f_.score_params.dropout.words != nullptr) {
      dropout_.apply(position, first_key_, scores, whole);
    }
    Pack::weights(scores, whole.first, whole.last);
  }

  void multiply_values(const Word* values) {
    const Word* weights = reinterpret_cast<const Word*>(scores_);
    for (int64_t e = 0; e < sizes_.out; e += kPanel) {
      int64_t width = min(kPanel, sizes_.out - e);
      const Word* panel = values + e * Pack::words(kBlockKeys);
      for (int64_t r = 0; r < rows_; r += kMicroRows) {
        int64_t rows = min(kMicroRows, rows_ - r);
        Columns whole = panels(r, rows);
        if (whole.empty()) continue;
        int64_t from = Pack::words(whole.first), words = Pack::words(whole.last) - from;
        gemm<Product>(rows, width, weights + r * kBlockKeys + from, kBlockKeys,
                      panel + from * width, words, out_ + r * sizes_.out + e, sizes_.out, true);
      }
    }
  }

  void finish(int64_t first) {
    int64_t E = f_.shape.E;
    for (int64_t r = 0; r < rows_; ++r) {
      RowResult row = row_state(r).result();
      float sum = row.normalizer(), inverse = sum == 0 ? 0.0f : 1 / sum;
      for (int64_t e = 0; e < E; e += kLanes) {
        F32 x = load(out_ + r * sizes_.out + e) * inverse;
        store_some(f_.type, f_.out, (first + r) * E + e, x, E - e);
      }
      f_.lse[first + r] = row.log_sum_exp();
    }
  }

  const ForwardParams& f_;
  PackedSizes<Pack> sizes_;
  int64_t b_, h_, t_, rows_, position_, first_key_ = 0, count_ = 0;
  Word *block_, *query_;
  float *out_, *scores_;
  ScoreStage stage_;
  Dropout dropout_;
  const Word* next_ = nullptr;  // the part of the next block not prefetched yet
  int64_t unprefetched_ = 0;
  float row_max_[kTaskQueries];
  alignas(64) float row_sum_[kTaskQueries * kLanes];
};

// A policy: how operands are packed, and which tile class computes the output.
template <typename Product, typename Pack>
struct VectorGemm {
  typedef typename Pack::Word Packed;
  typedef Tile<Product, Pack> TileType;
  static int64_t task_rows(const ForwardParams&, int64_t, int) { return kTaskQueries; }
  static int64_t block(const Shape& shape) { return PackedSizes<Pack>(shape).block(); }
  static constexpr auto pack = pack_block_of<Pack>;
};

#if defined(__AMX_BF16__)
template <int kParts>
struct AmxGemm {
  typedef Bf16 Packed;
  typedef AmxTile<kParts> TileType;
  // Long tasks load keys less often, but give threads less to balance, and are slower
  // for short sequences. With a shared bias they are halved: its rows for a task would
  // not stay in the cache from one head to the next.
  static int64_t task_rows(const ForwardParams& f, int64_t heads, int threads) {
    int64_t rows = kAmxTaskQueries, tasks = (f.shape.T + rows - 1) / rows * heads;
    bool few = tasks < 16 * threads;
    return few || f.score_params.bias.data != nullptr ? rows / 2 : rows;
  }
  static int64_t block(const Shape& shape) { return AmxSizes<kParts>(shape).block(); }
  static constexpr auto pack = pack_block_amx_of<kParts>;
};
#endif

// All tiles of the query heads of kv heads first .. first + count - 1 (over all
// sequences), longest tiles first for load balance. `packed` holds the blocks of these
// kv heads, or is null.
template <typename Gemm>
static void run_tiles(const ForwardParams& f, const ThreadPool& threads, int64_t first,
                      int64_t count, const typename Gemm::Packed* packed) {
  const Shape& s = f.shape;
  int64_t group = s.H / s.K, rows = Gemm::task_rows(f, count * group, threads.threads());
  int64_t tiles = (s.T + rows - 1) / rows;
  int64_t stride = (s.S + kBlockKeys - 1) / kBlockKeys * Gemm::block(s);
  threads.parallel_for(tiles * count * group, [&](int64_t n) {
    FlushDenormals fast;
    int64_t t = (tiles - 1 - n / (count * group)) * rows, head = n % (count * group);
    int64_t kv = first + head / group, b = kv / s.K;
    int64_t h = kv % s.K * group + head % group;
    Buffer memory(Gemm::TileType::bytes(f, rows));
    typename Gemm::TileType tile(f, b, h, t, rows, memory.as<char>());
    tile.run(packed == nullptr ? nullptr : packed + (kv - first) * stride);
  });
}

template <typename Gemm>
static void forward_with(const ForwardParams& f, const ThreadPool& threads) {
  const Shape& s = f.shape;
  int64_t heads = s.B * s.K, blocks = (s.S + kBlockKeys - 1) / kBlockKeys;
  int64_t bytes = blocks * Gemm::block(s) * static_cast<int64_t>(sizeof(typename Gemm::Packed));
  if (bytes > kPackedBytes) {
    run_tiles<Gemm>(f, threads, 0, heads, nullptr);
    return;
  }
  int64_t at_once = min(heads, kPackedBytes / bytes);
  Buffer memory(at_once * bytes);
  auto* packed = memory.as<typename Gemm::Packed>();
  for (int64_t first = 0; first < heads; first += at_once) {
    int64_t count = min(at_once, heads - first);
    threads.parallel_for(count * blocks, [&](int64_t n) {
      FlushDenormals fast;
      int64_t kv = first + n / blocks, b = kv / s.K, block = n % blocks;
      BlockRange visible = visible_blocks(f, b, 0, s.T);
      if (block < visible.first || block >= visible.last) return;
      Gemm::pack(f, b, kv % s.K, block, packed + n * Gemm::block(s));
    });
    run_tiles<Gemm>(f, threads, first, count, packed);
  }
}

static void forward(const ForwardParams& f, const ThreadPool& threads) {
#if defined(__AMX_BF16__)
  if (f.score_params.dropout.words == nullptr) {
    if (f.type == Type::kBF16) return forward_with<AmxGemm<1>>(f, threads);
    if (worth_parts(f.shape)) return forward_with<AmxGemm<3>>(f, threads);
  }
#endif
#if defined(__AVX512BF16__)
  if (f.type == Type::kBF16) return forward_with<VectorGemm<Bf16Product, Bf16Pack>>(f, threads);
#endif
  forward_with<VectorGemm<F32Product, F32Pack>>(f, threads);
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
