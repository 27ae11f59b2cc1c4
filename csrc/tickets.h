// Pieces of work handed out one by one to whichever threads come. See parallel.h.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

namespace raptax {

// Each thread that comes takes the next ticket until there are none left.
class Tickets {
 public:
  explicit Tickets(int64_t count) : count_(count) {}

  // Runs pieces 0 .. count - 1 here and on up to `helpers` other threads, each asked for
  // by schedule(function). Returns when all pieces are done, even if nobody comes.
  template <typename Schedule>
  static void share(int64_t count, int64_t helpers, void (*piece)(void*, int64_t),
                    void* context, const Schedule& schedule) {
    if (count <= 0) return;
    auto tickets = std::make_shared<Tickets>(count);
    for (int64_t i = 0; i < helpers && i < count - 1; ++i) {
      // A thread that comes when all is done finds no ticket, and touches nothing else.
      schedule([tickets, piece, context] { tickets->work(piece, context); });
    }
    tickets->work(piece, context);
    tickets->wait();
  }

 private:
  void work(void (*piece)(void*, int64_t), void* context) {
    for (int64_t n = next_++; n < count_; n = next_++) {
      piece(context, n);
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
