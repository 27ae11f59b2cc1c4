// The handler of the backward pass: operands of src/raptax/kernels/cpu/backward.py to BackwardParams.
// An array without elements means there is none.
#include <cstring>

#include "ffi/attention.h"

namespace raptax {
namespace {

using Any = ffi::AnyBuffer;
using Floats = ffi::Buffer<ffi::F32>;

bool same_shape(const Any::Dimensions& a, const Any::Dimensions& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

// Results of the forward pass and their cotangents.
struct Found {
  Any out;
  Floats lse;
  Any d_out;
  Floats d_lse;
};

ffi::Error read_found(const Found& x, BackwardParams* to) {
  const Shape& s = to->forward.shape;
  if (!has_shape(x.out, {s.B, s.H, s.T, s.E}) || !has_shape(x.d_out, {s.B, s.H, s.T, s.E}) ||
      !has_shape(x.lse, {s.B, s.H, s.T}) || !has_shape(x.d_lse, {s.B, s.H, s.T})) {
    return invalid_argument(
        "out, its log-sum-exp or their gradients do not fit query and value");
  }
  to->forward.out = x.out.untyped_data();
  to->forward.lse = x.lse.typed_data();
  to->d_out = x.d_out.untyped_data();
  to->d_lse = x.d_lse.typed_data();
  return ffi::Error::Success();
}

struct Gradients {
  ffi::Result<Any> query, key, value;
  ffi::Result<Floats> bias, sinks;
};

ffi::Error read_gradients(Gradients& to, const Operands& of, BackwardParams* p) {
  if (!same_shape(to.query->dimensions(), of.query.dimensions()) ||
      !same_shape(to.key->dimensions(), of.key.dimensions()) ||
      !same_shape(to.value->dimensions(), of.value.dimensions()) ||
      !same_shape(to.bias->dimensions(), of.bias.dimensions()) ||
      !same_shape(to.sinks->dimensions(), of.sinks.dimensions())) {
    return invalid_argument("gradients do not have the shapes of their arrays");
  }
  p->d_query = to.query->untyped_data();
  p->d_key = to.key->untyped_data();
  p->d_value = to.value->untyped_data();
  if (to.sinks->element_count() != 0) p->d_sinks = to.sinks->typed_data();
  if (to.bias->element_count() != 0) {
    p->d_bias.data = to.bias->typed_data();
    memcpy(p->d_bias.stride, p->forward.score_params.bias.stride, sizeof p->d_bias.stride);
    memset(p->d_bias.data, 0, to.bias->size_bytes());
  }
  return ffi::Error::Success();
}

// The program of d score / d base, whose arrays are the operands after those of `mods`.
ffi::Error read_slope(const ffi::Dictionary& attributes, Mods* mods, Program* slope,
                      BackwardParams* to) {
  auto code = attributes.get<Code>("slope_code");
  auto arrays = attributes.get<int64_t>("slope_arrays");
  if (code.has_error()) return code.error();
  if (arrays.has_error()) return arrays.error();
  bool has = false;
  ffi::Error error = mods->programs.read(*code, *arrays, true, *slope, has);
  if (has) to->slope_program = slope;
  if (error.success() && !mods->programs.finished()) {
    return invalid_argument("there are arrays that no mod reads");
  }
  return error;
}

ffi::Error backward(ffi::ThreadPool pool, Any query, Any key, Any value,
                    ffi::Buffer<ffi::S32> start, ffi::Buffer<ffi::S32> band, Floats factors,
                    ffi::Buffer<ffi::S8> kinds, ffi::Buffer<ffi::PRED> mask, Floats bias,
                    Floats sinks, ffi::Buffer<ffi::U32> words, Any out, Floats lse, Any d_out,
                    Floats d_lse, ffi::RemainingArgs arrays, ffi::Result<Any> d_query,
                    ffi::Result<Any> d_key, ffi::Result<Any> d_value,
                    ffi::Result<Floats> d_bias, ffi::Result<Floats> d_sinks,
                    ffi::Dictionary attributes) {
  if (chosen_kernels() == nullptr)
    return invalid_argument("RAPTAX_ISA names nothing that runs here");
  for (const Any* x : {&out, &d_out, &*d_query, &*d_key, &*d_value}) {
    if (x->element_type() != query.element_type())
      return invalid_argument("arrays differ in type");
  }
  BackwardParams p{};
  const Operands operands = {query, key,  value, start, band, factors,
                             kinds, mask, bias,  sinks, words};
  ffi::Error error = read(operands, attributes, &p.forward);
  if (error.failure()) return error;
  error = read_found({out, lse, d_out, d_lse}, &p);
  if (error.failure()) return error;
  Gradients gradients = {d_query, d_key, d_value, d_bias, d_sinks};
  error = read_gradients(gradients, operands, &p);
  if (error.failure()) return error;
  Mods mods(arrays);
  error = read_mods(attributes, &mods, &p.forward.score_params);
  if (error.failure()) return error;
  Program slope;
  error = read_slope(attributes, &mods, &slope, &p);
  if (error.failure()) return error;
  chosen_kernels()->backward(p, XlaThreadPool(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace raptax

RAPTAX_HANDLER(raptax_backward, raptax::backward,
               ffi::Ffi::Bind()
                   .Ctx<ffi::ThreadPool>()
                   .Arg<ffi::AnyBuffer>()          // query
                   .Arg<ffi::AnyBuffer>()          // key
                   .Arg<ffi::AnyBuffer>()          // value
                   .Arg<ffi::Buffer<ffi::S32>>()   // start
                   .Arg<ffi::Buffer<ffi::S32>>()   // band
                   .Arg<ffi::Buffer<ffi::F32>>()   // factors
                   .Arg<ffi::Buffer<ffi::S8>>()    // kinds
                   .Arg<ffi::Buffer<ffi::PRED>>()  // mask
                   .Arg<ffi::Buffer<ffi::F32>>()   // bias
                   .Arg<ffi::Buffer<ffi::F32>>()   // sinks
                   .Arg<ffi::Buffer<ffi::U32>>()   // words
                   .Arg<ffi::AnyBuffer>()          // out
                   .Arg<ffi::Buffer<ffi::F32>>()   // lse
                   .Arg<ffi::AnyBuffer>()          // d_out
                   .Arg<ffi::Buffer<ffi::F32>>()   // d_lse
                   .RemainingArgs()                // arrays of the programs
                   .Ret<ffi::AnyBuffer>()          // d_query
                   .Ret<ffi::AnyBuffer>()          // d_key
                   .Ret<ffi::AnyBuffer>()          // d_value
                   .Ret<ffi::Buffer<ffi::F32>>()   // d_bias
                   .Ret<ffi::Buffer<ffi::F32>>()   // d_sinks
                   .Attrs());
