#include "ffi/common.h"

// out = x + 1: proves that a jitted program reaches this library and gets its answer.
static ffi::Error probe(ffi::Buffer<ffi::S32> x, ffi::ResultBuffer<ffi::S32> out) {
  const int32_t* from = x.typed_data();
  int32_t* to = out->typed_data();
  for (size_t i = 0; i < x.element_count(); ++i) to[i] = from[i] + 1;
  return ffi::Error::Success();
}

RAPTAX_HANDLER(raptax_probe, probe,
               ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::S32>>().Ret<ffi::Buffer<ffi::S32>>());
