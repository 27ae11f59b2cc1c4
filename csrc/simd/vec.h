// SIMD vectors of the width that the including file is compiled for, as GCC/Clang
// vector extensions, so that one source serves every instruction set. No STL in here or
// in what includes it: the linker may keep the AVX-512 copy of a weak inline function
// for every caller (tools/check_symbols.py).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns that its own _mm512_undefined vectors are uninitialised (GCC bug
// 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

#if defined(__AVX512F__)
#define RAPTAX_LANES 16
#elif defined(__AVX2__)
#define RAPTAX_LANES 8
#else
#define RAPTAX_LANES 4
#endif

// For functions of single vectors, where a call would cost more than the work.
#define RAPTAX_INLINE static inline __attribute__((always_inline))

namespace raptax {
namespace RAPTAX_ISA {

constexpr int kLanes = RAPTAX_LANES;
typedef float F32 __attribute__((vector_size(4 * RAPTAX_LANES)));
typedef int32_t I32 __attribute__((vector_size(4 * RAPTAX_LANES)));
typedef uint32_t U32 __attribute__((vector_size(4 * RAPTAX_LANES)));
typedef uint16_t U16 __attribute__((vector_size(2 * RAPTAX_LANES)));
typedef uint8_t U8 __attribute__((vector_size(RAPTAX_LANES)));

constexpr float kInf = __builtin_inff();
constexpr float kLog2OfE = 1.44269504088896341f;

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
static inline int64_t round_down(int64_t n, int64_t unit) { return n / unit * unit; }

// x - 0 is x, -0 included, so compilers make a broadcast of it; x + 0 is not.
static inline F32 broadcast(float x) { return x - F32{}; }
static inline I32 broadcast(int32_t x) { return I32{} + x; }
static inline U32 broadcast(uint32_t x) { return U32{} + x; }
static inline F32 load(const float* p) {
  F32 x;
  memcpy(&x, p, sizeof x);
  return x;
}
static inline void store(float* p, F32 x) { memcpy(p, &x, sizeof x); }
static inline F32 as_float(I32 x) { return (F32)x; }
static inline F32 as_float(U32 x) { return (F32)x; }
static inline I32 as_bits(F32 x) { return (I32)x; }

// Lane-wise maximum and minimum; b where either is NaN.
#if defined(__AVX512F__)
static inline F32 max(F32 a, F32 b) { return (F32)_mm512_max_ps((__m512)a, (__m512)b); }
static inline F32 min(F32 a, F32 b) { return (F32)_mm512_min_ps((__m512)a, (__m512)b); }
#else
static inline F32 max(F32 a, F32 b) { return a > b ? a : b; }
static inline F32 min(F32 a, F32 b) { return a < b ? a : b; }
#endif

// 0, 1, 2, ...
static inline I32 lane_indices() {
  I32 x;
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

// `inside` for the lanes first <= lane < last, `outside` for the others.
static inline F32 select_lanes(int64_t first, int64_t last, F32 inside, F32 outside) {
  if (first <= 0 && last >= kLanes) return inside;  // whole vector visible: the common case
#if defined(__AVX512F__)
  uint32_t below = last >= kLanes ? 0xffff : (1u << (last < 0 ? 0 : last)) - 1;
  uint32_t skipped = first <= 0 ? 0 : (1u << (first > kLanes ? kLanes : first)) - 1;
  __mmask16 mask = static_cast<__mmask16>(below & ~skipped);
  return (F32)_mm512_mask_blend_ps(mask, (__m512)outside, (__m512)inside);
#else
  I32 lane = lane_indices();
  int32_t low = static_cast<int32_t>(first < 0 ? 0 : first > kLanes ? kLanes : first);
  int32_t high = static_cast<int32_t>(last < 0 ? 0 : last > kLanes ? kLanes : last);
  return ((lane >= low) & (lane < high)) ? inside : outside;
#endif
}

#if defined(__AVX512F__)
static inline float reduce_add(F32 x) { return _mm512_reduce_add_ps((__m512)x); }
static inline float reduce_max(F32 x) { return _mm512_reduce_max_ps((__m512)x); }
static inline bool any_greater(F32 x, F32 limit) {
  return _mm512_cmp_ps_mask((__m512)x, (__m512)limit, _CMP_GT_OQ) != 0;
}
#else
static inline float reduce_add(F32 x) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}
static inline float reduce_max(F32 x) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] = x[i + half] > x[i] ? x[i + half] : x[i];
  }
  return x[0];
}
static inline bool any_greater(F32 x, F32 limit) {
#if defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(x > limit)) != 0;
#else
  bool any = false;
  for (int i = 0; i < kLanes; ++i) any |= x[i] > limit[i];
  return any;
#endif
}
#endif

// 2^x to within 1.6e-7; exactly 0 from -150 down, NaN for NaN. x is at most 127.
static inline F32 exp2_fast(F32 x) {
#if defined(__AVX512DQ__)
  F32 f = (F32)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
  F32 y = broadcast(0.00187757669f) * f + 0.00898933969f;
  y = y * f + 0.0558263175f;
  y = y * f + 0.240153611f;
  y = y * f + 0.693153083f;
  y = y * f + 0.99999994f;
  return (F32)_mm512_scalef_ps((__m512)y, (__m512)x);
#else
  F32 low = x < -126.0f ? broadcast(-126.0f) : x;
  F32 shifted = low + 12582912.0f;  // 1.5 * 2^23: rounds, the integer is in the low bits
  F32 f = low - (shifted - 12582912.0f);
  F32 y = broadcast(0.00132764725f) * f + 0.00967554096f;
  y = y * f + 0.0555071309f;
  y = y * f + 0.240221202f;
  y = y * f + 0.693146944f;
  y = y * f + 1.00000012f;
  F32 power = as_float((as_bits(shifted) + 127) << 23);
  return x < -126.0f ? F32{} : y * power;
#endif
}

// Transposes kLanes vectors: x[i][j] and x[j][i] are exchanged.
#if RAPTAX_LANES == 16
#define RAPTAX_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define RAPTAX_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif RAPTAX_LANES == 8
#define RAPTAX_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define RAPTAX_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define RAPTAX_LOW 0, 4, 1, 5
#define RAPTAX_HIGH 2, 6, 3, 7
#endif
static inline void transpose(F32* x) {
  // A perfect shuffle per power of two.
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    F32 interleaved[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      interleaved[2 * i] = __builtin_shufflevector(x[i], x[i + kLanes / 2], RAPTAX_LOW);
      interleaved[2 * i + 1] = __builtin_shufflevector(x[i], x[i + kLanes / 2], RAPTAX_HIGH);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = interleaved[i];
  }
}
#undef RAPTAX_LOW
#undef RAPTAX_HIGH

// Sets flush-to-zero and denormals-are-zero while it is alive: arithmetic on denormals,
// the tails of exponentials, takes about a hundred cycles per operation.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace RAPTAX_ISA
}  // namespace raptax
