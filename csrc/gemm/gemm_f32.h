// float32 GEMM micro-kernels: accumulators in registers.

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

// c (+)= a b for R rows: a (R, n) and c (R, V vectors) with strides, b (n, V vectors)
// without gaps. Sums run in the order of n whatever R is.
template <int R, int V>
static inline void micro_gemm(const float* a, int64_t a_stride, const float* b, int64_t n,
                              float* c, int64_t c_stride, bool add) {
  F32 sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      sum[r][v] = add ? load(c + r * c_stride + v * kLanes) : F32{};
    }
  }
  for (int64_t k = 0; k < n; ++k) {
    F32 y[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) y[v] = load(b + (k * V + v) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      F32 x = broadcast(a[r * a_stride + k]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] += x * y[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(c + r * c_stride + v * kLanes, sum[r][v]);
  }
}

template <int R, int V>
static void gemm_rows(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t n,
                      float* c, int64_t c_stride, bool add) {
  if (rows == R) {
    micro_gemm<R, V>(a, a_stride, b, n, c, c_stride, add);
  } else if constexpr (R > 1) {
    gemm_rows<R - 1, V>(rows, a, a_stride, b, n, c, c_stride, add);
  }
}

// The same for up to kMicroRows rows, and one or two vectors of columns.
static void gemm(int64_t rows, int64_t columns, const float* a, int64_t a_stride,
                 const float* b, int64_t n, float* c, int64_t c_stride, bool add) {
  if (columns == kLanes) {
    gemm_rows<kMicroRows, 1>(rows, a, a_stride, b, n, c, c_stride, add);
  } else {
    gemm_rows<kMicroRows, 2>(rows, a, a_stride, b, n, c, c_stride, add);
  }
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
