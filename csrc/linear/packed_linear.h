// y = x W^T for packed weights: rows of x are prepared once, then each task multiplies
// them with a few tiles of one weight.
#pragma once

#include "gemm/packed_dot.h"
#include "runtime/scratch.h"
#include "runtime/thread_pool.h"

namespace raptax {
namespace RAPTAX_ISA {

// Rows of x that a task takes: 256 rows of 2,048 int8 numbers fill half of a level-2 cache.
constexpr int64_t kTaskRows = 256;
// Bytes of codes that are worth a task of their own for a single row: a microsecond or two
// of reading.
constexpr int64_t kTaskBytes = 32 << 10;
// The same for more rows, in multiplications.
constexpr int64_t kTaskWork = 1 << 20;

// Row m of x as float32, with its sums.
static void float_row(const PackedLinearParams& p, int64_t m, float* x, float* sums) {
  for (int64_t c = 0; c < p.C; c += kLanes) {
    store(x + c, load_some(p.type, p.x, m * p.C + c, p.C - c));
  }
  for (int64_t n = 0; n < p.C / kSumInputs; ++n) {
    float sum = 0;
    for (int64_t i = 0; i < kSumInputs; ++i) sum += x[n * kSumInputs + i];
    sums[n] = sum;
  }
}

// Rows that are multiplied together: kRowsAtOnce, then a four, then single ones.
struct Block {
  int64_t first, count;
};
static Block block_of(int64_t m, int64_t M) {
  int64_t whole = round_down(M, kRowsAtOnce), fours = round_down(M, 4);
  if (m < whole) return {round_down(m, kRowsAtOnce), kRowsAtOnce};
  return m < fours ? Block{whole, 4} : Block{m, 1};
}

// Row m of x rounded to int8: 32 inputs share the scale max |x| / 127. What is not finite
// makes a scale, and with it the row's outputs, NaN.
static void int8_row(const PackedLinearParams& p, int64_t m, const Int8Rows& rows) {
  Block block = block_of(m, p.M);
  int64_t own = m - block.first;
  for (int64_t n = 0; n < p.C / kRoundInputs; ++n) {
    float some[kRoundInputs];
    F32 high{};
    I32 finite = broadcast(int32_t{-1});
    for (int64_t i = 0; i < kRoundInputs; i += kLanes) {
      F32 v = load_as(p.type, p.x, m * p.C + n * kRoundInputs + i);
      store(some + i, v);
      F32 size = as_float(as_bits(v) & 0x7fffffff);
      high = max(size, high);
      finite &= size < broadcast(kInf);
    }
    bool whole = true;
    for (int i = 0; i < kLanes; ++i) whole &= finite[i] != 0;
    float most = reduce_max(high);
    float scale = whole ? most / 127.0f : __builtin_nanf("");
    float inverse = whole && most > 0 ? 127.0f / most : 0.0f;
    uint8_t* to = rows.block(block.first, block.count, n);
    float* scales = Int8Rows::scales(to, block.count) + own;
    float sums[kRoundInputs / kSumInputs];
    for (int64_t half = 0; half < kRoundInputs / kSumInputs; ++half) {
      I32 sum{};
      for (int64_t i = half * kSumInputs; i < (half + 1) * kSumInputs; i += kLanes) {
        // 1.5 * 2^23: rounds to even, and leaves the integer in the low bits.
        F32 shifted = load(some + i) * broadcast(inverse) + 12582912.0f;
        I32 q = whole ? as_bits(shifted) - 0x4b400000 : I32{};
        sum += q;
        S8 bytes = __builtin_convertvector(q, S8);
        memcpy(to + own * kRoundInputs + i, &bytes, sizeof bytes);
      }
      int32_t all = 0;
      for (int i = 0; i < kLanes; ++i) all += sum[i];
      sums[half] = static_cast<float>(all);
    }
    scales[0] = scale;
    scales[block.count] = scale * (sums[0] + sums[1]);
    scales[2 * block.count] = scale * sums[0];
    scales[3 * block.count] = scale * sums[1];
  }
}

// Products of rows first .. end - 1 with one strip, stored to column `column` of y.
template <typename Codes, int64_t kGroup, typename Rows>
static void strip_rows(const PackedLinearParams& p, const PackedWeight& w, const Codes& codes,
                       const PackedStrip& strip, const Rows& rows, int64_t first, int64_t end,
                       int64_t column, int64_t count) {
  F32 out[kRowsAtOnce];
  for (int64_t m = first; m < end;) {
    int64_t rows_here = block_of(m, p.M).count;
    if (rows_here == kRowsAtOnce) {
      strip_product<Codes, kGroup, kRowsAtOnce>(w, codes, strip, rows, m, out);
    } else if (rows_here == 4) {
      strip_product<Codes, kGroup, 4>(w, codes, strip, rows, m, out);
    } else {
      strip_product<Codes, kGroup, 1>(w, codes, strip, rows, m, out);
    }
    for (int64_t i = 0; i < rows_here; ++i, ++m) {
      store_some(p.type, p.y, m * p.O + column, out[i], count);
    }
  }
}

template <typename Codes, typename Rows>
static void tile_rows(const PackedLinearParams& p, const PackedWeight& w, int64_t column,
                      const Rows& rows, int64_t tile, int64_t first, int64_t end) {
  Codes codes(w);
  for (int64_t row = 0; row < kTileRows && tile * kTileRows + row < w.O; row += kLanes) {
    PackedStrip strip(w, tile, row);
    int64_t at = tile * kTileRows + row;
    auto product = w.group == 16 ? strip_rows<Codes, 16, Rows> : strip_rows<Codes, 32, Rows>;
    product(p, w, codes, strip, rows, first, end, column + at, w.O - at);
  }
}

// Every product, shared out among the threads.
template <typename Rows>
static void all_tiles(const PackedLinearParams& p, const Rows& rows, const ThreadPool& pool) {
  struct Part {
    int64_t column, per_task, first_task;
  } parts[kMaxParts];
  int64_t tasks = 0, column = 0, height = min(p.M, kTaskRows);
  for (int64_t n = 0; n < p.count; ++n) {
    const PackedWeight& w = p.parts[n];
    int64_t by_bytes = kTaskBytes / w.code_bytes();
    int64_t by_work = kTaskWork / (kTileRows * w.C * height);
    int64_t per_task = max(1, min(by_bytes, by_work));
    parts[n] = {column, per_task, tasks};
    tasks += (w.tiles + per_task - 1) / per_task;
    column += w.O;
  }
  int64_t heights = (p.M + height - 1) / height;
  auto task = [&](int64_t index) {
    int64_t first = index / tasks * height, end = min(first + height, p.M);
    int64_t number = index % tasks, n = 0;
    while (n + 1 < p.count && number >= parts[n + 1].first_task) ++n;
    const PackedWeight& w = p.parts[n];
    int64_t from = (number - parts[n].first_task) * parts[n].per_task;
    for (int64_t tile = from; tile < min(from + parts[n].per_task, w.tiles); ++tile) {
      auto multiply = w.bits == 4 ? tile_rows<Codes4, Rows> : tile_rows<Codes8, Rows>;
      multiply(p, w, parts[n].column, rows, tile, first, end);
    }
  };
  pool.parallel_for(tasks * heights, task);
}

static void packed_linear(const PackedLinearParams& p, const ThreadPool& pool) {
  size_t numbers = p.M * p.C, sums = p.M * (p.C / kSumInputs);
  // Few rows are prepared faster than a thread is woken.
  auto prepare = [&](auto row) {
    int64_t some = max(1, (int64_t{1} << 15) / max(p.C, 1));
    pool.parallel_for((p.M + some - 1) / some, [&](int64_t n) {
      for (int64_t m = n * some; m < min((n + 1) * some, p.M); ++m) row(m);
    });
  };
  if (p.int8) {
    Buffer memory(numbers / kRoundInputs * Int8Rows::kRowBytes);
    Int8Rows rows{memory.as<uint8_t>(), p.C};
    prepare([&](int64_t m) { int8_row(p, m, rows); });
    all_tiles(p, rows, pool);
    return;
  }
  Buffer x_memory(4 * numbers), sum_memory(4 * sums);
  float* x = x_memory.as<float>();
  float* to = sum_memory.as<float>();
  prepare([&](int64_t m) { float_row(p, m, x + m * p.C, to + m * (p.C / kSumInputs)); });
  all_tiles(p, FloatRows{x, to, p.C}, pool);
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
