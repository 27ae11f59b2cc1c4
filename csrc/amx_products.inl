// Products of tiles, handed out in small steps so that they can run beside other work:
// the tile unit computes while the vector units do something else.

#pragma once

#include "amx_pack.inl"

namespace raptax {
namespace RAPTAX_ISA {

constexpr int64_t kTileBytes = 1024;

// Tile registers 0-3 hold sums, 4 and 5 the left, 6 and 7 the right operands.
class TileUnit {
 public:
  TileUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) shape.bytes[i] = 64, shape.rows[i] = 16;
    asm volatile("" : : "r"(&shape) : "memory");  // see TileQueue::step
    _tile_loadconfig(&shape);
  }
  ~TileUnit() { _tile_release(); }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};

// c (+)= a b, 32 rows and 32 columns of it.
struct TileProduct {
  const char* a;     // tiles of rows 0-15, one for each step
  int64_t a_second;  // bytes from there to rows 16-31
  const char* b;     // likewise of columns 0-15
  int64_t b_second;
  int64_t steps;
  float* c;
  int64_t c_stride;  // in bytes
  bool add;
};

class TileQueue {
 public:
  explicit TileQueue(TileProduct* products) : products_(products) {}

  void clear() { size_ = at_ = step_ = 0, steps_ = 0; }
  void push(const TileProduct& product) {
    products_[size_++] = product;
    steps_ += product.steps;
  }
  int64_t steps() const { return steps_; }

  // Runs up to `count` of the steps that are left.
  void advance(int64_t count) {
    for (; count > 0 && at_ < size_; --count) step();
  }

 private:
  void step() {
    // The intrinsics do not tell GCC 12 that they read memory.
    asm volatile("" ::: "memory");
    const TileProduct& p = products_[at_];
    char* c = reinterpret_cast<char*>(p.c);
    char* below = c + 16 * p.c_stride;
    if (step_ == 0) {
      if (p.add) {
        _tile_loadd(0, c, p.c_stride);
        _tile_loadd(1, c + 64, p.c_stride);
        _tile_loadd(2, below, p.c_stride);
        _tile_loadd(3, below + 64, p.c_stride);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
    }
    const char* a = p.a + step_ * kTileBytes;
    const char* b = p.b + step_ * kTileBytes;
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_loadd(7, b + p.b_second, 64);
    _tile_loadd(5, a + p.a_second, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    if (++step_ == p.steps) {
      _tile_stored(0, c, p.c_stride);
      _tile_stored(1, c + 64, p.c_stride);
      _tile_stored(2, below, p.c_stride);
      _tile_stored(3, below + 64, p.c_stride);
      step_ = 0;
      ++at_;
    }
    asm volatile("" ::: "memory");
  }

  TileProduct* products_;
  int64_t size_ = 0, at_ = 0, step_ = 0, steps_ = 0;
};

}  // namespace RAPTAX_ISA
}  // namespace raptax
