// One task of attention to pages: up to kLines lines, or a split of their keys.
//
// A line is one query row of one head; those of one sequence and one kv head read the
// same keys, so a task takes up to kLines of them. Keys go in blocks of kBlock, whose
// scores become weights before the next block comes, and in splits of kSplit, whose
// results are put together in order. Blocks and splits are cut by position alone: what
// a row gets depends neither on the other sequences nor on the number of threads.
//
// NaN and Inf are looked for in what comes out, which is little, rather than in what is
// read: only if there are any is a block done again with care.

#pragma once

#include "memory.h"
#include "paged_amx.inl"
#include "paged_few.inl"
#include "program.inl"

namespace raptax {
namespace RAPTAX_ISA {
namespace pages {

constexpr int64_t kSplit = 1024, kBlock = 128;
constexpr int64_t kLines = 128;  // of a task
constexpr int64_t kFew = 8;      // up to here a packed copy of the keys does not pay
constexpr int64_t kRounded = 16;  // row pointers come in multiples of so many

// ------------------------------------------------------------------ the softmax so far
// One line's state: E sums of weighted values, padded, and then these three.
enum { kHigh = 0, kTotal = 1, kPoison = 2, kStateTail = 16 };

static void clear(float* state, int64_t size) {
  memset(state, 0, static_cast<size_t>(size + kStateTail) * sizeof(float));
  state[size + kHigh] = -kInf;
}

// into = what both saw. An empty state changes nothing.
__attribute__((noinline)) static void merge(float* into, const float* from, int64_t size) {
  into[size + kPoison] += from[size + kPoison];
  float a = into[size + kHigh], b = from[size + kHigh];
  float high = a > b ? a : b;
  if (high == -kInf) return;
  a = shrink_from(a, high), b = shrink_from(b, high);
  F32 va = all(a), vb = all(b);
  for (int64_t e = 0; e < size; e += kLanes) {
    store(into + e, load(into + e) * va + load(from + e) * vb);
  }
  into[size + kTotal] = into[size + kTotal] * a + from[size + kTotal] * b;
  into[size + kHigh] = high;
}

// ------------------------------------------------------------------------- one call

// How a sequence is cut into tasks.
struct Cut {
  int64_t first_task;
  int64_t chunks;   // of lines
  int64_t splits;   // of keys, each a task of its own; 0 if tasks take all their keys
  int64_t partial;  // where its partial states begin, in lines
};

struct Call {
  const Paged& p;
  int64_t G, Dp, Ep;  // heads of a group; padded head sizes
  const Cut* cuts;
  float* partials;
  int32_t* left;  // (B, K): splits that are not done

  int64_t lines(int64_t b) const { return p.rows(b) * G; }
  int64_t pitch() const { return Ep + kStateTail; }
  // Keys that some of the lines may see.
  int64_t low(int64_t b, int64_t line) const {
    return most(0, p.first(b) + line / G - p.band.left);
  }
  int64_t high(int64_t b, int64_t last_line) const { return p.end_key(b, last_line / G); }
};

// Keys first .. first + count - 1 of one sequence and kv head.
struct Block {
  int64_t first = 0, count = 0;
  bool missing = false;  // none of them lies in a page: the mask has emptied them all
  const char* keys[kBlock];
  const char* values[kBlock];
  const char* keys_ahead[kBlock];  // rows that come kAhead bytes later
  const char* values_ahead[kBlock];
  float key_scales[kBlock], value_scales[kBlock];
};

// ------------------------------------------------------------------------- one task

template <typename Element>
class Task {
 public:
  Task(const Call& call, int64_t b, int64_t k, int64_t first_line, int64_t lines)
      : call_(call), p_(call.p), b_(b), k_(k), first_line_(first_line), lines_(lines),
        way_(way_of(call.p, lines)), padded_(pad_lines(way_, lines)), Dp_(call.Dp), Ep_(call.Ep), buffer_(lay_out(nullptr)) {
    lay_out(buffer_.template as<char>());
    memset(zeros_, 0, static_cast<size_t>(4 * most(Dp_, Ep_)));
    if (way_ == kOnTiles) memset(halves_, 0, static_cast<size_t>(padded_ * kBlock) * 2);
    read_query();
  }

