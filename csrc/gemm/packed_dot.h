// Products of rows with one strip of a packed weight: kLanes of its rows, one per lane.
//
// A 32-bit word of a strip holds codes of neighbouring inputs of one row. Multiplied as
// floats, each code is taken out of its word and converted (AVX-512: looked up, one
// shift and one permutation per 16 codes); as bytes, four codes meet four int8 inputs in
// one dot product (VNNI), and a float32 is made of the sum once a group.
#pragma once

#include "api/packed_linear_params.h"
#include "simd/convert.h"

namespace raptax {
namespace RAPTAX_ISA {

typedef int8_t S8 __attribute__((vector_size(RAPTAX_LANES)));

#if defined(__AVX512VNNI__)
constexpr int32_t kBias8 = 128;  // dot products take codes as unsigned
#else
constexpr int32_t kBias8 = 0;
#endif

// a + c[0] x[0] + c[1] x[1] + c[2] x[2] + c[3] x[3] of the bytes of each lane. Codes are
// below 128, or signed, plus kBias8.
RAPTAX_INLINE I32 dot4(I32 a, U32 c, I32 x) {
#if defined(__AVX512VNNI__)
  return (I32)_mm512_dpbusd_epi32((__m512i)a, (__m512i)c, (__m512i)x);
#elif defined(__AVX512BW__)
  __m512i even = _mm512_madd_epi16(_mm512_srai_epi16(_mm512_slli_epi16((__m512i)c, 8), 8),
                                   _mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, 8), 8));
  __m512i odd =
      _mm512_madd_epi16(_mm512_srai_epi16((__m512i)c, 8), _mm512_srai_epi16((__m512i)x, 8));
  return a + (I32)even + (I32)odd;
#elif defined(__AVX2__)
  __m256i even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16((__m256i)c, 8), 8),
                                   _mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8));
  __m256i odd =
      _mm256_madd_epi16(_mm256_srai_epi16((__m256i)c, 8), _mm256_srai_epi16((__m256i)x, 8));
  return a + (I32)even + (I32)odd;
#else
  for (int j = 0; j < 4; ++j) {
    a += ((I32)(c << (24 - 8 * j)) >> 24) * ((I32)((U32)x << (24 - 8 * j)) >> 24);
  }
  return a;
#endif
}

// Codes of 4 bits. Byte j of a word holds inputs j (low) and 4 + j (high).
class Codes4 {
 public:
  static constexpr int64_t kInputs = 8;  // of one word

  explicit Codes4(const PackedWeight& w) : zero_(static_cast<int32_t>(w.zero)) {
#if defined(__AVX512F__)
    table_ = __builtin_convertvector(lane_indices() - zero_, F32);
#endif
  }
  int32_t zero() const { return zero_; }

  RAPTAX_API_INLINE F32 value(U32 word, int i) const {
    U32 shifted = word >> static_cast<uint32_t>(i < 4 ? 8 * i : 8 * i - 28);
#if defined(__AVX512F__)
    // The permutation reads the low four bits of an index.
    return (F32)_mm512_permutexvar_ps((__m512i)shifted, (__m512)table_);
#else
    return __builtin_convertvector((I32)(shifted & 15u) - zero_, F32);
#endif
  }
  // Two words of four codes each.
  RAPTAX_API_INLINE void bytes(U32 word, U32* to) const {
    to[0] = word & 0x0f0f0f0fu;
    to[1] = (word >> 4) & 0x0f0f0f0fu;
  }

 private:
  int32_t zero_;
#if defined(__AVX512F__)
  F32 table_;
#endif
};

// Codes of 8 bits, signed. Byte j of a word holds input j.
class Codes8 {
 public:
  static constexpr int64_t kInputs = 4;

  explicit Codes8(const PackedWeight&) {}
  int32_t zero() const { return kBias8; }

