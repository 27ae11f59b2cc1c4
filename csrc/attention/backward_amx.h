// The backward kernel's GEMMs on AMX, of bfloat16, or of float32 in three bfloat16
// parts: see pack_amx.h. Here the parts of an operand are separate planes.
//
// A left operand has 32 elements of a row in each row of its tile, a right operand
// pairs of elements of 16 columns. Along the sum, elements n and n + 16 of 32 are
// paired, so that two float32 vectors become one of pairs by a shift and a blend.

#pragma once

#include "attention/backward_scores.h"
#include "gemm/gemm_amx.h"

namespace raptax {
namespace RAPTAX_ISA {

// Splits two vectors into parts, `first` in the low halves, `second` in the high
// halves; a single part is rounded.
template <int kParts>
static inline void back_pairs(F32 first, F32 second, Pairs* parts) {
  if (kParts == 1) {
    const I32 half = broadcast(int32_t{0x8000});
    parts[0] = upper_halves(as_float(as_bits(first) + half), as_float(as_bits(second) + half));
  } else {
    split(first, second, parts);
  }
}

// Replaces elements that are not finite by 0. Returns whether all are finite.
static inline bool back_scrub(Pairs* x) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 bad = _mm512_cmpeq_epi16_mask(_mm512_and_si512((__m512i)*x, exponent), exponent);
  *x = (Pairs)_mm512_maskz_mov_epi16(static_cast<__mmask32>(~bad), (__m512i)*x);
  return bad == 0;
}
static inline bool back_scrub(F32* x) {
  I32 finite = back_finite(*x);
  *x = finite ? *x : F32{};
  return back_all(finite);
}

// The operands of a product.
struct BackTiles {
  const Bf16* left;  // rows of `stride` numbers
  int64_t stride;
  int64_t left_part;      // numbers from one part to the next
  const Bf16* right;      // tiles of 16 columns, one for each step
  int64_t right_columns;  // numbers from there to the next 16 columns
  int64_t right_part;     // numbers from one part to the next
};

static inline void back_load_left(const BackTiles& x, const Bf16* a) {
  _tile_loadd(4, a, 2 * x.stride);
  _tile_loadd(5, a + 16 * x.stride, 2 * x.stride);
}
static inline void back_load_right(const BackTiles& x, const Bf16* b) {
  _tile_loadd(6, b, 64);
  _tile_loadd(7, b + x.right_columns, 64);
}
static inline void back_multiply() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// c (32 x 32) (+)= a b, over steps of 32.
template <int kParts>
static inline void back_tile_product(int64_t steps, const BackTiles& x, float* c,
                                     int64_t c_stride, bool add) {
  char* above = reinterpret_cast<char*>(c);
  char* below = above + 64 * c_stride;
  const int64_t pitch = 4 * c_stride;
  if (add) {
    _tile_loadd(0, above, pitch);
    _tile_loadd(1, above + 64, pitch);
    _tile_loadd(2, below, pitch);
    _tile_loadd(3, below + 64, pitch);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t n = 0; n < steps; ++n) {
    const Bf16* a = x.left + n * kTileDepth;
    const Bf16* b = x.right + n * kTileNumbers;
    back_load_right(x, b);
    if (kParts == 3) {  // as TileQueue::multiply
      back_load_left(x, a + 2 * x.left_part);
      back_multiply();
      back_load_left(x, a + x.left_part);
      back_multiply();
      back_load_right(x, b + x.right_part);
      back_multiply();
      back_load_left(x, a);
      back_multiply();
      back_load_right(x, b + 2 * x.right_part);
      back_multiply();
      back_load_right(x, b);
    } else {
      back_load_left(x, a);
    }
    back_multiply();
  }
  _tile_stored(0, above, pitch);
  _tile_stored(1, above + 64, pitch);
  _tile_stored(2, below, pitch);
  _tile_stored(3, below + 64, pitch);
}

// The interface of BackFloat. dK and dV are accumulated transposed.
template <int kParts>
class BackAmx {
 public:
  static constexpr int64_t kQueries = kParts == 1 ? 128 : 64;
  static constexpr int64_t kKeys = kParts == 1 ? 256 : 192;
  static constexpr int64_t kAlign = 32;

