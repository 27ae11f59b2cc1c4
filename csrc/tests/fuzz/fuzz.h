// What random tests of the kernels share: numbers, arrays of any type in memory of just
// their size, and the loop over cases.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "api/kernel_table.h"
#include "runtime/thread_pool.h"

namespace raptax {
namespace fuzz {

struct Serial final : ThreadPool {
  bool ascending;
  explicit Serial(bool up) : ascending(up) {}
  int threads() const override { return 1; }
  void run(int64_t count, void (*task)(void*, int64_t), void* context) const override {
    for (int64_t n = 0; n < count; ++n) task(context, ascending ? n : count - 1 - n);
  }
};

inline std::mt19937_64 rng;
inline int64_t between(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(rng() % static_cast<uint64_t>(high - low + 1));
}
inline bool chance(int64_t percent) { return between(1, 100) <= percent; }
inline float normal() {
  static std::normal_distribution<float> numbers;
  return numbers(rng);
}

// Memory of just so many bytes.
struct Bytes {
  explicit Bytes(int64_t count)
      : data(static_cast<char*>(std::malloc(count ? count : 1))), size(count) {}
  Bytes(Bytes&& other) noexcept : data(other.data), size(other.size) { other.data = nullptr; }
  ~Bytes() { std::free(data); }
  char* data;
  int64_t size;
};

// Arrays that live as long as their case.
class Arrays {
 public:
  char* keep(Bytes bytes) {
    owned_.push_back(std::move(bytes));
    return owned_.back().data;
  }
  template <typename T>
  T* keep(const std::vector<T>& x) {
    Bytes bytes(static_cast<int64_t>(x.size() * sizeof(T)));
    if (!x.empty()) std::memcpy(bytes.data, x.data(), x.size() * sizeof(T));
    return reinterpret_cast<T*>(keep(std::move(bytes)));
  }

 private:
  std::vector<Bytes> owned_;
};

// A float of some bits of fraction and of exponent, as IEEE 754 has it; `finite_only` is
// e4m3fn, which has no Inf and one NaN.
inline double decode(uint32_t code, int fraction, int exponent, bool finite_only) {
  uint32_t ones = (1u << exponent) - 1, e = code >> fraction & ones;
  uint32_t f = code & ((1u << fraction) - 1), sign = code >> (fraction + exponent) & 1;
  int bias = (1 << (exponent - 1)) - 1;
  double value =
      std::ldexp(e ? (1u << fraction) + f : f, static_cast<int>(e ? e : 1) - bias - fraction);
  if (finite_only ? (e == ones && f == (1u << fraction) - 1) : e == ones) {
    value = finite_only || f ? std::nan("") : std::numeric_limits<double>::infinity();
  }
  return sign ? -value : value;
}

inline double read(const void* from, PageType stored, int64_t i) {
  const char* data = static_cast<const char*>(from);
  if (stored == PageType::kF32) {
    float x;
    std::memcpy(&x, data + 4 * i, 4);
    return static_cast<double>(x);
  }
  if (bytes_of(stored) == 2) {
    uint16_t x;
    std::memcpy(&x, data + 2 * i, 2);
    return stored == PageType::kBF16 ? decode(x, 7, 8, false) : decode(x, 10, 5, false);
  }
  auto x = static_cast<uint8_t>(data[i]);
  if (stored == PageType::kS8) return static_cast<int8_t>(x);
  return stored == PageType::kE4M3 ? decode(x, 3, 4, true) : decode(x, 2, 5, false);
}

inline PageType as_stored(Type type) {
  if (type == Type::kF32) return PageType::kF32;
  return type == Type::kBF16 ? PageType::kBF16 : PageType::kF16;
}
inline double read(const void* from, Type type, int64_t i) {
  return read(from, as_stored(type), i);
}

inline void write_float(char* data, Type type, int64_t i, float x) {
  if (type == Type::kF32) {
    std::memcpy(data + 4 * i, &x, 4);
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (type == Type::kF16) {  // cut off: what it stands for is read back
    int exponent = static_cast<int>(bits >> 23 & 255) - 112;
    if (exponent > 31) exponent = 31;  // NaN and Inf; nothing else is that large here
    half = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (exponent > 0) half |= static_cast<uint16_t>(exponent << 10 | (bits >> 13 & 1023));
  }
  std::memcpy(data + 2 * i, &half, 2);
}

inline Bytes random_rows(Type type, int64_t count) {
  Bytes rows(count * bytes_of(type));
  for (int64_t i = 0; i < count; ++i) write_float(rows.data, type, i, normal());
  return rows;
}

inline double step_of(PageType stored) {  // largest relative rounding error
  switch (stored) {
    case PageType::kF32: return 6e-8;
    case PageType::kBF16: return 1.0 / 256;
    case PageType::kF16: return 1.0 / 2048;
    case PageType::kS8: return 0;
    case PageType::kE4M3: return 1.0 / 16;
    default: return 1.0 / 8;
  }
}

inline int failures = 0;
inline void fail(const std::string& what, const std::string& problem) {
  std::fprintf(stderr, "%s: %s\n", what.c_str(), problem.c_str());
  if (++failures > 10) std::exit(1);
}

// What main() does: `one` draws a case and tests it.
template <typename One>
int run_cases(const char* name, int argc, char** argv, const One& one) {
  int64_t cases = argc > 1 ? std::atoll(argv[1]) : 2000;
  int64_t seed = argc > 2 ? std::atoll(argv[2]) : 0;
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) {
    std::printf("%s: this machine does not have that instruction set\n", name);
    return 0;
  }
  for (int64_t n = 0; n < cases; ++n) {
    rng.seed(static_cast<uint64_t>(seed + n));
    int before = failures;
    one(*kernels);
    if (failures > before) std::fprintf(stderr, "  case %lld\n", (long long)(seed + n));
  }
  std::printf("%s: %lld cases on %s, %d wrong\n", name, (long long)cases, kernels->name,
              failures);
  return failures != 0;
}

}  // namespace fuzz
}  // namespace raptax
