// Keys, values and queries as the tile products read them: tiles of 16 rows of 64 bytes,
// of bfloat16 numbers.
//
// A number is kParts of them that add up to it: itself if it is bfloat16, three for
// float32 (Henry, Tang & Heinecke 2019, arXiv:1904.06376). The tiles of the parts follow
// one another, the largest first.
//
// A left operand has 32 numbers of one row in a row of its tile, the right operand two
// numbers of each of 16 columns. Numbers n and n + 16 of 32 make such a pair, which is how
// two vectors of float32 become one of bfloat16 with a shift and a blend. Along D of
// bfloat16 rows n and n + 1 do.

#pragma once

#include "pack.inl"

namespace raptax {
namespace RAPTAX_ISA {

constexpr int64_t kStep = 32;         // what one tile product sums over
constexpr int64_t kTileNumbers = 512;  // bfloat16 numbers of a tile

typedef uint16_t Bf16;
typedef int32_t Pairs __attribute__((vector_size(64)));  // of bfloat16 numbers

static const Pairs kNanPairs = Pairs{} + 0x7fc07fc0;

// Whether numbers that are not bfloat16 are worth taking apart: vector units do as well
// with few queries or short rows.
static inline bool worth_parts(const Shape& shape) { return shape.T >= 64 && shape.D >= 16; }

// The upper halves of the floats of two vectors.
static inline Pairs upper_halves(F32 first, F32 second) {
  __m512i low = _mm512_srli_epi32((__m512i)first, 16);
  return (Pairs)_mm512_mask_blend_epi16(0xaaaaaaaau, low, (__m512i)second);
}

// float32 numbers that are bfloat16 numbers: the nearest one, and the next towards 0.
static inline F32 near_bf16(F32 x) { return as_float(((U32)x + 0x8000u) & 0xffff0000u); }
static inline F32 cut_to_bf16(F32 x) { return as_float((U32)x & 0xffff0000u); }

// The three parts of two vectors, the first of which are at hand.
static inline void split(F32 x, F32 high_x, F32 y, F32 high_y, Pairs* parts) {
  parts[0] = upper_halves(high_x, high_y);
  x -= high_x, y -= high_y;
  parts[1] = upper_halves(x, y);
  parts[2] = upper_halves(x - cut_to_bf16(x), y - cut_to_bf16(y));
}

// Rounding the first part makes the second have either sign, so that the products that
// are left out are 0 on average.
static inline void split(F32 x, F32 y, Pairs* parts) {
  split(x, near_bf16(x), y, near_bf16(y), parts);
}
// The same for numbers so large that the first part has to be smaller than them.
static inline void split_any(F32 x, F32 y, Pairs* parts) {
  F32 most = all(0x1.fep127f), least = -most;
  split(x, smaller(larger(near_bf16(x), least), most), y,
        smaller(larger(near_bf16(y), least), most), parts);
}

// Numbers d .. d + 31 of a row of `size`, then zeros.
static inline Pairs load_pairs(const Bf16* row, int64_t d, int64_t size) {
  int64_t left = size - d;
  __mmask32 mask = left >= 32 ? 0xffffffffu : left <= 0 ? 0 : (1u << left) - 1;
  return (Pairs)_mm512_maskz_loadu_epi16(mask, row + d);
}

static inline const Bf16* bf16_row(const Source& from, int64_t row) {
  return static_cast<const Bf16*>(from.data) + from.first + row * from.size;
}

// Numbers d .. d + 15 of a row, then zeros.
static inline F32 load_lanes(const Source& from, int64_t row, int64_t d) {
  return d < from.size ? from.load(row, d) : F32{};
}

// Looks whether all numbers that it is shown are finite.
class Finite {
 public:
  void see(Pairs x) {
    __m512i exponent = _mm512_set1_epi16(0x7f80);
    bad_ |= _mm512_cmpeq_epi16_mask(_mm512_and_si512((__m512i)x, exponent), exponent);
  }
  void see(F32 x) { zero_ += x * 0.0f; }
  bool all() const { return bad_ == 0 && sum_of(zero_) == 0; }

