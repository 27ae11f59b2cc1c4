// Direct dot products for few query rows: keys and values are converted in registers,
// straight from their pages. Decoding is memory-bound, so each key is read once for up
// to four query rows.

#pragma once

#include "simd/page_elements.h"
#include "simd/paged_vec.h"

namespace raptax {
namespace RAPTAX_ISA {
namespace pages {

constexpr int kSums = RAPTAX_LANES == 16 ? 16 : 8;  // accumulators that fit in registers

// Prefetches a row. The distance just covers the memory latency; larger ones hold up
// the hardware prefetcher.
constexpr int64_t kAhead = 2048;  // bytes
static inline void prefetch(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 3);
}

// scores[r, j] = query_rows[r] . rows[j], for kQueryRows query rows and `count` keys, a
// multiple of 16. Prefetches the rows `ahead`.
template <typename Element, int kQueryRows>
static void direct_scores(const float* query_rows, int64_t size, const char* const* rows,
                          const char* const* ahead, int64_t count, float* scores,
                          int64_t stride) {
  constexpr int kKeysAtOnce = kSums / kQueryRows;
  for (int64_t j = 0; j < count; j += kKeysAtOnce) {
    F32 sum[kSums] = {};
    for (int64_t d = 0; d < size; d += kPairLanes) {
      F32 a[kKeysAtOnce], b[kKeysAtOnce];
      for (int c = 0; c < kKeysAtOnce; ++c) Element::pair(rows[j + c], d, a[c], b[c]);
      for (int r = 0; r < kQueryRows; ++r) {
        F32 qa = load(query_rows + r * size + d), qb = load(query_rows + r * size + d + kLanes);
        for (int c = 0; c < kKeysAtOnce; ++c) {
          sum[r * kKeysAtOnce + c] += qa * a[c];
          sum[r * kKeysAtOnce + c] += qb * b[c];
        }
      }
    }
    for (int c = 0; c < kKeysAtOnce; ++c) prefetch(ahead[j + c], size * Element::kBytes);
    float total[kSums];
    for (int i = 0; i < kSums; i += kLanes) store(total + i, sums(sum + i));
    for (int r = 0; r < kQueryRows; ++r) {
      memcpy(scores + r * stride + j, total + r * kKeysAtOnce, kKeysAtOnce * sizeof(float));
    }
  }
}

// out[r, e] = sum over j < count of weights[r, j] * rows[j, e], for kQueryRows query
// rows and kPairs * kPairLanes columns from `first` on.
template <typename Element, int kQueryRows, int kPairs>
static void direct_columns(const float* weights, int64_t stride, const char* const* rows,
                           const char* const* ahead, int64_t count, int64_t first, float* out,
                           int64_t size) {
  F32 sum[kQueryRows][2 * kPairs] = {};
  for (int64_t j = 0; j < count; ++j) {
    F32 x[2 * kPairs];
    for (int c = 0; c < kPairs; ++c) {
      Element::pair(rows[j], first + c * kPairLanes, x[2 * c], x[2 * c + 1]);
    }
    prefetch(ahead[j] + first * Element::kBytes, kPairs * kPairLanes * Element::kBytes);
    for (int r = 0; r < kQueryRows; ++r) {
      F32 weight = broadcast(weights[r * stride + j]);
      for (int c = 0; c < 2 * kPairs; ++c) sum[r][c] += weight * x[c];
    }
  }
  for (int r = 0; r < kQueryRows; ++r) {
    for (int c = 0; c < 2 * kPairs; ++c) {
      store(out + r * size + first + c * kLanes, sum[r][c]);
    }
  }
}

template <typename Element, int kQueryRows>
static void direct_values(const float* weights, int64_t stride, const char* const* rows,
                          const char* const* ahead, int64_t count, float* out, int64_t size) {
  constexpr int kPairs = kQueryRows == 1 ? 4 : kSums / (2 * kQueryRows);
  int64_t e = 0;
  for (; e + kPairs * kPairLanes <= size; e += kPairs * kPairLanes) {
    direct_columns<Element, kQueryRows, kPairs>(weights, stride, rows, ahead, count, e, out,
                                                size);
  }
  for (; e < size; e += kPairLanes) {
    direct_columns<Element, kQueryRows, 1>(weights, stride, rows, ahead, count, e, out, size);
  }
}

}  // namespace pages
}  // namespace RAPTAX_ISA
}  // namespace raptax
