// Attention over keys and values that lie in pages: see paged.h. New rows are appended,
// sequences are cut into tasks, and the splits of one are put together by whoever is last.

#pragma once

#include "kernels.h"
#include "paged_task.inl"

namespace raptax {
namespace RAPTAX_ISA {
namespace pages {

static void append_row(const Paged& p, int64_t b, int64_t row) {
  int64_t place = p.place(b, p.lengths[b] + row - p.row_offsets[b]);
  auto copy = [&](const void* from, int64_t size, void* pages, float* scales) {
    for (int64_t k = 0; k < p.K; ++k) {
      int64_t first = (row * p.K + k) * size, token = place + k * p.P;
      char* to = static_cast<char*>(pages) + token * size * bytes_of(p.stored);
      if (scales != nullptr) {
        uint8_t* codes = reinterpret_cast<uint8_t*>(to);
        scales[token] = quantise(p.stored, p.new_type, from, first, size, codes);
        continue;
      }
      Type type = p.stored == Stored::kF32    ? Type::kF32
                  : p.stored == Stored::kBF16 ? Type::kBF16
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

static void append(const Paged& p, const Parallel& parallel) {
  constexpr int64_t kRowsOfPiece = 16;
  auto piece = [&](int64_t number) {
    int64_t row = number * kRowsOfPiece, end = least(row + kRowsOfPiece, p.row_offsets[p.B]);
    int64_t b = 0;
    for (; row < end; ++row) {
      while (p.row_offsets[b + 1] <= row) ++b;
      append_row(p, b, row);
    }
  };
  int64_t pieces = (p.row_offsets[p.B] + kRowsOfPiece - 1) / kRowsOfPiece;
  if (pieces == 1) return piece(0);  // not worth waking anybody
  parallel.each(pieces, piece);
}

// Fills in `cuts`; returns how many tasks there are. Splits take room for their partial
// states, so only as many sequences are split as fit `room` floats.
static int64_t plan(const Call& call, int64_t room, Cut* cuts, int64_t* partial_lines) {
  int64_t tasks = 0, lines = 0;
  for (int64_t b = 0; b < call.p.B; ++b) {
    Cut& cut = cuts[b];
    cut = {tasks, (call.lines(b) + kLines - 1) / kLines, 0, lines};
    if (cut.chunks == 0) continue;
    int64_t low = call.low(b, 0), high = call.high(b, call.lines(b) - 1);
    int64_t splits = low < high ? (high - 1) / kSplit - low / kSplit + 1 : 0;
    int64_t wanted = splits * call.p.K * call.lines(b);
    if (cut.chunks == 1 && splits > 1 && (lines + wanted) * call.pitch() <= room) {
      cut.splits = splits;
      lines += wanted;
    }
    tasks += cut.chunks * call.p.K * most(1, cut.splits);
  }
  *partial_lines = lines;
  return tasks;
}

template <typename Element>
static void run_task(const Call& call, int64_t number) {
  FlushDenormals flush;
#if defined(__AMX_BF16__)
  TileRegisters tiles;
#endif
  const Paged& p = call.p;
  int64_t low = 0, high = p.B;  // the last sequence whose first task is not later
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    (call.cuts[middle].first_task <= number ? low : high) = middle;
  }
  const Cut& cut = call.cuts[low];
  int64_t b = low, task = number - cut.first_task;
  if (cut.splits == 0) {
    // The last rows see the most keys, so they go first.
    int64_t k = task % p.K, first_line = (cut.chunks - 1 - task / p.K) * kLines;
    int64_t lines = least(kLines, call.lines(b) - first_line);
    Task<Element>(call, b, k, first_line, lines).run_all();
    return;
  }
  int64_t k = task / cut.splits, split = task % cut.splits, lines = call.lines(b);
  int64_t first = call.low(b, 0), end = call.high(b, lines - 1);
  int64_t start = (first / kSplit + split) * kSplit;
  float* states = call.partials + (cut.partial + k * cut.splits * lines) * call.pitch();
  int64_t step = lines * call.pitch();
  Task<Element>(call, b, k, 0, lines)
      .run(most(first, start), least(end, start + kSplit), states + split * step);
  // Whoever is last puts the splits together, always in the same order.
  if (__atomic_sub_fetch(&call.left[b * p.K + k], 1, __ATOMIC_ACQ_REL) != 0) return;
  Buffer buffer(static_cast<size_t>(3 * call.pitch()) * sizeof(float));
  float* whole = buffer.as<float>();
  for (int64_t r = 0; r < lines; ++r) {
    clear(whole, call.Ep);
    for (int64_t s = 0; s < cut.splits; ++s) {
      merge(whole, states + s * step + r * call.pitch(), call.Ep);
    }
    Task<Element>::write(call, b, k, r, lines, whole, whole + call.pitch());
  }
}

template <typename Element>
static void attend(const Paged& p, const Parallel& parallel) {
  constexpr int64_t kRoom = 2 << 20;  // floats of partial states
  Buffer cuts(static_cast<size_t>(p.B) * sizeof(Cut));
  Call call = {p,       p.H / p.K, round_up(p.D, kStep), round_up(p.E, kStep), cuts.as<Cut>(),
               nullptr, nullptr};
  int64_t lines = 0;
  int64_t tasks = plan(call, kRoom, cuts.as<Cut>(), &lines);
  Buffer partials(static_cast<size_t>(lines * call.pitch()) * sizeof(float));
  Buffer left(static_cast<size_t>(p.B * p.K) * sizeof(int32_t));
  call.partials = partials.as<float>();
  call.left = left.as<int32_t>();
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t k = 0; k < p.K; ++k) {
      call.left[b * p.K + k] = static_cast<int32_t>(call.cuts[b].splits);
    }
  }
  parallel.each(tasks, [&](int64_t number) { run_task<Element>(call, number); });
}

// Whether the band and the mask program let a row of sequence b see one of the keys
// first .. end - 1.
static bool any_seen(const Paged& p, int64_t b, int64_t first, int64_t end) {
  constexpr int64_t kRowsAtOnce = 16;
  Buffer memory(Runner::bytes(*p.mask_program, kBlock));
  Buffer area(kRowsAtOnce * kBlock * sizeof(float));
  float* scores = area.as<float>();
  Runner runner(*p.mask_program, Along::kKeys, kBlock, memory.as<void>());
  for (int64_t h = 0; h < p.H; ++h) {
    runner.begin(b, h);
    for (int64_t key = first; key < end; key += kBlock) {
      int64_t count = least(kBlock, end - key);
      runner.columns(key, count);
      for (int64_t r = 0; r < p.rows(b); r += kRowsAtOnce) {
        int64_t rows = least(kRowsAtOnce, p.rows(b) - r), position = p.first(b) + r;
        for (int64_t i = 0; i < rows * kBlock; ++i) {
          int64_t away = key + i % kBlock - (position + i / kBlock);
          bool inside = -away <= p.band.left && away <= p.band.right;
          scores[i] = inside && i % kBlock < count ? 0.0f : -kInf;
        }
        runner.mask(position, rows, scores, kBlock);
        for (int64_t i = 0; i < rows * kBlock; ++i) {
          if (scores[i] == 0.0f) return true;
        }
      }
    }
  }
  return false;
}

// The first entry of the table that names no page and has a key which a row may see, or
// -1. Without a mask program `check` has found them all.
static int64_t first_missing(const Paged& p, const Parallel& parallel) {
  if (p.mask_program == nullptr) return -1;
  Buffer found(static_cast<size_t>(p.B) * sizeof(int64_t));
  int64_t* entries = found.as<int64_t>();
  parallel.each(p.B, [&](int64_t b) {
    entries[b] = -1;
    if (p.rows(b) == 0) return;
    int64_t end = p.end_key(b, p.rows(b) - 1);
    for (int64_t m = p.first_key(b) / p.P; m * p.P < end && entries[b] < 0; ++m) {
      if (p.held(b, m)) continue;
      if (any_seen(p, b, m * p.P, least(end, (m + 1) * p.P))) entries[b] = b * p.M + m;
    }
  });
  for (int64_t b = 0; b < p.B; ++b) {
    if (entries[b] >= 0) return entries[b];
  }
  return -1;
}

static void attend_to_stored(const Paged& p, const Parallel& parallel) {
  switch (p.stored) {
    case Stored::kF32: return attend<Float32>(p, parallel);
    case Stored::kBF16: return attend<BFloat16>(p, parallel);
    case Stored::kF16: return attend<Float16>(p, parallel);
    case Stored::kS8: return attend<Int8>(p, parallel);
    case Stored::kE4M3: return attend<E4M3>(p, parallel);
    case Stored::kE5M2: return attend<E5M2>(p, parallel);
  }
}

static int64_t paged(const Paged& p, const Parallel& parallel) {
  int64_t missing = first_missing(p, parallel);
  if (missing >= 0) return missing;
  int64_t row = p.row_offsets[p.B], bytes = p.H * p.E * bytes_of(p.type);
  memset(static_cast<char*>(p.out) + row * bytes, 0, static_cast<size_t>((p.R - row) * bytes));
  for (int64_t i = row * p.H; i < p.R * p.H; ++i) p.lse[i] = -kInf;
  if (row == 0) return -1;
  if (p.key != nullptr) append(p, parallel);
  attend_to_stored(p, parallel);
  return -1;
}

}  // namespace pages
}  // namespace RAPTAX_ISA
}  // namespace raptax
