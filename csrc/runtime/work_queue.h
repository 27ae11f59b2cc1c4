// A work queue: tasks 0 .. count - 1 claimed one by one by an atomic counter.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

namespace raptax {

// Each thread claims the next task until none is left.
class WorkQueue {
 public:
  explicit WorkQueue(int64_t count) : count_(count) {}

  // Runs tasks 0 .. count - 1 on this thread and on up to `helpers` others, each
  // requested by schedule(function). Returns when all tasks are done, even if no helper
  // starts.
  template <typename Schedule>
  static void parallel_for(int64_t count, int64_t helpers, void (*task)(void*, int64_t),
                           void* context, const Schedule& schedule) {
    if (count <= 0) return;
    auto queue = std::make_shared<WorkQueue>(count);
    for (int64_t i = 0; i < helpers && i < count - 1; ++i) {
      // A helper that starts after the last task finds none left and reads only the
      // queue, which it shares the ownership of.
      schedule([queue, task, context] { queue->work(task, context); });
    }
    queue->work(task, context);
    queue->wait();
  }

 private:
  void work(void (*task)(void*, int64_t), void* context) {
    for (int64_t n = next_++; n < count_; n = next_++) {
      task(context, n);
      if (++done_ == count_) {
        std::lock_guard<std::mutex> lock(guard_);
        finished_.notify_all();
      }
    }
  }
  void wait() {
    std::unique_lock<std::mutex> lock(guard_);
    finished_.wait(lock, [this] { return done_ == count_; });
  }

  const int64_t count_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex guard_;
  std::condition_variable finished_;
};

}  // namespace raptax
