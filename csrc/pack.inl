// Keys and values in the order that the float32 products read them.
//
// A block of kKeys keys becomes panels of kPanel keys, each (D, kPanel): transposed. Its
// values become panels of kPanel columns, each (kKeys, kPanel), the last perhaps of
// kLanes columns. What lies beyond the keys or columns that there are is 0.
//
// A key that is not finite, or whose value is not, becomes NaN throughout, so that the
// scores of those who see it are NaN; the value becomes 0, so that nobody else's output
// is. See softmax.py.

#pragma once

#include "numbers.inl"

namespace raptax {
namespace RAPTAX_ISA {

constexpr int64_t kKeys = 256;
constexpr int64_t kPanel = 2 * kLanes;

static inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows of keys or of values as they came.
struct Source {
  Type type;
  const void* data;
  int64_t first;  // the entry where the first row starts
  int64_t size;   // of a row

  F32 load(int64_t row, int64_t column) const {
    return load_some(type, data, first + row * size + column, size - column);
  }
  bool finite(int64_t row) const {
    F32 zero = F32{};
    for (int64_t d = 0; d < size; d += kLanes) zero += load(row, d) * 0.0f;
    return sum_of(zero) == 0;
  }
};

// Returns whether all of them are finite.
static bool pack_keys(const Source& keys, int64_t count, float* packed) {
  F32 zero = F32{};
  for (int64_t s = 0; s < rounded_up(count, kPanel); s += kLanes) {
    float* panel = packed + s / kPanel * kPanel * keys.size + s % kPanel;
    for (int64_t d = 0; d < keys.size; d += kLanes) {
      F32 x[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        x[i] = s + i < count ? keys.load(s + i, d) : F32{};
        zero += x[i] * 0.0f;
      }
      transpose(x);
      int64_t rows = least(kLanes, keys.size - d);
      for (int64_t i = 0; i < rows; ++i) store(panel + (d + i) * kPanel, x[i]);
    }
  }
  return sum_of(zero) == 0;
}

static bool pack_values(const Source& values, int64_t count, float* packed) {
  F32 zero = F32{};
  int64_t columns = rounded_up(values.size, kLanes);
  for (int64_t c = 0; c < columns; c += kPanel) {
    float* panel = packed + c * kKeys;
    int64_t width = least(kPanel, columns - c);
    for (int64_t s = 0; s < rounded_up(count, kPanel); ++s) {
      for (int64_t i = 0; i < width; i += kLanes) {
        F32 x = s < count ? values.load(s, c + i) : F32{};
        zero += x * 0.0f;
        store(panel + s * width + i, x);
      }
    }
  }
  return sum_of(zero) == 0;
}

// Where packed keys and values lie, one entry of one row at a time.
static inline float* key_entry(float* packed, int64_t size, int64_t s, int64_t d) {
  return packed + s / kPanel * kPanel * size + d * kPanel + s % kPanel;
}
static inline float* value_entry(float* packed, int64_t size, int64_t s, int64_t e) {
  int64_t panel = e / kPanel * kPanel;
  int64_t width = least(kPanel, rounded_up(size, kLanes) - panel);
  return packed + panel * kKeys + s * width + e % kPanel;
}

static void pack_block(const Source& keys, const Source& values, int64_t count,
                       float* packed_keys, float* packed_values) {
  bool fine = pack_keys(keys, count, packed_keys);
  fine &= pack_values(values, count, packed_values);
  if (fine) return;
  for (int64_t s = 0; s < count; ++s) {
    bool good = values.finite(s);
    for (int64_t e = 0; e < values.size && !good; ++e) {
      *value_entry(packed_values, values.size, s, e) = 0;
    }
    if (good && keys.finite(s)) continue;
    for (int64_t d = 0; d < keys.size; ++d) {
      *key_entry(packed_keys, keys.size, s, d) = __builtin_nanf("");
    }
  }
}

// Query rows, each `stride` long and 0 beyond its entries. One that is not finite is NaN
// throughout, as its scores are.
static void pack_queries(const Source& queries, int64_t count, float* packed,
                         int64_t stride) {
  for (int64_t t = 0; t < count; ++t) {
    F32 zero = F32{};
    for (int64_t d = 0; d < stride; d += kLanes) {
      F32 x = queries.load(t, d);
      zero += x * 0.0f;
      store(packed + t * stride + d, x);
    }
    if (sum_of(zero) == 0) continue;
    for (int64_t d = 0; d < stride; ++d) packed[t * stride + d] = __builtin_nanf("");
  }
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
