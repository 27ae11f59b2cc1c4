// What the tasks of one call of paged attention share: constants, the plan of each
// sequence, blocks of keys, and partial states with their merge.

#pragma once

#include "gemm/dot_direct.h"
#include "gemm/paged_amx.h"

namespace raptax {
namespace RAPTAX_ISA {
namespace pages {

constexpr int64_t kSplit = 1024, kBlock = 128;
constexpr int64_t kQueryRows = 128;       // of a task
constexpr int64_t kDirectRows = 8;        // up to here packing the keys does not pay
constexpr int64_t kPointerMultiple = 16;  // row pointers are padded to a multiple of it

// -------------------------------------------------------------------- online softmax
// State of a query row: E weighted sums of values, padded, then these three.
enum { kRowMax = 0, kRowSum = 1, kPoison = 2, kStateTail = 16 };

static void clear(float* state, int64_t size) {
  memset(state, 0, static_cast<size_t>(size + kStateTail) * sizeof(float));
  state[size + kRowMax] = -kInf;
}

// Merges two partial states into `into`. An empty state is the identity.
__attribute__((noinline)) static void merge(float* into, const float* from, int64_t size) {
  into[size + kPoison] += from[size + kPoison];
  float a = into[size + kRowMax], b = from[size + kRowMax];
  float row_max = a > b ? a : b;
  if (row_max == -kInf) return;
  a = exp_difference(a, row_max), b = exp_difference(b, row_max);
  F32 va = broadcast(a), vb = broadcast(b);
  for (int64_t e = 0; e < size; e += kLanes) {
    store(into + e, load(into + e) * va + load(from + e) * vb);
  }
  into[size + kRowSum] = into[size + kRowSum] * a + from[size + kRowSum] * b;
  into[size + kRowMax] = row_max;
}

// ------------------------------------------------------------------------- one call

// How a sequence is split into tasks.
struct TaskPlan {
  int64_t first_task;
  int64_t chunks;   // of query rows
  int64_t splits;   // of keys, each a task of its own; 0 if tasks take all their keys
  int64_t partial;  // first of its partial states
};

struct Call {
  const PagedParams& p;
  int64_t G, Dp, Ep;  // heads of a group; padded head sizes
  const TaskPlan* plans;
  float* partials;
  int32_t* splits_left;  // (B, K): splits that are not done

  int64_t query_rows(int64_t b) const { return p.rows(b) * G; }
  int64_t pitch() const { return Ep + kStateTail; }
  // Range of keys visible to some query rows.
  int64_t first_key(int64_t b, int64_t query_row) const {
    return max(0, p.first(b) + query_row / G - p.band.left);
  }
  int64_t end_key(int64_t b, int64_t last_query_row) const {
    return p.end_key(b, last_query_row / G);
  }
};

// Keys first .. first + count - 1 of one sequence and kv head.
struct Block {
  int64_t first = 0, count = 0;
  bool missing = false;  // no page holds any of them: all are masked
  const char* keys[kBlock];
  const char* values[kBlock];
  const char* keys_ahead[kBlock];  // the rows kAhead bytes later, to prefetch
  const char* values_ahead[kBlock];
  float key_scales[kBlock], value_scales[kBlock];
};

}  // namespace pages
}  // namespace RAPTAX_ISA
}  // namespace raptax