  static size_t bytes(const Shape& shape) { return lay_out(shape, nullptr, nullptr); }

  BackAmx(const BackwardParams& p, float* memory) : p_(p), shape_(p.forward.shape) {
    lay_out(shape_, this, reinterpret_cast<char*>(memory));
  }

  static bool direct(const BackwardParams&) { return false; }
  static float query_factor(const BackwardParams& p) { return p.forward.score_params.scale; }

  void keys(int64_t b, int64_t kv, int64_t key, int64_t keys) {
    const ForwardParams& f = p_.forward;
    const int64_t row = (b * shape_.K + kv) * shape_.S + key;
    poison_ = nullptr;
    const int64_t count = round_up(keys, kTileDepth);
    key_rows({f.type, f.key, row * shape_.D, shape_.D}, keys, k_size_);
    columns(room_, count, k_size_, key_columns_);
    pairs(room_, count, k_size_, key_pairs_);
    key_rows({f.type, f.value, row * shape_.E, shape_.E}, keys, v_size_);
    columns(room_, count, v_size_, value_columns_);
    memset(d_key_, 0, sizeof(float) * kKeys * k_size_);
    memset(d_value_, 0, sizeof(float) * kKeys * v_size_);
  }

  const float* poison() const { return poison_; }

  void queries(const BackPlace& at, float* shift) {
    const ForwardParams& f = p_.forward;
    const int64_t first = (at.b * shape_.H + at.h) * shape_.T + at.row;
    rows_ = round_up(at.rows, kTileDepth);
    bool finite_rows[kQueries];
    rows_of({f.type, f.query, first * shape_.D, shape_.D}, at.rows, k_size_, query_,
            kQueries * k_size_, finite_rows);
    for (int64_t r = 0; r < at.rows; ++r) {
      if (!finite_rows[r]) shift[r] += __builtin_nanf("");
    }
    rows_of({f.type, p_.d_out, first * shape_.E, shape_.E}, at.rows, v_size_, d_out_,
            kQueries * v_size_, finite_rows);
    transposed(query_, rows_, k_size_, query_transposed_);
    transposed(d_out_, rows_, v_size_, d_out_transposed_);
  }

  void compute_weights(const BackPlace& at, BackScores* scores, const BackRows& known) {
    for (int64_t r = 0; r < rows_; r += kTileDepth) {
      const Strip visible = strips_[r / kTileDepth] =
          scores->visible(r, r + kTileDepth, kTileDepth);
      memory_barrier();
      for (int64_t c = visible.from; c < visible.to; c += kTileDepth) {
        const int64_t d = k_size_, e = v_size_;
        back_tile_product<kParts>(
            d / kTileDepth,
            {query_ + r * d, d, kQueries * d, key_columns_ + c * d, 16 * d, kKeys * d},
            scores_ + c, kKeys, false);
        back_tile_product<kParts>(
            e / kTileDepth,
            {d_out_ + r * e, e, kQueries * e, value_columns_ + c * e, 16 * e, kKeys * e},
            slopes_ + c, kKeys, false);
      }
      memory_barrier();
      const int64_t end = at.rows < r + kTileDepth ? at.rows : r + kTileDepth;
      scores->rows(r, end, known, scores_, slopes_, kKeys);
      for (int64_t n = end - r; n < kTileDepth; ++n) {
        memset(scores_ + n * kKeys, 0, sizeof(float) * kKeys);
        memset(slopes_ + n * kKeys, 0, sizeof(float) * kKeys);
      }
      store_operands(visible, r);
    }
  }

