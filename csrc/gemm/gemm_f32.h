// GEMM micro-kernels with float32 accumulators in registers, for operands of float32
// numbers or of pairs of bfloat16 numbers.

#pragma once

#include "simd/vec.h"

namespace raptax {
namespace RAPTAX_ISA {

// Rows of the micro-kernel: with two vectors of columns each, the accumulators fill the
// registers.
#if RAPTAX_LANES == 16
constexpr int kMicroRows = 8;
#else
constexpr int kMicroRows = 6;
#endif

// Operands of float32 numbers, one to a word.
struct F32Product {
  typedef float Word;
  typedef F32 Vector;
  static constexpr int64_t kPerWord = 1;
  RAPTAX_INLINE Vector vector(const Word* p) { return load(p); }
  RAPTAX_INLINE Vector repeated(Word x) { return broadcast(x); }
  RAPTAX_INLINE F32 add(F32 sum, Vector x, Vector y) { return sum + x * y; }
};

#if defined(__AVX512BF16__)
// Operands of bfloat16 numbers, two neighbours along the sum to a word. Their products
// are added to float32 sums.
struct Bf16Product {
  typedef uint32_t Word;
  typedef U32 Vector;
  static constexpr int64_t kPerWord = 2;
  RAPTAX_INLINE Vector vector(const Word* p) {
    Vector x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  RAPTAX_INLINE Vector repeated(Word x) { return broadcast(x); }
  RAPTAX_INLINE F32 add(F32 sum, Vector x, Vector y) {
    return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
  }
};
#endif

// c (+)= a b for R rows: a (R, n words) and c (R, V vectors) with strides, b (n words, V
// vectors) without gaps. Sums run in the order of n whatever R is.
template <typename Product, int R, int V>
static inline void micro_gemm(const typename Product::Word* a, int64_t a_stride,
                              const typename Product::Word* b, int64_t n, float* c,
                              int64_t c_stride, bool add) {
  typedef typename Product::Vector Vector;
  F32 sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      sum[r][v] = add ? load(c + r * c_stride + v * kLanes) : F32{};
    }
  }
  for (int64_t k = 0; k < n; ++k) {
    Vector y[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) y[v] = Product::vector(b + (k * V + v) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vector x = Product::repeated(a[r * a_stride + k]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] = Product::add(sum[r][v], x, y[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(c + r * c_stride + v * kLanes, sum[r][v]);
  }
}

template <typename Product, int R, int V>
static void gemm_rows(int64_t rows, const typename Product::Word* a, int64_t a_stride,
                      const typename Product::Word* b, int64_t n, float* c, int64_t c_stride,
                      bool add) {
  if (rows == R) {
    micro_gemm<Product, R, V>(a, a_stride, b, n, c, c_stride, add);
  } else if constexpr (R > 1) {
    gemm_rows<Product, R - 1, V>(rows, a, a_stride, b, n, c, c_stride, add);
  }
}

// The same for up to kMicroRows rows, and one or two vectors of columns.
template <typename Product>
static void gemm(int64_t rows, int64_t columns, const typename Product::Word* a,
                 int64_t a_stride, const typename Product::Word* b, int64_t n, float* c,
                 int64_t c_stride, bool add) {
  if (columns == kLanes) {
    gemm_rows<Product, kMicroRows, 1>(rows, a, a_stride, b, n, c, c_stride, add);
  } else {
    gemm_rows<Product, kMicroRows, 2>(rows, a, a_stride, b, n, c, c_stride, add);
  }
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