 private:
  __mmask32 bad_ = 0;
  F32 zero_ = F32{};
};

// Numbers d .. d + 31 of a row.
template <int kParts>
static inline void load_parts(const Source& from, int64_t row, int64_t d, Pairs* parts,
                              Finite* finite) {
  if (kParts == 1) {
    parts[0] = load_pairs(bf16_row(from, row), d, from.size);
    finite->see(parts[0]);
  } else {
    F32 x = load_lanes(from, row, d), y = load_lanes(from, row, d + kLanes);
    split_any(x, y, parts);
    finite->see(x);
    finite->see(y);
  }
}

template <int kParts>
static bool row_finite(const Source& from, int64_t row) {
  Finite finite;
  Pairs parts[kParts];
  for (int64_t d = 0; d < from.size; d += kStep) {
    load_parts<kParts>(from, row, d, parts, &finite);
  }
  return finite.all();
}

// Up to 16 rows to the tiles of a left operand. A row that is not finite becomes NaN.
template <int kParts>
static void pack_left(const Source& from, int64_t count, Bf16* tiles) {
  constexpr int64_t kNext = kParts * kTileNumbers;
  int64_t steps = rounded_up(from.size, kStep) / kStep;
  for (int64_t r = 0; r < count; ++r) {
    Finite finite;
    Bf16* to = tiles + r * kStep;
    for (int64_t n = 0; n < steps; ++n) {
      Pairs parts[kParts];
      load_parts<kParts>(from, r, n * kStep, parts, &finite);
      for (int p = 0; p < kParts; ++p) memcpy(to + n * kNext + p * kTileNumbers, parts + p, 64);
    }
    if (finite.all()) continue;
    for (int64_t n = 0; n < steps; ++n) memcpy(to + n * kNext, &kNanPairs, 64);
  }
}

// Keys of a block: for each 16 of them, tiles of 32 dimensions, the keys its columns. Those
// that are not `good` become NaN. Returns whether all numbers are finite.
template <int kParts>
static bool pack_keys_amx(const Source& from, const bool* good, int64_t count,
                          Bf16* packed) {
  Finite finite;
  for (int64_t s = 0; s < rounded_up(count, 32); s += 16) {
    for (int64_t d = 0; d < from.size; d += kStep) {
      F32 x[kParts][16] = {};
      for (int64_t i = 0; i < 16 && s + i < count; ++i) {
        Pairs parts[kParts];
        load_parts<kParts>(from, s + i, d, parts, &finite);
        for (int p = 0; p < kParts; ++p) {
          x[p][i] = (F32)(good[s + i] ? parts[p] : kNanPairs);
        }
      }
      for (int p = 0; p < kParts; ++p, packed += kTileNumbers) {
        transpose(x[p]);
        memcpy(packed, x[p], sizeof x[p]);
      }
    }
  }
  return finite.all();
}

static inline U32 load_row_part(const Bf16* row, int64_t e, int64_t size) {
  int64_t left = size - e;
  __mmask16 mask = static_cast<__mmask16>(
      left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1);
  return (U32)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + e));
}

// Values of a block: for each 16 columns, tiles of 32 keys. Those that are not `good`
// become 0. Returns whether all numbers are finite.
template <int kParts>
static bool pack_values_amx(const Source& from, const bool* good, int64_t count,
                            Bf16* packed) {
  Finite finite;
  for (int64_t e = 0; e < rounded_up(from.size, 32); e += 16) {
    Bf16* tiles = packed + e * kParts * kKeys;
    for (int64_t s = 0; s < rounded_up(count, kStep); s += kStep) {
      for (int64_t i = 0; i < 16; ++i) {
        bool low = s + i < count && good[s + i];
        bool high = s + i + 16 < count && good[s + i + 16];
        Pairs parts[kParts];
        if (kParts == 1) {
          U32 x = low ? load_row_part(bf16_row(from, s + i), e, from.size) : U32{};
          U32 y = high ? load_row_part(bf16_row(from, s + i + 16), e, from.size) : U32{};
          parts[0] = (Pairs)(x | (y << 16));
          finite.see(parts[0]);
        } else {
          F32 x = low ? load_lanes(from, s + i, e) : F32{};
          F32 y = high ? load_lanes(from, s + i + 16, e) : F32{};
          split_any(x, y, parts);
          finite.see(x);
          finite.see(y);
        }
        for (int p = 0; p < kParts; ++p) {
          memcpy(tiles + p * kTileNumbers + i * kStep, parts + p, 64);
        }
      }
      tiles += kParts * kTileNumbers;
    }
  }
  return finite.all();
}

template <int kParts>
static void pack_block_amx(const Source& keys, const Source& values, int64_t count,
                           Bf16* packed_keys, Bf16* packed_values) {
  bool good_key[kKeys], good_value[kKeys];
  for (int64_t s = 0; s < kKeys; ++s) good_key[s] = good_value[s] = true;
  bool fine = pack_keys_amx<kParts>(keys, good_key, count, packed_keys);
  fine &= pack_values_amx<kParts>(values, good_value, count, packed_values);
  if (fine) return;
  for (int64_t s = 0; s < count; ++s) {
    good_value[s] = row_finite<kParts>(values, s);
    good_key[s] = good_value[s] && row_finite<kParts>(keys, s);
  }
  pack_keys_amx<kParts>(keys, good_key, count, packed_keys);
  pack_values_amx<kParts>(values, good_value, count, packed_values);
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
