// Scratch memory that is kept between calls, which saves page faults.
#pragma once

#include <cstddef>

namespace raptax {

// Uninitialised memory for one call, page-aligned (hence 64-byte aligned), from a free
// list shared by all threads.
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