  void add_to_keys(const BackPlace& at) {
    memory_barrier();
    for (int64_t c = at.from; c < at.to; c += kTileDepth) {
      int64_t first = 0, last = rows_;  // of the rows that see some of these columns
      while (first < last && !sees(first, c)) first += kTileDepth;
      while (first < last && !sees(last - kTileDepth, c)) last -= kTileDepth;
      if (first == last) continue;
      const int64_t skip = c / 16 * kPanelNumbers + first * 16,
                    steps = (last - first) / kTileDepth;
      for (int64_t e = 0; e < v_size_; e += kTileDepth) {
        back_tile_product<kParts>(
            steps,
            {d_out_transposed_ + e * kQueries + first, kQueries, kQueries * v_size_,
             weight_pairs_ + skip, kPanelNumbers, kScores},
            d_value_ + e * kKeys + c, kKeys, true);
      }
      for (int64_t d = 0; d < k_size_; d += kTileDepth) {
        back_tile_product<kParts>(
            steps,
            {query_transposed_ + d * kQueries + first, kQueries, kQueries * k_size_,
             slope_pairs_ + skip, kPanelNumbers, kScores},
            d_key_ + d * kKeys + c, kKeys, true);
      }
    }
    memory_barrier();
  }

  // Writes whole blocks of 32 rows.
  void add_to_queries(const BackPlace& at, float* sums, int64_t stride, bool add) {
    memory_barrier();
    constexpr int64_t kColumns = kKeys * 16;  // numbers of 16 columns of K
    for (int64_t r = 0; r < at.rows; r += kTileDepth) {
      const Strip visible = strips_[r / kTileDepth];
      for (int64_t d = 0; d < k_size_; d += kTileDepth) {
        const Bf16* right = key_pairs_ + d / 16 * kColumns + visible.from * 16;
        back_tile_product<kParts>((visible.to - visible.from) / kTileDepth,
                                  {slope_rows_ + r * kKeys + visible.from, kKeys, kScores,
                                   right, kColumns, kKeys * k_size_},
                                  sums + r * stride + d, stride, add);
      }
    }
    memory_barrier();
  }

  void finish(int64_t b, int64_t kv, int64_t key, int64_t keys) {
    const int64_t row = (b * shape_.K + kv) * shape_.S + key;
    put(d_key_, k_size_, shape_.D, p_.forward.score_params.scale, p_.d_key, row, keys);
    put(d_value_, v_size_, shape_.E, 1, p_.d_value, row, keys);
  }

 private:
  static constexpr int64_t kPanelNumbers = kQueries * 16;  // numbers of 16 columns
  static constexpr int64_t kScores = kQueries * kKeys;     // of a block

  bool sees(int64_t row, int64_t column) const {
    const Strip& strip = strips_[row / kTileDepth];
    return column >= strip.from && column < strip.to;
  }

  // Compiler barrier: GCC 12 does not know what memory tile intrinsics access.
  static void memory_barrier() { asm volatile("" ::: "memory"); }

  static size_t lay_out(const Shape& shape, BackAmx* self, char* memory) {
    const int64_t k = round_up(shape.D, kTileDepth), v = round_up(shape.E, kTileDepth);
    const int64_t wide = k > v ? k : v;
    constexpr int64_t kBytes = 2 * kParts;
    size_t used = 0;
    auto take = [&](auto BackAmx::* array, int64_t count, int64_t bytes) {
      if (self != nullptr) {
        self->*array = reinterpret_cast<decltype(self->*array + 0)>(memory + used);
      }
      used += static_cast<size_t>(round_up(count * bytes, 64));
    };
    take(&BackAmx::key_columns_, kKeys * k, kBytes);
    take(&BackAmx::key_pairs_, kKeys * k, kBytes);
    take(&BackAmx::value_columns_, kKeys * v, kBytes);
    take(&BackAmx::room_, kKeys * wide, kBytes);
    take(&BackAmx::query_, kQueries * k, kBytes);
    take(&BackAmx::query_transposed_, kQueries * k, kBytes);
    take(&BackAmx::d_out_, kQueries * v, kBytes);
    take(&BackAmx::d_out_transposed_, kQueries * v, kBytes);
    take(&BackAmx::weight_pairs_, kQueries * kKeys, kBytes);
    take(&BackAmx::slope_pairs_, kQueries * kKeys, kBytes);
    take(&BackAmx::slope_rows_, kQueries * kKeys, kBytes);
    take(&BackAmx::scores_, kTileDepth * kKeys, 4);
    take(&BackAmx::slopes_, kTileDepth * kKeys, 4);
    take(&BackAmx::d_key_, kKeys * k, 4);
    take(&BackAmx::d_value_, kKeys * v, 4);
    take(&BackAmx::poison_room_, kKeys, 4);
    take(&BackAmx::row_room_, 16 * wide, 4);
    if (self != nullptr) self->k_size_ = k, self->v_size_ = v;
    return used;
  }

