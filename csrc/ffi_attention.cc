#include "ffi_attention.h"

namespace raptax {

#define RAPTAX_RETURN_IF_ERROR(expression) \
  if (ffi::Error error = (expression); error.failure()) return error

ffi::Error wrong(const std::string& what) {
  return ffi::Error::InvalidArgument("raptax: " + what + ".");
}

namespace {

template <typename T>
ffi::Error get(const ffi::Dictionary& attributes, const char* name, T* to) {
  auto found = attributes.get<T>(name);
  if (found.has_error()) return found.error();
  *to = *found;
  return ffi::Error::Success();
}

ffi::Error read_arrays(const Operands& x, Forward* to) {
  auto q = x.query.dimensions(), v = x.value.dimensions();
  if (q.size() != 4 || v.size() != 4) return wrong("query, key and value have four axes");
  Shape& s = to->shape;
  s = {q[0], q[1], v[1], q[2], v[2], q[3], v[3]};
  if (!has_shape(x.key, {s.B, s.K, s.S, s.D}) || v[0] != s.B) {
    return wrong("query, key and value do not fit together");
  }
  for (int64_t size : {s.B, s.H, s.K, s.T, s.S, s.D, s.E}) {
    if (size < 1) return wrong("there is nothing to attend to");
  }
  if (s.H % s.K != 0) return wrong("heads do not share kv heads evenly");
  ffi::DataType type = x.query.element_type();
  if (x.key.element_type() != type || x.value.element_type() != type) {
    return wrong("query, key and value differ in type");
  }
  switch (type) {
    case ffi::F32: to->type = Type::kF32; break;
    case ffi::BF16: to->type = Type::kBF16; break;
    case ffi::F16: to->type = Type::kF16; break;
    default: return wrong("this type of numbers is not supported");
  }
  to->query = x.query.untyped_data();
  to->key = x.key.untyped_data();
  to->value = x.value.untyped_data();
  return ffi::Error::Success();
}

// An array that broadcasts to the scores.
template <typename Array, typename T>
ffi::Error read_broadcast(const Array& x, const Shape& s, const char* name,
                          Broadcast<const T>* to) {
  if (x.element_count() == 0) return ffi::Error::Success();
  auto dims = x.dimensions();
  const int64_t axes[4] = {s.B, s.H, s.T, s.S};
  bool fits = dims.size() == 4;
  int64_t stride = 1;
  for (int i = 3; fits && i >= 0; --i) {
    fits = dims[i] == 1 || dims[i] == axes[i];
    to->stride[i] = dims[i] == 1 ? 0 : stride;
    stride *= dims[i];
  }
  if (!fits) return wrong(std::string(name) + " does not broadcast to the scores");
  to->data = static_cast<const T*>(x.untyped_data());
  return ffi::Error::Success();
}

ffi::Error read_kinds(const ffi::Buffer<ffi::S8>& x, const Shape& s,
                      const ffi::Dictionary& attributes, TileKinds* to) {
  if (x.element_count() == 0) return ffi::Error::Success();
  RAPTAX_RETURN_IF_ERROR(get(attributes, "tile_queries", &to->queries));
  RAPTAX_RETURN_IF_ERROR(get(attributes, "tile_keys", &to->keys));
  if (to->queries < 1 || to->keys < 1) return wrong("tiles have at least one score");
  auto dims = x.dimensions();
  int64_t down = (s.T + to->queries - 1) / to->queries;
  to->across = (s.S + to->keys - 1) / to->keys;
  bool fits = dims.size() == 4 && (dims[0] == 1 || dims[0] == s.B) &&
              (dims[1] == 1 || dims[1] == s.H) && dims[2] == down && dims[3] == to->across;
  if (!fits) return wrong("kinds do not fit the lengths");
  to->stride_h = dims[1] == 1 ? 0 : down * to->across;
  to->stride_b = dims[0] == 1 ? 0 : dims[1] * down * to->across;
  to->data = x.typed_data();
  return ffi::Error::Success();
}

}  // namespace

ffi::Error read(const Operands& x, const ffi::Dictionary& attributes, Forward* to) {
  *to = {};
  RAPTAX_RETURN_IF_ERROR(read_arrays(x, to));
  const Shape& s = to->shape;
  Rules& rules = to->rules;
  if (!has_shape(x.band, {2}) || !has_shape(x.factors, {2})) {
    return wrong("there are two limits of the band, and two factors");
  }
  rules.band = band_of(x.band.typed_data());
  rules.scale = x.factors.typed_data()[0];
  rules.start = x.start.typed_data();
  rules.starts = static_cast<int64_t>(x.start.element_count());
  if (rules.starts != 1 && rules.starts != s.B) {
    return wrong("there is one start, or one for each sequence");
  }
  RAPTAX_RETURN_IF_ERROR(read_kinds(x.kinds, s, attributes, &rules.kinds));
  RAPTAX_RETURN_IF_ERROR(read_broadcast(x.mask, s, "mask", &rules.mask));
  RAPTAX_RETURN_IF_ERROR(read_broadcast(x.bias, s, "bias", &rules.bias));
  if (x.sinks.element_count() != 0) {
    if (!has_shape(x.sinks, {s.H})) return wrong("there is one sink for each query head");
    rules.sinks = x.sinks.typed_data();
  }
  if (x.words.element_count() != 0) {
    rules.dropout.words = x.words.typed_data();
    rules.dropout.count = static_cast<int64_t>(x.words.element_count());
    rules.dropout.rate = x.factors.typed_data()[1];
  }
  return ffi::Error::Success();
}

ffi::Error read_mods(const ffi::Dictionary& attributes, Mods* mods, Rules* to) {
  Code mask, score;
  int64_t mask_arrays = 0, score_arrays = 0;
  RAPTAX_RETURN_IF_ERROR(get(attributes, "mask_code", &mask));
  RAPTAX_RETURN_IF_ERROR(get(attributes, "mask_arrays", &mask_arrays));
  RAPTAX_RETURN_IF_ERROR(get(attributes, "score_code", &score));
  RAPTAX_RETURN_IF_ERROR(get(attributes, "score_arrays", &score_arrays));
  bool masks = false, changes = false;
  Programs& programs = mods->programs;
  RAPTAX_RETURN_IF_ERROR(programs.read(mask, mask_arrays, false, mods->mask, masks));
  RAPTAX_RETURN_IF_ERROR(programs.read(score, score_arrays, true, mods->score, changes));
  to->mask_program = masks ? &mods->mask : nullptr;
  to->score_program = changes ? &mods->score : nullptr;
  return ffi::Error::Success();
}

namespace {

ffi::Error forward(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key,
                   ffi::AnyBuffer value, ffi::Buffer<ffi::S32> start,
                   ffi::Buffer<ffi::S32> band, ffi::Buffer<ffi::F32> factors,
                   ffi::Buffer<ffi::S8> kinds, ffi::Buffer<ffi::PRED> mask,
                   ffi::Buffer<ffi::F32> bias, ffi::Buffer<ffi::F32> sinks,
                   ffi::Buffer<ffi::U32> words, ffi::RemainingArgs arrays,
                   ffi::Result<ffi::AnyBuffer> out, ffi::ResultBuffer<ffi::F32> lse,
                   ffi::Dictionary attributes) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return wrong("RAPTAX_ISA names nothing that runs here");
  Forward problem;
  Operands operands = {query, key,  value, start, band, factors,
                       kinds, mask, bias,  sinks, words};
  RAPTAX_RETURN_IF_ERROR(read(operands, attributes, &problem));
  Mods mods(arrays);
  RAPTAX_RETURN_IF_ERROR(read_mods(attributes, &mods, &problem.rules));
  if (!mods.programs.finished()) return wrong("there are arrays that no mod reads");
  const Shape& s = problem.shape;
  if (!has_shape(*out, {s.B, s.H, s.T, s.E}) || !has_shape(*lse, {s.B, s.H, s.T}) ||
      out->element_type() != query.element_type()) {
    return wrong("the results do not fit the arrays");
  }
  problem.out = out->untyped_data();
  problem.lse = lse->typed_data();
  kernels->forward(problem, XlaParallel(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace raptax

RAPTAX_HANDLER(raptax_forward, raptax::forward,
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
                   .RemainingArgs()                // arrays of mods
                   .Ret<ffi::AnyBuffer>()          // out
                   .Ret<ffi::Buffer<ffi::F32>>()   // lse
                   .Attrs());
