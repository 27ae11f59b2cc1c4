// Products of tiles, handed out in small steps so that they can run beside other work:
// the tile unit computes while the vector units do something else. Numbers have kParts
// parts: see amx_pack.inl.

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

// Products in the order they were pushed. One step of a product, that is 32 numbers of a
// row times 32 of a column, is kPhases turns: so little is begun at once that the vector
// work between two turns need not wait for the first to end.
template <int kParts>
class TileQueue {
 public:
  static constexpr int kPhases = kParts == 3 ? 6 : 2;

  explicit TileQueue(TileProduct* products) : products_(products) {}

  void clear() { size_ = at_ = step_ = phase_ = 0, turns_ = 0; }
  void push(const TileProduct& product) {
    products_[size_++] = product;
    turns_ += product.steps * kPhases;
  }
  int64_t turns() const { return turns_; }  // of all that was pushed

  void turn() {
    if (at_ == size_) return;
    // The intrinsics do not tell GCC 12 that they read memory.
    asm volatile("" ::: "memory");
    const TileProduct& p = products_[at_];
    if (step_ == 0 && phase_ == 0) begin(p);
    int64_t offset = step_ * kParts * kTileBytes;
    multiply(p, p.a + offset, p.b + offset);
    if (++phase_ == kPhases) {
      phase_ = 0;
      if (++step_ == p.steps) end(p);
    }
    asm volatile("" ::: "memory");
  }
  void finish() {
    while (at_ < size_) turn();
  }

 private:
  void begin(const TileProduct& p) {
    if (!p.add) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      return;
    }
    char* c = reinterpret_cast<char*>(p.c);
    char* below = c + 16 * p.c_stride;
    _tile_loadd(0, c, p.c_stride);
    _tile_loadd(1, c + 64, p.c_stride);
    _tile_loadd(2, below, p.c_stride);
    _tile_loadd(3, below + 64, p.c_stride);
  }
  void end(const TileProduct& p) {
    char* c = reinterpret_cast<char*>(p.c);
    char* below = c + 16 * p.c_stride;
    _tile_stored(0, c, p.c_stride);
    _tile_stored(1, c + 64, p.c_stride);
    _tile_stored(2, below, p.c_stride);
    _tile_stored(3, below + 64, p.c_stride);
    step_ = 0;
    ++at_;
  }

  // Six of the nine products of parts, the small ones first; what the others add is less
  // than what is lost when sums are rounded to float32.
  void multiply(const TileProduct& p, const char* a, const char* b) {
    if (kParts == 3) {
      switch (phase_) {
        case 0:
          right(b, p.b_second);
          left(a + 2 * kTileBytes, p.a_second);
          break;
        case 1: left(a + kTileBytes, p.a_second); break;
        case 2: right(b + kTileBytes, p.b_second); break;
        case 3: left(a, p.a_second); break;
        case 4: right(b + 2 * kTileBytes, p.b_second); break;
        default: right(b, p.b_second);
      }
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      return;
    }
    if (phase_ == 0) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + p.b_second, 64);
      _tile_dpbf16ps(1, 4, 7);
    } else {
      _tile_loadd(5, a + p.a_second, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  static void left(const char* a, int64_t second) {
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + second, 64);
  }
  static void right(const char* b, int64_t second) {
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + second, 64);
  }

  TileProduct* products_;
  int64_t size_ = 0, at_ = 0, step_ = 0, phase_ = 0, turns_ = 0;
};

// Spreads the turns of a queue evenly over other work, in so many portions.
template <int kParts>
class Beside {
 public:
  Beside(TileQueue<kParts>* queue, int64_t portions)
      : queue_(queue), rate_((queue->turns() << kBits) / most(portions, 1)) {}

  void portion() {
    for (due_ += rate_; due_ >= kOne; due_ -= kOne) queue_->turn();
  }

 private:
  static constexpr int kBits = 16;
  static constexpr int64_t kOne = int64_t{1} << kBits;

  TileQueue<kParts>* queue_;
  int64_t rate_, due_ = 0;
};

}  // namespace RAPTAX_ISA
}  // namespace raptax
