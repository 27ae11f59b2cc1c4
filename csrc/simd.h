// Vectors of the width that the including file is compiled for, in the compiler's own
// vector types, so that one text serves every instruction set. No STL in here or in
// what includes it: the linker might keep the AVX-512 copy of an inline function for
// everybody.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 calls its own "undefined" vectors uninitialised (its bug 105593).
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

namespace raptax {
namespace RAPTAX_ISA {

constexpr int kLanes = RAPTAX_LANES;
typedef float F32 __attribute__((vector_size(4 * RAPTAX_LANES)));
typedef int32_t I32 __attribute__((vector_size(4 * RAPTAX_LANES)));
typedef uint32_t U32 __attribute__((vector_size(4 * RAPTAX_LANES)));

constexpr float kInf = __builtin_inff();

static inline F32 all(float x) { return F32{} + x; }
static inline I32 all(int32_t x) { return I32{} + x; }
static inline F32 load(const float* p) {
  F32 x;
  memcpy(&x, p, sizeof x);
  return x;
}
static inline void store(float* p, F32 x) { memcpy(p, &x, sizeof x); }
static inline F32 larger(F32 a, F32 b) { return a > b ? a : b; }
static inline F32 smaller(F32 a, F32 b) { return a < b ? a : b; }
static inline F32 as_float(I32 x) { return (F32)x; }
static inline I32 as_bits(F32 x) { return (I32)x; }

}  // namespace RAPTAX_ISA
}  // namespace raptax
