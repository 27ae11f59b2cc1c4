// One task of paged attention: up to kQueryRows query rows against all their keys, or
// against one split of the keys.
//
// A query row is one token x one head of a group; those of one sequence and one kv head
// read the same keys. Keys are processed in blocks of kBlock and splits of kSplit,
// whose partial results are merged in order. Block and split boundaries depend on
// positions alone, so a row's result depends neither on the other sequences nor on the
// number of threads.
//
// NaN and Inf are detected in the results of a block, which are small, rather than in
// its keys and values; only then is the block repeated with each key checked
// (`careful`).

#pragma once

#include "attention/mod_runner.h"
#include "attention/paged_call.h"
#include "runtime/scratch.h"

namespace raptax {
namespace RAPTAX_ISA {
namespace pages {

template <typename Element>
class Task {
 public:
  Task(const Call& call, int64_t b, int64_t k, int64_t first_query_row, int64_t query_rows)
      : call_(call),
        p_(call.p),
        b_(b),
        k_(k),
        first_query_row_(first_query_row),
        query_rows_(query_rows),
        gemm_(choose_gemm(call.p, query_rows)),
        padded_(pad_query_rows(gemm_, query_rows)),
        Dp_(call.Dp),
        Ep_(call.Ep),
        buffer_(lay_out(nullptr)) {
    lay_out(buffer_.template as<char>());
    memset(zeros_, 0, static_cast<size_t>(4 * max(Dp_, Ep_)));
    if (gemm_ == kAmxTiles) memset(bf16_weights_, 0, static_cast<size_t>(padded_ * kBlock) * 2);
    read_query();
  }

  // States of all query rows after keys first_key .. end_key - 1.
  void run(int64_t first_key, int64_t end_key, float* states) {
    for (int64_t r = 0; r < query_rows_; ++r) clear(states + r * call_.pitch(), Ep_);
    Block blocks[2];
    load_block(blocks[0], first_key, end_key);
    for (int i = 0; blocks[i].count > 0; i = 1 - i) {
      Block &now = blocks[i], &next = blocks[1 - i];
      load_block(next, now.first + now.count, end_key);
      set_prefetch(p_.D, now.count, now.keys, next.keys, now.keys_ahead);
      set_prefetch(p_.E, now.count, now.values, next.values, now.values_ahead);
      if (now.missing) continue;
      pad(now);
      if (!attend(now, false, states)) {
        zero_nonfinite(now);
        attend(now, true, states);
      }
    }
    for (int64_t r = 0; r < query_rows_; ++r) {
      float* state = states + r * call_.pitch() + Ep_;
      if (nonfinite_query_[r] && state[kRowSum] > 0) state[kPoison] = __builtin_nanf("");
    }
  }

  // All keys, split by split.
  void run_all() {
    int64_t pitch = call_.pitch();
    Buffer buffer(static_cast<size_t>(query_rows_ * pitch) * sizeof(float));
    float* whole = buffer.template as<float>();
    for (int64_t r = 0; r < query_rows_; ++r) clear(whole + r * pitch, Ep_);
    int64_t first_key = call_.first_key(b_, first_query_row_),
            end_key = call_.end_key(b_, first_query_row_ + query_rows_ - 1);
    while (first_key < end_key) {
      int64_t end = min(end_key, (first_key / kSplit + 1) * kSplit);
      run(first_key, end, state_);
      for (int64_t r = 0; r < query_rows_; ++r)
        merge(whole + r * pitch, state_ + r * pitch, Ep_);
      first_key = end;
    }
    for (int64_t r = 0; r < query_rows_; ++r) {
      write(call_, b_, k_, first_query_row_ + r, query_rows_, whole + r * pitch, rows_);
    }
  }