  RAPTAX_API_INLINE F32 value(U32 word, int i) const {
    return __builtin_convertvector((I32)(word << static_cast<uint32_t>(24 - 8 * i)) >> 24, F32);
  }
  RAPTAX_API_INLINE void bytes(U32 word, U32* to) const {
    to[0] = kBias8 == 0 ? word : word ^ 0x80808080u;
  }
};

// One strip of a weight: where its numbers lie.
class PackedStrip {
 public:
  PackedStrip(const PackedWeight& w, int64_t tile, int64_t first_row)
      : codes_(w.codes + tile * w.code_bytes() + 4 * first_row),
        type_(w.scale_type),
        scales_(w.scales),
        offsets_(w.offsets),
        scale_at_(tile * (w.C / w.block) * kTileRows + first_row),
        groups_per_block_log2_(__builtin_ctzll(w.block / w.group)) {
    int64_t at = tile * (w.C / w.group) * kTileRows + first_row;
    factors_ = w.factors == nullptr ? nullptr : w.factors + at;
    offset_factors_ = w.offset_factors == nullptr ? nullptr : w.offset_factors + at;
  }
  bool has_offsets() const { return offsets_ != nullptr; }

  RAPTAX_API_INLINE U32 word(int64_t n) const {
    U32 x;
    memcpy(&x, codes_ + n * 4 * kTileRows, sizeof x);
    return x;
  }
  RAPTAX_API_INLINE F32 scale(int64_t group) const {
    F32 d = load_as(type_, scales_, place(group));
    if (factors_ == nullptr) return d;
    S8 s;
    memcpy(&s, factors_ + group * kTileRows, sizeof s);
    return d * __builtin_convertvector(__builtin_convertvector(s, I32), F32);
  }
  RAPTAX_API_INLINE F32 offset(int64_t group) const {
    F32 d = load_as(type_, offsets_, place(group));
    if (offset_factors_ == nullptr) return d;
    U8 m;
    memcpy(&m, offset_factors_ + group * kTileRows, sizeof m);
    return d * __builtin_convertvector(__builtin_convertvector(m, I32), F32);
  }

 private:
  int64_t place(int64_t group) const {
    return scale_at_ + (group >> groups_per_block_log2_) * kTileRows;
  }

  const uint8_t* codes_;
  Type type_;
  const void *scales_, *offsets_;
  int64_t scale_at_;
  int groups_per_block_log2_;
  const int8_t* factors_;
  const uint8_t* offset_factors_;
};

// Rows that are multiplied at once, as registers allow.
constexpr int kRowsAtOnce = RAPTAX_LANES == 16 ? 8 : 4;

constexpr int64_t kSumInputs = 16;    // of one sum of inputs
constexpr int64_t kRoundInputs = 32;  // that share a scale when rounded to int8

// Rows of x, C inputs each.
struct FloatRows {
  const float* x;
  const float* sums;  // of kSumInputs inputs
  int64_t C;

  template <int64_t kGroup>
  RAPTAX_API_INLINE float sum(int64_t m, int64_t group) const {
    const float* s = sums + m * (C / kSumInputs) + group * (kGroup / kSumInputs);
    return kGroup == kSumInputs ? s[0] : s[0] + s[1];
  }
};

// Rows rounded to int8. For the rows that are multiplied together, `count` of them, lie
// side by side for each kRoundInputs inputs: their codes, their scales, and their scaled
// sums, of all these inputs, of the first half and of the second.
struct Int8Rows {
  static constexpr int64_t kRowBytes = kRoundInputs + 4 + 3 * 4;  // of one row

  uint8_t* data;
  int64_t C;

