// AMX tile products, queued and issued in small steps between vector instructions, so
// that the tile unit and the vector units work at the same time. Elements have kParts
// parts: see pack_amx.h.

#pragma once

#include "gemm/pack_amx.h"

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

// A FIFO of tile products. One step of a product (32 elements of a row times 32 of a
// column) takes kPhases calls of issue(): each starts so few tile instructions that the
// vector instructions between two calls do not wait for them.
//
// Sums stay in the tile registers until the next product needs these: a store waits for
// the last tile product, and would stall the tile unit.
template <int kParts>
class TileQueue {
 public:
  static constexpr int kPhases = kParts == 3 ? 6 : 2;

  explicit TileQueue(TileProduct* products) : products_(products) {}

  void clear() { size_ = at_ = step_ = phase_ = 0, phases_ = 0; }
  void push(const TileProduct& product) {
    products_[size_++] = product;
    phases_ += product.steps * kPhases;
  }
  int64_t phases() const { return phases_; }  // of all products pushed

  void issue() {
    if (at_ == size_) return;
    const TileProduct& p = products_[at_];
    int64_t offset = step_ * kParts * kTileBytes;
    // The intrinsics do not tell GCC 12 that they read memory.
    asm volatile("" ::: "memory");
    if (step_ == 0) {
      multiply<true>(p, p.a, p.b);
    } else {
      multiply<false>(p, p.a + offset, p.b + offset);
    }
    asm volatile("" ::: "memory");
    if (++phase_ < kPhases) return;
    phase_ = 0;
    if (++step_ < p.steps) return;
    step_ = 0;
    ++at_;
    sums_ = {reinterpret_cast<char*>(p.c), p.c_stride};
  }
  void finish() {
    while (at_ < size_) issue();
    store<0>();
    store<1>();
    store<2>();
    store<3>();
    asm volatile("" ::: "memory");
    sums_.c = nullptr;
  }

 private:
  // The four tiles of a product.
  struct Sums {
    char* c;
    int64_t stride;

    char* tile(int n) const { return c + n / 2 * 16 * stride + n % 2 * 64; }
  };

  // Tile intrinsics need literal register numbers.
  template <int n>
  void store() const {
    if (sums_.c == nullptr) return;
    if (n == 0) _tile_stored(0, sums_.tile(0), sums_.stride);
    if (n == 1) _tile_stored(1, sums_.tile(1), sums_.stride);
    if (n == 2) _tile_stored(2, sums_.tile(2), sums_.stride);
    if (n == 3) _tile_stored(3, sums_.tile(3), sums_.stride);
  }
  template <int n>
  static void load(const Sums& sums) {
    if (n == 0) _tile_loadd(0, sums.tile(0), sums.stride);
    if (n == 1) _tile_loadd(1, sums.tile(1), sums.stride);
    if (n == 2) _tile_loadd(2, sums.tile(2), sums.stride);
    if (n == 3) _tile_loadd(3, sums.tile(3), sums.stride);
  }
  template <int n>
  static void zero() {
    if (n == 0) _tile_zero(0);
    if (n == 1) _tile_zero(1);
    if (n == 2) _tile_zero(2);
    if (n == 3) _tile_zero(3);
  }

  // Stores tile n of the previous product and loads or clears it for this one.
  template <int n, bool kFirst>
  void begin(const TileProduct& p) const {
    if (!kFirst) return;
    store<n>();
    if (p.add) {
      load<n>({reinterpret_cast<char*>(p.c), p.c_stride});
    } else {
      zero<n>();
    }
  }

  template <bool kFirst>
  void multiply(const TileProduct& p, const char* a, const char* b) {
    if (kParts == 3) return multiply_parts<kFirst>(p, a, b);
    if (phase_ == 0) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a, 64);
      begin<0, kFirst>(p);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + p.b_second, 64);
      begin<1, kFirst>(p);
      _tile_dpbf16ps(1, 4, 7);
    } else {
      _tile_loadd(5, a + p.a_second, 64);
      begin<2, kFirst>(p);
      _tile_dpbf16ps(2, 5, 6);
      begin<3, kFirst>(p);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  // Six of the nine products of parts, the small ones first; the other three together
  // are below the rounding error of the float32 sums.
  template <bool kFirst>
  void multiply_parts(const TileProduct& p, const char* a, const char* b) {
    switch (phase_) {
      case 0:
        right(b, p.b_second);
        left(a + 2 * kTileBytes, p.a_second);
        begin<0, kFirst>(p);
        _tile_dpbf16ps(0, 4, 6);
        begin<1, kFirst>(p);
        _tile_dpbf16ps(1, 4, 7);
        begin<2, kFirst>(p);
        _tile_dpbf16ps(2, 5, 6);
        begin<3, kFirst>(p);
        _tile_dpbf16ps(3, 5, 7);
        return;
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
  int64_t size_ = 0, at_ = 0, step_ = 0, phase_ = 0, phases_ = 0;
  Sums sums_{nullptr, 0};  // results still in the tile registers
};

// Interleaves a queue with other work: spreads its phases evenly over `ticks` calls.
template <int kParts>
class Interleaver {
 public:
  Interleaver(TileQueue<kParts>* queue, int64_t ticks)
      : queue_(queue), rate_((queue->phases() << kBits) / max(ticks, 1)) {}

  void tick() {
    for (due_ += rate_; due_ >= kOne; due_ -= kOne) queue_->issue();
  }

 private:
  static constexpr int kBits = 16;
  static constexpr int64_t kOne = int64_t{1} << kBits;

  TileQueue<kParts>* queue_;
  int64_t rate_, due_ = 0;
};

}  // namespace RAPTAX_ISA
}  // namespace raptax
