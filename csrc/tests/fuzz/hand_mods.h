// Mod programs written by hand, each with the plain function that it stands for.
#pragma once

#include <algorithm>
#include <functional>

#include "api/mod_program.h"
#include "tests/fuzz/fuzz.h"

namespace raptax {
namespace fuzz {

// Where a score stands; q is the absolute position of its query.
struct Place {
  int64_t b, h, q, k;
};

typedef std::function<double(const Place&, double)> Function;

struct Mod {
  Program program, slope;  // without code: there is none, and a slope is 1
  Function value;          // the changed score, or whether it is allowed
  Function derivative;

  explicit operator bool() const { return program.code != nullptr; }
};

// An array that a mod reads; outside of it the nearest entry counts.
struct Lookup {
  Captured array;

  double operator()(int64_t i) const {
    i = std::min(std::max<int64_t>(i, 0), array.size - 1);
    const auto* bytes = static_cast<const int8_t*>(array.data);
    switch (array.entry) {
      case Entry::kI32: return static_cast<const int32_t*>(array.data)[i];
      case Entry::kI8: return bytes[i];
      case Entry::kU8:
      case Entry::kBool: return static_cast<uint8_t>(bytes[i]);
      default: return read(array.data, static_cast<Type>(array.entry), i);
    }
  }
};

class ModWriter {
 public:
  ModWriter(Arrays* arrays, std::vector<Captured> captured)
      : arrays_(arrays), captured_(std::move(captured)) {}

  int32_t add(Op op, int32_t a = 0, int32_t b = 0, int32_t c = 0) {
    words_.insert(words_.end(), {static_cast<int32_t>(op), a, b, c});
    return static_cast<int32_t>(words_.size() / 4) - 1;
  }
  int32_t number(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return add(Op::kConstant, bits);
  }
  int32_t whole(int64_t x) { return add(Op::kConstant, static_cast<int32_t>(x)); }
  // Query * width + key, as 32 bits have it.
  int32_t square(int64_t width) {
    int32_t row = add(Op::kIntMul, add(Op::kQuery), whole(width));
    return add(Op::kIntAdd, row, add(Op::kKey));
  }

  Program done(bool reads_scores) const {
    Program program;
    program.code = arrays_->keep(words_);
    program.code_size = static_cast<int64_t>(words_.size());
    program.arrays = arrays_->keep(captured_);
    program.array_count = static_cast<int64_t>(captured_.size());
    if (const char* reason = unsupported_reason(program, reads_scores)) fail("program", reason);
    return program;
  }

