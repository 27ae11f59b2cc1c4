// The forward pass: FlashAttention-2's two loops (Dao 2023, arXiv:2307.08691), here in
// float32 on vector units; amx_forward.inl has the other way.
//
// One task is some query rows of one head; it visits the keys block by block. Keys
// and values are packed once per kv head for all tasks that read them where that takes
// little memory, and by each task for itself beyond.

#pragma once

#include "blocks.inl"
#if defined(__AMX_BF16__)
#include "amx_forward.inl"
#endif
#include "kernels.h"
#include "memory.h"
#include "products.inl"
#include "rules.inl"

namespace raptax {
namespace RAPTAX_ISA {

// Sizes in numbers of what is packed.
struct Sizes {
  int64_t keys, values, query, out;  // of a block of keys, of one, of a row, of a row

  explicit Sizes(const Shape& shape)
      : keys(kKeys * shape.D),
        values(kKeys * rounded_up(shape.E, kLanes)),
        query(rounded_up(shape.D, kLanes)),
        out(rounded_up(shape.E, kLanes)) {}

  int64_t block() const { return keys + values; }
};

static void pack_block_of(const Forward& f, int64_t b, int64_t kv, int64_t block,
                          float* packed) {
  const Shape& s = f.shape;
  int64_t row = (b * s.K + kv) * s.S + block * kKeys;
  int64_t count = least(kKeys, s.S - block * kKeys);
  pack_block({f.type, f.key, row * s.D, s.D}, {f.type, f.value, row * s.E, s.E}, count,
             packed, packed + Sizes(s).keys);
}

// Up to kQueries rows of one head. Its memory: see bytes().
class Tile {
 public:
  static size_t bytes(const Forward& f, int64_t rows) {
    Sizes sizes(f.shape);
    int64_t numbers = sizes.block() + rows * (sizes.query + sizes.out + kKeys);
    return numbers * sizeof(float) + Changes::bytes(f.rules);
  }

  Tile(const Forward& f, int64_t b, int64_t h, int64_t t, int64_t rows, char* memory)
      : f_(f),
        sizes_(f.shape),
        b_(b),
        h_(h),
        t_(t),
        rows_(least(rows, f.shape.T - t)),
        position_(f.rules.first(b) + t),
        block_(reinterpret_cast<float*>(memory)),
        query_(block_ + sizes_.block()),
        out_(query_ + rows * sizes_.query),
        scores_(out_ + rows * sizes_.out),
        changes_(f.rules, b, h, reinterpret_cast<char*>(scores_ + rows * kKeys)),
        dropping_(f.rules.dropout, b, h) {}

  // `packed` holds the blocks of the kv head from the one of key 0 on, or is null.
  void run(const float* packed) {
    const Shape& s = f_.shape;
    int64_t row = (b_ * s.H + h_) * s.T + t_;
    pack_queries({f_.type, f_.query, row * s.D, s.D}, rows_, query_, sizes_.query);
    const float* sink = f_.rules.sinks == nullptr ? nullptr : f_.rules.sinks + h_;
    for (int64_t r = 0; r < rows_; ++r) running(r).begin(sink);
    for (int64_t i = 0; i < rows_ * sizes_.out; i += kLanes) store(out_ + i, F32{});
    Blocks blocks = blocks_seen(f_, b_, t_, rows_);
    for (int64_t j = blocks.first; j < blocks.last; ++j) {
      int64_t count = least(kKeys, s.S - j * kKeys);
      Kind kind = kind_of(f_.rules.kinds, b_, h_, t_, rows_, j * kKeys, count);
      if (kind == kEmpty) continue;
      const float* block = block_;
      if (packed != nullptr) {
        block = packed + j * sizes_.block();
      } else {
        pack_block_of(f_, b_, h_ / (s.H / s.K), j, block_);
      }
      next_ = block + sizes_.block();
      unfetched_ = packed == nullptr || j + 1 == blocks.last ? 0 : sizes_.block();
      visit(j * kKeys, count, kind, block);
    }
    finish(row);
  }

 private:
  Running running(int64_t r) { return {high_ + r, total_ + r * kLanes}; }

