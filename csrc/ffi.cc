// The only door to XLA: handlers that turn FFI buffers into the plain arrays the kernels
// take. Every handler here has a line in HANDLERS of src/raptax/kernels/native.py.

#include <cstddef>
#include <cstdint>

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

// out = x + 1: proves that a jitted program reaches this library and gets its answer.
static ffi::Error probe(ffi::Buffer<ffi::S32> x, ffi::ResultBuffer<ffi::S32> out) {
  const int32_t* from = x.typed_data();
  int32_t* to = out->typed_data();
  for (size_t i = 0; i < x.element_count(); ++i) to[i] = from[i] + 1;
  return ffi::Error::Success();
}

RAPTAX_HANDLER(raptax_probe, probe,
               ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::S32>>().Ret<ffi::Buffer<ffi::S32>>());