  // State of all lines after keys low .. high - 1; `states` has a row per line.
  void run(int64_t low, int64_t high, float* states) {
    for (int64_t r = 0; r < lines_; ++r) clear(states + r * call_.pitch(), Ep_);
    Block blocks[2];
    find(blocks[0], low, high);
    for (int i = 0; blocks[i].count > 0; i = 1 - i) {
      Block &now = blocks[i], &next = blocks[1 - i];
      find(next, now.first + now.count, high);
      look_ahead(p_.D, now.count, now.keys, next.keys, now.keys_ahead);
      look_ahead(p_.E, now.count, now.values, next.values, now.values_ahead);
      if (now.missing) continue;
      pad(now);
      if (!attend(now, false, states)) {
        inspect(now);
        attend(now, true, states);
      }
    }
    for (int64_t r = 0; r < lines_; ++r) {
      float* state = states + r * call_.pitch() + Ep_;
      if (bad_query_[r] && state[kTotal] > 0) state[kPoison] = __builtin_nanf("");
    }
  }

  // All keys of the lines, split by split.
  void run_all() {
    int64_t pitch = call_.pitch();
    Buffer buffer(static_cast<size_t>(lines_ * pitch) * sizeof(float));
    float* whole = buffer.template as<float>();
    for (int64_t r = 0; r < lines_; ++r) clear(whole + r * pitch, Ep_);
    int64_t low = call_.low(b_, first_line_), high = call_.high(b_, first_line_ + lines_ - 1);
    while (low < high) {
      int64_t end = least(high, (low / kSplit + 1) * kSplit);
      run(low, end, state_);
      for (int64_t r = 0; r < lines_; ++r) merge(whole + r * pitch, state_ + r * pitch, Ep_);
      low = end;
    }
    for (int64_t r = 0; r < lines_; ++r) {
      write(call_, b_, k_, first_line_ + r, lines_, whole + r * pitch, rows_);
    }
  }

  // Writes what a state comes to. `lines` are those of the task that made it; `scratch`
  // has room for two rows of values.
  static void write(const Call& call, int64_t b, int64_t k, int64_t line, int64_t lines,
                    const float* state, float* scratch) {
    const Paged& p = call.p;
    int64_t row = p.row_offsets[b] + line / call.G, head = k * call.G + line % call.G;
    float sink = p.sinks == nullptr ? -kInf : p.sinks[head];
    float high = __builtin_fmaxf(state[call.Ep + kHigh], sink), shrink = 1;
    float total = state[call.Ep + kTotal];
    if (sink > -kInf) {
      shrink = shrink_from(state[call.Ep + kHigh], high);
      total = total * shrink + shrink_from(sink, high);
    }
    float factor = total == 0 ? 0.0f : shrink / total;
    float lse = total == 0 ? -kInf : high + __builtin_logf(total);
    if (state[call.Ep + kPoison] != 0 || !(sink < kInf)) factor = lse = __builtin_nanf("");
    p.lse[row * p.H + head] = lse;
    for (int64_t e = 0; e < call.Ep; e += kLanes) store(scratch + e, load(state + e) * factor);
    float* ordered = scratch + call.Ep;
    if (way_of(p, lines) == kOnTiles) {
      restore_columns(scratch, call.Ep, ordered);
    } else {
      restore<Element>(scratch, call.Ep, ordered);
    }
    write_numbers(p.type, p.out, (row * p.H + head) * p.E, p.E, ordered);
  }

 private:
  // How products are done. It follows from the lines alone, not from where they run.
  enum Way { kFewLines, kPacked, kOnTiles };

