// The forward pass on a machine with matrix tiles (AMX), of bfloat16 numbers or of numbers
// in three bfloat16 parts: see amx_pack.inl.
//
// The rows of one task and one block of keys make units, which go through three stages:
// scores = queries keys^T, their softmax, and output += weights values. While the vector
// units do the second stage of one unit, the tile unit does the first of the next and
// the third of the one before, a step after each row.

#pragma once

#include "amx_products.inl"
#include "amx_softmax.inl"
#include "blocks.inl"

namespace raptax {
namespace RAPTAX_ISA {

constexpr int64_t kAmxQueries = 512;              // query rows of a task, at most
constexpr int64_t kUnit = 64;                     // query rows of a unit
constexpr int64_t kGroup = 32;                    // rows of a tile product
constexpr int64_t kScoreStride = kKeys + kLanes;  // not a power of 2: see cache sets

// Sizes in numbers of what is packed.
template <int kParts>
struct AmxSizes {
  int64_t D, E;  // rounded up

  explicit AmxSizes(const Shape& shape)
      : D(rounded_up(shape.D, kStep)), E(rounded_up(shape.E, kStep)) {}

  int64_t keys() const { return kKeys * kParts * D; }
  int64_t block() const { return kKeys * kParts * (D + E); }
  int64_t query() const { return kParts * D; }
  int64_t out_stride() const { return E + kLanes; }
};

template <int kParts>
static void pack_block_amx_of(const Forward& f, int64_t b, int64_t kv, int64_t block,
                              Bf16* packed) {
  const Shape& s = f.shape;
  int64_t row = (b * s.K + kv) * s.S + block * kKeys;
  pack_block_amx<kParts>({f.type, f.key, row * s.D, s.D}, {f.type, f.value, row * s.E, s.E},
                         least(kKeys, s.S - block * kKeys), packed,
                         packed + AmxSizes<kParts>(s).keys());
}

// Up to kAmxQueries rows of one head. Its memory: see bytes().
template <int kParts>
class AmxTile {
  typedef AmxSizes<kParts> Sizes;

 public:
  static size_t bytes(const Forward& f, int64_t rows) {
    Sizes sizes(f.shape);
    size_t bytes = kOwnBlocks * sizes.block() * sizeof(Bf16);     // when not packed before
    bytes += rows * sizes.query() * sizeof(Bf16);                 // query_
    bytes += rows * sizes.out_stride() * sizeof(float);           // out_
    bytes += 2 * kUnit * kScoreStride * sizeof(float);            // scores_
    bytes += 2 * kUnit * kParts * kKeys * sizeof(Bf16);           // weights_
    bytes += rows * (kLanes + 2) * sizeof(float);                 // total_, high_, shrink_
    bytes += rounded_up(product_count(sizes) * sizeof(TileProduct), 64);
    return bytes + Changes::bytes(f.rules);
  }

  AmxTile(const Forward& f, int64_t b, int64_t h, int64_t t, int64_t rows, char* memory)
      : f_(f),
        sizes_(f.shape),
        b_(b),
        h_(h),
        t_(t),
        rows_(least(rows, f.shape.T - t)),
        position_(f.rules.first(b) + t),
        block_(take<Bf16>(&memory, kOwnBlocks * sizes_.block())),
        query_(take<Bf16>(&memory, rows * sizes_.query())),
        out_(take<float>(&memory, rows * sizes_.out_stride())),
        scores_(take<float>(&memory, 2 * kUnit * kScoreStride)),
        weights_(take<Bf16>(&memory, 2 * kUnit * kParts * kKeys)),
        total_(take<float>(&memory, rows * kLanes)),
        high_(take<float>(&memory, rows)),
        shrink_(take<float>(&memory, rows)),
        queue_(take<TileProduct>(&memory, product_count(sizes_))),
        changes_(f.rules, b, h, memory) {}

