// What every file of handlers (ffi*.cc) shares: they turn FFI buffers into the plain
// arrays that the kernels take, and are the only files that know of XLA. Every handler
// has a line in HANDLERS of src/raptax/kernels/native.py.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#ifdef _WIN32
#define RAPTAX_EXPORT __declspec(dllexport)
#else
#define RAPTAX_EXPORT __attribute__((visibility("default")))
#endif

// Defines the exported handler `name` and what it takes: (name, function, binding).
#define RAPTAX_HANDLER(name, ...)                                   \
  extern "C" RAPTAX_EXPORT XLA_FFI_Error* name(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, __VA_ARGS__)

namespace raptax {

// XLA's own threads. Each that comes takes the next ticket until there are none left.
class XlaParallel final : public Parallel {
 public:
  explicit XlaParallel(ffi::ThreadPool pool) : pool_(pool) {}

  int threads() const override { return static_cast<int>(pool_.num_threads()); }

  void run(int64_t count, void (*piece)(void*, int64_t), void* context) const override {
    auto tickets = std::make_shared<Tickets>();
    tickets->count = count;
    int64_t helpers = count - 1 < threads() - 1 ? count - 1 : threads() - 1;
    for (int64_t i = 0; i < helpers; ++i) {
      // A thread that comes when all is done finds no ticket, and touches nothing else.
      pool_.Schedule([tickets, piece, context] { tickets->work(piece, context); });
    }
    tickets->work(piece, context);
    tickets->wait();
  }

 private:
  struct Tickets {
    int64_t count = 0;
    std::atomic<int64_t> next{0}, done{0};
    std::mutex guard;
    std::condition_variable finished;

    void work(void (*piece)(void*, int64_t), void* context) {
      for (int64_t n = next++; n < count; n = next++) {
        piece(context, n);
        if (++done == count) {
          std::lock_guard<std::mutex> lock(guard);
          finished.notify_all();
        }
      }
    }
    void wait() {
      std::unique_lock<std::mutex> lock(guard);
      finished.wait(lock, [this] { return done == count; });
    }
  };

  // XLA's handle is a plain pair of pointers whose methods are not const.
  mutable ffi::ThreadPool pool_;
};

}  // namespace raptax
