#include "ffi/attention.h"

namespace raptax {

#define RAPTAX_RETURN_IF_ERROR(expression) \
  if (ffi::Error error = (expression); error.failure()) return error

ffi::Error invalid_argument(const std::string& what) {
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

ffi::Error read_arrays(const Operands& x, ForwardParams* to) {
  auto q = x.query.dimensions(), v = x.value.dimensions();
  if (q.size() != 4 || v.size() != 4)
    return invalid_argument("query, key and value have four axes");
  Shape& s = to->shape;
  s = {q[0], q[1], v[1], q[2], v[2], q[3], v[3]};
  if (!has_shape(x.key, {s.B, s.K, s.S, s.D}) || v[0] != s.B) {
    return invalid_argument("query, key and value do not fit together");
  }
  for (int64_t size : {s.B, s.H, s.K, s.T, s.S, s.D, s.E}) {
    if (size < 1) return invalid_argument("there is nothing to attend to");
  }
  if (s.H % s.K != 0) return invalid_argument("heads do not share kv heads evenly");
  ffi::DataType type = x.query.element_type();
  if (x.key.element_type() != type || x.value.element_type() != type) {
    return invalid_argument("query, key and value differ in type");
  }
  switch (type) {
    case ffi::F32: to->type = Type::kF32; break;
    case ffi::BF16: to->type = Type::kBF16; break;
    case ffi::F16: to->type = Type::kF16; break;
    default: return invalid_argument("this type of numbers is not supported");
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
  if (!fits) return invalid_argument(std::string(name) + " does not broadcast to the scores");
  to->data = static_cast<const T*>(x.untyped_data());
  return ffi::Error::Success();
}

ffi::Error read_kinds(const ffi::Buffer<ffi::S8>& x, const Shape& s,
                      const ffi::Dictionary& attributes, BlockKinds* to) {
  if (x.element_count() == 0) return ffi::Error::Success();
  RAPTAX_RETURN_IF_ERROR(get(attributes, "tile_queries", &to->queries));
  RAPTAX_RETURN_IF_ERROR(get(attributes, "tile_keys", &to->keys));
  if (to->queries < 1 || to->keys < 1) return invalid_argument("tiles have at least one score");
  auto dims = x.dimensions();
  int64_t down = (s.T + to->queries - 1) / to->queries;
  to->across = (s.S + to->keys - 1) / to->keys;
  bool fits = dims.size() == 4 && (dims[0] == 1 || dims[0] == s.B) &&
              (dims[1] == 1 || dims[1] == s.H) && dims[2] == down && dims[3] == to->across;
  if (!fits) return invalid_argument("kinds do not fit the lengths");
  to->stride_h = dims[1] == 1 ? 0 : down * to->across;
  to->stride_b = dims[0] == 1 ? 0 : dims[1] * down * to->across;
  to->data = x.typed_data();
  return ffi::Error::Success();
}

}  // namespace

ffi::Error read(const Operands& x, const ffi::Dictionary& attributes, ForwardParams* to) {
  *to = {};
  RAPTAX_RETURN_IF_ERROR(read_arrays(x, to));
  const Shape& s = to->shape;
  ScoreParams& score_params = to->score_params;
  bool drops = x.words.element_count() != 0;
  if (!has_shape(x.band, {2}) || !has_shape(x.factors, {drops ? 2 : 1})) {
    return invalid_argument(
        "there are two limits of the band, a scale and, with dropout, a rate");
  }
  score_params.band = band_of(x.band.typed_data());
  score_params.scale = x.factors.typed_data()[0];
  score_params.start = x.start.typed_data();
  score_params.starts = static_cast<int64_t>(x.start.element_count());
  if (score_params.starts != 1 && score_params.starts != s.B) {
    return invalid_argument("there is one start, or one for each sequence");
  }
  RAPTAX_RETURN_IF_ERROR(read_kinds(x.kinds, s, attributes, &score_params.kinds));
  RAPTAX_RETURN_IF_ERROR(read_broadcast(x.mask, s, "mask", &score_params.mask));
  RAPTAX_RETURN_IF_ERROR(read_broadcast(x.bias, s, "bias", &score_params.bias));
  if (x.sinks.element_count() != 0) {
    if (!has_shape(x.sinks, {s.H}))
      return invalid_argument("there is one sink for each query head");
    score_params.sinks = x.sinks.typed_data();
  }
  if (drops) {
    score_params.dropout.words = x.words.typed_data();
    score_params.dropout.count = static_cast<int64_t>(x.words.element_count());
    score_params.dropout.rate = x.factors.typed_data()[1];
  }
  return ffi::Error::Success();
}

ffi::Error read_mods(const ffi::Dictionary& attributes, Mods* mods, ScoreParams* to) {
  Code mask, score;
  int64_t mask_arrays = 0, score_arrays = 0;
  RAPTAX_RETURN_IF_ERROR(get(attributes, "mask_code", &mask));
  RAPTAX_RETURN_IF_ERROR(get(attributes, "mask_arrays", &mask_arrays));
  RAPTAX_RETURN_IF_ERROR(get(attributes, "score_code", &score));
  RAPTAX_RETURN_IF_ERROR(get(attributes, "score_arrays", &score_arrays));
  bool has_mask = false, has_score_mod = false;
  Programs& programs = mods->programs;
  RAPTAX_RETURN_IF_ERROR(programs.read(mask, mask_arrays, false, mods->mask, has_mask));
  RAPTAX_RETURN_IF_ERROR(programs.read(score, score_arrays, true, mods->score, has_score_mod));
  to->mask_program = has_mask ? &mods->mask : nullptr;
  to->score_program = has_score_mod ? &mods->score : nullptr;
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
  if (kernels == nullptr) return invalid_argument("RAPTAX_ISA names nothing that runs here");
  ForwardParams problem;
  Operands operands = {query, key,  value, start, band, factors,
                       kinds, mask, bias,  sinks, words};
  RAPTAX_RETURN_IF_ERROR(read(operands, attributes, &problem));
  Mods mods(arrays);
  RAPTAX_RETURN_IF_ERROR(read_mods(attributes, &mods, &problem.score_params));
  if (!mods.programs.finished()) return invalid_argument("there are arrays that no mod reads");
  const Shape& s = problem.shape;
  if (!has_shape(*out, {s.B, s.H, s.T, s.E}) || !has_shape(*lse, {s.B, s.H, s.T}) ||
      out->element_type() != query.element_type()) {
    return invalid_argument("the results do not fit the arrays");
  }
  problem.out = out->untyped_data();
  problem.lse = lse->typed_data();
  kernels->forward(problem, XlaThreadPool(pool));
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
