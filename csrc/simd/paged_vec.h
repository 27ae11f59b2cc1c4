// Vector operations of the paged kernel beyond vec.h: several horizontal sums at once,
// transposition, 2^x, small matrix products.

#pragma once

#include "simd/vec.h"

namespace raptax {
namespace RAPTAX_ISA {
namespace pages {

#define RAPTAX_4(f, h) f(0, h), f(1, h), f(2, h), f(3, h)
#if RAPTAX_LANES >= 8
#define RAPTAX_8(f, h) RAPTAX_4(f, h), f(4, h), f(5, h), f(6, h), f(7, h)
#endif
#if RAPTAX_LANES == 16
#define RAPTAX_ALL(f, h) \
  RAPTAX_8(f, h), f(8, h), f(9, h), f(10, h), f(11, h), f(12, h), f(13, h), f(14, h), f(15, h)
#elif RAPTAX_LANES == 8
#define RAPTAX_ALL(f, h) RAPTAX_8(f, h)
#else
#define RAPTAX_ALL(f, h) RAPTAX_4(f, h)
#endif

// Lane selections for shuffles of two vectors a, b at distance h. STAY takes lane i of
// a where bit h of i is unset and of b where it is set; SWAP takes the other half of
// each, exchanged.
#define RAPTAX_STAY(i, h) ((i) & (h) ? RAPTAX_LANES + (i) : (i))
#define RAPTAX_SWAP(i, h) ((i) & (h) ? RAPTAX_LANES + (i) - (h) : (i) + (h))
#define RAPTAX_LOW(i, h) ((i) & (h) ? RAPTAX_LANES + (i) - (h) : (i))
#define RAPTAX_HIGH(i, h) ((i) & (h) ? RAPTAX_LANES + (i) : (i) + (h))
#define RAPTAX_SHUFFLE(a, b, f, h) __builtin_shufflevector(a, b, RAPTAX_ALL(f, h))

template <int h>
static inline F32 fold(F32 a, F32 b) {
  if constexpr (h == 8) {
#if RAPTAX_LANES == 16
    return RAPTAX_SHUFFLE(a, b, RAPTAX_STAY, 8) + RAPTAX_SHUFFLE(a, b, RAPTAX_SWAP, 8);
#endif
  } else if constexpr (h == 4) {
#if RAPTAX_LANES >= 8
    return RAPTAX_SHUFFLE(a, b, RAPTAX_STAY, 4) + RAPTAX_SHUFFLE(a, b, RAPTAX_SWAP, 4);
#endif
  } else if constexpr (h == 2) {
    return RAPTAX_SHUFFLE(a, b, RAPTAX_STAY, 2) + RAPTAX_SHUFFLE(a, b, RAPTAX_SWAP, 2);
  } else {
    return RAPTAX_SHUFFLE(a, b, RAPTAX_STAY, 1) + RAPTAX_SHUFFLE(a, b, RAPTAX_SWAP, 1);
  }
}

// Horizontal sums: lane i of the result is the sum of the lanes of x[i]. Overwrites x.
template <int h = kLanes / 2>
static inline F32 sums(F32* x) {
  for (int i = 0; i < h; ++i) x[i] = fold<h>(x[i], x[i + h]);
  if constexpr (h > 1) {
    return sums<h / 2>(x);
  } else {
    return x[0];
  }
}

template <int h>
static inline void exchange(F32& a, F32& b) {
  F32 low, high;
  if constexpr (h == 8) {
#if RAPTAX_LANES == 16
    low = RAPTAX_SHUFFLE(a, b, RAPTAX_LOW, 8);
    high = RAPTAX_SHUFFLE(a, b, RAPTAX_HIGH, 8);
#endif
  } else if constexpr (h == 4) {
#if RAPTAX_LANES >= 8
    low = RAPTAX_SHUFFLE(a, b, RAPTAX_LOW, 4);
    high = RAPTAX_SHUFFLE(a, b, RAPTAX_HIGH, 4);
#endif
  } else if constexpr (h == 2) {
    low = RAPTAX_SHUFFLE(a, b, RAPTAX_LOW, 2);
    high = RAPTAX_SHUFFLE(a, b, RAPTAX_HIGH, 2);
  } else {
    low = RAPTAX_SHUFFLE(a, b, RAPTAX_LOW, 1);
    high = RAPTAX_SHUFFLE(a, b, RAPTAX_HIGH, 1);
  }
  a = low, b = high;
}

// x[i] lane j <-> x[j] lane i.
template <int h = kLanes / 2>
static inline void transpose(F32* x) {
  for (int i = 0; i < kLanes; ++i) {
    if ((i & h) == 0) exchange<h>(x[i], x[i + h]);
  }
  if constexpr (h > 1) transpose<h / 2>(x);
}

// 2^x for x <= 0, to 1 ulp or 2; 0 below the smallest normal number, and for NaN.
static inline F32 exp2_nonpositive(F32 x) {
  F32 kept = x > -126.0f ? x : broadcast(-126.0f);
  F32 rounder = broadcast(0x1.8p23f), shifted = kept + rounder;
  F32 f = kept - (shifted - rounder);
  F32 y = broadcast(1.5252734e-05f);
  y = y * f + 1.5403530e-04f;
  y = y * f + 1.3333558e-03f;
  y = y * f + 9.6181291e-03f;
  y = y * f + 5.5504109e-02f;
  y = y * f + 2.4022651e-01f;
  y = y * f + 6.9314718e-01f;
  y = y * f + 1.0f;
  I32 exponent = (as_bits(shifted) - as_bits(rounder)) << 23;
  return x > -126.0f ? as_float(as_bits(y) + exponent) : F32{};
}

// exp(a - b) for a <= b where a may be -inf.
static inline float exp_difference(float a, float b) {
  return exp2_nonpositive(broadcast((a - b) * kLog2OfE))[0];
}

static inline bool any_lane(I32 x) {
  uint64_t words[kLanes / 2], found = 0;
  memcpy(words, &x, sizeof x);
  for (uint64_t word : words) found |= word;
  return found != 0;
}

// out[r, c] = sum over d < depth of a[r, d] * b[d, c], for kRows x kColumns * kLanes.
constexpr int kMicroRows = RAPTAX_LANES == 16 ? 8 : 4, kMicroVectors = 2;

static inline void micro_gemm(const float* a, int64_t a_stride, const float* b,
                              int64_t b_stride, int64_t depth, float* out, int64_t out_stride) {
  F32 sum[kMicroRows][kMicroVectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    F32 column[kMicroVectors];
    for (int c = 0; c < kMicroVectors; ++c) column[c] = load(b + d * b_stride + c * kLanes);
    for (int r = 0; r < kMicroRows; ++r) {
      F32 factor = broadcast(a[r * a_stride + d]);
      for (int c = 0; c < kMicroVectors; ++c) sum[r][c] += factor * column[c];
    }
  }
  for (int r = 0; r < kMicroRows; ++r) {
    for (int c = 0; c < kMicroVectors; ++c) store(out + r * out_stride + c * kLanes, sum[r][c]);
  }
}

// The same for any multiples of these rows and columns.
static void gemm(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride,
                 const float* b, int64_t b_stride, float* out, int64_t out_stride) {
  for (int64_t c = 0; c < columns; c += kMicroVectors * kLanes) {
    for (int64_t r = 0; r < rows; r += kMicroRows) {
      micro_gemm(a + r * a_stride, a_stride, b + c, b_stride, depth, out + r * out_stride + c,
                 out_stride);
    }
  }
}

}  // namespace pages
}  // namespace RAPTAX_ISA
}  // namespace raptax
