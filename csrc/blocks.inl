// Which blocks of keys a tile of queries has to visit.

#pragma once

#include "rules.inl"

namespace raptax {
namespace RAPTAX_ISA {

constexpr int64_t kQueries = 128;
constexpr int64_t kPackedBytes = int64_t{26} << 20;  // keys and values, of all kv heads

// Blocks first <= j < last of keys.
struct Blocks {
  int64_t first, last;
  int64_t count() const { return last > first ? last - first : 0; }
};

// The blocks that hold a key which some query of rows t .. t + rows - 1 may see.
static Blocks blocks_seen(const Forward& f, int64_t b, int64_t t, int64_t rows) {
  int64_t first = f.rules.first(b) + t, last = first + rows - 1;
  int64_t low = most(0, first - f.rules.band.left);
  int64_t high = least(f.shape.S - 1, last + f.rules.band.right);
  if (high < low) return {0, 0};
  return {low / kKeys, high / kKeys + 1};
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