  // Rows, finite, with zeros up to `padded` numbers and kTileDepth rows.
  static void rows_of(const Source& from, int64_t count, int64_t padded, Bf16* to, int64_t part,
                      bool* finite_rows) {
    for (int64_t r = 0; r < count; ++r) {
      finite_rows[r] = true;
      for (int64_t d = 0; d < padded; d += kTileDepth) {
        Pairs x[kParts];
        if (kParts == 1) {
          x[0] = load_pairs(bf16_row(from, r), d, from.size);
          finite_rows[r] &= back_scrub(x);
        } else {
          F32 low = load_lanes(from, r, d), high = load_lanes(from, r, d + kLanes);
          finite_rows[r] &= back_scrub(&low);
          finite_rows[r] &= back_scrub(&high);
          split_any(low, high, x);
        }
        for (int p = 0; p < kParts; ++p) memcpy(to + p * part + r * padded + d, x + p, 64);
      }
    }
    const int64_t rest = (round_up(count, kTileDepth) - count) * padded;
    for (int p = 0; p < kParts; ++p) memset(to + p * part + count * padded, 0, 2 * rest);
  }

  void key_rows(const Source& from, int64_t keys, int64_t padded) {
    bool finite_rows[kKeys];
    rows_of(from, keys, padded, room_, kKeys * padded, finite_rows);
    for (int64_t r = 0; r < keys; ++r) {
      if (finite_rows[r]) continue;
      if (poison_ == nullptr) memset(poison_room_, 0, sizeof(float) * kKeys);
      poison_room_[r] = __builtin_nanf("");
      poison_ = poison_room_;
    }
  }

  // Right operands whose columns are the rows given: for each 16, tiles of 32 numbers.
  static void columns(const Bf16* rows, int64_t count, int64_t size, Bf16* tiles) {
    for (int p = 0; p < kParts; ++p, rows += kKeys * size) {
      Bf16* tile = tiles + p * kKeys * size;
      for (int64_t s = 0; s < count; s += 16) {
        for (int64_t d = 0; d < size; d += kTileDepth, tile += kTileNumbers) {
          F32 x[16];
          for (int64_t i = 0; i < 16; ++i) memcpy(x + i, rows + (s + i) * size + d, 64);
          transpose(x);
          memcpy(tile, x, sizeof x);
        }
      }
    }
  }

  // Numbers d .. d + 15 of row i, each paired with that of row i + 16.
  static Pairs paired(const Bf16* rows, int64_t i, int64_t d, int64_t size) {
    const Bf16 *first = rows + i * size, *second = first + 16 * size;
    if (kParts == 1) {
      return (Pairs)(load_row_part(first, d, size) | (load_row_part(second, d, size) << 16));
    }
    // Rows in parts have pairs themselves: d and d + 16 of 32.
    U32 low, high;
    memcpy(&low, first + round_down(d, kTileDepth), sizeof low);
    memcpy(&high, second + round_down(d, kTileDepth), sizeof high);
    return d % kTileDepth == 0 ? (Pairs)((low & 0xffffu) | (high << 16))
                               : (Pairs)((low >> 16) | (high & 0xffff0000u));
  }

  // Right operands that sum over rows: for each 16 columns, tiles of 32 of kKeys rows.
  static void pairs(const Bf16* rows, int64_t count, int64_t size, Bf16* tiles) {
    for (int p = 0; p < kParts; ++p, rows += kKeys * size, tiles += kKeys * size) {
      for (int64_t d = 0; d < size; d += 16) {
        for (int64_t s = 0; s < count; s += kTileDepth) {
          Bf16* tile = tiles + d * kKeys + s * 16;
          for (int64_t i = 0; i < 16; ++i) {
            Pairs x = paired(rows, s + i, d, size);
            memcpy(tile + i * kTileDepth, &x, sizeof x);
          }
        }
      }
    }
  }

