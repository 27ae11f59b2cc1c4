// Paged attention: see paged_params.h. Appends new tokens, splits sequences into tasks, and
// merges the partial results of a split sequence (split-KV decoding) in the task that
// finishes last.

#pragma once

#include "api/kernel_table.h"
#include "attention/paged_task.h"
#include "runtime/scratch.h"
#include "runtime/thread_pool.h"

namespace raptax {
namespace RAPTAX_ISA {
namespace pages {

static void append_row(const PagedParams& p, int64_t b, int64_t row) {
  int64_t place = p.place(b, p.lengths[b] + row - p.row_offsets[b]);
  auto copy = [&](const void* from, int64_t size, void* pages, float* scales) {
    for (int64_t k = 0; k < p.K; ++k) {
      int64_t first = (row * p.K + k) * size, token = place + k * p.P;
      char* to = static_cast<char*>(pages) + token * size * bytes_of(p.stored);
      if (scales != nullptr) {
        uint8_t* codes = reinterpret_cast<uint8_t*>(to);
        scales[token] = quantize(p.stored, p.new_type, from, first, size, codes);
        continue;
      }
      Type type = p.stored == PageType::kF32    ? Type::kF32
                  : p.stored == PageType::kBF16 ? Type::kBF16
                                                : Type::kF16;
      if (type == p.new_type) {
        memcpy(to, static_cast<const char*>(from) + first * bytes_of(type),
               static_cast<size_t>(size * bytes_of(type)));
        continue;
      }
      for (int64_t i = 0; i < size; ++i) {
        write_number(type, to, i, read_number(p.new_type, from, first + i));
      }
    }
  };
  copy(p.key, p.D, p.k_pages, p.k_scales);
  copy(p.value, p.E, p.v_pages, p.v_scales);
}

static void append(const PagedParams& p, const ThreadPool& threads) {
  constexpr int64_t kRowsOfPiece = 16;
  auto piece = [&](int64_t number) {
    int64_t row = number * kRowsOfPiece, end = min(row + kRowsOfPiece, p.row_offsets[p.B]);
    int64_t b = 0;
    for (; row < end; ++row) {
      while (p.row_offsets[b + 1] <= row) ++b;
      append_row(p, b, row);
    }
  };
  int64_t pieces = (p.row_offsets[p.B] + kRowsOfPiece - 1) / kRowsOfPiece;
  if (pieces == 1) return piece(0);  // too little work for other threads
  threads.parallel_for(pieces, piece);
}

// Plans the tasks of each sequence; returns their number. Splits need memory for
// partial states, so sequences are split only while these fit `room` floats.
static int64_t plan_tasks(const Call& call, int64_t room, TaskPlan* plans,
                          int64_t* partial_rows) {
  int64_t tasks = 0, query_rows = 0;
  for (int64_t b = 0; b < call.p.B; ++b) {
    TaskPlan& plan = plans[b];
    plan = {tasks, (call.query_rows(b) + kQueryRows - 1) / kQueryRows, 0, query_rows};
    if (plan.chunks == 0) continue;
    int64_t first_key = call.first_key(b, 0), end_key = call.end_key(b, call.query_rows(b) - 1);
    int64_t splits = first_key < end_key ? (end_key - 1) / kSplit - first_key / kSplit + 1 : 0;
    int64_t wanted = splits * call.p.K * call.query_rows(b);
    if (plan.chunks == 1 && splits > 1 && (query_rows + wanted) * call.pitch() <= room) {
      plan.splits = splits;
      query_rows += wanted;
    }
    tasks += plan.chunks * call.p.K * max(1, plan.splits);
  }
  *partial_rows = query_rows;
  return tasks;
}

template <typename Element>
static void run_task(const Call& call, int64_t number) {
  FlushDenormals flush;
#if defined(__AMX_BF16__)
  TileRegisters tiles;
#endif
  const PagedParams& p = call.p;
  int64_t b = 0, end_b = p.B;  // binary search: the sequence of the task
  while (end_b - b > 1) {
    int64_t middle = (b + end_b) / 2;
    (call.plans[middle].first_task <= number ? b : end_b) = middle;
  }
  const TaskPlan& plan = call.plans[b];
  int64_t task = number - plan.first_task;
  if (plan.splits == 0) {
    // The last rows see the most keys, so they go first.
    int64_t k = task % p.K, first_query_row = (plan.chunks - 1 - task / p.K) * kQueryRows;
    int64_t query_rows = min(kQueryRows, call.query_rows(b) - first_query_row);
    Task<Element>(call, b, k, first_query_row, query_rows).run_all();
    return;
  }
  int64_t k = task / plan.splits, split = task % plan.splits, query_rows = call.query_rows(b);
  int64_t first = call.first_key(b, 0), end = call.end_key(b, query_rows - 1);
  int64_t start = (first / kSplit + split) * kSplit;
  float* states = call.partials + (plan.partial + k * plan.splits * query_rows) * call.pitch();
  int64_t step = query_rows * call.pitch();
  Task<Element>(call, b, k, 0, query_rows)
      .run(max(first, start), min(end, start + kSplit), states + split * step);
  // The last task to finish merges the splits, always in the same order.
  if (__atomic_sub_fetch(&call.splits_left[b * p.K + k], 1, __ATOMIC_ACQ_REL) != 0) return;
  Buffer buffer(static_cast<size_t>(3 * call.pitch()) * sizeof(float));
  float* whole = buffer.as<float>();
  for (int64_t r = 0; r < query_rows; ++r) {
    clear(whole, call.Ep);
    for (int64_t s = 0; s < plan.splits; ++s) {
      merge(whole, states + s * step + r * call.pitch(), call.Ep);
    }
    Task<Element>::write(call, b, k, r, query_rows, whole, whole + call.pitch());
  }
}

template <typename Element>
static void attend(const PagedParams& p, const ThreadPool& threads) {
  constexpr int64_t kRoom = 2 << 20;  // floats of partial states
  Buffer plans(static_cast<size_t>(p.B) * sizeof(TaskPlan));
  Call call = {p,
               p.H / p.K,
               round_up(p.D, kPairLanes),
               round_up(p.E, kPairLanes),
               plans.as<TaskPlan>(),
               nullptr,
               nullptr};
  int64_t query_rows = 0;
  int64_t tasks = plan_tasks(call, kRoom, plans.as<TaskPlan>(), &query_rows);
  Buffer partials(static_cast<size_t>(query_rows * call.pitch()) * sizeof(float));
  Buffer splits_left(static_cast<size_t>(p.B * p.K) * sizeof(int32_t));
  call.partials = partials.as<float>();
  call.splits_left = splits_left.as<int32_t>();
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t k = 0; k < p.K; ++k) {
      call.splits_left[b * p.K + k] = static_cast<int32_t>(call.plans[b].splits);
    }
  }
  threads.parallel_for(tasks, [&](int64_t number) { run_task<Element>(call, number); });
}

// Whether the band and the mask program let a query of sequence b see one of the keys
// first .. end - 1.
static bool any_visible(const PagedParams& p, int64_t b, int64_t first, int64_t end) {
  constexpr int64_t kRowsAtOnce = 16;
  Buffer memory(Runner::bytes(*p.mask_program, kBlock));
  Buffer area(kRowsAtOnce * kBlock * sizeof(float));
  float* scores = area.as<float>();
  Runner runner(*p.mask_program, Along::kKeys, kBlock, memory.as<void>());
  for (int64_t h = 0; h < p.H; ++h) {
    runner.begin(b, h);
    for (int64_t key = first; key < end; key += kBlock) {
      int64_t count = min(kBlock, end - key);
      runner.columns(key, count);
      for (int64_t r = 0; r < p.rows(b); r += kRowsAtOnce) {
        int64_t rows = min(kRowsAtOnce, p.rows(b) - r), position = p.first(b) + r;
        for (int64_t i = 0; i < rows * kBlock; ++i) {
          int64_t away = key + i % kBlock - (position + i / kBlock);
          bool inside = -away <= p.band.left && away <= p.band.right;
          scores[i] = inside && i % kBlock < count ? 0.0f : -kInf;
        }
        runner.apply_mask(position, rows, scores, kBlock);
        for (int64_t i = 0; i < rows * kBlock; ++i) {
          if (scores[i] == 0.0f) return true;
        }
      }
    }
  }
  return false;
}

// The flat index of the first table entry without a page that has a visible key, or -1.
// Without a mask program `check` has found them all.
static int64_t first_missing(const PagedParams& p, const ThreadPool& threads) {
  if (p.mask_program == nullptr) return -1;
  Buffer found(static_cast<size_t>(p.B) * sizeof(int64_t));
  int64_t* entries = found.as<int64_t>();
  threads.parallel_for(p.B, [&](int64_t b) {
    entries[b] = -1;
    if (p.rows(b) == 0) return;
    int64_t end = p.end_key(b, p.rows(b) - 1);
    for (int64_t m = p.first_key(b) / p.P; m * p.P < end && entries[b] < 0; ++m) {
      if (p.page_exists(b, m)) continue;
      if (any_visible(p, b, m * p.P, min(end, (m + 1) * p.P))) entries[b] = b * p.M + m;
    }
  });
  for (int64_t b = 0; b < p.B; ++b) {
    if (entries[b] >= 0) return entries[b];
  }
  return -1;
}

static void attend_to_stored(const PagedParams& p, const ThreadPool& threads) {
  switch (p.stored) {
    case PageType::kF32: return attend<Float32>(p, threads);
    case PageType::kBF16: return attend<BFloat16>(p, threads);
    case PageType::kF16: return attend<Float16>(p, threads);
    case PageType::kS8: return attend<Int8>(p, threads);
    case PageType::kE4M3: return attend<E4M3>(p, threads);
    case PageType::kE5M2: return attend<E5M2>(p, threads);
  }
}

static int64_t paged(const PagedParams& p, const ThreadPool& threads) {
  int64_t missing = first_missing(p, threads);
  if (missing >= 0) return missing;
  int64_t row = p.row_offsets[p.B], bytes = p.H * p.E * bytes_of(p.type);
  memset(static_cast<char*>(p.out) + row * bytes, 0, static_cast<size_t>((p.R - row) * bytes));
  for (int64_t i = row * p.H; i < p.R * p.H; ++i) p.lse[i] = -kInf;
  if (row == 0) return -1;
  if (p.key != nullptr) append(p, threads);
  attend_to_stored(p, threads);
  return -1;
}

}  // namespace pages
}  // namespace RAPTAX_ISA
}  // namespace raptax