  // Columns that the rows r .. r + rows - 1 may see, in whole panels.
  Columns panels(int64_t r, int64_t rows) const {
    const Band& band = f_.rules.band;
    Columns first = seen_by(band, position_ + r, first_key_, count_);
    Columns last = seen_by(band, position_ + r + rows - 1, first_key_, count_);
    if (first.first >= last.last) return {0, 0};
    return {first.first / kPanel * kPanel, rounded_up(last.last, kPanel)};
  }

  void visit(int64_t first_key, int64_t count, Kind kind, const float* block) {
    first_key_ = first_key;
    count_ = count;
    times_keys(block);
    bool change = changes_.keys(first_key, count, kind);
    for (int64_t r = 0; r < rows_; r += kRows) {
      int64_t rows = least(kRows, rows_ - r);
      Columns whole = panels(r, rows);
      if (whole.empty()) continue;
      if (change) {
        changes_.change(t_ + r, position_ + r, rows, scores_ + r * kKeys, kKeys, whole);
      }
      for (int64_t i = r; i < r + rows; ++i) weigh_row(i, whole, change);
    }
    times_values(block + sizes_.keys);
  }

  // scores = queries keys^T, panel by panel, so that one stays in the nearest cache.
  void times_keys(const float* keys) {
    for (int64_t j = 0; j < count_; j += kPanel) {
      for (int64_t r = 0; r < rows_; r += kRows) {
        int64_t rows = least(kRows, rows_ - r);
        Columns whole = panels(r, rows);
        if (j < whole.first || j >= whole.last) continue;
        fetch_next(sizes_.block() / 64);
        multiply(rows, kPanel, query_ + r * sizes_.query, sizes_.query,
                 keys + j * f_.shape.D, f_.shape.D, scores_ + r * kKeys + j, kKeys, false);
      }
    }
  }

  // Asks for a piece of the next block, so that it is near when its turn comes.
  void fetch_next(int64_t count) {
    count = least(count, unfetched_);
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(next_ + i, 0, 2);
    next_ += count;
    unfetched_ -= count;
  }

  void weigh_row(int64_t r, Columns whole, bool change) {
    float* scores = scores_ + r * kKeys;
    int64_t position = position_ + r;
    Columns seen = seen_by(f_.rules.band, position, first_key_, count_);
    Exponents to = {change, change ? 1.0f : f_.rules.scale};
    float shrink = weigh(scores, seen, whole, to, running(r));
    if (shrink != 1) {
      float* out = out_ + r * sizes_.out;
      for (int64_t e = 0; e < sizes_.out; e += kLanes) {
        store(out + e, load(out + e) * shrink);
      }
    }
    if (f_.rules.dropout.words != nullptr) {
      dropping_.apply(position, first_key_, scores, whole);
    }
  }

  void times_values(const float* values) {
    for (int64_t e = 0; e < sizes_.out; e += kPanel) {
      int64_t width = least(kPanel, sizes_.out - e);
      const float* panel = values + e * kKeys;
      for (int64_t r = 0; r < rows_; r += kRows) {
        int64_t rows = least(kRows, rows_ - r);
        Columns whole = panels(r, rows);
        if (whole.empty()) continue;
        multiply(rows, width, scores_ + r * kKeys + whole.first, kKeys,
                 panel + whole.first * width, whole.last - whole.first,
                 out_ + r * sizes_.out + e, sizes_.out, true);
      }
    }
  }

  void finish(int64_t first) {
    int64_t E = f_.shape.E;
    for (int64_t r = 0; r < rows_; ++r) {
      Ended row = running(r).end();
      float total = row.sum(), share = total == 0 ? 0.0f : 1 / total;
      for (int64_t e = 0; e < E; e += kLanes) {
        F32 x = load(out_ + r * sizes_.out + e) * share;
        store_some(f_.type, f_.out, (first + r) * E + e, x, E - e);
      }
      f_.lse[first + r] = row.log_sum_exp();
    }
  }