  // `packed` holds the blocks of the kv head from the one of key 0 on, or is null.
  void run(const Bf16* packed) {
    begin();
    Unit before{}, now{}, next = first_unit(packed);
    while (before.rows != 0 || now.rows != 0 || next.rows != 0) {
      queue_.clear();
      if (before.rows != 0) queue_values(before);
      if (next.rows != 0) queue_keys(next);
      if (now.rows != 0) weigh(now);
      queue_.finish();
      if (now.rows != 0) shrink(now);
      before = now;
      now = next;
      if (next.rows != 0) next = next_unit(next, packed);
    }
    finish();
  }

 private:
  // Rows first .. first + rows - 1 of the tile, and a block of keys. `side` says which
  // half of scores_ and weights_ is its own.
  struct Unit {
    int64_t row, rows;  // none: there is no such unit
    int64_t block, count;
    Kind kind;
    const Bf16* packed;
    int64_t side;
    bool sees_all;  // every row every key of a whole block

    int64_t first_key() const { return block * kKeys; }
  };

  template <typename T>
  static T* take(char** memory, int64_t count) {
    T* taken = reinterpret_cast<T*>(*memory);
    *memory += rounded_up(count * sizeof(T), 64);
    return taken;
  }
  static int64_t product_count(const Sizes& sizes) {
    return kUnit / kGroup * (kKeys / kStep + sizes.E / kStep);
  }

  void begin() {
    const Shape& s = f_.shape;
    int64_t row = (b_ * s.H + h_) * s.T + t_;
    for (int64_t r = 0; r < rows_; r += 16) {
      pack_left<kParts>({f_.type, f_.query, (row + r) * s.D, s.D}, least(16, rows_ - r),
                        query_ + r * sizes_.query());
    }
    const float* sink = f_.rules.sinks == nullptr ? nullptr : f_.rules.sinks + h_;
    for (int64_t r = 0; r < rows_; ++r) running(r).begin(sink);
    blocks_ = blocks_seen(f_, b_, t_, rows_);
  }

  Running running(int64_t r) { return {high_ + r, total_ + r * kLanes, kOne}; }

  Unit first_unit(const Bf16* packed) { return unit_from(blocks_.first, 0, 0, packed); }
  Unit next_unit(const Unit& unit, const Bf16* packed) {
    return unit_from(unit.block, unit.row + kUnit, 1 - unit.side, packed);
  }

  // The first unit from rows `row` and block `block` on in which something is seen.
  Unit unit_from(int64_t block, int64_t row, int64_t side, const Bf16* packed) {
    for (; block < blocks_.last; ++block, row = 0) {
      int64_t count = least(kKeys, f_.shape.S - block * kKeys);
      for (; row < rows_; row += kUnit) {
        Unit unit = {row, least(kUnit, rows_ - row), block, count, kFull, nullptr, side, false};
        if (panels(unit, row, unit.rows).empty()) continue;
        unit.kind = kind_of(f_.rules.kinds, b_, h_, t_ + row, unit.rows, unit.first_key(), count);
        if (unit.kind == kEmpty) continue;
        unit.sees_all = sees_all(unit);
        unit.packed = packed_block(block, packed);
        return unit;
      }
    }
    return {};
  }

  const Bf16* packed_block(int64_t block, const Bf16* packed) {
    if (packed != nullptr) return packed + block * sizes_.block();
    // Values of the block before the last one are still to be multiplied.
    Bf16* own = block_ + block % kOwnBlocks * sizes_.block();
    if (block != packed_here_) {
      pack_block_amx_of<kParts>(f_, b_, h_ / (f_.shape.H / f_.shape.K), block, own);
    }
    packed_here_ = block;
    return own;
  }

  // Columns that rows row .. row + rows - 1 of the tile may see, in whole steps.
  Columns panels(const Unit& unit, int64_t row, int64_t rows) const {
    if (unit.sees_all) return {0, kKeys};
    const Band& band = f_.rules.band;
    Columns first = seen_by(band, position_ + row, unit.first_key(), unit.count);
    Columns last = seen_by(band, position_ + row + rows - 1, unit.first_key(), unit.count);
    if (first.first >= last.last) return {0, 0};
    return {first.first / kStep * kStep, rounded_up(last.last, kStep)};
  }
  int64_t rows_of(const Unit& unit, int64_t group) const {
    return least(kGroup, unit.rows - group);
  }

