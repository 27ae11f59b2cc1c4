// The thread pool that kernels run on, as an interface.
#pragma once

#include <cstdint>

namespace raptax {

// Runs tasks 0 .. count - 1, started in ascending order, on the pool and on the calling
// thread, so that a call finishes even if every thread of the pool is busy. Which
// thread runs which task is unspecified; results must not depend on it.
class ThreadPool {
 public:
  virtual ~ThreadPool() = default;

  // Maximum number of concurrent threads, the caller included. For sizing tasks;
  // results must not depend on it.
  virtual int threads() const = 0;

  virtual void run(int64_t count, void (*task)(void* context, int64_t index),
                   void* context) const = 0;

  // run() for any callable that takes the index.
  template <typename Task>
  void parallel_for(int64_t count, const Task& task) const {
    run(
        count,
        [](void* context, int64_t index) { (*static_cast<const Task*>(context))(index); },
        const_cast<void*>(static_cast<const void*>(&task)));
  }
};

}  // namespace raptax
