#include "ffi/mod_program.h"

#include <string>

#include "api/kernel_table.h"

namespace raptax {

// False for a type that programs do not read.
static bool entry_of(ffi::DataType type, Entry& entry) {
  switch (type) {
    case ffi::DataType::F32: entry = Entry::kF32; return true;
    case ffi::DataType::BF16: entry = Entry::kBF16; return true;
    case ffi::DataType::F16: entry = Entry::kF16; return true;
    case ffi::DataType::S32: entry = Entry::kI32; return true;
    case ffi::DataType::S8: entry = Entry::kI8; return true;
    case ffi::DataType::U8: entry = Entry::kU8; return true;
    case ffi::DataType::PRED: entry = Entry::kBool; return true;
    default: return false;
  }
}

ffi::Error Programs::read(Code code, int64_t count, bool reads_scores, Program& program,
                          bool& has) {
  const size_t first = arrays_.size();
  if (count < 0 || next_ + static_cast<size_t>(count) > args_.size()) {
    return ffi::Error::InvalidArgument("the arrays of a program are missing");
  }
  for (int64_t i = 0; i < count; ++i) {
    ffi::ErrorOr<ffi::AnyBuffer> array = args_.get<ffi::AnyBuffer>(next_++);
    if (!array.has_value()) return array.error();
    Captured captured{array->untyped_data(), Entry::kF32,
                      static_cast<int64_t>(array->element_count())};
    if (!entry_of(array->element_type(), captured.entry)) {
      return ffi::Error::InvalidArgument("a program reads an array of an unknown type");
    }
    arrays_.push_back(captured);
  }
  has = code.size() > 0;
  program.code = code.begin();
  program.code_size = static_cast<int64_t>(code.size());
  program.arrays = arrays_.data() + first;
  program.array_count = count;
  const char* reason = has ? unsupported_reason(program, reads_scores) : nullptr;
  return reason == nullptr ? ffi::Error::Success() : ffi::Error::InvalidArgument(reason);
}

static ffi::Error run(ffi::Buffer<ffi::F32> scores, ffi::RemainingArgs arrays,
                      ffi::ResultBuffer<ffi::F32> out, Code code, int32_t what,
                      bool along_queries, int64_t first, int64_t columns, int64_t rows) {
  ProgramRun run;
  bool has = false;
  Programs programs(arrays, 0);
  ffi::Error error = programs.read(code, static_cast<int64_t>(arrays.size()),
                                   what != ProgramRun::kMask, run.program, has);
  if (error.failure()) return error;
  const auto shape = scores.dimensions();
  if (!has || shape.size() != 4 || columns < 1 || rows < 1 ||
      out->element_count() != scores.element_count()) {
    return ffi::Error::InvalidArgument("scores must be (B, H, T, S), as must be out");
  }
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) {
    return ffi::Error::InvalidArgument("RAPTAX_ISA names no set that runs here");
  }
  run.what = static_cast<ProgramRun::What>(what);
  run.along_queries = along_queries;
  run.B = shape[0], run.H = shape[1], run.T = shape[2], run.S = shape[3];
  run.first = first;
  run.columns = columns;
  run.rows = rows;
  run.scores = scores.typed_data();
  run.out = out->typed_data();
  kernels->run_program(run);
  return ffi::Error::Success();
}

}  // namespace raptax

RAPTAX_HANDLER(raptax_run_program, raptax::run,
               ffi::Ffi::Bind()
                   .Arg<ffi::Buffer<ffi::F32>>()
                   .RemainingArgs()
                   .Ret<ffi::Buffer<ffi::F32>>()
                   .Attr<raptax::Code>("code")
                   .Attr<int32_t>("what")
                   .Attr<bool>("along_queries")
                   .Attr<int64_t>("first")
                   .Attr<int64_t>("columns")
                   .Attr<int64_t>("rows"));
