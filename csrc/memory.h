// Scratch memory that outlives a call, so that a kernel does not pay for fresh pages.
#pragma once

#include <cstddef>

namespace raptax {

// Memory for one call, 64-byte aligned and not cleared, from a list that all threads
// share and that keeps what it once had.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
  size_t bytes_;
};

}  // namespace raptax
