#include <string>

#include "api/kernel_table.h"
#include "api/paged_params.h"
#include "ffi/common.h"
#include "ffi/mod_program.h"

namespace raptax {
namespace {

ffi::Error invalid_argument(const std::string& sentence) {
  return ffi::Error::InvalidArgument("paged attention: " + sentence);
}

bool stored_of(ffi::DataType dtype, PageType* stored) {
  switch (dtype) {
    case ffi::DataType::F32: *stored = PageType::kF32; return true;
    case ffi::DataType::BF16: *stored = PageType::kBF16; return true;
    case ffi::DataType::F16: *stored = PageType::kF16; return true;
    case ffi::DataType::S8: *stored = PageType::kS8; return true;
    case ffi::DataType::F8E4M3FN: *stored = PageType::kE4M3; return true;
    case ffi::DataType::F8E5M2: *stored = PageType::kE5M2; return true;
    default: return false;
  }
}

bool quantized(PageType stored) { return bytes_of(stored) == 1; }

// Whether `x` has just these axes.
bool is(const ffi::AnyBuffer& x, std::initializer_list<int64_t> shape) {
  auto found = x.dimensions();
  return found.size() == shape.size() && std::equal(shape.begin(), shape.end(), found.begin());
}

// The operands, in the order in which they come; see src/raptax/kernels/cpu/paged.py.
struct Operands {
  ffi::AnyBuffer query, key, value, k_pages, v_pages, k_scales, v_scales;
  ffi::AnyBuffer table, lengths, row_offsets, layer, scale, band, sinks;
  size_t count;  // of these; the rest are arrays of programs
};

ffi::ErrorOr<Operands> read(ffi::RemainingArgs args, bool append) {
  size_t next = 0;
  bool there = true;
  auto take = [&]() -> ffi::AnyBuffer {
    static XLA_FFI_Buffer none = {};
    auto x = args.get<ffi::AnyBuffer>(next++);
    there = there && x.has_value();
    return x.has_value() ? *x : ffi::AnyBuffer(&none);
  };
  ffi::AnyBuffer query = take();
  ffi::AnyBuffer key = append ? take() : query, value = append ? take() : query;
  ffi::AnyBuffer k_pages = take(), v_pages = take();
  PageType stored;
  bool scales = there && stored_of(k_pages.element_type(), &stored) && quantized(stored);
  ffi::AnyBuffer k_scales = scales ? take() : k_pages, v_scales = scales ? take() : v_pages;
  ffi::AnyBuffer table = take(), lengths = take(), offsets = take(), layer = take(),
                 scale = take(), band = take(), sinks = take();
  if (!there) return ffi::Unexpected(invalid_argument("an operand is missing."));
  return Operands{query,   key,     value, k_pages, v_pages, k_scales, v_scales, table,
                  lengths, offsets, layer, scale,   band,    sinks,    next};
}

ffi::Error check_axes(const Operands& x, const PagedParams& p, bool append) {
  bool fit = is(x.k_pages, {p.L, p.N, p.K, p.P, p.D}) &&
             is(x.v_pages, {p.L, p.N, p.K, p.P, p.E}) && is(x.table, {p.B, p.M}) &&
             is(x.lengths, {p.B}) && is(x.row_offsets, {p.B + 1}) && is(x.layer, {}) &&
             is(x.scale, {}) && is(x.band, {2}) && (is(x.sinks, {0}) || is(x.sinks, {p.H}));
  if (append) fit = fit && is(x.key, {p.R, p.K, p.D}) && is(x.value, {p.R, p.K, p.E});
  if (quantized(p.stored)) {
    fit = fit && is(x.k_scales, {p.L, p.N, p.K, p.P}) && is(x.v_scales, {p.L, p.N, p.K, p.P});
    fit = fit && x.k_scales.element_type() == ffi::DataType::F32 &&
          x.v_scales.element_type() == ffi::DataType::F32;
  }
  for (const ffi::AnyBuffer& whole : {x.table, x.lengths, x.row_offsets, x.layer, x.band}) {
    fit = fit && whole.element_type() == ffi::DataType::S32;
  }
  fit = fit && x.scale.element_type() == ffi::DataType::F32 &&
        x.sinks.element_type() == ffi::DataType::F32 &&
        x.v_pages.element_type() == x.k_pages.element_type();
  if (!fit)
    return invalid_argument("the shapes or dtypes of the operands do not fit together.");
  if (p.K < 1 || p.H % p.K != 0 || p.P < 1)
    return invalid_argument("heads or pages are of no size.");
  return ffi::Error::Success();
}

// Sizes and pointers; `error` says what does not fit.
ffi::Error fill(const Operands& x, bool append, PagedParams& p) {
  auto q = x.query.dimensions(), k = x.k_pages.dimensions(), v = x.v_pages.dimensions();
  auto table = x.table.dimensions();
  if (q.size() != 3 || k.size() != 5 || v.size() != 5 || table.size() != 2) {
    return invalid_argument("an operand has the invalid_argument number of axes.");
  }
  p.R = q[0], p.H = q[1], p.D = q[2];
  p.L = k[0], p.N = k[1], p.K = k[2], p.P = k[3], p.E = v[4];
  p.B = table[0], p.M = table[1];
  if (!type_of(x.query.element_type(), &p.type) ||
      !stored_of(x.k_pages.element_type(), &p.stored)) {
    return invalid_argument("it does not know the dtype of the query or of the pages.");
  }
  if (ffi::Error error = check_axes(x, p, append); error.failure()) return error;
  p.query = x.query.untyped_data();
  if (append) {
    if (!type_of(x.key.element_type(), &p.new_type) ||
        x.value.element_type() != x.key.element_type()) {
      return invalid_argument("it does not know the dtypes of the new keys and values.");
    }
    p.key = x.key.untyped_data(), p.value = x.value.untyped_data();
  }
  p.k_pages = x.k_pages.untyped_data(), p.v_pages = x.v_pages.untyped_data();
  if (quantized(p.stored)) {
    p.k_scales = static_cast<float*>(x.k_scales.untyped_data());
    p.v_scales = static_cast<float*>(x.v_scales.untyped_data());
  }
  p.table = x.table.typed_data<int32_t>();
  p.lengths = x.lengths.typed_data<int32_t>();
  p.row_offsets = x.row_offsets.typed_data<int32_t>();
  p.layer = *x.layer.typed_data<int32_t>();
  p.scale = *x.scale.typed_data<float>();
  p.band = band_of(x.band.typed_data<int32_t>());
  if (is(x.sinks, {p.H})) p.sinks = x.sinks.typed_data<float>();
  return ffi::Error::Success();
}

// Results: out and the log-sum-exp, then the pools appended to, which XLA must have
// aliased to the operands.
ffi::Error check_results(ffi::RemainingRets rets, const Operands& x, bool append,
                         PagedParams& p) {
  auto out = rets.get<ffi::AnyBuffer>(0);
  if (!out.has_value() || !is(**out, {p.R, p.H, p.E}) ||
      (*out)->element_type() != x.query.element_type()) {
    return invalid_argument("the result does not fit the query.");
  }
  p.out = (*out)->untyped_data();
  auto lse = rets.get<ffi::AnyBuffer>(1);
  if (!lse.has_value() || !is(**lse, {p.R, p.H}) ||
      (*lse)->element_type() != ffi::DataType::F32) {
    return invalid_argument("the log-sum-exp does not fit the query.");
  }
  p.lse = (*lse)->typed_data<float>();
  if (!append) return ffi::Error::Success();
  const ffi::AnyBuffer* pools[] = {&x.k_pages, &x.v_pages, &x.k_scales, &x.v_scales};
  for (size_t i = 0; i < (quantized(p.stored) ? 4 : 2); ++i) {
    auto pool = rets.get<ffi::AnyBuffer>(i + 2);
    if (!pool.has_value() || (*pool)->untyped_data() != pools[i]->untyped_data()) {
      return invalid_argument(
          "the pool came back as another buffer, so it cannot be updated in place.");
    }
  }
  return ffi::Error::Success();
}

ffi::Error paged(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets,
                 bool append, Code mask_code, int64_t mask_arrays, Code score_code,
                 int64_t score_arrays) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr)
    return invalid_argument("RAPTAX_ISA names no instruction set of this machine.");
  ffi::ErrorOr<Operands> operands = read(args, append);
  if (operands.has_error()) return operands.error();
  PagedParams problem{};
  if (ffi::Error error = fill(*operands, append, problem); error.failure()) return error;
  if (ffi::Error error = check_results(rets, *operands, append, problem); error.failure()) {
    return error;
  }
  Programs programs(args, operands->count);
  Program mask, score;
  bool has_mask = false, has_score_mod = false;
  if (ffi::Error error = programs.read(mask_code, mask_arrays, false, mask, has_mask);
      error.failure()) {
    return error;
  }
  if (ffi::Error error = programs.read(score_code, score_arrays, true, score, has_score_mod);
      error.failure()) {
    return error;
  }
  if (!programs.finished()) return invalid_argument("there are arrays that no mod reads.");
  if (has_mask) problem.mask_program = &mask;
  if (has_score_mod) problem.score_program = &score;
  char message[400];
  if (!check(problem, message, sizeof message)) return invalid_argument(message);
  int64_t missing = kernels->paged(problem, XlaThreadPool(threads));
  if (missing < 0) return ffi::Error::Success();
  describe_missing_page(problem, missing, message, sizeof message);
  return invalid_argument(message);
}

}  // namespace
}  // namespace raptax

RAPTAX_HANDLER(raptax_paged, raptax::paged,
               ffi::Ffi::Bind()
                   .Ctx<ffi::ThreadPool>()
                   .RemainingArgs()
                   .RemainingRets()
                   .Attr<bool>("append")
                   .Attr<raptax::Code>("mask_code")
                   .Attr<int64_t>("mask_arrays")
                   .Attr<raptax::Code>("score_code")
                   .Attr<int64_t>("score_arrays"));
