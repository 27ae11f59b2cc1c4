// Few query rows: keys and values are converted in registers, straight from their pages.
// Decoding is bound by memory, so each row is read once, for up to four lines at a time.

#pragma once

#include "stored.inl"
#include "vectors.inl"

namespace raptax {
namespace RAPTAX_ISA {
namespace pages {

constexpr int kSums = RAPTAX_LANES == 16 ? 16 : 8;  // accumulators that fit in registers

// Asks for a row that is needed soon. Just far enough ahead for memory to answer: further
// ahead, the requests stand in the way of the hardware's own.
constexpr int64_t kAhead = 2048;  // bytes
static inline void prefetch(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 3);
}

// scores[r, j] = lines[r] . rows[j], for kLines lines and `count` rows, a multiple of 16.
// Asks for the rows `ahead`, which are needed soon, on the way.
template <typename Element, int kLines>
static void few_scores(const float* lines, int64_t size, const char* const* rows,
                       const char* const* ahead, int64_t count, float* scores,
                       int64_t stride) {
  constexpr int kKeys = kSums / kLines;
  for (int64_t j = 0; j < count; j += kKeys) {
    F32 sum[kSums] = {};
    for (int64_t d = 0; d < size; d += kStep) {
      F32 a[kKeys], b[kKeys];
      for (int c = 0; c < kKeys; ++c) Element::pair(rows[j + c], d, a[c], b[c]);
      for (int r = 0; r < kLines; ++r) {
        F32 qa = load(lines + r * size + d), qb = load(lines + r * size + d + kLanes);
        for (int c = 0; c < kKeys; ++c) {
          sum[r * kKeys + c] += qa * a[c];
          sum[r * kKeys + c] += qb * b[c];
        }
      }
    }
    for (int c = 0; c < kKeys; ++c) prefetch(ahead[j + c], size * Element::kBytes);
    float total[kSums];
    for (int i = 0; i < kSums; i += kLanes) store(total + i, sums(sum + i));
    for (int r = 0; r < kLines; ++r) {
      memcpy(scores + r * stride + j, total + r * kKeys, kKeys * sizeof(float));
    }
  }
}

// out[r, e] = sum over j < count of weights[r, j] * rows[j, e], for kLines lines and
// kPairs * kStep columns from `first` on.
template <typename Element, int kLines, int kPairs>
static void few_columns(const float* weights, int64_t stride, const char* const* rows,
                        const char* const* ahead, int64_t count, int64_t first, float* out,
                        int64_t size) {
  F32 sum[kLines][2 * kPairs] = {};
  for (int64_t j = 0; j < count; ++j) {
    F32 x[2 * kPairs];
    for (int c = 0; c < kPairs; ++c) {
      Element::pair(rows[j], first + c * kStep, x[2 * c], x[2 * c + 1]);
    }
    prefetch(ahead[j] + first * Element::kBytes, kPairs * kStep * Element::kBytes);
    for (int r = 0; r < kLines; ++r) {
      F32 weight = all(weights[r * stride + j]);
      for (int c = 0; c < 2 * kPairs; ++c) sum[r][c] += weight * x[c];
    }
  }
  for (int r = 0; r < kLines; ++r) {
    for (int c = 0; c < 2 * kPairs; ++c) {
      store(out + r * size + first + c * kLanes, sum[r][c]);
    }
  }
}

template <typename Element, int kLines>
static void few_values(const float* weights, int64_t stride, const char* const* rows,
                       const char* const* ahead, int64_t count, float* out, int64_t size) {
  constexpr int kPairs = kLines == 1 ? 4 : kSums / (2 * kLines);
  int64_t e = 0;
  for (; e + kPairs * kStep <= size; e += kPairs * kStep) {
    few_columns<Element, kLines, kPairs>(weights, stride, rows, ahead, count, e, out, size);
  }
  for (; e < size; e += kStep) {
    few_columns<Element, kLines, 1>(weights, stride, rows, ahead, count, e, out, size);
  }
}

}  // namespace pages
}  // namespace RAPTAX_ISA
}  // namespace raptax
