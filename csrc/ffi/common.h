// Common to all FFI handlers (ffi*.cc), which convert FFI buffers to the plain arrays
// that the kernels take; no other file includes XLA headers. Every handler is listed in
// HANDLERS of src/raptax/kernels/cpu/library.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "api/attention_params.h"
#include "runtime/thread_pool.h"
#include "runtime/work_queue.h"
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

// The type of arrays that kernels take; false if they do not.
inline bool type_of(ffi::DataType dtype, Type* type) {
  switch (dtype) {
    case ffi::DataType::F32: *type = Type::kF32; return true;
    case ffi::DataType::BF16: *type = Type::kBF16; return true;
    case ffi::DataType::F16: *type = Type::kF16; return true;
    default: return false;
  }
}

// The thread pool of XLA's CPU client.
class XlaThreadPool final : public ThreadPool {
 public:
  explicit XlaThreadPool(ffi::ThreadPool pool) : pool_(pool) {}

  int threads() const override { return static_cast<int>(pool_.num_threads()); }

  void run(int64_t count, void (*task)(void*, int64_t), void* context) const override {
    auto schedule = [this](auto function) { pool_.Schedule(std::move(function)); };
    WorkQueue::parallel_for(count, threads() - 1, task, context, schedule);
  }

 private:
  // The FFI handle is a pair of pointers whose methods are not const.
  mutable ffi::ThreadPool pool_;
};

}  // namespace raptax
