// Threads for tests, as XLA's pool has them.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "runtime/thread_pool.h"
#include "runtime/work_queue.h"

namespace raptax {
namespace fuzz {

// Threads that run what is put into a queue, as XLA's do.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { serve(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(guard_);
      closing_ = true;
    }
    more_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  void schedule(std::function<void()> job) {
    std::lock_guard<std::mutex> lock(guard_);
    jobs_.push_back(std::move(job));
    more_.notify_one();
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(guard_);
    while (true) {
      more_.wait(lock, [this] { return closing_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      std::function<void()> job = std::move(jobs_.front());
      jobs_.pop_front();
      lock.unlock();
      job();
      lock.lock();
    }
  }

  std::vector<std::thread> threads_;
  std::deque<std::function<void()>> jobs_;
  std::mutex guard_;
  std::condition_variable more_;
  bool closing_ = false;
};

// Shares work with the threads of a pool.
class Threads final : public ThreadPool {
 public:
  explicit Threads(int helpers) : pool_(helpers), helpers_(helpers) {}
  int threads() const override { return helpers_ + 1; }
  void run(int64_t count, void (*task)(void*, int64_t), void* context) const override {
    WorkQueue::parallel_for(count, helpers_, task, context, [this](std::function<void()> job) {
      pool_.schedule(std::move(job));
    });
  }

 private:
  mutable Pool pool_;
  int helpers_;
};

}  // namespace fuzz
}  // namespace raptax