  // Writes what a state comes to. `query_rows` are those of the task that made it; `scratch`
  // has room for two rows of values.
  static void write(const Call& call, int64_t b, int64_t k, int64_t query_row,
                    int64_t query_rows, const float* state, float* scratch) {
    const PagedParams& p = call.p;
    int64_t row = p.row_offsets[b] + query_row / call.G, head = k * call.G + query_row % call.G;
    float sink = p.sinks == nullptr ? -kInf : p.sinks[head];
    float row_max = __builtin_fmaxf(state[call.Ep + kRowMax], sink), rescale = 1;
    float total = state[call.Ep + kRowSum];
    if (sink > -kInf) {
      rescale = exp_difference(state[call.Ep + kRowMax], row_max);
      total = total * rescale + exp_difference(sink, row_max);
    }
    float factor = total == 0 ? 0.0f : rescale / total;
    float lse = total == 0 ? -kInf : row_max + __builtin_logf(total);
    if (state[call.Ep + kPoison] != 0 || !(sink < kInf)) factor = lse = __builtin_nanf("");
    p.lse[row * p.H + head] = lse;
    for (int64_t e = 0; e < call.Ep; e += kLanes) store(scratch + e, load(state + e) * factor);
    float* ordered = scratch + call.Ep;
    if (choose_gemm(p, query_rows) == kAmxTiles) {
      restore_columns(scratch, call.Ep, ordered);
    } else {
      restore<Element>(scratch, call.Ep, ordered);
    }
    write_numbers(p.type, p.out, (row * p.H + head) * p.E, p.E, ordered);
  }

 private:
  // Which GEMM: depends on the number of query rows, not on the machine's load.
  enum Gemm { kDirectDot, kPackedF32, kAmxTiles };

  static Gemm choose_gemm(const PagedParams& p, int64_t query_rows) {
    if (query_rows <= kDirectRows) return kDirectDot;
    bool tiles = kHasAmx && Element::kFitsBFloat16 && p.type == Type::kBF16;
    return tiles ? kAmxTiles : kPackedF32;
  }
  static int64_t pad_query_rows(Gemm gemm, int64_t query_rows) {
    if (gemm == kAmxTiles) return round_up(query_rows, kTile);
    if (gemm == kPackedF32) return round_up(query_rows, kMicroRows);
    return query_rows <= 2 ? query_rows : round_up(query_rows, 4);
  }
  // Assigns scratch memory from `base` on; returns its size in bytes.
  size_t lay_out(char* base) {
    int64_t used = 0;
    auto place = [&](auto*& array, int64_t count) {
      if (base != nullptr) array = reinterpret_cast<decltype(&array[0])>(base + used);
      used += round_up(count * static_cast<int64_t>(sizeof(array[0])), 64);
    };
    place(query_, padded_ * Dp_);
    place(scores_, padded_ * kBlock);
    place(values_, padded_ * Ep_);
    place(state_, query_rows_ * call_.pitch());
    place(rows_, 2 * max(Dp_, Ep_));
    place(zeros_, 4 * max(Dp_, Ep_));
    place(k_packed_, gemm_ == kDirectDot ? 0 : Dp_ * kBlock);
    place(v_packed_, gemm_ == kDirectDot ? 0 : kBlock * Ep_);
    place(bf16_weights_, gemm_ == kAmxTiles ? padded_ * kBlock : 0);
    place(program_memory_, static_cast<int64_t>(program_bytes()));
    place(k_copies_, p_.D == Dp_ ? 0 : kBlock * Dp_ * Element::kBytes);
    place(v_copies_, p_.E == Ep_ ? 0 : kBlock * Ep_ * Element::kBytes);
    return static_cast<size_t>(used);
  }

  void read_query() {
    memset(query_, 0, static_cast<size_t>(padded_ * Dp_) * sizeof(float));
    memset(rows_, 0, static_cast<size_t>(Dp_) * sizeof(float));
    for (int64_t r = 0; r < query_rows_; ++r) {
      int64_t query_row = first_query_row_ + r, head = k_ * call_.G + query_row % call_.G;
      int64_t from = ((p_.row_offsets[b_] + query_row / call_.G) * p_.H + head) * p_.D;
      nonfinite_query_[r] = !read_numbers(p_.type, p_.query, from, p_.D, rows_);
      if (nonfinite_query_[r]) continue;
      if (gemm_ == kAmxTiles) {
        query_row_to_tiles(r);
      } else {
        arrange<Element>(rows_, Dp_, query_ + r * Dp_);
      }
    }
  }

  size_t program_bytes() const {
    size_t mask = p_.mask_program == nullptr ? 0 : Runner::bytes(*p_.mask_program, kBlock);
    size_t score = p_.score_program == nullptr ? 0 : Runner::bytes(*p_.score_program, kBlock);
    return mask > score ? mask : score;
  }

