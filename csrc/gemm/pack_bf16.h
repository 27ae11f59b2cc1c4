// Packs bfloat16 rows for dot products of pairs: as gemm/pack_f32.h does, with two
// neighbours along the sum in each 32-bit word, along D for keys and queries, along keys
// for values and weights.

#pragma once

#include "gemm/pack_f32.h"

#if defined(__AVX512BF16__)
namespace raptax {
namespace RAPTAX_ISA {

struct Bf16Pack {
  typedef uint32_t Word;

  static int64_t words(int64_t numbers) { return (numbers + 1) / 2; }
  static int64_t query_words(int64_t D) { return round_up(words(D), kLanes); }

  static bool keys(const Source& rows, int64_t count, Word* packed) {
    U32 special{};
    int64_t size = words(rows.size);
    for (int64_t s = 0; s < round_up(count, kPanel); s += kLanes) {
      Word* panel = packed + s / kPanel * kPanel * size + s % kPanel;
      for (int64_t d = 0; d < size; d += kLanes) {
        F32 x[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          U32 pairs = s + i < count ? load_pairs(rows, s + i, d) : U32{};
          special |= not_finite(pairs);
          x[i] = as_float(pairs);
        }
        transpose(x);
        int64_t used = min(kLanes, size - d);
        for (int64_t i = 0; i < used; ++i) memcpy(panel + (d + i) * kPanel, x + i, sizeof(F32));
      }
    }
    return none(special);
  }

  static bool values(const Source& rows, int64_t count, Word* packed) {
    U32 special{};
    int64_t columns = round_up(rows.size, kLanes);
    for (int64_t c = 0; c < columns; c += kPanel) {
      Word* panel = packed + c * (kBlockKeys / 2);
      int64_t width = min(kPanel, columns - c);
      for (int64_t s = 0; s < round_up(count, kPanel); s += 2) {
        for (int64_t i = 0; i < width; i += kLanes) {
          U32 low = s < count ? load_numbers(rows, s, c + i) : U32{};
          U32 high = s + 1 < count ? load_numbers(rows, s + 1, c + i) : U32{};
          U32 pairs = low | high << 16;
          special |= not_finite(pairs);
          memcpy(panel + s / 2 * width + i, &pairs, sizeof pairs);
        }
      }
    }
    return none(special);
  }

  // Single numbers of packed keys and values.
  static uint16_t* key_entry(Word* packed, int64_t size, int64_t s, int64_t d) {
    return half_of(packed + s / kPanel * kPanel * words(size) + d / 2 * kPanel + s % kPanel, d);
  }
  static uint16_t* value_entry(Word* packed, int64_t size, int64_t s, int64_t e) {
    int64_t panel = e / kPanel * kPanel;
    int64_t width = min(kPanel, round_up(size, kLanes) - panel);
    return half_of(packed + panel * (kBlockKeys / 2) + s / 2 * width + e % kPanel, s);
  }
  static uint16_t nan() { return 0x7fc0; }

  // Query rows, zero-padded to `stride` words. A row that is not finite becomes NaN
  // throughout, as its scores are.
  static void queries(const Source& rows, int64_t count, Word* packed, int64_t stride) {
    for (int64_t t = 0; t < count; ++t) {
      U32 special{};
      for (int64_t d = 0; d < stride; d += kLanes) {
        U32 pairs = load_pairs(rows, t, d);
        special |= not_finite(pairs);
        memcpy(packed + t * stride + d, &pairs, sizeof pairs);
      }
      if (none(special)) continue;
      for (int64_t d = 0; d < stride; ++d) packed[t * stride + d] = 0x7fc07fc0;
    }
  }

  // Rounds the weights first .. last - 1 of a row, whole panels, in place: number n goes
  // to bytes 2 n and 2 n + 1, which have been read by then.
  static Word* weights(float* scores, int64_t first, int64_t last) {
    uint16_t* to = reinterpret_cast<uint16_t*>(scores);
    for (int64_t j = first; j < last; j += 2 * kLanes) {
      __m512 low = (__m512)load(scores + j), high = (__m512)load(scores + j + kLanes);
      __m512bh pairs = _mm512_cvtne2ps_pbh(high, low);
      memcpy(to + j, &pairs, sizeof pairs);
    }
    return reinterpret_cast<Word*>(scores);
  }

 private:
  static uint16_t* half_of(Word* word, int64_t n) {
    return reinterpret_cast<uint16_t*>(word) + n % 2;
  }
  static const uint16_t* row(const Source& rows, int64_t n) {
    return static_cast<const uint16_t*>(rows.data) + rows.first + n * rows.size;
  }
  // Words d and on of row n.
  static U32 load_pairs(const Source& rows, int64_t n, int64_t d) {
    U32 x{};
    int64_t numbers = rows.size - 2 * d;
    if (numbers >= 2 * kLanes) {
      memcpy(&x, row(rows, n) + 2 * d, sizeof x);
    } else if (numbers > 0) {
      memcpy(&x, row(rows, n) + 2 * d, static_cast<size_t>(2 * numbers));
    }
    return x;
  }
  // Numbers c and on of row n, each in the low half of a word.
  static U32 load_numbers(const Source& rows, int64_t n, int64_t c) {
    U16 x{};
    int64_t numbers = min(kLanes, rows.size - c);
    if (numbers == kLanes) {
      memcpy(&x, row(rows, n) + c, sizeof x);
    } else if (numbers > 0) {
      memcpy(&x, row(rows, n) + c, static_cast<size_t>(2 * numbers));
    }
    return widen(x);
  }
  // Bits where a number of a pair has the exponent of infinity and NaN.
  static U32 not_finite(U32 pairs) {
    const U32 high = broadcast(uint32_t{0x7f800000}), low = broadcast(uint32_t{0x7f80});
    return (U32)((pairs & high) == high) | (U32)((pairs & low) == low);
  }
  static bool none(U32 x) { return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) == 0; }
};

}  // namespace RAPTAX_ISA
}  // namespace raptax
#endif
