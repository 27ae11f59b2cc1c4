// The ticket loop under many threads: every piece runs once, and what pieces wrote is seen
// by whoever waited. Meant for -fsanitize=thread; see `make native-test`.

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "../memory.h"
#include "../tickets.h"

namespace {

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

void run(Pool& pool, int64_t count, int64_t helpers) {
  std::vector<int64_t> done(static_cast<size_t>(count), 0);  // plain memory, on purpose
  raptax::Tickets::share(
      count, helpers,
      [](void* context, int64_t number) {
        raptax::Buffer scratch(1000 + 7000 * static_cast<size_t>(number % 3));
        int64_t* memory = scratch.as<int64_t>();
        for (int i = 0; i < 100; ++i) memory[i] = number;
        (*static_cast<std::vector<int64_t>*>(context))[static_cast<size_t>(number)] +=
            memory[99] + 1;
      },
      &done, [&](std::function<void()> job) { pool.schedule(std::move(job)); });
  for (int64_t n = 0; n < count; ++n) {
    if (done[static_cast<size_t>(n)] == n + 1) continue;
    std::fprintf(stderr, "piece %lld of %lld ran %lld times\n", static_cast<long long>(n),
                 static_cast<long long>(count),
                 static_cast<long long>(done[static_cast<size_t>(n)] / (n + 1)));
    std::exit(1);
  }
}

}  // namespace

int main() {
  Pool pool(3);
  std::vector<std::thread> callers;  // several calls share the pool
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&pool] {
      for (int64_t turn = 0; turn < 2000; ++turn) run(pool, turn % 17, turn % 5);
    });
  }
  for (std::thread& caller : callers) caller.join();
  Pool nobody(0);
  run(nobody, 50, 3);
  std::puts("parallel: every piece ran once");
}