  // Runs a program over all scores; the query rows of a head are call_.G apart.
  template <typename Run>
  void run_program(const Program& program, const Block& block, const Run& run) {
    Runner runner(program, Along::kKeys, kBlock, program_memory_);
    int64_t G = call_.G;
    for (int64_t g = 0; g < G; ++g) {
      int64_t r = (g - first_query_row_ % G + G) % G;
      if (r >= query_rows_) continue;
      runner.begin(b_, k_ * G + g);
      runner.columns(block.first, block.count);
      run(runner, p_.first(b_) + (first_query_row_ + r) / G, (query_rows_ - r + G - 1) / G,
          scores_ + r * kBlock);
    }
  }

  // score_mod, then mask.
  void run_programs(const Block& block) {
    int64_t stride = call_.G * kBlock;
    if (p_.score_program != nullptr) {
      run_program(*p_.score_program, block,
                  [&](Runner& runner, int64_t position, int64_t rows, float* scores) {
                    runner.apply_score_mod(position, rows, scores, stride);
                  });
    }
    if (p_.mask_program != nullptr) {
      run_program(*p_.mask_program, block,
                  [&](Runner& runner, int64_t position, int64_t rows, float* scores) {
                    runner.apply_mask(position, rows, scores, stride);
                  });
    }
  }

  // Query row r in bfloat16: pairs along D, 16 query rows to a tile.
  void query_row_to_tiles(int64_t r) {
    uint32_t* tiles = reinterpret_cast<uint32_t*>(query_) + r / kTile * Dp_ / 2 * kTile;
    for (int64_t i = 0; i < Dp_ / 2; ++i) {
      uint32_t first_key = float_to_bits(rows_[2 * i]) >> 16;
      tiles[i * kTile + r % kTile] =
          first_key | (float_to_bits(rows_[2 * i + 1]) & 0xffff0000u);
    }
  }

  // The block that begins at `first`; empty if that is `end`.
  void load_block(Block& block, int64_t first, int64_t end) const {
    block.first = first;
    block.count = min(end, (first / kBlock + 1) * kBlock) - first;
    if (block.count < 0) block.count = 0;
    block.missing = block.count > 0;
    int64_t key_bytes = p_.D * Element::kBytes, value_bytes = p_.E * Element::kBytes;
    for (int64_t j = 0; j < block.count;) {
      int64_t run = min(p_.P - (first + j) % p_.P, block.count - j);
      if (!p_.page_exists(b_, (first + j) / p_.P)) {
        use_zeros(block, j, j + run);
        j += run;
        continue;
      }
      block.missing = false;
      int64_t place = p_.place(b_, first + j) + k_ * p_.P;
      const char* key = static_cast<char*>(p_.k_pages) + place * key_bytes;
      const char* value = static_cast<char*>(p_.v_pages) + place * value_bytes;
      for (int64_t i = 0; i < run; ++i) {
        block.keys[j + i] = key + i * key_bytes;
        block.values[j + i] = value + i * value_bytes;
      }
      if (p_.k_scales != nullptr) {
        size_t size = static_cast<size_t>(run) * sizeof(float);
        memcpy(block.key_scales + j, p_.k_scales + place, size);
        memcpy(block.value_scales + j, p_.v_scales + place, size);
      }
      j += run;
    }
    use_zeros(block, block.count, kBlock);
  }

  // Rows from .. end - 1 of the block are zeros.
  void use_zeros(Block& block, int64_t from, int64_t end) const {
    for (int64_t j = from; j < end; ++j) {
      block.keys[j] = block.values[j] = zeros_;
      block.key_scales[j] = block.value_scales[j] = 0;
    }
  }

  static void set_prefetch(int64_t size, int64_t count, const char* const* rows,
                           const char* const* next, const char** ahead) {
    int64_t distance = max(1, min(kAhead / (size * Element::kBytes), kBlock - 1));
    int64_t here = max(0, count - distance);
    for (int64_t j = 0; j < here; ++j) ahead[j] = rows[j + distance];
    for (int64_t j = here; j < kBlock; ++j) {
      ahead[j] = next[min(j + distance - count, kBlock - 1)];
    }
  }

