// Packs keys, values and queries for AMX: tiles of 16 rows of 64 bytes, bfloat16.
//
// A number is split into kParts bfloat16 parts that add up to it: one for bfloat16,
// three for float32 (Henry, Tang & Heinecke 2019, arXiv:1904.06376). The tiles of the
// parts are consecutive, the largest part first.
//
// A left operand has 32 elements of a row in each row of its tile, a right operand
// pairs of elements of 16 columns. Along keys, and along D of float32 rows, elements n
// and n + 16 of 32 are paired: two float32 vectors become one of bfloat16 by a shift
// and a blend. Along D of bfloat16 rows n and n + 1 are paired.

#pragma once

#include "gemm/pack_f32.h"

namespace raptax {
namespace RAPTAX_ISA {

constexpr int64_t kTileDepth = 32;     // what one tile product sums over
constexpr int64_t kTileNumbers = 512;  // bfloat16 numbers of a tile

typedef uint16_t Bf16;
typedef int32_t Pairs __attribute__((vector_size(64)));  // of bfloat16 numbers

static const Pairs kNanPairs = Pairs{} + 0x7fc07fc0;

// Whether splitting float32 into three parts pays: with few queries or short rows the
// vector units are as fast.
static inline bool worth_parts(const Shape& shape) { return shape.T >= 64 && shape.D >= 16; }

// The upper halves of the floats of two vectors.
static inline Pairs upper_halves(F32 first, F32 second) {
  __m512i low = _mm512_srli_epi32((__m512i)first, 16);
  return (Pairs)_mm512_mask_blend_epi16(0xaaaaaaaau, low, (__m512i)second);
}

// float32 numbers that are bfloat16 numbers: the nearest one, and the next towards 0.
static inline F32 near_bf16(F32 x) { return as_float(((U32)x + 0x8000u) & 0xffff0000u); }
static inline F32 cut_to_bf16(F32 x) { return as_float((U32)x & 0xffff0000u); }

// The three parts of two vectors, given the first parts.
static inline void split(F32 x, F32 high_x, F32 y, F32 high_y, Pairs* parts) {
  parts[0] = upper_halves(high_x, high_y);
  x -= high_x, y -= high_y;
  parts[1] = upper_halves(x, y);
  parts[2] = upper_halves(x - cut_to_bf16(x), y - cut_to_bf16(y));
}

// Rounding the first part gives the second either sign, so the omitted products average
// to 0.
static inline void split(F32 x, F32 y, Pairs* parts) {
  split(x, near_bf16(x), y, near_bf16(y), parts);
}
// The same, with the first part clamped so that it does not overflow to infinity.
static inline void split_any(F32 x, F32 y, Pairs* parts) {
  F32 upper = broadcast(0x1.fep127f), lower = -upper;
  split(x, min(max(near_bf16(x), lower), upper), y, min(max(near_bf16(y), lower), upper),
        parts);
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

// Accumulates whether all elements added are finite.
class FiniteCheck {
 public:
  void add(Pairs x) {
    __m512i exponent = _mm512_set1_epi16(0x7f80);
    nonfinite_ |= _mm512_cmpeq_epi16_mask(_mm512_and_si512((__m512i)x, exponent), exponent);
  }
  void add(F32 x) { zero_ += x * 0.0f; }
  bool all_finite() const { return nonfinite_ == 0 && reduce_add(zero_) == 0; }

 private:
  __mmask32 nonfinite_ = 0;
  F32 zero_ = F32{};
};

// Numbers d .. d + 31 of a row.
template <int kParts>
static inline void load_parts(const Source& from, int64_t row, int64_t d, Pairs* parts,
                              FiniteCheck* finite) {
  if (kParts == 1) {
    parts[0] = load_pairs(bf16_row(from, row), d, from.size);
    finite->add(parts[0]);
  } else {
    F32 x = load_lanes(from, row, d), y = load_lanes(from, row, d + kLanes);
    split_any(x, y, parts);
    finite->add(x);
    finite->add(y);
  }
}

template <int kParts>
static bool row_finite(const Source& from, int64_t row) {
  FiniteCheck finite;
  Pairs parts[kParts];
  for (int64_t d = 0; d < from.size; d += kTileDepth) {
    load_parts<kParts>(from, row, d, parts, &finite);
  }
  return finite.all_finite();
}

// Packs up to 16 rows as a left operand. A row that is not finite becomes NaN.
template <int kParts>
static void pack_left(const Source& from, int64_t count, Bf16* tiles) {
  constexpr int64_t kNext = kParts * kTileNumbers;
  int64_t steps = round_up(from.size, kTileDepth) / kTileDepth;
  for (int64_t r = 0; r < count; ++r) {
    FiniteCheck finite;
    Bf16* to = tiles + r * kTileDepth;
    for (int64_t n = 0; n < steps; ++n) {
      Pairs parts[kParts];
      load_parts<kParts>(from, r, n * kTileDepth, parts, &finite);
      for (int p = 0; p < kParts; ++p) memcpy(to + n * kNext + p * kTileNumbers, parts + p, 64);
    }
    if (finite.all_finite()) continue;
    for (int64_t n = 0; n < steps; ++n) memcpy(to + n * kNext, &kNanPairs, 64);
  }
}

// Packs the keys of a block: for each 16 keys, the columns, tiles of 32 dimensions.
// Keys without `finite_rows` become NaN. Returns whether all elements are finite.
template <int kParts>
static bool pack_keys_amx(const Source& from, const bool* finite_rows, int64_t count,
                          Bf16* packed) {
  FiniteCheck finite;
  for (int64_t s = 0; s < round_up(count, 32); s += 16) {
    for (int64_t d = 0; d < from.size; d += kTileDepth) {
      F32 x[kParts][16] = {};
      for (int64_t i = 0; i < 16 && s + i < count; ++i) {
        Pairs parts[kParts];
        load_parts<kParts>(from, s + i, d, parts, &finite);
        for (int p = 0; p < kParts; ++p) {
          x[p][i] = (F32)(finite_rows[s + i] ? parts[p] : kNanPairs);
        }
      }
      for (int p = 0; p < kParts; ++p, packed += kTileNumbers) {
        transpose(x[p]);
        memcpy(packed, x[p], sizeof x[p]);
      }
    }
  }
  return finite.all_finite();
}

static inline U32 load_row_part(const Bf16* row, int64_t e, int64_t size) {
  int64_t left = size - e;
  __mmask16 mask = static_cast<__mmask16>(left >= 16  ? 0xffff
                                          : left <= 0 ? 0
                                                      : (1u << left) - 1);
  return (U32)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + e));
}

// Packs the values of a block: for each 16 columns, tiles of 32 keys. Values without
// `finite_rows` become 0. Returns whether all elements are finite.
template <int kParts>
static bool pack_values_amx(const Source& from, const bool* finite_rows, int64_t count,
                            Bf16* packed) {
  FiniteCheck finite;
  for (int64_t e = 0; e < round_up(from.size, 32); e += 16) {
    Bf16* tiles = packed + e * kParts * kBlockKeys;
    for (int64_t s = 0; s < round_up(count, kTileDepth); s += kTileDepth) {
      for (int64_t i = 0; i < 16; ++i) {
        bool low = s + i < count && finite_rows[s + i];
        bool high = s + i + 16 < count && finite_rows[s + i + 16];
        Pairs parts[kParts];
        if (kParts == 1) {
          U32 x = low ? load_row_part(bf16_row(from, s + i), e, from.size) : U32{};
          U32 y = high ? load_row_part(bf16_row(from, s + i + 16), e, from.size) : U32{};
          parts[0] = (Pairs)(x | (y << 16));
          finite.add(parts[0]);
        } else {
          F32 x = low ? load_lanes(from, s + i, e) : F32{};
          F32 y = high ? load_lanes(from, s + i + 16, e) : F32{};
          split_any(x, y, parts);
          finite.add(x);
          finite.add(y);
        }
        for (int p = 0; p < kParts; ++p) {
          memcpy(tiles + p * kTileNumbers + i * kTileDepth, parts + p, 64);
        }
      }
      tiles += kParts * kTileNumbers;
    }
  }
  return finite.all_finite();
}

template <int kParts>
static void pack_block_amx(const Source& keys, const Source& values, int64_t count,
                           Bf16* packed_keys, Bf16* packed_values) {
  bool finite_keys[kBlockKeys], finite_values[kBlockKeys];
  for (int64_t s = 0; s < kBlockKeys; ++s) finite_keys[s] = finite_values[s] = true;
  bool all_finite = pack_keys_amx<kParts>(keys, finite_keys, count, packed_keys);
  all_finite &= pack_values_amx<kParts>(values, finite_values, count, packed_values);
  if (all_finite) return;
  for (int64_t s = 0; s < count; ++s) {
    finite_values[s] = row_finite<kParts>(values, s);
    finite_keys[s] = finite_values[s] && row_finite<kParts>(keys, s);
  }
  pack_keys_amx<kParts>(keys, finite_keys, count, packed_keys);
  pack_values_amx<kParts>(values, finite_values, count, packed_values);
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
