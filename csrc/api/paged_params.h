// Parameters of paged attention. Semantics: src/raptax/kernels/paged/; axis letters:
// src/raptax/_core/types.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "api/attention_params.h"
#include "api/inline.h"

namespace raptax {

// Element types of pages. The last three have a float32 scale per token and kv head.
enum class PageType : int32_t { kF32, kBF16, kF16, kS8, kE4M3, kE5M2 };

RAPTAX_API_INLINE int64_t bytes_of(PageType stored) {
  if (stored == PageType::kF32) return 4;
  return stored == PageType::kBF16 || stored == PageType::kF16 ? 2 : 1;
}

struct PagedParams {
  int64_t R, B;     // packed query tokens of all sequences; sequences
  int64_t H, K;     // query heads, key/value heads; H % K == 0
  int64_t D, E;     // head sizes of keys and of values
  int64_t L, N, P;  // layers, pages in the pool, tokens per page
  int64_t M;        // pages per sequence

  Type type;          // of query and out
  const void* query;  // (R, H, D)
  void* out;          // (R, H, E)
  float* lse;         // (R, H), natural logarithm, sinks included; -inf for an empty row

  // What to append; null if there is nothing.
  Type new_type;
  const void* key = nullptr;    // (R, K, D)
  const void* value = nullptr;  // (R, K, E)

  PageType stored;
  void* k_pages;              // (L, N, K, P, D)
  void* v_pages;              // (L, N, K, P, E)
  float* k_scales = nullptr;  // (L, N, K, P); null where pages hold plain numbers
  float* v_scales = nullptr;

  const int32_t* table;        // (B, M)
  const int32_t* lengths;      // (B): keys held before the new rows, if any, are appended
  const int32_t* row_offsets;  // (B + 1)
  int64_t layer;

  float scale = 1;
  const float* sinks = nullptr;  // (H): scores of one more key, whose value is 0
  Band band;
  const Program* mask_program = nullptr;
  const Program* score_program = nullptr;

  RAPTAX_API_INLINE int64_t rows(int64_t b) const {
    return row_offsets[b + 1] - row_offsets[b];
  }
  // Keys of sequence b, the appended ones included.
  RAPTAX_API_INLINE int64_t keys(int64_t b) const {
    return lengths[b] + (key != nullptr ? rows(b) : 0);
  }
  // Absolute position of its first row.
  RAPTAX_API_INLINE int64_t first(int64_t b) const { return keys(b) - rows(b); }
  // The first key that any of its rows may see.
  RAPTAX_API_INLINE int64_t first_key(int64_t b) const {
    int64_t low = first(b) - band.left;
    return low < 0 ? 0 : low;
  }
  // One past the last key that its rows up to `row` may see.
  RAPTAX_API_INLINE int64_t end_key(int64_t b, int64_t row) const {
    int64_t high = first(b) + row + band.right + 1;
    return high < keys(b) ? high : keys(b);
  }
  // Whether entry m of the table of sequence b names a page of the pool.
  RAPTAX_API_INLINE bool page_exists(int64_t b, int64_t m) const {
    return table[b * M + m] >= 0 && table[b * M + m] < N;
  }
  // Where token `position` of sequence b lies, counted in tokens of the pool, for kv
  // head 0; that of head k lies k * P further.
  RAPTAX_API_INLINE int64_t place(int64_t b, int64_t position) const {
    int64_t page = table[b * M + position / P];
    return (layer * N + page) * K * P + position % P;
  }
};

// Checks that every page to be written, and every page the band lets a query read,
// exists. Reads only the table, the lengths and the offsets. If not, `message` says
// what is wrong. Pages that only the mask program can rule out are left to the kernel,
// which evaluates it.
bool check(const PagedParams& problem, char* message, size_t size);

// Describes the missing page of `entry`, a flat index into the table, in `message`.
void describe_missing_page(const PagedParams& problem, int64_t entry, char* message,
                           size_t size);

}  // namespace raptax