  // Rows whose size is no multiple of two vectors become copies that are.
  void pad(Block& block) {
    auto copy = [&](const char** rows, char* at, int64_t size, int64_t padded) {
      if (size == padded) return;
      size_t bytes = static_cast<size_t>(size * Element::kBytes);
      size_t room = static_cast<size_t>(padded * Element::kBytes);
      for (int64_t j = 0; j < block.count; ++j, at += room) {
        memcpy(at, rows[j], bytes);
        memset(at + bytes, 0, room - bytes);
        rows[j] = at;
      }
    };
    copy(block.keys, k_copies_, p_.D, Dp_);
    copy(block.values, v_copies_, p_.E, Ep_);
  }

  static bool finite_row(const char* row, int64_t size) {
    I32 bad = {};
    for (int64_t i = 0; i < size; i += kPairLanes) {
      F32 a, b;
      Element::pair(row, i, a, b);
      bad |= (a - a != 0) | (b - b != 0);
    }
    return !any_lane(bad);
  }

  // Finds the keys that are not finite, or whose values are not, and zeros them.
  void zero_nonfinite(Block& block) {
    for (int64_t j = 0; j < kBlock; ++j) {
      float scales = block.key_scales[j] + block.value_scales[j];
      bool finite = finite_row(block.keys[j], Dp_) && finite_row(block.values[j], Ep_) &&
                    (p_.k_scales == nullptr || scales - scales == 0);
      poison_[j] = finite ? 0.0f : __builtin_nanf("");
      if (finite) continue;
      block.keys[j] = block.values[j] = zeros_;
      block.key_scales[j] = block.value_scales[j] = 0;
    }
  }

  // Adds a block. Returns false, with nothing changed, if it needs `careful`.
  bool attend(const Block& block, bool careful, float* states) {
    multiply_keys(block);
    if (!scale_scores(block, careful)) return false;
    run_programs(block);
    if (p_.band.left < Band::kUnlimited || p_.band.right < Band::kUnlimited) apply_band(block);
    for (int64_t r = 0; r < query_rows_; ++r)
      softmax_row(block, r, states + r * call_.pitch() + Ep_);
    multiply_values(block);
    if (!careful && !finite_values()) return false;
    for (int64_t r = 0; r < query_rows_; ++r) {
      float* state = states + r * call_.pitch();
      F32 rescale = broadcast(rescale_[r]);
      for (int64_t e = 0; e < Ep_; e += kLanes) {
        store(state + e, load(state + e) * rescale + load(values_ + r * Ep_ + e));
      }
      state[Ep_ + kRowSum] = state[Ep_ + kRowSum] * rescale_[r] + sum_[r];
      state[Ep_ + kRowMax] = row_max_[r];
      state[Ep_ + kPoison] += row_poison_[r];
    }
    return true;
  }

  void multiply_keys(const Block& block) {
    int64_t count = round_up(block.count, kPointerMultiple);
    if (gemm_ == kPackedF32) return pack_and_multiply_keys(block);
    if (gemm_ == kAmxTiles) return multiply_keys_on_tiles(block);
    int64_t r = 0;
    for (; r + 4 <= padded_; r += 4) {
      direct_scores<Element, 4>(query_ + r * Dp_, Dp_, block.keys, block.keys_ahead, count,
                                scores_ + r * kBlock, kBlock);
    }
    if (padded_ - r == 2) {
      direct_scores<Element, 2>(query_, Dp_, block.keys, block.keys_ahead, count, scores_,
                                kBlock);
    } else if (padded_ - r == 1) {
      direct_scores<Element, 1>(query_, Dp_, block.keys, block.keys_ahead, count, scores_,
                                kBlock);
    }
  }

  void multiply_values(const Block& block) {
    if (gemm_ == kPackedF32) return pack_and_multiply_values(block);
    if (gemm_ == kAmxTiles) return multiply_values_on_tiles(block);
    int64_t r = 0;
    for (; r + 4 <= padded_; r += 4) {
      direct_values<Element, 4>(scores_ + r * kBlock, kBlock, block.values, block.values_ahead,
                                block.count, values_ + r * Ep_, Ep_);
    }
    if (padded_ - r == 2) {
      direct_values<Element, 2>(scores_, kBlock, block.values, block.values_ahead, block.count,
                                values_, Ep_);
    } else if (padded_ - r == 1) {
      direct_values<Element, 1>(scores_, kBlock, block.values, block.values_ahead, block.count,
                                values_, Ep_);
    }
  }

