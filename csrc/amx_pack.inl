// Keys, values and queries as the tile products read them: tiles of 16 rows of 64 bytes.
//
// A left operand has 32 numbers of one row in a row of its tile, the right operand two
// numbers of each of 16 columns. Keys s and s + 16 of 32 make such a pair, which is how
// two vectors of weights become one of bfloat16 with a shift and a blend.

#pragma once

#include "pack.inl"

namespace raptax {
namespace RAPTAX_ISA {

constexpr int64_t kStep = 32;         // what one tile product sums over
constexpr int64_t kTileNumbers = 512;  // bfloat16 numbers of a tile

typedef uint16_t Bf16;
typedef int32_t Pairs __attribute__((vector_size(64)));  // of bfloat16 numbers

// Numbers d .. d + 31 of a row of `size`, then zeros.
static inline Pairs load_pairs(const Bf16* row, int64_t d, int64_t size) {
  int64_t left = size - d;
  __mmask32 mask = left >= 32 ? 0xffffffffu : left <= 0 ? 0 : (1u << left) - 1;
  return (Pairs)_mm512_maskz_loadu_epi16(mask, row + d);
}

static inline bool all_finite(Pairs x) {
  __m512i exponent = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpeq_epi16_mask(_mm512_and_si512((__m512i)x, exponent), exponent) == 0;
}

static inline bool row_finite(const Bf16* row, int64_t size) {
  bool fine = true;
  for (int64_t d = 0; d < size; d += 32) fine &= all_finite(load_pairs(row, d, size));
  return fine;
}

// Up to 16 rows to the tiles of a left operand. A row that is not finite becomes NaN.
static void pack_left(const Bf16* rows, int64_t count, int64_t size, Bf16* tiles) {
  for (int64_t r = 0; r < count; ++r) {
    const Bf16* row = rows + r * size;
    bool fine = row_finite(row, size);
    for (int64_t d = 0; d < size; d += kStep) {
      Pairs x = fine ? load_pairs(row, d, size) : all(int32_t{0x7fc07fc0});
      memcpy(tiles + d / kStep * kTileNumbers + r * kStep, &x, sizeof x);
    }
  }
}

// Keys of a block: for each 16 of them, tiles of 32 dimensions, the keys its columns.
static void pack_keys_amx(const Bf16* keys, const bool* good, int64_t count, int64_t size,
                          Bf16* packed) {
  int64_t steps = rounded_up(size, kStep) / kStep;
  for (int64_t s = 0; s < rounded_up(count, 32); s += 16) {
    for (int64_t d = 0; d < steps; ++d) {
      F32 x[16];
      for (int64_t i = 0; i < 16; ++i) {
        Pairs pairs = {};
        if (s + i < count) {
          pairs = good[s + i] ? load_pairs(keys + (s + i) * size, d * kStep, size)
                              : all(int32_t{0x7fc07fc0});
        }
        x[i] = (F32)pairs;
      }
      transpose(x);
      memcpy(packed + (s / 16 * steps + d) * kTileNumbers, x, sizeof x);
    }
  }
}

static inline U32 load_row_part(const Bf16* row, int64_t e, int64_t size) {
  int64_t left = size - e;
  __mmask16 mask = static_cast<__mmask16>(
      left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1);
  return (U32)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + e));
}

// Values of a block: for each 16 columns, tiles of 32 keys.
static void pack_values_amx(const Bf16* values, const bool* good, int64_t count,
                            int64_t size, Bf16* packed) {
  constexpr int64_t kSteps = kKeys / kStep;
  for (int64_t e = 0; e < rounded_up(size, 32); e += 16) {
    Bf16* panel = packed + e / 16 * kSteps * kTileNumbers;
    for (int64_t s = 0; s < rounded_up(count, kStep); s += kStep) {
      for (int64_t i = 0; i < 16; ++i) {
        U32 pair[2] = {};
        for (int64_t half = 0; half < 2; ++half) {
          int64_t row = s + i + 16 * half;
          if (row < count && good[row]) pair[half] = load_row_part(values + row * size, e, size);
        }
        U32 x = pair[0] | (pair[1] << 16);
        memcpy(panel + s / kStep * kTileNumbers + i * kStep, &x, sizeof x);
      }
    }
  }
}

static void pack_block_amx(const Bf16* keys, int64_t D, const Bf16* values, int64_t E,
                           int64_t count, Bf16* packed_keys, Bf16* packed_values) {
  bool good_key[kKeys], good_value[kKeys];
  for (int64_t s = 0; s < count; ++s) {
    good_value[s] = row_finite(values + s * E, E);
    good_key[s] = good_value[s] && row_finite(keys + s * D, D);
  }
  pack_keys_amx(keys, good_key, count, D, packed_keys);
  pack_values_amx(values, good_value, count, E, packed_values);
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