  static Way way_of(const Paged& p, int64_t lines) {
    if (lines <= kFew) return kFewLines;
    bool tiles = kTiles && Element::kFitsBFloat16 && p.type == Type::kBF16;
    return tiles ? kOnTiles : kPacked;
  }
  static int64_t pad_lines(Way way, int64_t lines) {
    if (way == kOnTiles) return round_up(lines, kTile);
    if (way == kPacked) return round_up(lines, kRows);
    return lines <= 2 ? lines : round_up(lines, 4);
  }
  // Puts the scratch arrays one after another from `base` on; returns their size.
  size_t lay_out(char* base) {
    int64_t used = 0;
    auto place = [&](auto*& array, int64_t count) {
      if (base != nullptr) array = reinterpret_cast<decltype(&array[0])>(base + used);
      used += round_up(count * static_cast<int64_t>(sizeof(array[0])), 64);
    };
    place(query_, padded_ * Dp_);
    place(scores_, padded_ * kBlock);
    place(values_, padded_ * Ep_);
    place(state_, lines_ * call_.pitch());
    place(rows_, 2 * most(Dp_, Ep_));
    place(zeros_, 4 * most(Dp_, Ep_));
    place(k_packed_, way_ == kFewLines ? 0 : Dp_ * kBlock);
    place(v_packed_, way_ == kFewLines ? 0 : kBlock * Ep_);
    place(halves_, way_ == kOnTiles ? padded_ * kBlock : 0);
    place(program_memory_, static_cast<int64_t>(program_bytes()));
    place(k_copies_, p_.D == Dp_ ? 0 : kBlock * Dp_ * Element::kBytes);
    place(v_copies_, p_.E == Ep_ ? 0 : kBlock * Ep_ * Element::kBytes);
    return static_cast<size_t>(used);
  }

