// The handler of products with packed weights; see src/raptax/kernels/cpu/packed_linear.py.
#include "api/packed_linear_params.h"

#include <string>

#include "api/kernel_table.h"
#include "ffi/common.h"

namespace raptax {
namespace {

constexpr size_t kWordsPerPart = 7;

ffi::Error invalid_argument(const std::string& sentence) {
  return ffi::Error::InvalidArgument("packed_linear: " + sentence);
}

// Reads the arrays of weights, each a stack along the first axis, of which one is taken.
class Stacks {
 public:
  Stacks(ffi::RemainingArgs args, int64_t index) : args_(args), index_(index) {}

  // One of the stack of the next array, which has `size` elements; null if it does not fit.
  const void* next(int64_t size, ffi::DataType* dtype, int64_t element_bytes) {
    auto x = args_.get<ffi::AnyBuffer>(next_++);
    if (!x.has_value()) return nullptr;
    int64_t all = static_cast<int64_t>(x->element_count());
    if (size <= 0 || all % size != 0 || index_ < 0 || index_ >= all / size) return nullptr;
    *dtype = x->element_type();
    int64_t bytes = element_bytes > 0 ? element_bytes : *dtype == ffi::DataType::F32 ? 4 : 2;
    return static_cast<const char*>(x->untyped_data()) + index_ * size * bytes;
  }
  bool finished() const { return next_ == args_.size(); }

 private:
  ffi::RemainingArgs args_;
  int64_t index_;
  size_t next_ = 0;
};

// A weight from its words: outputs, bits, zero, group, block, has factors, has offsets
// (2: with factors of their own).
bool fill(const int32_t* words, int64_t C, Stacks& arrays, PackedWeight& w) {
  w.O = words[0], w.C = C, w.bits = words[1], w.zero = words[2];
  w.group = words[3], w.block = words[4];
  w.tiles = (w.O + kTileRows - 1) / kTileRows;
  bool known = (w.bits == 4 || w.bits == 8) && (w.group == 16 || w.group == 32);
  int64_t groups = known && w.block % w.group == 0 ? w.block / w.group : 0;
  if (w.O < 1 || groups < 1 || (groups & (groups - 1)) != 0) return false;
  if (C % w.block != 0 || C % 32 != 0) return false;
  int64_t factors = w.tiles * (C / w.group) * kTileRows;
  int64_t scales = w.tiles * (C / w.block) * kTileRows;
  auto dtype = ffi::DataType::U8;
  w.codes = static_cast<const uint8_t*>(arrays.next(w.tiles * w.code_bytes(), &dtype, 1));
  if (w.codes == nullptr || dtype != ffi::DataType::U8) return false;
  w.scales = arrays.next(scales, &dtype, 0);
  if (w.scales == nullptr || !type_of(dtype, &w.scale_type)) return false;
  if (words[5] != 0) {
    w.factors = static_cast<const int8_t*>(arrays.next(factors, &dtype, 1));
    if (w.factors == nullptr || dtype != ffi::DataType::S8) return false;
  }
  if (words[6] == 0) return true;
  w.offsets = arrays.next(scales, &dtype, 0);
  Type type;
  if (w.offsets == nullptr || !type_of(dtype, &type) || type != w.scale_type) return false;
  if (words[6] == 1) return true;
  w.offset_factors = static_cast<const uint8_t*>(arrays.next(factors, &dtype, 1));
  return w.offset_factors != nullptr && dtype == ffi::DataType::U8;
}

ffi::Error packed_linear(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer index,
                         ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> y,
                         ffi::Span<const int32_t> parts, bool int8) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) {
    return invalid_argument("RAPTAX_ISA names no instruction set of this machine.");
  }
  auto shape = x.dimensions(), result = y->dimensions();
  if (shape.size() != 2 || result.size() != 2 || result[0] != shape[0] ||
      y->element_type() != x.element_type() || index.element_type() != ffi::DataType::S32 ||
      index.element_count() != 1) {
    return invalid_argument("x, y or the index has another shape or dtype.");
  }
  PackedLinearParams p{};
  p.M = shape[0], p.C = shape[1], p.O = result[1], p.int8 = int8;
  p.x = x.untyped_data(), p.y = y->untyped_data();
  p.count = static_cast<int64_t>(parts.size() / kWordsPerPart);
  if (!type_of(x.element_type(), &p.type) || parts.size() % kWordsPerPart != 0 || p.count < 1 ||
      p.count > kMaxParts) {
    return invalid_argument("it does not know the dtype of x, or takes fewer weights.");
  }
  Stacks arrays(args, *index.typed_data<int32_t>());
  int64_t outputs = 0;
  for (int64_t n = 0; n < p.count; ++n) {
    const int32_t* words = parts.begin() + n * kWordsPerPart;
    if (!fill(words, p.C, arrays, p.parts[n])) {
      return invalid_argument("the arrays of weight " + std::to_string(n) +
                              " do not fit x, the index or each other.");
    }
    outputs += p.parts[n].O;
  }
  if (outputs != p.O || !arrays.finished()) {
    return invalid_argument("the weights do not have as many outputs as y.");
  }
  if (p.M > 0) kernels->packed_linear(p, XlaThreadPool(threads));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace raptax

RAPTAX_HANDLER(raptax_packed_linear, raptax::packed_linear,
               ffi::Ffi::Bind()
                   .Ctx<ffi::ThreadPool>()
                   .Arg<ffi::AnyBuffer>()
                   .Arg<ffi::AnyBuffer>()
                   .RemainingArgs()
                   .Ret<ffi::AnyBuffer>()
                   .Attr<ffi::Span<const int32_t>>("parts")
                   .Attr<bool>("int8"));