  // Many query rows: keys are packed as float32 columns, values as float32 rows.
  void pack_and_multiply_keys(const Block& block) {
    int64_t columns = round_up(block.count, kMicroVectors * kLanes);
    for (int64_t j = 0; j < columns; j += kLanes) {
      for (int64_t d = 0; d < Dp_; d += kPairLanes) {
        F32 a[kLanes], b[kLanes];
        for (int i = 0; i < kLanes; ++i) Element::pair(block.keys[j + i], d, a[i], b[i]);
        transpose(a), transpose(b);
        for (int i = 0; i < kLanes; ++i) {
          store(k_packed_ + (d + i) * kBlock + j, a[i]);
          store(k_packed_ + (d + kLanes + i) * kBlock + j, b[i]);
        }
      }
    }
    gemm(padded_, columns, Dp_, query_, Dp_, k_packed_, kBlock, scores_, kBlock);
  }

  void pack_and_multiply_values(const Block& block) {
    for (int64_t j = 0; j < block.count; ++j) {
      for (int64_t e = 0; e < Ep_; e += kPairLanes) {
        F32 a, b;
        Element::pair(block.values[j], e, a, b);
        store(v_packed_ + j * Ep_ + e, a);
        store(v_packed_ + j * Ep_ + e + kLanes, b);
      }
    }
    gemm(padded_, Ep_, block.count, scores_, kBlock, v_packed_, Ep_, values_, Ep_);
  }

#if defined(__AMX_BF16__)
  // The tile of keys j to j + 15: in their page, or a bfloat16 copy.
  KeyTile key_tile(const Block& block, int64_t j) {
    if (j >= block.count) return {zeros_, 0};
    int64_t stride = 2 * Dp_;
    if (Element::kBytes == 2) {
      bool together = true;
      for (int64_t i = 1; i < kTile; ++i) {
        together = together && block.keys[j + i] == block.keys[j] + i * stride;
      }
      if (together) return {block.keys[j], stride};
    }
    char* copy = reinterpret_cast<char*>(k_packed_) + j * stride;
    for (int64_t i = 0; i < kTile; ++i) {
      for (int64_t d = 0; d < Dp_; d += 32) {
        __m512i x = read_bfloat16<Element>(block.keys[j + i], d);
        memcpy(copy + i * stride + 2 * d, &x, 64);
      }
    }
    return {copy, stride};
  }

  void multiply_keys_on_tiles(const Block& block) {
    const char* query = reinterpret_cast<const char*>(query_);
    for (int64_t j = 0; j < block.count; j += 4 * kTile) {
      KeyTile keys[4];
      for (int64_t g = 0; g < 4; ++g) keys[g] = key_tile(block, j + g * kTile);
      for (int64_t r = 0; r < padded_; r += kTile) {
        tile_scores(query + r * 2 * Dp_, Dp_ / 32, keys, scores_ + r * kBlock + j, kBlock,
                    query_rows_ - r);
      }
      for (int64_t i = j; i < j + 4 * kTile; ++i)
        prefetch(block.keys_ahead[i], Dp_ * Element::kBytes);
    }
  }

  void multiply_values_on_tiles(const Block& block) {
    int64_t steps = (block.count + 31) / 32, step_bytes = 64 * Ep_;
    char* packed = reinterpret_cast<char*>(v_packed_);
    for (int64_t s = 0; s < steps; ++s) {
      pack_values<Element>(block.values + 32 * s, block.values_ahead + 32 * s, Ep_,
                           packed + s * step_bytes);
    }
    for (int64_t r = 0; r < query_rows_; ++r) {
      float* weights = scores_ + r * kBlock;
      if ((block.count - 1) % 32 < kLanes) store(weights + 32 * steps - kLanes, F32{});
      for (int64_t j = 0; j < 32 * steps; j += 32) {
        __m512i x = read_bfloat16<Float32>(reinterpret_cast<char*>(weights), j);
        memcpy(bf16_weights_ + r * kBlock + j, &x, 64);
      }
    }
    for (int64_t r = 0; r < padded_; r += kTile) {
      tile_values(bf16_weights_ + r * kBlock, kBlock, packed, step_bytes, steps, Ep_,
                  values_ + r * Ep_);
    }
  }
#else
  void multiply_keys_on_tiles(const Block&) {}
  void multiply_values_on_tiles(const Block&) {}
#endif