  void read_query() {
    memset(query_, 0, static_cast<size_t>(padded_ * Dp_) * sizeof(float));
    memset(rows_, 0, static_cast<size_t>(Dp_) * sizeof(float));
    for (int64_t r = 0; r < lines_; ++r) {
      int64_t line = first_line_ + r, head = k_ * call_.G + line % call_.G;
      int64_t from = ((p_.row_offsets[b_] + line / call_.G) * p_.H + head) * p_.D;
      bad_query_[r] = !read_numbers(p_.type, p_.query, from, p_.D, rows_);
      if (bad_query_[r]) continue;
      if (way_ == kOnTiles) {
        line_to_tiles(r);
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

  // Runs a program over the scores of all lines: those of one head lie call_.G apart.
  template <typename Run>
  void run_program(const Program& program, const Block& block, const Run& run) {
    Runner runner(program, Along::kKeys, kBlock, program_memory_);
    int64_t G = call_.G;
    for (int64_t g = 0; g < G; ++g) {
      int64_t r = (g - first_line_ % G + G) % G;
      if (r >= lines_) continue;
      runner.begin(b_, k_ * G + g);
      runner.columns(block.first, block.count);
      run(runner, p_.first(b_) + (first_line_ + r) / G, (lines_ - r + G - 1) / G,
          scores_ + r * kBlock);
    }
  }

  // Score change and mask, in this order.
  void run_programs(const Block& block) {
    int64_t stride = call_.G * kBlock;
    if (p_.score_program != nullptr) {
      run_program(*p_.score_program, block,
                  [&](Runner& runner, int64_t position, int64_t rows, float* scores) {
                    runner.change(position, rows, scores, stride);
                  });
    }
    if (p_.mask_program != nullptr) {
      run_program(*p_.mask_program, block,
                  [&](Runner& runner, int64_t position, int64_t rows, float* scores) {
                    runner.mask(position, rows, scores, stride);
                  });
    }
  }

  // Line r in bfloat16: pairs along D, 16 lines beside each other in a tile.
  void line_to_tiles(int64_t r) {
    uint32_t* tiles = reinterpret_cast<uint32_t*>(query_) + r / kTile * Dp_ / 2 * kTile;
    for (int64_t i = 0; i < Dp_ / 2; ++i) {
      uint32_t low = float_to_bits(rows_[2 * i]) >> 16;
      tiles[i * kTile + r % kTile] = low | (float_to_bits(rows_[2 * i + 1]) & 0xffff0000u);
    }
  }

  // The block that begins at `first`; empty if that is `end`.
  void find(Block& block, int64_t first, int64_t end) const {
    block.first = first;
    block.count = least(end, (first / kBlock + 1) * kBlock) - first;
    if (block.count < 0) block.count = 0;
    block.missing = block.count > 0;
    int64_t key_bytes = p_.D * Element::kBytes, value_bytes = p_.E * Element::kBytes;
    for (int64_t j = 0; j < block.count;) {
      int64_t run = least(p_.P - (first + j) % p_.P, block.count - j);
      if (!p_.held(b_, (first + j) / p_.P)) {
        leave_out(block, j, j + run);
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
    leave_out(block, block.count, kBlock);
  }

  // Rows from .. end - 1 of the block are zeros.
  void leave_out(Block& block, int64_t from, int64_t end) const {
    for (int64_t j = from; j < end; ++j) {
      block.keys[j] = block.values[j] = zeros_;
      block.key_scales[j] = block.value_scales[j] = 0;
    }
  }

  static void look_ahead(int64_t size, int64_t count, const char* const* rows,
                         const char* const* next, const char** ahead) {
    int64_t distance = most(1, least(kAhead / (size * Element::kBytes), kBlock - 1));
    int64_t here = most(0, count - distance);
    for (int64_t j = 0; j < here; ++j) ahead[j] = rows[j + distance];
    for (int64_t j = here; j < kBlock; ++j) {
      ahead[j] = next[least(j + distance - count, kBlock - 1)];
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
    for (int64_t i = 0; i < size; i += kStep) {
      F32 a, b;
      Element::pair(row, i, a, b);
      bad |= (a - a != 0) | (b - b != 0);
    }
    return !any_lane(bad);
  }

  // Finds the keys that are not finite, or whose values are not, and zeros them.
  void inspect(Block& block) {
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

  // Takes in a block. False, and nothing changed, if care is needed and was not taken.
  bool attend(const Block& block, bool careful, float* states) {
    multiply_keys(block);
    if (!scale_scores(block, careful)) return false;
    run_programs(block);
    if (p_.band.left < Band::kUnlimited || p_.band.right < Band::kUnlimited) limit(block);
    for (int64_t r = 0; r < lines_; ++r) weigh(block, r, states + r * call_.pitch() + Ep_);
    multiply_values(block);
    if (!careful && !finite_values()) return false;
    for (int64_t r = 0; r < lines_; ++r) {
      float* state = states + r * call_.pitch();
      F32 shrink = all(shrink_[r]);
      for (int64_t e = 0; e < Ep_; e += kLanes) {
        store(state + e, load(state + e) * shrink + load(values_ + r * Ep_ + e));
      }
      state[Ep_ + kTotal] = state[Ep_ + kTotal] * shrink_[r] + sum_[r];
      state[Ep_ + kHigh] = high_[r];
      state[Ep_ + kPoison] += line_poison_[r];
    }
    return true;
  }

  void multiply_keys(const Block& block) {
    int64_t count = round_up(block.count, kRounded);
    if (way_ == kPacked) return pack_and_multiply_keys(block);
    if (way_ == kOnTiles) return multiply_keys_on_tiles(block);
    int64_t r = 0;
    for (; r + 4 <= padded_; r += 4) {
      few_scores<Element, 4>(query_ + r * Dp_, Dp_, block.keys, block.keys_ahead, count,
                             scores_ + r * kBlock, kBlock);
    }
    if (padded_ - r == 2) {
      few_scores<Element, 2>(query_, Dp_, block.keys, block.keys_ahead, count, scores_, kBlock);
    } else if (padded_ - r == 1) {
      few_scores<Element, 1>(query_, Dp_, block.keys, block.keys_ahead, count, scores_, kBlock);
    }
  }

  void multiply_values(const Block& block) {
    if (way_ == kPacked) return pack_and_multiply_values(block);
    if (way_ == kOnTiles) return multiply_values_on_tiles(block);
    int64_t r = 0;
    for (; r + 4 <= padded_; r += 4) {
      few_values<Element, 4>(scores_ + r * kBlock, kBlock, block.values, block.values_ahead,
                             block.count, values_ + r * Ep_, Ep_);
    }
    if (padded_ - r == 2) {
      few_values<Element, 2>(scores_, kBlock, block.values, block.values_ahead, block.count,
                             values_, Ep_);
    } else if (padded_ - r == 1) {
      few_values<Element, 1>(scores_, kBlock, block.values, block.values_ahead, block.count,
                             values_, Ep_);
    }
  }

  // Many lines: keys become float32 columns, values float32 rows.
  void pack_and_multiply_keys(const Block& block) {
    int64_t columns = round_up(block.count, kColumns * kLanes);
    for (int64_t j = 0; j < columns; j += kLanes) {
      for (int64_t d = 0; d < Dp_; d += kStep) {
        F32 a[kLanes], b[kLanes];
        for (int i = 0; i < kLanes; ++i) Element::pair(block.keys[j + i], d, a[i], b[i]);
        transpose(a), transpose(b);
        for (int i = 0; i < kLanes; ++i) {
          store(k_packed_ + (d + i) * kBlock + j, a[i]);
          store(k_packed_ + (d + kLanes + i) * kBlock + j, b[i]);
        }
      }
    }
    product(padded_, columns, Dp_, query_, Dp_, k_packed_, kBlock, scores_, kBlock);
  }

  void pack_and_multiply_values(const Block& block) {
    for (int64_t j = 0; j < block.count; ++j) {
      for (int64_t e = 0; e < Ep_; e += kStep) {
        F32 a, b;
        Element::pair(block.values[j], e, a, b);
        store(v_packed_ + j * Ep_ + e, a);
        store(v_packed_ + j * Ep_ + e + kLanes, b);
      }
    }
    product(padded_, Ep_, block.count, scores_, kBlock, v_packed_, Ep_, values_, Ep_);
  }

#if defined(__AMX_BF16__)
  // Where the tile with keys j to j + 15 lies: in their page, or a copy in bfloat16.
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
                    lines_ - r);
      }
      for (int64_t i = j; i < j + 4 * kTile; ++i) prefetch(block.keys_ahead[i], Dp_ * Element::kBytes);
    }
  }

  void multiply_values_on_tiles(const Block& block) {
    int64_t steps = (block.count + 31) / 32, step_bytes = 64 * Ep_;
    char* packed = reinterpret_cast<char*>(v_packed_);
    for (int64_t s = 0; s < steps; ++s) {
      pack_values<Element>(block.values + 32 * s, block.values_ahead + 32 * s, Ep_,
                           packed + s * step_bytes);
    }
    for (int64_t r = 0; r < lines_; ++r) {
      float* weights = scores_ + r * kBlock;
      if ((block.count - 1) % 32 < kLanes) store(weights + 32 * steps - kLanes, F32{});
      for (int64_t j = 0; j < 32 * steps; j += 32) {
        __m512i x = read_bfloat16<Float32>(reinterpret_cast<char*>(weights), j);
        memcpy(halves_ + r * kBlock + j, &x, 64);
      }
    }
    for (int64_t r = 0; r < padded_; r += kTile) {
      tile_values(halves_ + r * kBlock, kBlock, packed, step_bytes, steps, Ep_,
                  values_ + r * Ep_);
    }
  }
#else
  void multiply_keys_on_tiles(const Block&) {}
  void multiply_values_on_tiles(const Block&) {}
#endif

  // Whether all scores are finite, or care was taken.
  bool scale_scores(const Block& block, bool careful) {
    I32 odd = {};
    F32 scale = all(p_.scale);
    for (int64_t r = 0; r < lines_; ++r) {
      float* scores = scores_ + r * kBlock;
      for (int64_t j = 0; j < block.count; j += kLanes) {
        F32 x = load(scores + j) * scale;
        if (p_.k_scales != nullptr) x *= load(block.key_scales + j);
        if (careful) x += load(poison_ + j);
        odd |= x - x != 0;
        store(scores + j, x);
      }
    }
    return careful || !any_lane(odd);
  }

  // Scores outside the band become -inf.
  void limit(const Block& block) {
    for (int64_t r = 0; r < lines_; ++r) {
      int64_t position = p_.first(b_) + (first_line_ + r) / call_.G - block.first;
      int64_t low = least(most(position - p_.band.left, 0), block.count);
      int64_t high = most(least(position + p_.band.right + 1, block.count), low);
      float* scores = scores_ + r * kBlock;
      for (int64_t j = 0; j < low; ++j) scores[j] = -kInf;
      for (int64_t j = high; j < block.count; ++j) scores[j] = -kInf;
    }
  }

  // Scores of line r become weights; what the state has to know of them is put aside.
  void weigh(const Block& block, int64_t r, const float* tail) {
    float* scores = scores_ + r * kBlock;
    int64_t count = round_up(block.count, kLanes);
    for (int64_t j = block.count; j < count; ++j) scores[j] = -kInf;
    F32 highest = all(-kInf);
    I32 odd = {};
    for (int64_t j = 0; j < count; j += kLanes) {
      F32 x = load(scores + j);
      odd |= (x != x) | (x == kInf);
      highest = larger(highest, x);
    }
    line_poison_[r] = 0;
    if (any_lane(odd)) {  // such a score makes the whole line NaN; the rest is moot
      line_poison_[r] = __builtin_nanf("");
      for (int64_t j = 0; j < count; ++j) scores[j] = -kInf;
      highest = all(-kInf);
    }
    float high = __builtin_fmaxf(tail[kHigh], largest_of(highest));
    bool nothing = high == -kInf;
    shrink_[r] = nothing ? 1.0f : shrink_from(tail[kHigh], high);
    high_[r] = high;
    F32 sum = {}, shift = all(nothing ? 0.0f : high), log2e = all(kLog2E);
    for (int64_t j = 0; j < count; j += kLanes) {
      F32 weight = power((load(scores + j) - shift) * log2e);
      sum += weight;
      if (p_.k_scales != nullptr) weight *= load(block.value_scales + j);
      store(scores + j, weight);
    }
    sum_[r] = sum_of(sum);
  }

  bool finite_values() const {
    I32 odd = {};
    for (int64_t i = 0; i < lines_ * Ep_; i += kLanes) {
      F32 x = load(values_ + i);
      odd |= x - x != 0;
    }
    return !any_lane(odd);
  }

  const Call& call_;
  const Paged& p_;
  const int64_t b_, k_, first_line_, lines_;
  const Way way_;
  const int64_t padded_;  // lines, rounded up to what the loops take
  const int64_t Dp_, Ep_;
  Buffer buffer_;
  float *query_, *scores_, *values_, *state_, *rows_, *k_packed_, *v_packed_;
  char *zeros_, *k_copies_, *v_copies_, *program_memory_;
  uint16_t* halves_;  // weights in bfloat16
  float poison_[kBlock];
  bool bad_query_[kLines];
  float shrink_[kLines], sum_[kLines], high_[kLines], line_poison_[kLines];
};

}  // namespace pages
}  // namespace RAPTAX_ISA
}  // namespace raptax
