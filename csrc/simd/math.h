// Elementary functions of float32 vectors, to a few units in the last place, with the
// IEEE results for infinities and NaN. Coefficients are our own minimax fits. Results
// below the smallest normal number may be 0.

#pragma once

#include "simd/vec.h"

namespace raptax {
namespace RAPTAX_ISA {

constexpr float kNaN = __builtin_nanf("");

// Lane-wise x where `mask` is -1, y where it is 0.
static inline F32 select(I32 mask, F32 x, F32 y) { return mask ? x : y; }
static inline I32 select(I32 mask, I32 x, I32 y) { return mask ? x : y; }

static inline F32 abs(F32 x) { return as_float(as_bits(x) & 0x7fffffff); }
static inline F32 copysign(F32 size, F32 x) {
  return as_float((as_bits(size) & 0x7fffffff) | (as_bits(x) & INT32_MIN));
}
// x clamped to [low, high]; NaN stays NaN.
static inline F32 clamp(F32 x, float low, float high) {
#if defined(__AVX512F__)
  const __m512 upper = (__m512)broadcast(high), lower = (__m512)broadcast(low);
  return (F32)_mm512_min_ps(upper, _mm512_max_ps(lower, (__m512)x));
#elif defined(__AVX2__)
  const __m256 upper = (__m256)broadcast(high), lower = (__m256)broadcast(low);
  return (F32)_mm256_min_ps(upper, _mm256_max_ps(lower, (__m256)x));
#else
  x = broadcast(low) > x ? broadcast(low) : x;
  return broadcast(high) < x ? broadcast(high) : x;
#endif
}

// 1 / x for x whose reciprocal is a normal number.
static inline F32 reciprocal(F32 x) {
#if defined(__AVX512F__)
  const F32 guess = (F32)_mm512_rcp14_ps((__m512)x);
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// Rounds to the nearest integer, ties to even, for |x| < 2**22.
static inline F32 nearest(F32 x) {
  const F32 magic = broadcast(12582912.0f);  // 1.5 * 2**23: its unit in the last place is 1
  return (x + magic) - magic;
}
// 2**n for integers n from -126 to 127.
static inline F32 power_of_two(F32 n) {
  return as_float((__builtin_convertvector(n, I32) + 127) << 23);
}

// 2**f for |f| <= 1/2.
static inline F32 exp2_fraction(F32 f) {
  F32 p = broadcast(1.5353257185779512e-4f);
  p = p * f + 1.339900423772633e-3f;
  p = p * f + 9.61843878030777e-3f;
  p = p * f + 5.550331994891167e-2f;
  p = p * f + 2.4022647738456726e-1f;
  p = p * f + 6.931471824645996e-1f;
  return p * f + 1.0f;
}

static inline F32 exp2(F32 x) {
  const F32 y = clamp(x, -127.0f, 128.5f);
  const F32 n = nearest(y);
  // In two steps: 2**128 overflows float32, 2**127.6 does not.
  const I32 whole = __builtin_convertvector(select(x == x, n, broadcast(0.0f)), I32);
  const I32 half = whole >> 1;
  const F32 p = exp2_fraction(y - n) * as_float((half + 127) << 23);
  const F32 r = p * as_float((whole - half + 127) << 23);
  return x < -126.5f ? broadcast(0.0f) : r;
}

// exp(x) - 1 = scale * (1 + rest) - 1, for |x| < 89; scale is a power of two.
struct ExpParts {
  F32 n, rest;
};
static inline ExpParts exp_parts(F32 x) {
  const F32 n = nearest(x * 1.44269504088896341f);
  // Cody-Waite: ln 2 in two parts, the first short enough for an exact product.
  const F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F32 p = broadcast(1.3944759266451001e-3f);
  p = broadcast(1.9790248188655823e-4f) * r + p;
  p = p * r + 8.333497680723667e-3f;
  p = p * r + 4.166629537940025e-2f;
  p = p * r + 1.666666567325592e-1f;
  p = p * r + 0.5f;
  return {n, p * (r * r) + r};
}

static inline F32 exp(F32 x) {
  const F32 y = clamp(x, -88.0f, 89.0f);
  const ExpParts e = exp_parts(select(x == x, y, broadcast(0.0f)));
  const F32 half = power_of_two(e.n - 1.0f);  // 2**128 overflows
  const F32 r = (e.rest * half + half) * 2.0f;
  const F32 in_range = x < -87.33f ? broadcast(0.0f) : r;
  return select(x == x, in_range, x);
}

static inline F32 expm1(F32 x) {
  const F32 y = clamp(x, -18.0f, 89.0f);
  const ExpParts e = exp_parts(select(x == x, y, broadcast(0.0f)));
  const F32 half = power_of_two(e.n - 1.0f);
  const F32 r = (e.rest * half + (half - 0.5f)) * 2.0f;
  const F32 tiny = select(x == 0.0f, x, r);  // -0 stays -0
  return select(x == x, tiny, x);
}

static inline F32 log(F32 x) {
  // Denormals are scaled first.
  const I32 small = x < 1.17549435e-38f;
  const F32 y = select(small, x * 8388608.0f, x);
  // y = 2**n * m with m from sqrt(1/2) to sqrt(2).
  const I32 shifted = (I32)((U32)as_bits(y) - 0x3f3504f3u);
  const I32 whole = shifted >> 23;
  const F32 n =
      __builtin_convertvector(whole, F32) - select(small, broadcast(23.0f), broadcast(0.0f));
  const F32 f = as_float((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  F32 p = broadcast(-7.634429633617401e-2f);
  p = p * f + 1.2761549651622772e-1f;
  p = p * f - 1.31601944565773e-1f;
  p = p * f + 1.4201761782169342e-1f;
  p = p * f - 1.6623356938362122e-1f;
  p = p * f + 2.0001226663589478e-1f;
  p = p * f - 2.50008225440979e-1f;
  p = p * f + 3.333333134651184e-1f;
  const F32 ff = f * f;
  F32 r = p * (ff * f) + n * -2.12194440e-4f;
  r = r - 0.5f * ff;
  r = n * 0.693359375f + (f + r);
  r = select(x == kInf, x, r);
  r = select(x == 0.0f, broadcast(-kInf), r);
  return select(x >= 0.0f, r, select(x == x, broadcast(kNaN), x));
}

static inline F32 log1p(F32 x) {
  const F32 u = x + 1.0f;
  const F32 lost = (x - (u - 1.0f)) / u;  // rounding error of u
  const F32 r = log(u) + select((u > 0.0f) & (u < kInf), lost, broadcast(0.0f));
  return select(abs(x) < 1e-8f, x, r);
}

static inline F32 logistic(F32 x) { return 1.0f / (1.0f + exp(-x)); }

static inline F32 truncate(F32 x) {
  // Every float from 2**23 on is an integer.
  const F32 whole = __builtin_convertvector(
      __builtin_convertvector(select(abs(x) < 8388608.0f, x, broadcast(0.0f)), I32), F32);
  return select(abs(x) < 8388608.0f, copysign(whole, x), x);
}
static inline F32 floor(F32 x) {
  const F32 t = truncate(x);
  return select(t > x, t - 1.0f, t);
}
static inline F32 ceil(F32 x) { return -floor(-x); }
static inline F32 round_even(F32 x) {
  return select(abs(x) < 4194304.0f, copysign(nearest(x), x), x);
}
// Ties away from zero.
static inline F32 round_away(F32 x) {
  const F32 t = truncate(x);
  return select(abs(x - t) >= 0.5f, t + copysign(broadcast(1.0f), x), t);
}

// A function of the C library, lane by lane.
template <typename Function>
static inline F32 by_lane(Function function, F32 x) {
  for (int i = 0; i < kLanes; ++i) x[i] = function(x[i]);
  return x;
}
template <typename Function>
static inline F32 by_lane(Function function, F32 x, F32 y) {
  for (int i = 0; i < kLanes; ++i) x[i] = function(x[i], y[i]);
  return x;
}

static inline F32 sqrt(F32 x) {
#if defined(__AVX512F__)
  return (F32)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (F32)_mm256_sqrt_ps((__m256)x);
#else
  return by_lane([](float lane) { return __builtin_sqrtf(lane); }, x);
#endif
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