  // Inputs n * kRoundInputs and on of `count` rows from row `first` on.
  RAPTAX_API_INLINE uint8_t* block(int64_t first, int64_t count, int64_t n) const {
    return data + (first * (C / kRoundInputs) + count * n) * kRowBytes;
  }
  static RAPTAX_API_INLINE I32 four(const uint8_t* block, int64_t m, int64_t c) {
    int32_t bytes;
    memcpy(&bytes, block + m * kRoundInputs + c, sizeof bytes);
    return broadcast(bytes);
  }
  static RAPTAX_API_INLINE float* scales(uint8_t* block, int64_t count) {
    return reinterpret_cast<float*>(block + count * kRoundInputs);
  }
};

// out[m] = the strip's product with row first + m, for kM rows.
template <typename Codes, int64_t kGroup, int kM>
static void strip_product(const PackedWeight& w, const Codes& codes, const PackedStrip& strip,
                          const FloatRows& rows, int64_t first, F32* out) {
  constexpr int64_t kWords = kGroup / Codes::kInputs;
  // Two sums in turns, as a fused multiply-add takes four cycles. For any number of rows,
  // so that a row's result does not depend on how many others there are.
  constexpr int kChains = 2;
  const float* x = rows.x + first * rows.C;
  F32 total[kM] = {};
  for (int64_t g = 0; g < w.C / kGroup; ++g) {
    F32 part[kChains][kM] = {};
#pragma GCC unroll 8
    for (int64_t n = 0; n < kWords; ++n) {
      U32 word = strip.word(g * kWords + n);
#pragma GCC unroll 8
      for (int i = 0; i < Codes::kInputs; ++i) {
        F32 value = codes.value(word, i);
        const float* at = x + g * kGroup + n * Codes::kInputs + i;
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          part[i % kChains][m] += value * broadcast(at[m * rows.C]);
        }
      }
    }
    F32 scale = strip.scale(g);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      total[m] += scale * (part[0][m] + part[1][m]);
    }
    if (!strip.has_offsets()) continue;
    F32 offset = strip.offset(g);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      total[m] += offset * broadcast(rows.template sum<kGroup>(first + m, g));
    }
  }
  for (int m = 0; m < kM; ++m) out[m] = total[m];
}

template <typename Codes, int64_t kGroup, int kM>
static void strip_product(const PackedWeight& w, const Codes& codes, const PackedStrip& strip,
                          const Int8Rows& rows, int64_t first, F32* out) {
  constexpr int64_t kWords = kGroup / Codes::kInputs, kPerWord = Codes::kInputs / 4;
  constexpr int64_t kGroups = kRoundInputs / kGroup;
  // scale (code - zero) + offset = scale code + (offset - scale zero)
  F32 zero = broadcast(static_cast<float>(codes.zero()));
  bool shifted = strip.has_offsets() || codes.zero() != 0;
  F32 total[kM] = {};
  for (int64_t n = 0; n < w.C / kRoundInputs; ++n) {
    uint8_t* x = rows.block(first, kM, n);
    const float* scales = Int8Rows::scales(x, kM);
    const float* sums = scales + kM;
#pragma GCC unroll 2
    for (int64_t half = 0; half < kGroups; ++half) {
      int64_t g = n * kGroups + half;
      U32 four[kGroup / 4];  // codes of each row of the strip
#pragma GCC unroll 8
      for (int64_t word = 0; word < kWords; ++word) {
        codes.bytes(strip.word(g * kWords + word), four + word * kPerWord);
      }
      F32 scale = strip.scale(g);
      F32 offset = strip.has_offsets() ? strip.offset(g) : F32{};
      offset -= scale * zero;
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        I32 dot{};
#pragma GCC unroll 8
        for (int64_t c = 0; c < kGroup / 4; ++c) {
          dot = dot4(dot, four[c], Int8Rows::four(x, m, half * kGroup + 4 * c));
        }
        total[m] += (scale * broadcast(scales[m])) * __builtin_convertvector(dot, F32);
      }
      if (!shifted) continue;
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        total[m] += offset * broadcast(sums[(kGroups == 2 ? 1 + half : 0) * kM + m]);
      }
    }
  }
  for (int m = 0; m < kM; ++m) out[m] = total[m];
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
