// Functions of float32 vectors, to a few units in the last place, with the usual answers
// for infinities and NaN. Coefficients are our own minimax fits. Results below the least
// normal number may be 0.

#pragma once

#include "simd.h"

namespace raptax {
namespace RAPTAX_ISA {

constexpr float kNaN = __builtin_nanf("");

// Where a lane of `mask` is 0 or -1: x where it is -1, else y.
static inline F32 pick(I32 mask, F32 x, F32 y) { return mask ? x : y; }
static inline I32 pick(I32 mask, I32 x, I32 y) { return mask ? x : y; }

static inline F32 absolute(F32 x) { return as_float(as_bits(x) & 0x7fffffff); }
static inline F32 with_sign_of(F32 size, F32 x) {
  return as_float((as_bits(size) & 0x7fffffff) | (as_bits(x) & INT32_MIN));
}
// x within [low, high]; NaN stays NaN.
static inline F32 within(F32 x, float low, float high) {
#if defined(__AVX512F__)
  const __m512 most = (__m512)all(high), least = (__m512)all(low);
  return (F32)_mm512_min_ps(most, _mm512_max_ps(least, (__m512)x));
#elif defined(__AVX2__)
  const __m256 most = (__m256)all(high), least = (__m256)all(low);
  return (F32)_mm256_min_ps(most, _mm256_max_ps(least, (__m256)x));
#else
  x = all(low) > x ? all(low) : x;
  return all(high) < x ? all(high) : x;
#endif
}

// 1 / x for x whose inverse is an ordinary number.
static inline F32 inverse(F32 x) {
#if defined(__AVX512F__)
  const F32 guess = (F32)_mm512_rcp14_ps((__m512)x);
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// The nearest whole number, ties to even, of |x| < 2**22.
static inline F32 nearest(F32 x) {
  const F32 magic = all(12582912.0f);  // 1.5 * 2**23: its last bit counts ones
  return (x + magic) - magic;
}
// 2**n for whole numbers n from -126 to 127.
static inline F32 power_of_two(F32 n) {
  return as_float((__builtin_convertvector(n, I32) + 127) << 23);
}

// 2**f for |f| <= 1/2.
static inline F32 exp2_fraction(F32 f) {
  F32 p = all(1.5353257185779512e-4f);
  p = p * f + 1.339900423772633e-3f;
  p = p * f + 9.61843878030777e-3f;
  p = p * f + 5.550331994891167e-2f;
  p = p * f + 2.4022647738456726e-1f;
  p = p * f + 6.931471824645996e-1f;
  return p * f + 1.0f;
}

static inline F32 exp2(F32 x) {
  const F32 y = within(x, -127.0f, 128.5f);
  const F32 n = nearest(y);
  // In two steps, as 2**128 has no float, but 2**127.6 does.
  const I32 whole = __builtin_convertvector(pick(x == x, n, all(0.0f)), I32);
  const I32 half = whole >> 1;
  const F32 p = exp2_fraction(y - n) * as_float((half + 127) << 23);
  const F32 r = p * as_float((whole - half + 127) << 23);
  return x < -126.5f ? all(0.0f) : r;
}

// exp(x) - 1 = scale * (1 + rest) - 1, for |x| < 89; scale is a power of two.
struct ExpParts {
  F32 n, rest;
};
static inline ExpParts exp_parts(F32 x) {
  const F32 n = nearest(x * 1.44269504088896341f);
  // ln 2 in two pieces; the first has so few bits that its product is exact.
  const F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F32 p = all(1.3944759266451001e-3f);
  p = all(1.9790248188655823e-4f) * r + p;
  p = p * r + 8.333497680723667e-3f;
  p = p * r + 4.166629537940025e-2f;
  p = p * r + 1.666666567325592e-1f;
  p = p * r + 0.5f;
  return {n, p * (r * r) + r};
}

static inline F32 exp(F32 x) {
  const F32 y = within(x, -88.0f, 89.0f);
  const ExpParts e = exp_parts(pick(x == x, y, all(0.0f)));
  const F32 half = power_of_two(e.n - 1.0f);  // 2**128 has no float
  const F32 r = (e.rest * half + half) * 2.0f;
  const F32 in_range = x < -87.33f ? all(0.0f) : r;
  return pick(x == x, in_range, x);
}

static inline F32 expm1(F32 x) {
  const F32 y = within(x, -18.0f, 89.0f);
  const ExpParts e = exp_parts(pick(x == x, y, all(0.0f)));
  const F32 half = power_of_two(e.n - 1.0f);
  const F32 r = (e.rest * half + (half - 0.5f)) * 2.0f;
  const F32 tiny = pick(x == 0.0f, x, r);  // -0 stays -0
  return pick(x == x, tiny, x);
}

static inline F32 log(F32 x) {
  // Numbers that are not normal are scaled first.
  const I32 small = x < 1.17549435e-38f;
  const F32 y = pick(small, x * 8388608.0f, x);
  // y = 2**n * m with m from sqrt(1/2) to sqrt(2).
  const I32 shifted = (I32)((U32)as_bits(y) - 0x3f3504f3u);
  const I32 whole = shifted >> 23;
  const F32 n = __builtin_convertvector(whole, F32) - pick(small, all(23.0f), all(0.0f));
  const F32 f = as_float((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  F32 p = all(-7.634429633617401e-2f);
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
  r = pick(x == kInf, x, r);
  r = pick(x == 0.0f, all(-kInf), r);
  return pick(x >= 0.0f, r, pick(x == x, all(kNaN), x));
}

static inline F32 log1p(F32 x) {
  const F32 u = x + 1.0f;
  const F32 lost = (x - (u - 1.0f)) / u;  // what rounding to u took away
  const F32 r = log(u) + pick((u > 0.0f) & (u < kInf), lost, all(0.0f));
  return pick(absolute(x) < 1e-8f, x, r);
}

static inline F32 logistic(F32 x) { return 1.0f / (1.0f + exp(-x)); }

static inline F32 truncate(F32 x) {
  // Every float from 2**23 on is whole.
  const F32 whole = __builtin_convertvector(__builtin_convertvector(
      pick(absolute(x) < 8388608.0f, x, all(0.0f)), I32), F32);
  return pick(absolute(x) < 8388608.0f, with_sign_of(whole, x), x);
}
static inline F32 floor(F32 x) {
  const F32 t = truncate(x);
  return pick(t > x, t - 1.0f, t);
}
static inline F32 ceil(F32 x) { return -floor(-x); }
static inline F32 round_even(F32 x) {
  return pick(absolute(x) < 4194304.0f, with_sign_of(nearest(x), x), x);
}
// Ties away from zero.
static inline F32 round_away(F32 x) {
  const F32 t = truncate(x);
  return pick(absolute(x - t) >= 0.5f, t + with_sign_of(all(1.0f), x), t);
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