  // Left operands that sum over rows: a row of kQueries for each column.
  static void transposed(const Bf16* rows, int64_t count, int64_t size, Bf16* to) {
    for (int p = 0; p < kParts; ++p, rows += kQueries * size, to += kQueries * size) {
      for (int64_t d = 0; d < size; d += 16) {
        for (int64_t s = 0; s < count; s += kTileDepth) {
          F32 x[16];
          for (int64_t i = 0; i < 16; ++i) x[i] = (F32)paired(rows, s + i, d, size);
          transpose(x);
          for (int64_t i = 0; i < 16; ++i) {
            memcpy(to + (d + i) * kQueries + s, x + i, sizeof x[i]);
          }
        }
      }
    }
  }

  // Converts 32 rows of weights and score gradients to tile operands.
  void store_operands(const Strip& visible, int64_t row) {
    for (int64_t c = visible.from; c < visible.to; c += kTileDepth) {
      Bf16* weights = weight_pairs_ + c / 16 * kPanelNumbers + row * 16;
      Bf16* slopes = slope_pairs_ + c / 16 * kPanelNumbers + row * 16;
      for (int64_t i = 0; i < 16; ++i) {
        const float *w = scores_ + i * kKeys + c, *s = slopes_ + i * kKeys + c;
        const float *w16 = w + 16 * kKeys, *s16 = s + 16 * kKeys;
        F32 s0 = load(s), s1 = load(s + 16), t0 = load(s16), t1 = load(s16 + 16);
        put_pairs(load(w), load(w16), weights + i * kTileDepth);
        put_pairs(load(w + 16), load(w16 + 16), weights + kPanelNumbers + i * kTileDepth);
        put_pairs(s0, t0, slopes + i * kTileDepth);
        put_pairs(s1, t1, slopes + kPanelNumbers + i * kTileDepth);
        put_pairs(s0, s1, slope_rows_ + (row + i) * kKeys + c);
        put_pairs(t0, t1, slope_rows_ + (row + i + 16) * kKeys + c);
      }
    }
  }
  static void put_pairs(F32 first, F32 second, Bf16* to) {
    Pairs x[kParts];
    back_pairs<kParts>(first, second, x);
    for (int p = 0; p < kParts; ++p) memcpy(to + p * kScores, x + p, 64);
  }

  // Writes transposed accumulators to rows of the output.
  void put(const float* sums, int64_t padded, int64_t size, float factor, void* to, int64_t row,
           int64_t keys) {
    for (int64_t s = 0; s < keys; s += 16) {
      for (int64_t d = 0; d < padded; d += 16) {
        F32 x[16];
        for (int64_t i = 0; i < 16; ++i) x[i] = load(sums + (d + i) * kKeys + s);
        transpose(x);
        for (int64_t i = 0; i < 16; ++i) store(row_room_ + i * padded + d, x[i]);
      }
      for (int64_t i = 0; i < 16 && s + i < keys; ++i) {
        back_put_row(row_room_ + i * padded, factor, to, p_.forward.type, (row + s + i) * size,
                     size);
      }
    }
  }

  const BackwardParams& p_;
  const Shape& shape_;
  TileUnit tile_config_;
  Strip strips_[kQueries / kTileDepth];  // what each 32 rows of the block see
  int64_t k_size_ = 0, v_size_ = 0;      // D and E, in steps of 32
  int64_t rows_ = 0;                     // of queries, in steps of 32
  Bf16 *key_columns_ = nullptr, *key_pairs_ = nullptr, *value_columns_ = nullptr;
  Bf16* room_ = nullptr;
  Bf16 *query_ = nullptr, *query_transposed_ = nullptr;
  Bf16 *d_out_ = nullptr, *d_out_transposed_ = nullptr;
  Bf16 *weight_pairs_ = nullptr, *slope_pairs_ = nullptr, *slope_rows_ = nullptr;
  float *scores_ = nullptr, *slopes_ = nullptr;  // 32 rows of them
  float *d_key_ = nullptr, *d_value_ = nullptr;
  float *poison_room_ = nullptr, *poison_ = nullptr, *row_room_ = nullptr;
};

}  // namespace RAPTAX_ISA
}  // namespace raptax
