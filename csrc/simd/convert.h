// Conversion of float32, bfloat16 and float16 arrays to float32 vectors and back.

#pragma once

#include "api/attention_params.h"
#include "simd/vec.h"

namespace raptax {
namespace RAPTAX_ISA {

static inline U32 widen(U16 x) { return __builtin_convertvector(x, U32); }

static inline F32 from_bf16(U16 x) { return as_float(widen(x) << 16); }

static inline F32 from_f16(U16 x) {
#if defined(__AVX512F__)
  return (F32)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__)
  return (F32)_mm256_cvtph_ps((__m128i)x);
#else
  U32 bits = widen(x), size = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
  F32 normal = as_float((size << 13) + (112u << 23));
  F32 small = __builtin_convertvector((I32)size, F32) * 0x1p-24f;
  F32 y = (size < 0x400u) ? small : normal;
  y = (size >= 0x7c00u) ? as_float((size << 13) | 0x7f800000u) : y;
  return as_float((U32)y | sign);
#endif
}

static inline U16 to_bf16(F32 x) {
  U32 bits = (U32)x, odd = (bits >> 16) & 1u;
  U32 rounded = (bits + 0x7fffu + odd) >> 16;
  U32 nan = broadcast(uint32_t{0x7fc0});
  return __builtin_convertvector((x == x) ? rounded : nan, U16);
}

static inline uint16_t f16_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to Inf
  if (size < 0x38800000) {  // denormal float16: a multiple of 2^-24, rounded by the addition
    float shifted = 0, magnitude;
    memcpy(&magnitude, &size, 4);
    shifted = magnitude + 0.5f;
    memcpy(&size, &shifted, 4);
    return static_cast<uint16_t>(sign | (size - 0x3f000000));
  }
  size += 0xfff + ((size >> 13) & 1);
  return static_cast<uint16_t>(sign | ((size - (112u << 23)) >> 13));
}

static inline U16 to_f16(F32 x) {
#if defined(__AVX512F__)
  return (U16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (U16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  U16 y;
  for (int i = 0; i < kLanes; ++i) y[i] = f16_of(x[i]);
  return y;
#endif
}

// kLanes elements from index `at` on.
static inline F32 load_as(Type type, const void* from, int64_t at) {
  if (type == Type::kF32) return load(static_cast<const float*>(from) + at);
  U16 x;
  memcpy(&x, static_cast<const uint16_t*>(from) + at, sizeof x);
  return type == Type::kBF16 ? from_bf16(x) : from_f16(x);
}

// `count` elements from index `at` on, zero-padded; reads nothing beyond.
static inline F32 load_some(Type type, const void* from, int64_t at, int64_t count) {
  if (count >= kLanes) return load_as(type, from, at);
  float some[kLanes] = {};
  int64_t size = bytes_of(type);
  memcpy(some, static_cast<const char*>(from) + at * size, count * size);
  return load_as(type, some, 0);
}

// Stores the first `count` lanes at index `at`.
static inline void store_some(Type type, void* to, int64_t at, F32 x, int64_t count) {
  int64_t size = bytes_of(type);
  char* place = static_cast<char*>(to) + at * size;
  U16 y = type == Type::kBF16 ? to_bf16(x) : type == Type::kF16 ? to_f16(x) : U16{};
  if (count < kLanes) {
    memcpy(place, type == Type::kF32 ? static_cast<void*>(&x) : &y, count * size);
  } else if (type == Type::kF32) {
    memcpy(place, &x, sizeof x);
  } else {
    memcpy(place, &y, sizeof y);
  }
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