 private:
  Arrays* arrays_;
  std::vector<Captured> captured_;
  std::vector<int32_t> words_;
};

inline int64_t square_index(const Place& at, int64_t width) {
  uint32_t row = static_cast<uint32_t>(at.q) * static_cast<uint32_t>(width);
  return static_cast<int32_t>(row + static_cast<uint32_t>(at.k));
}

inline Lookup random_floats(Arrays* arrays, int64_t size) {
  Type type = static_cast<Type>(between(0, 2));
  return {{arrays->keep(random_rows(type, size)), static_cast<Entry>(type), size}};
}
inline Lookup random_wholes(Arrays* arrays, Entry entry, int64_t size, int64_t most) {
  Bytes bytes(size * (entry == Entry::kI32 ? 4 : 1));
  for (int64_t i = 0; i < size; ++i) {
    int32_t x = static_cast<int32_t>(between(0, most));
    if (entry == Entry::kI32)
      std::memcpy(bytes.data + 4 * i, &x, 4);
    else
      bytes.data[i] = static_cast<char>(x);
  }
  return {{arrays->keep(std::move(bytes)), entry, size}};
}

// ------------------------------------------------------------------------ score changes

// cap * tanh((x + table[q * width + k]) / cap), perhaps without a table.
inline Mod soft_cap(Arrays* arrays, int64_t width, bool has_table) {
  Lookup table = random_floats(arrays, has_table ? width * 5 : 1);
  float cap = static_cast<float>(between(1, 30)), inverse = 1 / cap;
  auto program = [&](Op last, float factor) {
    ModWriter w(arrays, {table.array});
    int32_t x = w.add(Op::kScore);
    if (has_table) x = w.add(Op::kAdd, x, w.add(Op::kGather, 0, w.square(width)));
    int32_t by = w.number(inverse), times = w.number(factor);
    w.add(last, x, by, times);
    return w.done(true);
  };
  auto inner = [=](const Place& at, double x) {
    if (has_table) x += table(square_index(at, width));
    return std::tanh(x * static_cast<double>(inverse));
  };
  Mod mod;
  mod.program = program(Op::kSoftCap, cap);
  mod.slope = program(Op::kSoftCapSlope, 1);
  mod.value = [=](const Place& at, double x) { return inner(at, x) * double(cap); };
  mod.derivative = [=](const Place& at, double x) {
    double t = inner(at, x);
    return 1 - t * t;
  };
  return mod;
}

// x + slopes[h] * (k - q).
inline Mod alibi(Arrays* arrays, int64_t H) {
  Lookup slopes = random_floats(arrays, H);
  ModWriter w(arrays, {slopes.array});
  int32_t x = w.add(Op::kScore), slope = w.add(Op::kGather, 0, w.add(Op::kHead));
  int32_t distance = w.add(Op::kToFloat, w.add(Op::kDistance));
  w.add(Op::kMulAdd, w.add(Op::kMul, slope, w.number(0.125f)), distance, x);
  Mod mod;
  mod.program = w.done(true);
  mod.value = [=](const Place& at, double x) {
    return x + slopes(at.h) * 0.125 * static_cast<double>(at.k - at.q);
  };
  return mod;
}

// x + table[k - q + shift], or table[q * width + k].
inline Mod added_table(Arrays* arrays, int64_t width, bool by_distance) {
  Lookup table = random_floats(arrays, between(1, 2 * width));
  int64_t shift = between(-3, width);
  ModWriter w(arrays, {table.array});
  int32_t x = w.add(Op::kScore);
  int32_t index =
      by_distance ? w.add(Op::kIntAdd, w.add(Op::kDistance), w.whole(shift)) : w.square(width);
  w.add(Op::kAdd, w.add(Op::kGather, 0, index), x);
  Mod mod;
  mod.program = w.done(true);
  mod.value = [=](const Place& at, double x) {
    return x + table(by_distance ? at.k - at.q + shift : square_index(at, width));
  };
  return mod;
}

// x * factors[k].
inline Mod multiplied(Arrays* arrays, int64_t S) {
  Lookup factors = random_floats(arrays, S);
  ModWriter w(arrays, {factors.array}), slope(arrays, {factors.array});
  w.add(Op::kMul, w.add(Op::kGather, 0, w.add(Op::kKey)), w.add(Op::kScore));
  slope.add(Op::kGather, 0, slope.add(Op::kKey));
  Mod mod;
  mod.program = w.done(true);
  mod.slope = slope.done(true);
  mod.value = [=](const Place& at, double x) { return factors(at.k) * x; };
  mod.derivative = [=](const Place& at, double) { return factors(at.k); };
  return mod;
}

// x * x / 16.
inline Mod squared(Arrays* arrays) {
  ModWriter w(arrays, {}), slope(arrays, {});
  int32_t x = w.add(Op::kScore);
  w.add(Op::kMul, w.add(Op::kMul, x, x), w.number(0.0625f));
  slope.add(Op::kMul, slope.add(Op::kScore), slope.number(0.125f));
  Mod mod;
  mod.program = w.done(true);
  mod.slope = slope.done(true);
  mod.value = [](const Place&, double x) { return x * x / 16; };
  mod.derivative = [](const Place&, double x) { return x / 8; };
  return mod;
}

inline Mod random_score_mod(Arrays* arrays, const Shape& s) {
  switch (between(0, 6)) {
    case 0: return soft_cap(arrays, s.S, false);
    case 1: return soft_cap(arrays, s.S, true);
    case 2: return alibi(arrays, s.H);
    case 3: return added_table(arrays, s.S, false);
    case 4: return added_table(arrays, s.S, true);
    case 5: return multiplied(arrays, s.S);
    default: return squared(arrays);
  }
}

// -------------------------------------------------------------------------------- masks

// (k - q) % n == 0, or |k - q| <= n.
inline Mod by_distance(Arrays* arrays, int64_t n, bool dilated) {
  ModWriter w(arrays, {});
  int32_t distance = w.add(Op::kDistance), limit = w.whole(n);
  if (dilated)
    w.add(Op::kIntEqual, w.add(Op::kFloorRem, distance, limit), w.whole(0));
  else
    w.add(Op::kIntLessEqual, w.add(Op::kIntAbs, distance), limit);
  Mod mod;
  mod.program = w.done(false);
  mod.value = [=](const Place& at, double) {
    int64_t apart = at.k - at.q;
    return dilated ? apart % n == 0 : std::abs(apart) <= n;
  };
  return mod;
}

// documents[q] == documents[k].
inline Mod same_document(Arrays* arrays, int64_t S) {
  const Entry entries[] = {Entry::kI32, Entry::kI8, Entry::kU8};
  Lookup documents = random_wholes(arrays, entries[between(0, 2)], S, 2);
  ModWriter w(arrays, {documents.array});
  int32_t mine = w.add(Op::kGather, 0, w.add(Op::kQuery));
  w.add(Op::kIntEqual, mine, w.add(Op::kGather, 0, w.add(Op::kKey)));
  Mod mod;
  mod.program = w.done(false);
  mod.value = [=](const Place& at, double) { return documents(at.q) == documents(at.k); };
  return mod;
}

// k < prefix[b], or k <= q, and not both q and h are odd.
inline Mod prefix(Arrays* arrays, const Shape& s) {
  Lookup prefixes = random_wholes(arrays, Entry::kI32, s.B, s.S);
  ModWriter w(arrays, {prefixes.array});
  int32_t key = w.add(Op::kKey), query = w.add(Op::kQuery);
  int32_t end = w.add(Op::kGather, 0, w.add(Op::kSequence));
  int32_t seen = w.add(Op::kIntLess, key, end);
  seen = w.add(Op::kOr, seen, w.add(Op::kIntLessEqual, key, query));
  int32_t odd = w.add(Op::kAnd, w.add(Op::kAnd, query, w.add(Op::kHead)), w.whole(1));
  w.add(Op::kAnd, w.add(Op::kIntEqual, odd, w.whole(0)), seen);
  Mod mod;
  mod.program = w.done(false);
  mod.value = [=](const Place& at, double) {
    bool seen = static_cast<double>(at.k) < prefixes(at.b) || at.k <= at.q;
    return seen && (at.q & at.h & 1) == 0;
  };
  return mod;
}

// allowed[q * S + k].
inline Mod allowed_table(Arrays* arrays, const Shape& s) {
  Lookup allowed = random_wholes(arrays, Entry::kBool, between(1, s.T * s.S), 1);
  ModWriter w(arrays, {allowed.array});
  w.add(Op::kGather, 0, w.square(s.S));
  Mod mod;
  mod.program = w.done(false);
  mod.value = [=](const Place& at, double) { return allowed(square_index(at, s.S)); };
  return mod;
}

inline Mod random_mask_mod(Arrays* arrays, const Shape& s) {
  switch (between(0, 4)) {
    case 0: return by_distance(arrays, between(1, 20), true);
    case 1: return by_distance(arrays, between(0, s.S), false);
    case 2: return same_document(arrays, s.S);
    case 3: return prefix(arrays, s);
    default: return allowed_table(arrays, s);
  }
}

}  // namespace fuzz
}  // namespace raptax
