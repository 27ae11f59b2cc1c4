// Packs keys and values for the float32 products.
//
// A block of kBlockKeys keys becomes panels of kPanel keys, each transposed to (D,
// kPanel). Its values become panels of kPanel columns, each (kBlockKeys, kPanel); the
// last may have kLanes columns. Padding is 0.
//
// NaN and Inf: a key that is not finite, or whose value is not, becomes NaN throughout,
// so that the scores of every query that sees it are NaN; its value becomes 0, so that
// no other output is affected. See src/raptax/kernels/softmax.py.

#pragma once

#include "simd/convert.h"

namespace raptax {
namespace RAPTAX_ISA {

constexpr int64_t kBlockKeys = 256;
constexpr int64_t kPanel = 2 * kLanes;

// Unpacked rows of keys, values or queries.
struct Source {
  Type type;
  const void* data;
  int64_t first;  // index of the first element
  int64_t size;   // of a row

  F32 load(int64_t row, int64_t column) const {
    return load_some(type, data, first + row * size + column, size - column);
  }
  bool finite(int64_t row) const {
    F32 zero = F32{};
    for (int64_t d = 0; d < size; d += kLanes) zero += load(row, d) * 0.0f;
    return reduce_add(zero) == 0;
  }
};

// Packs float32 numbers, one to a word.
struct F32Pack {
  typedef float Word;

  static int64_t words(int64_t numbers) { return numbers; }
  static int64_t query_words(int64_t D) { return round_up(D, kLanes); }

  // Returns whether all elements are finite.
  static bool keys(const Source& rows, int64_t count, float* packed) {
    F32 zero = F32{};
    for (int64_t s = 0; s < round_up(count, kPanel); s += kLanes) {
      float* panel = packed + s / kPanel * kPanel * rows.size + s % kPanel;
      for (int64_t d = 0; d < rows.size; d += kLanes) {
        F32 x[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          x[i] = s + i < count ? rows.load(s + i, d) : F32{};
          zero += x[i] * 0.0f;
        }
        transpose(x);
        int64_t used = min(kLanes, rows.size - d);
        for (int64_t i = 0; i < used; ++i) store(panel + (d + i) * kPanel, x[i]);
      }
    }
    return reduce_add(zero) == 0;
  }

  static bool values(const Source& rows, int64_t count, float* packed) {
    F32 zero = F32{};
    int64_t columns = round_up(rows.size, kLanes);
    for (int64_t c = 0; c < columns; c += kPanel) {
      float* panel = packed + c * kBlockKeys;
      int64_t width = min(kPanel, columns - c);
      for (int64_t s = 0; s < round_up(count, kPanel); ++s) {
        for (int64_t i = 0; i < width; i += kLanes) {
          F32 x = s < count ? rows.load(s, c + i) : F32{};
          zero += x * 0.0f;
          store(panel + s * width + i, x);
        }
      }
    }
    return reduce_add(zero) == 0;
  }

  // Addresses of single elements of packed keys and values.
  static float* key_entry(float* packed, int64_t size, int64_t s, int64_t d) {
    return packed + s / kPanel * kPanel * size + d * kPanel + s % kPanel;
  }
  static float* value_entry(float* packed, int64_t size, int64_t s, int64_t e) {
    int64_t panel = e / kPanel * kPanel;
    int64_t width = min(kPanel, round_up(size, kLanes) - panel);
    return packed + panel * kBlockKeys + s * width + e % kPanel;
  }
  static float nan() { return __builtin_nanf(""); }

  // Packs query rows, zero-padded to `stride`. A row that is not finite becomes NaN
  // throughout, as its scores are.
  static void queries(const Source& rows, int64_t count, float* packed, int64_t stride) {
    for (int64_t t = 0; t < count; ++t) {
      F32 zero = F32{};
      for (int64_t d = 0; d < stride; d += kLanes) {
        F32 x = rows.load(t, d);
        zero += x * 0.0f;
        store(packed + t * stride + d, x);
      }
      if (reduce_add(zero) == 0) continue;
      for (int64_t d = 0; d < stride; ++d) packed[t * stride + d] = __builtin_nanf("");
    }
  }

  // Weights of a row, which are multiplied as they are.
  static Word* weights(float* scores, int64_t, int64_t) { return scores; }
};

template <typename Pack>
static void pack_block(const Source& keys, const Source& values, int64_t count,
                       typename Pack::Word* packed_keys, typename Pack::Word* packed_values) {
  bool all_finite = Pack::keys(keys, count, packed_keys);
  all_finite &= Pack::values(values, count, packed_values);
  if (all_finite) return;
  for (int64_t s = 0; s < count; ++s) {
    bool finite_value = values.finite(s);
    for (int64_t e = 0; e < values.size && !finite_value; ++e) {
      *Pack::value_entry(packed_values, values.size, s, e) = 0;
    }
    if (finite_value && keys.finite(s)) continue;
    for (int64_t d = 0; d < keys.size; ++d) {
      *Pack::key_entry(packed_keys, keys.size, s, d) = Pack::nan();
    }
  }
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
