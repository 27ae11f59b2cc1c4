// float32 GEMM of the backward kernel, register-blocked.

#pragma once

#include "simd/vec.h"

namespace raptax {
namespace RAPTAX_ISA {

// The micro-kernel has kBackRows x kBackVectors accumulators: 24 of the 32 registers of
// AVX-512, 12 of the 16 of other instruction sets.
constexpr int kBackRows = kLanes == 16 ? 8 : 4;
constexpr int kBackVectors = 3;
constexpr int64_t kBackPanel = kBackVectors * kLanes;

// The left operand: element (row, step) is data[row * stride + step] or, transposed,
// data[step * stride + row].
struct BackLeft {
  const float* data;
  int64_t stride;
  bool transposed;
};

// c[kBackRows x kVectors] (+)= a b over `depth` steps.
template <int kVectors, bool kTransposed>
static void back_micro_gemm(int64_t depth, const float* a, int64_t a_stride, const float* b,
                            int64_t b_stride, float* c, int64_t c_stride, bool add) {
  F32 sum[kBackRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kBackRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = add ? load(c + r * c_stride + v * kLanes) : F32{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    F32 right[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kBackRows; ++r) {
      F32 left = broadcast(kTransposed ? a[r] : a[r * a_stride]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
    b += b_stride;
    a += kTransposed ? a_stride : 1;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kBackRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + v * kLanes, sum[r][v]);
  }
}

template <int kVectors>
static void back_gemm_columns(int64_t rows, int64_t depth, BackLeft a, const float* b,
                              int64_t b_stride, float* c, int64_t c_stride, bool add) {
  for (int64_t r = 0; r < rows; r += kBackRows) {
    float* to = c + r * c_stride;
    if (a.transposed) {
      back_micro_gemm<kVectors, true>(depth, a.data + r, a.stride, b, b_stride, to, c_stride,
                                      add);
    } else {
      back_micro_gemm<kVectors, false>(depth, a.data + r * a.stride, a.stride, b, b_stride, to,
                                       c_stride, add);
    }
  }
}

// c (rows x columns) = a b, or += if `add`. `rows` is a multiple of kBackRows and
// `columns` one of kLanes; b has rows of b_stride floats.
static void back_gemm(int64_t rows, int64_t columns, int64_t depth, BackLeft a, const float* b,
                      int64_t b_stride, float* c, int64_t c_stride, bool add) {
  for (int64_t n = 0; n < columns;) {
    int64_t left = (columns - n) / kLanes;
    // Four vectors go as two and two: one alone would be bound by FMA latency.
    if (left == 4 || left == 2) {
      back_gemm_columns<2>(rows, depth, a, b + n, b_stride, c + n, c_stride, add);
      n += 2 * kLanes;
    } else if (left == 1) {
      back_gemm_columns<1>(rows, depth, a, b + n, b_stride, c + n, c_stride, add);
      n += kLanes;
    } else {
      back_gemm_columns<3>(rows, depth, a, b + n, b_stride, c + n, c_stride, add);
      n += 3 * kLanes;
    }
  }
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