  float* scores(const Unit& unit, int64_t row) {
    return scores_ + (unit.side * kUnit + row) * kScoreStride;
  }
  // Weights of 16 rows are kKeys / kStep tiles, times kParts.
  Bf16* weights(const Unit& unit, int64_t row) {
    int64_t group = (unit.side * kUnit + row) / 16;
    return weights_ + group * 16 * kParts * kKeys + row % 16 * kStep;
  }

  void queue_keys(const Unit& unit) {
    int64_t steps = sizes_.D / kStep, second = steps * kParts * kTileBytes;
    for (int64_t j = 0; j < unit.count; j += kStep) {
      for (int64_t g = 0; g < unit.rows; g += kGroup) {
        Columns whole = panels(unit, unit.row + g, rows_of(unit, g));
        if (j < whole.first || j >= whole.last) continue;
        const Bf16* a = query_ + (unit.row + g) * sizes_.query();
        const Bf16* b = unit.packed + j * kParts * sizes_.D;
        queue_.push({bytes_at(a), second, bytes_at(b), second, steps, scores(unit, g) + j,
                     kScoreStride * 4, false});
      }
    }
  }

  void queue_values(const Unit& unit) {
    constexpr int64_t kSecond = kKeys / kStep * kParts * kTileBytes;
    const Bf16* values = unit.packed + sizes_.keys();
    for (int64_t e = 0; e < sizes_.E; e += kStep) {
      for (int64_t g = 0; g < unit.rows; g += kGroup) {
        Columns whole = panels(unit, unit.row + g, rows_of(unit, g));
        if (whole.empty()) continue;
        int64_t skipped = whole.first / kStep * kParts * kTileNumbers;
        const Bf16* a = weights(unit, g) + skipped;
        const Bf16* b = values + e * kParts * kKeys + skipped;
        queue_.push({bytes_at(a), kSecond, bytes_at(b), kSecond,
                     (whole.last - whole.first) / kStep,
                     out_ + (unit.row + g) * sizes_.out_stride() + e,
                     sizes_.out_stride() * 4, started_[(unit.row + g) / kGroup]});
      }
    }
    for (int64_t g = 0; g < unit.rows; g += kGroup) {
      bool& started = started_[(unit.row + g) / kGroup];
      started |= !panels(unit, unit.row + g, rows_of(unit, g)).empty();
    }
  }
  static const char* bytes_at(const Bf16* x) { return reinterpret_cast<const char*>(x); }

  // The softmax of a unit, with the queued products in between.
  void weigh(const Unit& unit) {
    bool change = changes_.keys(unit.first_key(), unit.count, unit.kind);
    Beside<kParts> beside(&queue_, portions(unit));
    Exponents how = {change, change ? 1.0f : f_.rules.scale};
    shrunk_ = false;
    if (!change && unit.sees_all) {
      for (int64_t r = 0; r < unit.rows; ++r) {
        weigh_row<false>(unit, r, {0, kKeys}, {0, kKeys}, how, &beside);
      }
      return;
    }
    for (int64_t g = 0; g < unit.rows; g += kGroup) {
      Columns whole = panels(unit, unit.row + g, rows_of(unit, g));
      if (whole.empty()) continue;
      int64_t last = g + rows_of(unit, g);
      for (int64_t r = g; r < last; ++r) {
        int64_t position = position_ + unit.row + r;
        if (change && r % 8 == 0) {
          changes_.change(t_ + unit.row + r, position, least(8, last - r), scores(unit, r),
                          kScoreStride, whole);
        }
        Columns seen = seen_by(f_.rules.band, position, unit.first_key(), unit.count);
        weigh_row<true>(unit, r, seen, whole, how, &beside);
      }
    }
  }

