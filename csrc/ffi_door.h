// What every file of handlers (ffi*.cc) shares: they turn FFI buffers into the plain
// arrays that the kernels take, and are the only files that know of XLA. Every handler
// has a line in HANDLERS of src/raptax/kernels/native.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "parallel.h"
#include "tickets.h"
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
    auto schedule = [this](auto function) { pool_.Schedule(std::move(function)); };
    Tickets::share(count, threads() - 1, piece, context, schedule);
  }

 private:
  // XLA's handle is a plain pair of pointers whose methods are not const.
  mutable ffi::ThreadPool pool_;
};

}  // namespace raptax
