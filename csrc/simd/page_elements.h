// Elements of pages: conversion of each page type to float32 vectors, and back.

#pragma once

#include "api/paged_params.h"
#include "simd/vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace raptax {
namespace RAPTAX_ISA {
namespace pages {

// Intrinsics are used in their zero-masked forms: GCC 12 warns about the plain ones.
//
// Elements are loaded as pairs of vectors in the order that is cheapest for their type
// (`kInterleaved`). Keys and queries use the same order, so scores do not depend on it;
// outputs are restored to natural order.
constexpr int64_t kPairLanes = 2 * kLanes;

typedef uint16_t U16 __attribute__((vector_size(2 * RAPTAX_LANES)));
typedef uint8_t U8 __attribute__((vector_size(RAPTAX_LANES)));
typedef int8_t I8 __attribute__((vector_size(RAPTAX_LANES)));

template <typename V>
static inline V read(const void* p) {
  V x;
  memcpy(&x, p, sizeof x);
  return x;
}

static inline F32 half_to_float(U16 half) {
#if RAPTAX_LANES == 16
  return (F32)_mm512_maskz_cvtph_ps(0xffff, (__m256i)half);
#elif defined(__F16C__)
  return (F32)_mm256_cvtph_ps((__m128i)half);
#else
  U32 h = __builtin_convertvector(half, U32);
  U32 magnitude = h & 0x7fff;
  F32 small = __builtin_convertvector((I32)magnitude, F32) * 0x1p-24f;
  U32 normal = (magnitude << 13) + (112u << 23);
  U32 special = (magnitude << 13) | 0x7f800000u;
  U32 bits = magnitude < 0x400 ? (U32)small : magnitude >= 0x7c00 ? special : normal;
  return (F32)(bits | (h & 0x8000) << 16);
#endif
}

struct Float32 {
  static constexpr int64_t kBytes = 4;
  static constexpr bool kFitsBFloat16 = false;
  static constexpr bool kInterleaved = false;
  static inline void pair(const char* row, int64_t i, F32& a, F32& b) {
    a = read<F32>(row + 4 * i);
    b = read<F32>(row + 4 * (i + kLanes));
  }
};

struct BFloat16 {
  static constexpr int64_t kBytes = 2;
  static constexpr bool kFitsBFloat16 = true;
  static constexpr bool kInterleaved = true;  // even elements first, then the odd ones
  static inline void pair(const char* row, int64_t i, F32& a, F32& b) {
    U32 x = read<U32>(row + 2 * i);
    a = (F32)(x << 16);
    b = (F32)(x & 0xffff0000u);
  }
};

struct Float16 {
  static constexpr int64_t kBytes = 2;
  static constexpr bool kFitsBFloat16 = false;
  static constexpr bool kInterleaved = false;
  static inline void pair(const char* row, int64_t i, F32& a, F32& b) {
    a = half_to_float(read<U16>(row + 2 * i));
    b = half_to_float(read<U16>(row + 2 * (i + kLanes)));
  }
};

struct Int8 {
  static constexpr int64_t kBytes = 1;
  static constexpr bool kFitsBFloat16 = true;
  static constexpr bool kInterleaved = false;
  static inline F32 one(const char* p) {  // in two steps: GCC 12 scalarises a single conversion
#if RAPTAX_LANES == 16
    I32 x = (I32)_mm512_maskz_cvtepi8_epi32(0xffff, read<__m128i>(p));
#elif defined(__AVX2__)
    I32 x = (I32)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    I32 x = __builtin_convertvector(read<I8>(p), I32);
#endif
    return __builtin_convertvector(x, F32);
  }
  static inline void pair(const char* row, int64_t i, F32& a, F32& b) {
    a = one(row + i), b = one(row + i + kLanes);
  }
};

struct E5M2 {  // the upper half of a float16
  static constexpr int64_t kBytes = 1;
  static constexpr bool kFitsBFloat16 = true;
  static constexpr bool kInterleaved = false;
  static inline F32 one(const char* p) {
    return half_to_float(__builtin_convertvector(read<U8>(p), U16) << 8);
  }
  static inline void pair(const char* row, int64_t i, F32& a, F32& b) {
    a = one(row + i), b = one(row + i + kLanes);
  }
};

struct E4M3 {  // a float16 of 2^-8 times the number; but the largest code is NaN
  static constexpr int64_t kBytes = 1;
  static constexpr bool kFitsBFloat16 = true;
  static constexpr bool kInterleaved = false;
  static inline F32 one(const char* p) {
    U16 x = __builtin_convertvector(read<U8>(p), U16), magnitude = x & 0x7f;
    U16 half = (x & 0x80) << 8 | magnitude << 7;
    half |= (U16)(magnitude == 0x7f) & 0x7e00;
    return half_to_float(half) * 256.0f;
  }
  static inline void pair(const char* row, int64_t i, F32& a, F32& b) {
    a = one(row + i), b = one(row + i + kLanes);
  }
};

// Permutes a row into the order of `pair`: `size` elements, a multiple of kPairLanes.
template <typename Element>
static inline void arrange(const float* from, int64_t size, float* to) {
  for (int64_t i = 0; i < size; i += kPairLanes) {
    for (int l = 0; l < kLanes; ++l) {
      to[i + l] = from[i + (Element::kInterleaved ? 2 * l : l)];
      to[i + kLanes + l] = from[i + (Element::kInterleaved ? 2 * l + 1 : kLanes + l)];
    }
  }
}

// The inverse permutation.
template <typename Element>
static inline void restore(const float* from, int64_t size, float* to) {
  for (int64_t i = 0; i < size; i += kPairLanes) {
    for (int l = 0; l < kLanes; ++l) {
      to[i + (Element::kInterleaved ? 2 * l : l)] = from[i + l];
      to[i + (Element::kInterleaved ? 2 * l + 1 : kLanes + l)] = from[i + kLanes + l];
    }
  }
}

// ---------------------------------------------------------------------- one at a time

static inline float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

static inline float read_number(Type type, const void* data, int64_t i) {
  if (type == Type::kF32) return static_cast<const float*>(data)[i];
  uint32_t half = static_cast<const uint16_t*>(data)[i];
  if (type == Type::kBF16) return bits_to_float(half << 16);
  uint32_t magnitude = half & 0x7fff, sign = (half & 0x8000) << 16;
  if (magnitude < 0x400) {
    float small = static_cast<float>(magnitude) * 0x1p-24f;
    return sign != 0 ? -small : small;
  }
  uint32_t bits = (magnitude << 13) + (magnitude < 0x7c00 ? 112u << 23 : 224u << 23);
  return bits_to_float(bits | sign);
}

static inline uint16_t to_bfloat16(float x) {
  uint32_t bits = float_to_bits(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static constexpr float power_of_two(int n) {
  float x = 1;
  for (; n > 0; --n) x *= 2;
  for (; n < 0; ++n) x /= 2;
  return x;
}

// Rounds |x| to nearest even in a float format of `kMantissa` fraction bits whose
// smallest normal number is 2^`kLowest`; the sign is not included. |x| must not
// overflow.
template <int kMantissa, int kLowest>
static inline uint32_t to_minifloat(float magnitude) {
  constexpr float kUnits = power_of_two(kMantissa - kLowest);
  if (magnitude < power_of_two(kLowest)) {
    return static_cast<uint32_t>(__builtin_rintf(magnitude * kUnits));
  }
  constexpr int kDropped = 23 - kMantissa;
  uint32_t bits = float_to_bits(magnitude);
  bits += (1u << (kDropped - 1)) - 1 + (bits >> kDropped & 1);
  return (bits >> kDropped) - (static_cast<uint32_t>(127 + kLowest - 1) << kMantissa);
}

static inline uint16_t to_float16(float x) {
  uint32_t sign = float_to_bits(x) >> 16 & 0x8000;
  float magnitude = __builtin_fabsf(x);
  if (x != x) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 65520) return static_cast<uint16_t>(sign | 0x7c00);
  return static_cast<uint16_t>(sign | to_minifloat<10, -14>(magnitude));
}

// `size` numbers from number `from` on, as float32; whether all are finite.
static inline bool read_numbers(Type type, const void* data, int64_t from, int64_t size,
                                float* to) {
  int64_t i = 0;
  I32 nonfinite = {};
  auto convert = [&](auto one) {
    for (; i + kLanes <= size; i += kLanes) {
      F32 x = one(static_cast<const char*>(data), from + i);
      nonfinite |= x - x != 0;
      store(to + i, x);
    }
  };
  if (type == Type::kF32) {
    convert([](const char* p, int64_t at) { return read<F32>(p + 4 * at); });
  } else if (type == Type::kBF16) {
    convert([](const char* p, int64_t at) {
      return (F32)(__builtin_convertvector(read<U16>(p + 2 * at), U32) << 16);
    });
  } else {
    convert([](const char* p, int64_t at) { return half_to_float(read<U16>(p + 2 * at)); });
  }
  bool finite = true;
  for (; i < size; ++i) {
    to[i] = read_number(type, data, from + i);
    finite &= to[i] - to[i] == 0;
  }
  for (int l = 0; l < kLanes; ++l) finite &= nonfinite[l] == 0;
  return finite;
}

static inline void write_number(Type type, void* data, int64_t i, float x) {
  if (type == Type::kF32) {
    static_cast<float*>(data)[i] = x;
  } else {
    static_cast<uint16_t*>(data)[i] = type == Type::kBF16 ? to_bfloat16(x) : to_float16(x);
  }
}

static inline void write_numbers(Type type, void* data, int64_t from, int64_t size,
                                 const float* x) {
  if (type == Type::kF32) {
    memcpy(static_cast<float*>(data) + from, x, static_cast<size_t>(size) * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(data) + from;
  if (type == Type::kBF16) {
    for (int64_t i = 0; i < size; ++i) to[i] = to_bfloat16(x[i]);
  } else {
    for (int64_t i = 0; i < size; ++i) to[i] = to_float16(x[i]);
  }
}

// -------------------------------------------------------------------------- quantised

static inline float max_code(PageType stored) {
  return stored == PageType::kS8 ? 127.0f : stored == PageType::kE4M3 ? 448.0f : 57344.0f;
}

static inline uint8_t to_code(PageType stored, float x) {
  if (stored == PageType::kS8) {
    return static_cast<uint8_t>(static_cast<int8_t>(__builtin_rintf(x)));
  }
  uint32_t sign = float_to_bits(x) >> 24 & 0x80;
  float magnitude = __builtin_fabsf(x);
  uint32_t code = stored == PageType::kE4M3 ? to_minifloat<3, -6>(magnitude)
                                            : to_minifloat<2, -14>(magnitude);
  return static_cast<uint8_t>(sign | code);
}

// Quantizes a row to codes and returns its scale, max |x| / largest code. The scale of
// a zero row is 0, that of a row with a NaN or Inf is NaN.
static inline float quantize(PageType stored, Type type, const void* row, int64_t from,
                             int64_t size, uint8_t* codes) {
  float high = 0;
  bool finite = true;
  for (int64_t i = 0; i < size; ++i) {
    float x = __builtin_fabsf(read_number(type, row, from + i));
    finite &= x - x == 0;
    high = x > high ? x : high;
  }
  float scale = high * (1.0f / max_code(stored));  // as quant/rows.py does
  if (!finite || scale < 0x1p-126f) {
    memset(codes, 0, static_cast<size_t>(size));
    return finite ? 0.0f : __builtin_nanf("");
  }
  const float inverse = 1 / scale;
  for (int64_t i = 0; i < size; ++i) {
    codes[i] = to_code(stored, read_number(type, row, from + i) * inverse);
  }
  return scale;
}

}  // namespace pages
}  // namespace RAPTAX_ISA
}  // namespace raptax