  bool sees_all(const Unit& unit) const {
    const Band& band = f_.rules.band;
    int64_t first = position_ + unit.row, last = first + unit.rows - 1;
    return unit.count == kKeys && last - band.left <= unit.first_key() &&
           first + band.right >= unit.first_key() + kKeys - 1;
  }

  // Of kStep columns of a row.
  int64_t portions(const Unit& unit) const {
    int64_t count = 0;
    for (int64_t g = 0; g < unit.rows; g += kGroup) {
      Columns whole = panels(unit, unit.row + g, rows_of(unit, g));
      count += rows_of(unit, g) * (whole.last - whole.first) / kStep;
    }
    return count;
  }

  // Without `kAny` no score is changed and every one is seen.
  template <bool kAny>
  void weigh_row(const Unit& unit, int64_t r, Columns seen, Columns whole, Exponents how,
                 Beside<kParts>* beside) {
    int64_t row = unit.row + r;
    const float* from = scores(unit, r);
    Bf16* to = weights(unit, r);
    bool* climbs = climbs_ + row;
    float by = kAny ? weigh_tiles<kParts>(from, to, seen, whole, how, running(row), climbs, beside)
                    : weigh_tiles_by<kParts, false, false>(from, to, seen, whole, how,
                                                           running(row), climbs, beside);
    if (by == 1) return;
    for (int64_t n = 0; n < unit.rows && !shrunk_; ++n) shrink_[unit.row + n] = 1;
    shrunk_ = true;
    shrink_[row] = by;
  }

  // The output so far follows the maximum. Not before all products of it are done.
  void shrink(const Unit& unit) {
    if (!shrunk_) return;
    for (int64_t r = unit.row; r < unit.row + unit.rows; ++r) {
      if (shrink_[r] == 1) continue;
      float* out = out_ + r * sizes_.out_stride();
      for (int64_t e = 0; e < sizes_.E; e += kLanes) {
        store(out + e, load(out + e) * shrink_[r]);
      }
    }
  }

  void finish() {
    const Shape& s = f_.shape;
    int64_t first = (b_ * s.H + h_) * s.T + t_;
    for (int64_t r = 0; r < rows_; ++r) {
      Ended row = running(r).end();
      float total = row.sum(), share = total == 0 ? 0.0f : 1 / total;
      float* out = out_ + r * sizes_.out_stride();
      if (!started_[r / kGroup]) memset(out, 0, sizes_.E * sizeof(float));
      // Weights that are too large by kOne are cut off; so they are right as they are.
      for (int64_t e = 0; e < s.E; e += kLanes) {
        F32 x = load(out + e) * share;
        store_some(f_.type, f_.out, (first + r) * s.E + e, x, s.E - e);
      }
      shrink_[r] = row.total;
    }
    for (int64_t r = 0; r < rows_; r += kLanes) {  // lanes beyond rows_ hold anything
      F32 total = load(shrink_ + r), sum = load(high_ + r) + log(total);
      F32 lse = total == 0.0f ? all(-kInf) : sum;
      memcpy(f_.lse + first + r, &lse, least(kLanes, rows_ - r) * sizeof(float));
    }
  }

  static constexpr int64_t kOwnBlocks = 3;
  static constexpr float kOne = kParts == 1 ? kRaised : 1;

  TileUnit tiles_;
  const Forward& f_;
  Sizes sizes_;
  int64_t b_, h_, t_, rows_, position_, packed_here_ = -1;
  Blocks blocks_{0, 0};
  Bf16 *block_, *query_;
  float *out_, *scores_;
  Bf16* weights_;
  float *total_, *high_, *shrink_;           // of each row
  bool started_[kAmxQueries / kGroup] = {};  // whether rows of out_ hold something
  bool shrunk_ = false;                      // whether a row of the unit has to follow
  bool climbs_[kAmxQueries] = {};            // rows whose maximum had to follow
  TileQueue<kParts> queue_;
  Changes changes_;
};

}  // namespace RAPTAX_ISA
}  // namespace raptax
