// Visible blocks: the range of key blocks that the band lets a tile of queries see.

#pragma once

#include "attention/score_stage.h"

namespace raptax {
namespace RAPTAX_ISA {

constexpr int64_t kTaskQueries = 128;
constexpr int64_t kPackedBytes = int64_t{26} << 20;  // keys and values, of all kv heads

// Blocks first <= j < last of keys.
struct BlockRange {
  int64_t first, last;
  int64_t count() const { return last > first ? last - first : 0; }
};

// The blocks with a key that the band lets a query of rows t .. t + rows - 1 see.
static BlockRange visible_blocks(const ForwardParams& f, int64_t b, int64_t t, int64_t rows) {
  int64_t first = f.score_params.first(b) + t, last = first + rows - 1;
  int64_t low = max(0, first - f.score_params.band.left);
  int64_t high = min(f.shape.S - 1, last + f.score_params.band.right);
  if (high < low) return {0, 0};
  return {low / kBlockKeys, high / kBlockKeys + 1};
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
