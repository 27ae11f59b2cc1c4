// The operations of mod programs on rows of values: see mod_program.h for the list.

#pragma once

#include "api/mod_program.h"
#include "simd/math.h"
#include "simd/tanh.h"
#include "simd/vec.h"

namespace raptax {
namespace RAPTAX_ISA {

// The extent of an operation.
struct Area {
  int64_t rows, columns;
};

// Rows of values, or one value that stands for all of a row.
struct Operand {
  const float* data;
  bool is_row;
  int64_t step;  // from what belongs to one row to what belongs to the next

  Operand of_row(int64_t row) const { return {data + row * step, is_row, step}; }
};

// Broadcasts *value. Not through float arithmetic: the bits may be of an integer, which
// as a denormal would be flushed to 0.
static inline F32 load_broadcast(const float* value) {
  int32_t bits;
  memcpy(&bits, value, 4);
  return as_float(broadcast(bits));
}

static inline bool any(I32 mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

static inline bool all_same(const float* values, int64_t n) {
  const I32 first = as_bits(load_broadcast(values));
  I32 differ = I32{};
  for (int64_t i = 0; i < n; i += kLanes) {
    I32 other = as_bits(load(values + i)) ^ first;
    if (i + kLanes > n) other &= lane_indices() < static_cast<int32_t>(n - i);
    differ |= other;
  }
  return !any(differ);
}

// ----------------------------------------------------------------------------- integers

static inline I32 max(I32 a, I32 b) {
#if defined(__AVX512F__)
  return (I32)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
  return select(a > b, a, b);
#endif
}
static inline I32 min(I32 a, I32 b) {
#if defined(__AVX512F__)
  return (I32)_mm512_min_epi32((__m512i)a, (__m512i)b);
#else
  return select(a < b, a, b);
#endif
}

typedef double F64 __attribute__((vector_size(8 * RAPTAX_LANES)));

// a / b, rounded towards zero; XLA's answer to a division by zero is -1. Doubles hold
// these quotients well enough: one that is not whole is 1 / b away from being so.
static inline I32 divide(I32 a, I32 b) {
  const I32 valid = (b != 0) & ~((a == INT32_MIN) & (b == -1));
  const F64 x = __builtin_convertvector(a, F64);
  const F64 y = __builtin_convertvector(select(valid, b, I32{} + 1), F64);
  const I32 q = __builtin_convertvector(x / y, I32);  // a where invalid
  return select(b == 0, I32{} - 1, q);
}
// The same for one positive b, without dividing. Half a unit keeps the product away from
// whole numbers, where rounding would matter.
struct DivideBy {
  double inverse;
  I32 operator()(I32 a) const {
    const F64 x = __builtin_convertvector(a, F64);
    const F64 half = x < 0 ? F64{} - 0.5 : F64{} + 0.5;
    return __builtin_convertvector((x + half) * inverse, I32);
  }
};

static inline I32 multiply(I32 a, I32 b) { return (I32)((U32)a * (U32)b); }
static inline I32 add(I32 a, I32 b) { return (I32)((U32)a + (U32)b); }
static inline I32 subtract(I32 a, I32 b) { return (I32)((U32)a - (U32)b); }

enum class Division { kQuotient, kRemainder, kFloorQuotient, kFloorRemainder };

// The result of `what`, from the truncated quotient.
static inline I32 from_quotient(Division what, I32 a, I32 b, I32 q) {
  if (what == Division::kQuotient) return q;
  const I32 rest = select(b == 0, a, subtract(a, multiply(q, b)));
  if (what == Division::kRemainder) return rest;
  if (what == Division::kFloorRemainder) {
    const I32 across = (rest != 0) & ((rest ^ b) < 0);
    return select(b == 0, I32{}, rest + (across & b));
  }
  // As jnp.floor_divide has it, also for b = 0.
  const I32 sign_a = (a > 0) & 1, sign_b = (b > 0) & 1;
  const I32 differ = (sign_a | (a < 0)) != (sign_b | (b < 0));
  return add(q, differ & (rest != 0));
}

static inline I32 shift(Op op, I32 a, I32 by) {
  const I32 valid = (by >= 0) & (by < 32), n = by & 31;
  switch (op) {
    case Op::kShiftLeft: return ((I32)((U32)a << (U32)n)) & valid;
    case Op::kShiftRight: return select(valid, a >> n, a >> 31);
    default: return ((I32)((U32)a >> (U32)n)) & valid;
  }
}

static inline I32 to_int(F32 x) {
  const I32 q = __builtin_convertvector(
      clamp(select(x == x, x, broadcast(0.0f)), -2147483648.0f, 2147483520.0f), I32);
  return select(x >= 2147483648.0f, I32{} + INT32_MAX, q);
}

// -------------------------------------------------------------------------------- loops

// Sinks: what takes a vector of results, for the scores of a row from i on.
struct Store {
  float* out;
  int64_t stride;  // from row to row
  void next_row() { out += stride; }
  void operator()(int64_t i, F32 x) { store(out + i, x); }
  void operator()(int64_t i, I32 x) { store(out + i, as_float(x)); }
};

// Sets scores to -inf where the result is false, and beyond `count`.
struct MaskScores {
  float* scores;
  int64_t stride;
  int64_t count;
  I32 seen = I32{};  // lanes that were true
  void next_row() { scores += stride; }
  void operator()(int64_t i, I32 allowed) {
    if (i + kLanes > count) allowed &= lane_indices() < static_cast<int32_t>(count - i);
    seen |= allowed;
    store(scores + i, select(allowed, load(scores + i), broadcast(-kInf)));
  }
  void operator()(int64_t i, F32 allowed) { (*this)(i, as_bits(allowed)); }
};

struct Row {
  const float* data;
  F32 operator()(int64_t i) const { return load(data + i); }
};
struct One {
  F32 value;
  F32 operator()(int64_t) const { return value; }
};

template <typename Function, typename Sink>
RAPTAX_INLINE void map_row(Function f, Operand a, int64_t n, Sink& sink) {
  if (a.is_row) {
    for (int64_t i = 0; i < n; i += kLanes) sink(i, f(load(a.data + i)));
  } else {
    const auto x = f(load_broadcast(a.data));
    for (int64_t i = 0; i < n; i += kLanes) sink(i, x);
  }
}

template <typename Function, typename A, typename B, typename Sink>
RAPTAX_INLINE void loop(Function f, A a, B b, int64_t n, Sink& sink) {
  for (int64_t i = 0; i < n; i += kLanes) sink(i, f(a(i), b(i)));
}

template <typename Function, typename Sink>
RAPTAX_INLINE void map_row(Function f, Operand a, Operand b, int64_t n, Sink& sink) {
  if (!b.is_row) {
    const One y{load_broadcast(b.data)};
    map_row([=](F32 x) { return f(x, y.value); }, a, n, sink);
  } else if (a.is_row) {
    loop(f, Row{a.data}, Row{b.data}, n, sink);
  } else {
    loop(f, One{load_broadcast(a.data)}, Row{b.data}, n, sink);
  }
}

// Three operands: one that stands for a row is a vector that is read again and again.
template <typename Function, typename Sink>
RAPTAX_INLINE void map_row(Function f, Operand a, Operand b, Operand c, int64_t n, Sink& sink) {
  if (a.is_row && !b.is_row && !c.is_row) {
    const F32 y = load_broadcast(b.data), z = load_broadcast(c.data);
    return map_row([=](F32 x) { return f(x, y, z); }, a, n, sink);
  }
  if (a.is_row && !b.is_row) {
    const F32 y = load_broadcast(b.data);
    return loop([=](F32 x, F32 z) { return f(x, y, z); }, Row{a.data}, Row{c.data}, n, sink);
  }
  const Operand in[3] = {a, b, c};
  alignas(64) float copy[3][kLanes];
  const float* data[3];
  int64_t step[3];
  for (int j = 0; j < 3; ++j) {
    data[j] = in[j].is_row ? in[j].data : copy[j];
    step[j] = in[j].is_row ? 1 : 0;
    if (!in[j].is_row) store(copy[j], load_broadcast(in[j].data));
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    sink(i, f(load(data[0] + i * step[0]), load(data[1] + i * step[1]),
              load(data[2] + i * step[2])));
  }
}

// Row after row: map(f, operands, area, sink). Rows are short, so what is to be done is
// found out once for all of them.
template <typename Function, typename Sink>
static inline void map(Function f, Operand a, Area area, Sink& sink) {
  for (int64_t r = 0; r < area.rows; ++r, sink.next_row()) {
    map_row(f, a.of_row(r), area.columns, sink);
  }
}
template <typename Function, typename Sink>
static inline void map(Function f, Operand a, Operand b, Area area, Sink& sink) {
  for (int64_t r = 0; r < area.rows; ++r, sink.next_row()) {
    map_row(f, a.of_row(r), b.of_row(r), area.columns, sink);
  }
}
template <typename Function, typename Sink>
static inline void map(Function f, Operand a, Operand b, Operand c, Area area, Sink& sink) {
  for (int64_t r = 0; r < area.rows; ++r, sink.next_row()) {
    map_row(f, a.of_row(r), b.of_row(r), c.of_row(r), area.columns, sink);
  }
}

// A function of whole numbers as one of their bits.
template <typename Function>
struct OfInts {
  Function f;
  I32 operator()(F32 a) const { return f(as_bits(a)); }
  I32 operator()(F32 a, F32 b) const { return f(as_bits(a), as_bits(b)); }
};
template <typename Function>
static inline OfInts<Function> of_ints(Function f) {
  return {f};
}

template <typename Sink>
static inline void map_division(Division what, Operand a, Operand b, Area area, Sink& sink) {
  for (int64_t r = 0; r < area.rows; ++r, sink.next_row()) {
    const Operand x = a.of_row(r), y = b.of_row(r);
    if (!y.is_row && as_bits(load_broadcast(y.data))[0] > 0) {
      const DivideBy by{1.0 / as_bits(load_broadcast(y.data))[0]};
      map_row(of_ints([=](I32 x, I32 y) { return from_quotient(what, x, y, by(x)); }), x, y,
              area.columns, sink);
    } else {
      map_row(of_ints([=](I32 x, I32 y) { return from_quotient(what, x, y, divide(x, y)); }), x,
              y, area.columns, sink);
    }
  }
}

// ------------------------------------------------------------------------------ gathers

static inline float read(const float* p) { return *p; }
static inline int32_t read(const int32_t* p) { return *p; }
static inline int32_t read(const int8_t* p) { return *p; }
static inline int32_t read(const uint8_t* p) { return *p; }
static inline int32_t read(const bool* p) { return *p ? -1 : 0; }

struct BFloat16 {
  uint16_t bits;
};
static inline float read(const BFloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
struct Float16 {
  uint16_t bits;
};
static inline float read(const Float16* p) {
  const uint32_t size = p->bits & 0x7fff, sign = (p->bits & 0x8000u) << 16;
  // Not through numbers that are not normal: they may count as zero here.
  const float tiny = static_cast<float>(size) * 5.9604644775390625e-8f;
  uint32_t bits = size >= 0x7c00 ? (size << 13) | 0x7f800000 : (size << 13) + 0x38000000;
  if (size < 0x400) memcpy(&bits, &tiny, 4);
  bits |= sign;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

template <typename T>
static inline F32 read_run(const T* p) {
  decltype(read(p)) lane[kLanes];
  for (int j = 0; j < kLanes; ++j) lane[j] = read(p + j);
  F32 x;
  memcpy(&x, lane, sizeof x);
  return x;
}

template <typename T>
static inline F32 read_each(const T* data, I32 index) {
  decltype(read(data)) lane[kLanes];
  for (int j = 0; j < kLanes; ++j) lane[j] = read(data + index[j]);
  F32 x;
  memcpy(&x, lane, sizeof x);
  return x;
}
#if defined(__AVX512F__)
static inline F32 read_each(const float* data, I32 index) {
  return (F32)_mm512_i32gather_ps((__m512i)index, data, 4);
}
#elif defined(__AVX2__)
static inline F32 read_each(const float* data, I32 index) {
  return (F32)_mm256_i32gather_ps(data, (__m256i)index, 4);
}
#endif

// Whatever the index, nothing outside the array is read. Indices are often neighbours,
// since positions are.
template <typename T>
static void gather(const void* array, int64_t size, Operand index, float* out, int64_t n) {
  const T* data = static_cast<const T*>(array);
  const I32 last = broadcast(static_cast<int32_t>(size - 1)), count = lane_indices();
  for (int64_t i = 0; i < n; i += kLanes) {
    I32 at = as_bits(index.is_row ? load(index.data + i) : load_broadcast(index.data));
    at = min(max(at, I32{}), last);
    const int32_t first = at[0];
    if (!any(at ^ (count + first))) {
      store(out + i, read_run(data + first));
    } else if (!any(at ^ (I32{} + first))) {
      store(out + i, read_each(data, I32{} + first));
    } else {
      store(out + i, read_each(data, at));
    }
  }
}

static inline void gather(const Captured& array, Operand index, float* out, int64_t n) {
  switch (array.entry) {
    case Entry::kF32: return gather<float>(array.data, array.size, index, out, n);
    case Entry::kI32: return gather<int32_t>(array.data, array.size, index, out, n);
    case Entry::kBF16: return gather<BFloat16>(array.data, array.size, index, out, n);
    case Entry::kF16: return gather<Float16>(array.data, array.size, index, out, n);
    case Entry::kI8: return gather<int8_t>(array.data, array.size, index, out, n);
    case Entry::kU8: return gather<uint8_t>(array.data, array.size, index, out, n);
    case Entry::kBool: return gather<bool>(array.data, array.size, index, out, n);
  }
}

// ----------------------------------------------------------------------- all operations

// Comparisons and logic, with any sink. False if it is not one of them.
template <typename Sink>
static bool map_logic(Op op, Operand a, Operand b, Area area, Sink& sink) {
  switch (op) {
    case Op::kLess: map([](F32 x, F32 y) { return x < y; }, a, b, area, sink); return true;
    case Op::kLessEqual:
      map([](F32 x, F32 y) { return x <= y; }, a, b, area, sink);
      return true;
    case Op::kEqual: map([](F32 x, F32 y) { return x == y; }, a, b, area, sink); return true;
    case Op::kNotEqual: map([](F32 x, F32 y) { return x != y; }, a, b, area, sink); return true;
    case Op::kIntLess:
      map(of_ints([](I32 x, I32 y) { return x < y; }), a, b, area, sink);
      return true;
    case Op::kIntLessEqual:
      map(of_ints([](I32 x, I32 y) { return x <= y; }), a, b, area, sink);
      return true;
    case Op::kIntEqual:
      map(of_ints([](I32 x, I32 y) { return x == y; }), a, b, area, sink);
      return true;
    case Op::kIntNotEqual:
      map(of_ints([](I32 x, I32 y) { return x != y; }), a, b, area, sink);
      return true;
    case Op::kAnd:
      map(of_ints([](I32 x, I32 y) { return x & y; }), a, b, area, sink);
      return true;
    case Op::kOr:
      map(of_ints([](I32 x, I32 y) { return x | y; }), a, b, area, sink);
      return true;
    case Op::kXor:
      map(of_ints([](I32 x, I32 y) { return x ^ y; }), a, b, area, sink);
      return true;
    default: return false;
  }
}

// C library functions, lane by lane: slow but rarely used.
template <typename Function>
static inline void map_lanes(Function f, Operand a, Area area, Store& out) {
  map([=](F32 x) { return by_lane(f, x); }, a, area, out);
}
template <typename Function>
static inline void map_lanes(Function f, Operand a, Operand b, Area area, Store& out) {
  map([=](F32 x, F32 y) { return by_lane(f, x, y); }, a, b, area, out);
}

static inline F32 max_or_nan(F32 x, F32 y) { return select((x > y) | (x != x), x, y); }
static inline F32 min_or_nan(F32 x, F32 y) { return select((x < y) | (x != x), x, y); }

static inline void map_unary(Op op, Operand a, Area area, Store& out) {
  switch (op) {
    case Op::kNeg: return map([](F32 x) { return -x; }, a, area, out);
    case Op::kAbs: return map([](F32 x) { return abs(x); }, a, area, out);
    case Op::kSign:
      return map(
          [](F32 x) { return select((x == 0.0f) | (x != x), x, copysign(broadcast(1.0f), x)); },
          a, area, out);
    case Op::kFloor: return map([](F32 x) { return floor(x); }, a, area, out);
    case Op::kCeil: return map([](F32 x) { return ceil(x); }, a, area, out);
    case Op::kRound: return map([](F32 x) { return round_away(x); }, a, area, out);
    case Op::kRoundEven: return map([](F32 x) { return round_even(x); }, a, area, out);
    case Op::kExp: return map([](F32 x) { return exp(x); }, a, area, out);
    case Op::kExp2: return map([](F32 x) { return exp2(x); }, a, area, out);
    case Op::kExpm1: return map([](F32 x) { return expm1(x); }, a, area, out);
    case Op::kLog: return map([](F32 x) { return log(x); }, a, area, out);
    case Op::kLog1p: return map([](F32 x) { return log1p(x); }, a, area, out);
    case Op::kTanh: return map([](F32 x) { return tanh(x); }, a, area, out);
    case Op::kLogistic: return map([](F32 x) { return logistic(x); }, a, area, out);
    case Op::kSqrt: return map([](F32 x) { return sqrt(x); }, a, area, out);
    case Op::kRsqrt: return map([](F32 x) { return 1.0f / sqrt(x); }, a, area, out);
    case Op::kSin: return map_lanes([](float x) { return __builtin_sinf(x); }, a, area, out);
    case Op::kCos: return map_lanes([](float x) { return __builtin_cosf(x); }, a, area, out);
    case Op::kTan: return map_lanes([](float x) { return __builtin_tanf(x); }, a, area, out);
    case Op::kAtan: return map_lanes([](float x) { return __builtin_atanf(x); }, a, area, out);
    case Op::kSinh: return map_lanes([](float x) { return __builtin_sinhf(x); }, a, area, out);
    case Op::kCosh: return map_lanes([](float x) { return __builtin_coshf(x); }, a, area, out);
    case Op::kErfc: return map_lanes([](float x) { return __builtin_erfcf(x); }, a, area, out);
    case Op::kErf: return map_lanes([](float x) { return __builtin_erff(x); }, a, area, out);
    case Op::kCbrt: return map_lanes([](float x) { return __builtin_cbrtf(x); }, a, area, out);
    case Op::kIsFinite: return map([](F32 x) { return abs(x) < kInf; }, a, area, out);
    case Op::kToFloat:
      return map([](F32 x) { return __builtin_convertvector(as_bits(x), F32); }, a, area, out);
    case Op::kToInt: return map([](F32 x) { return to_int(x); }, a, area, out);
    case Op::kIntNeg:
      return map(of_ints([](I32 x) { return subtract(I32{}, x); }), a, area, out);
    case Op::kIntAbs:
      return map(of_ints([](I32 x) { return select(x < 0, subtract(I32{}, x), x); }), a, area,
                 out);
    case Op::kIntSign:
      return map(of_ints([](I32 x) { return (x < 0) | ((x > 0) & 1); }), a, area, out);
    default:  // kNot
      return map(of_ints([](I32 x) { return ~x; }), a, area, out);
  }
}

static inline void map_binary(Op op, Operand a, Operand b, Area area, Store& out) {
  switch (op) {
    case Op::kAdd: return map([](F32 x, F32 y) { return x + y; }, a, b, area, out);
    case Op::kSub: return map([](F32 x, F32 y) { return x - y; }, a, b, area, out);
    case Op::kMul: return map([](F32 x, F32 y) { return x * y; }, a, b, area, out);
    case Op::kDiv: return map([](F32 x, F32 y) { return x / y; }, a, b, area, out);
    case Op::kMax: return map([](F32 x, F32 y) { return max_or_nan(x, y); }, a, b, area, out);
    case Op::kMin: return map([](F32 x, F32 y) { return min_or_nan(x, y); }, a, b, area, out);
    case Op::kPow:
      return map_lanes([](float x, float y) { return __builtin_powf(x, y); }, a, b, area, out);
    case Op::kRem:
      return map_lanes([](float x, float y) { return __builtin_fmodf(x, y); }, a, b, area, out);
    case Op::kAtan2:
      return map_lanes([](float x, float y) { return __builtin_atan2f(x, y); }, a, b, area,
                       out);
    case Op::kIntAdd:
      return map(of_ints([](I32 x, I32 y) { return add(x, y); }), a, b, area, out);
    case Op::kIntSub:
      return map(of_ints([](I32 x, I32 y) { return subtract(x, y); }), a, b, area, out);
    case Op::kIntMul:
      return map(of_ints([](I32 x, I32 y) { return multiply(x, y); }), a, b, area, out);
    case Op::kIntMax:
      return map(of_ints([](I32 x, I32 y) { return max(x, y); }), a, b, area, out);
    case Op::kIntMin:
      return map(of_ints([](I32 x, I32 y) { return min(x, y); }), a, b, area, out);
    case Op::kIntDiv: return map_division(Division::kQuotient, a, b, area, out);
    case Op::kIntRem: return map_division(Division::kRemainder, a, b, area, out);
    case Op::kFloorDiv: return map_division(Division::kFloorQuotient, a, b, area, out);
    case Op::kFloorRem: return map_division(Division::kFloorRemainder, a, b, area, out);
    case Op::kShiftLeft:
    case Op::kShiftRight:
    case Op::kShiftRightLogical:
      return map(of_ints([=](I32 x, I32 y) { return shift(op, x, y); }), a, b, area, out);
    default: map_logic(op, a, b, area, out);
  }
}

static inline void map_ternary(Op op, Operand a, Operand b, Operand c, Area area, Store& out) {
  switch (op) {
    case Op::kSelect:
      return map([](F32 x, F32 y, F32 z) { return select(as_bits(x), y, z); }, a, b, c, area,
                 out);
    case Op::kMulAdd:
      return map([](F32 x, F32 y, F32 z) { return x * y + z; }, a, b, c, area, out);
    case Op::kSoftCap:
      return map([](F32 x, F32 y, F32 z) { return z * tanh(x * y); }, a, b, c, area, out);
    default:  // kSoftCapSlope
      return map(
          [](F32 x, F32 y, F32 z) {
            const F32 t = tanh(x * y);
            return z * ((1.0f - t) * (1.0f + t));
          },
          a, b, c, area, out);
  }
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
