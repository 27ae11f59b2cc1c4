// Rows of numbers of any type, as the backward kernel takes and gives them.

#pragma once

#include "numbers.inl"

namespace raptax {
namespace RAPTAX_ISA {

constexpr float kLog2E = 1.44269504088896341f;

// All bits set where x is neither NaN nor infinite.
static inline I32 back_finite(F32 x) {
  return (as_bits(x) & all(int32_t{0x7f800000})) != all(int32_t{0x7f800000});
}

static inline bool back_all(I32 x) {
#if RAPTAX_LANES == 16
  return _mm512_movepi32_mask((__m512i)x) == 0xffff;
#else
  int32_t every = -1;
  for (int i = 0; i < kLanes; ++i) every &= x[i];
  return every != 0;
#endif
}

// `count` numbers from entry `first` on as float32, with zeros for what is not finite,
// and zeros up to `padded`, a multiple of kLanes. Returns whether all were finite.
static bool back_row(const void* data, Type type, int64_t first, int64_t count,
                     int64_t padded, float* to) {
  I32 fine = all(int32_t{-1});
  for (int64_t i = 0; i < padded; i += kLanes) {
    F32 x = i < count ? load_some(type, data, first + i, count - i) : F32{};
    I32 finite = back_finite(x);
    fine &= finite;
    store(to + i, finite ? x : F32{});
  }
  return back_all(fine);
}

// Sum of products of two rows.
static float back_dot(const void* a, const void* b, Type type, int64_t first,
                      int64_t count) {
  F32 sum{};
  for (int64_t i = 0; i < count; i += kLanes) {
    sum += load_some(type, a, first + i, count - i) * load_some(type, b, first + i, count - i);
  }
  return sum_of(sum);
}

// Writes `count` numbers, times `factor`, from entry `first` on.
static void back_put_row(const float* from, float factor, void* data, Type type,
                         int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store_some(type, data, first + i, load(from + i) * all(factor), count - i);
  }
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
