#include "runtime/scratch.h"

#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace raptax {
namespace {

struct Block {
  void* data;
  size_t bytes;
};

constexpr size_t kKept = size_t{32} << 20;  // bytes that wait for the next call

std::mutex guard;
std::vector<Block>& waiting() {
  static auto* blocks = new std::vector<Block>;  // never destroyed: threads outlive main
  return *blocks;
}
size_t kept = 0;

size_t rounded(size_t bytes) { return (bytes + 4095) / 4096 * 4096 + 4096; }

}  // namespace

Buffer::Buffer(size_t bytes) : data_(nullptr), bytes_(rounded(bytes)) {
  {
    std::lock_guard<std::mutex> lock(guard);
    auto& blocks = waiting();
    size_t best = blocks.size();
    for (size_t i = 0; i < blocks.size(); ++i) {
      bool fits = blocks[i].bytes >= bytes_ && blocks[i].bytes <= 4 * bytes_;
      if (fits && (best == blocks.size() || blocks[i].bytes <= blocks[best].bytes)) best = i;
    }
    if (best < blocks.size()) {
      data_ = blocks[best].data;
      bytes_ = blocks[best].bytes;
      kept -= bytes_;
      blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(best));
      return;
    }
  }
  data_ = std::aligned_alloc(4096, bytes_);
  if (data_ == nullptr) throw std::bad_alloc();
}

Buffer::~Buffer() {
  if (bytes_ > kKept) {
    std::free(data_);
    return;
  }
  std::lock_guard<std::mutex> lock(guard);
  auto& blocks = waiting();
  while (kept + bytes_ > kKept) {  // what waits longest goes first
    std::free(blocks.front().data);
    kept -= blocks.front().bytes;
    blocks.erase(blocks.begin());
  }
  blocks.push_back({data_, bytes_});
  kept += bytes_;
}

}  // namespace raptax
