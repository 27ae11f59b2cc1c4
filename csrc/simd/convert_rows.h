// Rows of any dtype, converted for the backward kernel.

#pragma once

#include "simd/convert.h"

namespace raptax {
namespace RAPTAX_ISA {

// All bits set where x is neither NaN nor infinite.
static inline I32 back_finite(F32 x) {
  return (as_bits(x) & broadcast(int32_t{0x7f800000})) != broadcast(int32_t{0x7f800000});
}

static inline bool back_all(I32 x) {
#if RAPTAX_LANES == 16
  return _mm512_movepi32_mask((__m512i)x) == 0xffff;
#else
  int32_t all_full = -1;
  for (int i = 0; i < kLanes; ++i) all_full &= x[i];
  return all_full != 0;
#endif
}

// `count` numbers from entry `first` on as float32, with zeros for what is not finite,
// and zeros up to `padded`, a multiple of kLanes. Returns whether all were finite.
static bool back_row(const void* data, Type type, int64_t first, int64_t count, int64_t padded,
                     float* to) {
  I32 all_finite = broadcast(int32_t{-1});
  for (int64_t i = 0; i < padded; i += kLanes) {
    F32 x = i < count ? load_some(type, data, first + i, count - i) : F32{};
    I32 finite = back_finite(x);
    all_finite &= finite;
    store(to + i, finite ? x : F32{});
  }
  return back_all(all_finite);
}

// Sum of products of two rows.
static float back_dot(const void* a, const void* b, Type type, int64_t first, int64_t count) {
  F32 sum{};
  for (int64_t i = 0; i < count; i += kLanes) {
    sum += load_some(type, a, first + i, count - i) * load_some(type, b, first + i, count - i);
  }
  return reduce_add(sum);
}

// Writes `count` numbers, times `factor`, from entry `first` on.
static void back_put_row(const float* from, float factor, void* data, Type type, int64_t first,
                         int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store_some(type, data, first + i, load(from + i) * broadcast(factor), count - i);
  }
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