  const Forward& f_;
  Sizes sizes_;
  int64_t b_, h_, t_, rows_, position_, first_key_ = 0, count_ = 0;
  float *block_, *query_, *out_, *scores_;
  Changes changes_;
  Dropping dropping_;
  const float* next_ = nullptr;  // numbers of the next block that nobody asked for
  int64_t unfetched_ = 0;
  float high_[kQueries];
  alignas(64) float total_[kQueries * kLanes];
};

// One way to compute: what is packed, and a tile of the output.
struct Float32 {
  typedef float Packed;
  typedef Tile OneTile;
  static int64_t rows_of_task(const Forward&, int64_t, int) { return kQueries; }
  static int64_t block(const Shape& shape) { return Sizes(shape).block(); }
  static constexpr auto pack = pack_block_of;
};

#if defined(__AMX_BF16__)
template <int kParts>
struct Amx {
  typedef Bf16 Packed;
  typedef AmxTile<kParts> OneTile;
  // Long tasks load keys less often, but threads need many to share them evenly; for what
  // is short they are slower. So they are where heads share a bias, whose rows for a task
  // then leave the cache between one head and the next.
  static int64_t rows_of_task(const Forward& f, int64_t heads, int threads) {
    int64_t rows = kAmxQueries, tasks = (f.shape.T + rows - 1) / rows * heads;
    bool few = tasks < 16 * threads;
    return few || f.rules.bias.data != nullptr ? rows / 2 : rows;
  }
  static int64_t block(const Shape& shape) { return AmxSizes<kParts>(shape).block(); }
  static constexpr auto pack = pack_block_amx_of<kParts>;
};
#endif

// Every tile of the heads that read kv heads first .. first + count - 1 (of all
// sequences), those with the most keys first, so that no thread is left with a long one
// at the end. `packed` holds the blocks of these kv heads, or is null.
template <typename Way>
static void run_tiles(const Forward& f, const Parallel& parallel, int64_t first,
                      int64_t count, const typename Way::Packed* packed) {
  const Shape& s = f.shape;
  int64_t group = s.H / s.K, rows = Way::rows_of_task(f, count * group, parallel.threads());
  int64_t tiles = (s.T + rows - 1) / rows;
  int64_t stride = (s.S + kKeys - 1) / kKeys * Way::block(s);
  parallel.each(tiles * count * group, [&](int64_t n) {
    NoDenormals fast;
    int64_t t = (tiles - 1 - n / (count * group)) * rows, head = n % (count * group);
    int64_t kv = first + head / group, b = kv / s.K;
    int64_t h = kv % s.K * group + head % group;
    Buffer memory(Way::OneTile::bytes(f, rows));
    typename Way::OneTile tile(f, b, h, t, rows, memory.as<char>());
    tile.run(packed == nullptr ? nullptr : packed + (kv - first) * stride);
  });
}

template <typename Way>
static void forward_by(const Forward& f, const Parallel& parallel) {
  const Shape& s = f.shape;
  int64_t heads = s.B * s.K, blocks = (s.S + kKeys - 1) / kKeys;
  int64_t bytes = blocks * Way::block(s) * static_cast<int64_t>(sizeof(typename Way::Packed));
  if (bytes > kPackedBytes) {
    run_tiles<Way>(f, parallel, 0, heads, nullptr);
    return;
  }
  int64_t at_once = least(heads, kPackedBytes / bytes);
  Buffer memory(at_once * bytes);
  auto* packed = memory.as<typename Way::Packed>();
  for (int64_t first = 0; first < heads; first += at_once) {
    int64_t count = least(at_once, heads - first);
    parallel.each(count * blocks, [&](int64_t n) {
      NoDenormals fast;
      int64_t kv = first + n / blocks, b = kv / s.K, block = n % blocks;
      Blocks seen = blocks_seen(f, b, 0, s.T);
      if (block < seen.first || block >= seen.last) return;
      Way::pack(f, b, kv % s.K, block, packed + n * Way::block(s));
    });
    run_tiles<Way>(f, parallel, first, count, packed);
  }
}

static void forward(const Forward& f, const Parallel& parallel) {
#if defined(__AMX_BF16__)
  if (f.rules.dropout.words == nullptr) {
    if (f.type == Type::kBF16) return forward_by<Amx<1>>(f, parallel);
    if (worth_parts(f.shape)) return forward_by<Amx<3>>(f, parallel);
  }
#endif
  forward_by<Float32>(f, parallel);
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
