// bfloat16 products on AMX tiles of 16 rows of 64 bytes. Tiles hold 16 query rows, so
// that a single one is still bound by memory, not by the product.

#pragma once

#include "simd/page_elements.h"
#include "simd/paged_vec.h"

namespace raptax {
namespace RAPTAX_ISA {
namespace pages {

#if defined(__AMX_BF16__)
constexpr bool kHasAmx = true;
#else
constexpr bool kHasAmx = false;
#endif
constexpr int64_t kTile = 16;  // rows of a tile, and its dwords in a row

#if defined(__AMX_BF16__)
// Configures all tile registers at full size while it is alive.
class TileRegisters {
 public:
  TileRegisters() {
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; ++i) {
      config[16 + 2 * i] = 64;
      config[48 + i] = 16;
    }
    _tile_loadconfig(config);
  }
  ~TileRegisters() { _tile_release(); }
};

// Rows in bfloat16: 32 elements a step, in order.
template <typename Element>
static inline __m512i read_bfloat16(const char* row, int64_t i) {
  if constexpr (Element::kInterleaved) {
    return read<__m512i>(row + 2 * i);
  } else {
    F32 a, b;
    Element::pair(row, i, a, b);
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  }
}

// 16 rows of keys, `stride` bytes apart.
struct KeyTile {
  const char* base;
  int64_t stride;
};

// scores[r, 16 g + j] = query row r . key j of group g, for 4 groups. `query` holds
// `chunks` tiles of pairs along D: dword (i, r) is elements 2 i, 2 i + 1 of query row
// r.
static inline void tile_scores(const char* query, int64_t chunks, const KeyTile* keys,
                               float* scores, int64_t stride, int64_t query_rows) {
  alignas(64) float products[4][kTile][kTile];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t c = 0; c < chunks; ++c) {
    _tile_loadd(4, query + c * 1024, 64);
    _tile_loadd(5, keys[0].base + 64 * c, keys[0].stride);
    _tile_dpbf16ps(0, 5, 4);
    _tile_loadd(6, keys[1].base + 64 * c, keys[1].stride);
    _tile_dpbf16ps(1, 6, 4);
    _tile_loadd(7, keys[2].base + 64 * c, keys[2].stride);
    _tile_dpbf16ps(2, 7, 4);
    _tile_loadd(5, keys[3].base + 64 * c, keys[3].stride);
    _tile_dpbf16ps(3, 5, 4);
  }
  _tile_stored(0, products[0], 64);
  _tile_stored(1, products[1], 64);
  _tile_stored(2, products[2], 64);
  _tile_stored(3, products[3], 64);
  for (int g = 0; g < 4; ++g) {
    F32 x[kTile];
    for (int64_t j = 0; j < kTile; ++j) x[j] = load(products[g][j]);
    transpose(x);
    for (int64_t r = 0; r < kTile; ++r) {
      if (r < query_rows) store(scores + r * stride + g * kTile, x[r]);
    }
  }
}

// Packs the values of 32 keys as tiles of pairs along the keys, 16 columns each.
// Columns are permuted within 32 by the cheapest shuffle: see restore_columns.
template <typename Element>
static inline void pack_values(const char* const* rows, const char* const* ahead, int64_t size,
                               char* packed) {
  for (int64_t i = 0; i < kTile; ++i) {
    for (int64_t e = 0; e < size; e += 32) {
      __m512i a = read_bfloat16<Element>(rows[2 * i], e);
      __m512i b = read_bfloat16<Element>(rows[2 * i + 1], e);
      char* to = packed + e / 16 * 1024 + i * 64;
      __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
      memcpy(to, &low, 64);
      memcpy(to + 1024, &high, 64);
    }
    for (int64_t at = 0; at < size * Element::kBytes; at += 64) {
      __builtin_prefetch(ahead[2 * i] + at, 0, 2);
      __builtin_prefetch(ahead[2 * i + 1] + at, 0, 2);
    }
  }
}

// out[r, e] = sum over `steps` * 32 keys of weights[r] times packed values, 16 query
// rows.
static inline void tile_values(const uint16_t* weights, int64_t weight_stride,
                               const char* packed, int64_t step_bytes, int64_t steps,
                               int64_t size, float* out) {
  for (int64_t e = 0; e < size; e += 64) {
    bool whole = e + 32 < size;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps; ++s) {
      const char* tiles = packed + s * step_bytes + e / 16 * 1024;
      _tile_loadd(4, weights + 32 * s, 2 * weight_stride);
      _tile_loadd(5, tiles, 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, tiles + 1024, 64);
      _tile_dpbf16ps(1, 4, 6);
      if (!whole) continue;
      _tile_loadd(7, tiles + 2048, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, tiles + 3072, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, out + e, 4 * size);
    _tile_stored(1, out + e + 16, 4 * size);
    if (!whole) continue;
    _tile_stored(2, out + e + 32, 4 * size);
    _tile_stored(3, out + e + 48, 4 * size);
  }
}
#endif

// Undoes the permutation of columns that `pack_values` makes, 32 at a time.
static inline void restore_columns(const float* from, int64_t size, float* to) {
  for (int64_t e = 0; e < size; e += 32) {
    for (int64_t i = 0; i < 32; i += 4) {
      memcpy(to + e + i, from + e + (i & 4) * 4 + i / 8 * 4, 4 * sizeof(float));
    }
  }
}

}  // namespace pages
}  // namespace RAPTAX_ISA
}  // namespace raptax