  // Returns whether all scores are finite, or `careful`.
  bool scale_scores(const Block& block, bool careful) {
    I32 nonfinite = {};
    F32 scale = broadcast(p_.scale);
    for (int64_t r = 0; r < query_rows_; ++r) {
      float* scores = scores_ + r * kBlock;
      for (int64_t j = 0; j < block.count; j += kLanes) {
        F32 x = load(scores + j) * scale;
        if (p_.k_scales != nullptr) x *= load(block.key_scales + j);
        if (careful) x += load(poison_ + j);
        nonfinite |= x - x != 0;
        store(scores + j, x);
      }
    }
    return careful || !any_lane(nonfinite);
  }

  // Scores outside the band become -inf.
  void apply_band(const Block& block) {
    for (int64_t r = 0; r < query_rows_; ++r) {
      int64_t position = p_.first(b_) + (first_query_row_ + r) / call_.G - block.first;
      int64_t first = min(max(position - p_.band.left, 0), block.count);
      int64_t end = max(min(position + p_.band.right + 1, block.count), first);
      float* scores = scores_ + r * kBlock;
      for (int64_t j = 0; j < first; ++j) scores[j] = -kInf;
      for (int64_t j = end; j < block.count; ++j) scores[j] = -kInf;
    }
  }

  // Online softmax of query row r: scores become weights, statistics go to members.
  void softmax_row(const Block& block, int64_t r, const float* tail) {
    float* scores = scores_ + r * kBlock;
    int64_t count = round_up(block.count, kLanes);
    for (int64_t j = block.count; j < count; ++j) scores[j] = -kInf;
    F32 largest = broadcast(-kInf);
    I32 nonfinite = {};
    for (int64_t j = 0; j < count; j += kLanes) {
      F32 x = load(scores + j);
      nonfinite |= (x != x) | (x == kInf);
      largest = max(largest, x);
    }
    row_poison_[r] = 0;
    if (any_lane(nonfinite)) {  // such a score makes the whole row NaN
      row_poison_[r] = __builtin_nanf("");
      for (int64_t j = 0; j < count; ++j) scores[j] = -kInf;
      largest = broadcast(-kInf);
    }
    float row_max = __builtin_fmaxf(tail[kRowMax], reduce_max(largest));
    bool none_visible = row_max == -kInf;
    rescale_[r] = none_visible ? 1.0f : exp_difference(tail[kRowMax], row_max);
    row_max_[r] = row_max;
    F32 sum = {}, shift = broadcast(none_visible ? 0.0f : row_max), log2e = broadcast(kLog2OfE);
    for (int64_t j = 0; j < count; j += kLanes) {
      F32 weight = exp2_nonpositive((load(scores + j) - shift) * log2e);
      sum += weight;
      if (p_.k_scales != nullptr) weight *= load(block.value_scales + j);
      store(scores + j, weight);
    }
    sum_[r] = reduce_add(sum);
  }

  bool finite_values() const {
    I32 nonfinite = {};
    for (int64_t i = 0; i < query_rows_ * Ep_; i += kLanes) {
      F32 x = load(values_ + i);
      nonfinite |= x - x != 0;
    }
    return !any_lane(nonfinite);
  }

  const Call& call_;
  const PagedParams& p_;
  const int64_t b_, k_, first_query_row_, query_rows_;
  const Gemm gemm_;
  const int64_t padded_;  // query rows, rounded up to what the loops take
  const int64_t Dp_, Ep_;
  Buffer buffer_;
  float *query_, *scores_, *values_, *state_, *rows_, *k_packed_, *v_packed_;
  char *zeros_, *k_copies_, *v_copies_, *program_memory_;
  uint16_t* bf16_weights_;  // weights in bfloat16
  float poison_[kBlock];
  bool nonfinite_query_[kQueryRows];
  float rescale_[kQueryRows], sum_[kQueryRows], row_max_[kQueryRows], row_poison_[kQueryRows];
};

}  // namespace pages
}  // namespace RAPTAX_ISA
}  // namespace raptax
