// Random products with packed weights against plain loops in double precision. Every
// array has just its size, so that a sanitizer sees any step beyond it. See
// `make native-test`; RAPTAX_ISA picks the instruction set.
//
//   packed_fuzz [cases [seed]]

#include <cmath>
#include <string>
#include <vector>

#include "tests/fuzz/fuzz.h"

using namespace raptax;
using namespace raptax::fuzz;

namespace {

struct Case {
  PackedLinearParams p{};
  Arrays arrays;
  std::vector<std::vector<double>> weights;  // (O, C) of each part

  Case() {
    p.C = 32 * between(1, 9), p.M = chance(50) ? between(1, 4) : between(5, 40);
    p.type = static_cast<Type>(between(0, 2)), p.int8 = chance(50);
    p.count = between(1, chance(80) ? 3 : kMaxParts);
    p.x = arrays.keep(random_rows(p.type, p.M * p.C));
    for (int64_t n = 0; n < p.count; ++n) fill(p.parts[n]);
    p.y = arrays.keep(Bytes(p.M * p.O * bytes_of(p.type)));
  }

  void fill(PackedWeight& w) {
    w.O = between(1, 50), w.C = p.C, w.tiles = (w.O + kTileRows - 1) / kTileRows;
    w.bits = chance(50) ? 4 : 8, w.zero = w.bits == 4 ? between(0, 15) : 0;
    w.group = chance(50) ? 16 : 32, w.block = w.group;
    while (chance(40) && p.C % (2 * w.block) == 0) w.block *= 2;
    w.scale_type = chance(50) ? Type::kF16 : Type::kF32;
    int64_t scales = w.tiles * (p.C / w.block) * kTileRows;
    int64_t factors = w.tiles * (p.C / w.group) * kTileRows;
    w.codes = bytes<uint8_t>(w.tiles * w.code_bytes());
    w.scales = arrays.keep(random_rows(w.scale_type, scales));
    if (chance(50)) w.factors = bytes<int8_t>(factors);
    if (chance(50)) w.offsets = arrays.keep(random_rows(w.scale_type, scales));
    if (w.offsets != nullptr && chance(50)) w.offset_factors = bytes<uint8_t>(factors);
    p.O += w.O;
    std::vector<double> numbers;
    for (int64_t o = 0; o < w.O; ++o) {
      for (int64_t c = 0; c < p.C; ++c) numbers.push_back(number(w, o, c));
    }
    weights.push_back(std::move(numbers));
  }

  template <typename T>
  const T* bytes(int64_t count) {
    std::vector<T> x;
    for (int64_t i = 0; i < count; ++i) x.push_back(static_cast<T>(rng()));
    return arrays.keep(x);
  }

  // W[o, c], by the layout that packed_linear_params.h states.
  static double number(const PackedWeight& w, int64_t o, int64_t c) {
    int64_t tile = o / kTileRows, row = o % kTileRows, inputs = 32 / w.bits;
    int64_t word = (tile * (w.C / inputs) + c / inputs) * kTileRows + row, i = c % inputs;
    uint8_t byte = w.codes[4 * word + i % 4];
    int64_t code = static_cast<int8_t>(byte);
    if (w.bits == 4) code = (i < 4 ? byte & 15 : byte >> 4) - w.zero;
    int64_t scale = (tile * (w.C / w.block) + c / w.block) * kTileRows + row;
    int64_t group = (tile * (w.C / w.group) + c / w.group) * kTileRows + row;
    double x = read(w.scales, w.scale_type, scale) * static_cast<double>(code);
    if (w.factors != nullptr) x *= w.factors[group];
    if (w.offsets == nullptr) return x;
    double offset = read(w.offsets, w.scale_type, scale);
    return x + (w.offset_factors == nullptr ? offset : offset * w.offset_factors[group]);
  }
};

// What x counts as: itself, or the multiples of the largest of its 32 over 127.
std::vector<double> row_of(const PackedLinearParams& p, int64_t m, std::vector<double>* step) {
  std::vector<double> x;
  for (int64_t c = 0; c < p.C; ++c) x.push_back(read(p.x, p.type, m * p.C + c));
  for (int64_t c = 0; c < p.C; ++c) {
    double most = 0;
    for (int64_t i = c / 32 * 32; i < c / 32 * 32 + 32; ++i) {
      most = std::fmax(most, std::fabs(x[static_cast<size_t>(i)]));
    }
    step->push_back(p.int8 ? most / 127 : 0);
  }
  return x;
}

void test(const Kernels& kernels) {
  Case c;
  const PackedLinearParams& p = c.p;
  kernels.packed_linear(p, Serial(chance(50)));
  for (int64_t m = 0; m < p.M; ++m) {
    std::vector<double> step, x = row_of(p, m, &step);
    int64_t column = 0;
    for (int64_t n = 0; n < p.count; ++n) {
      const PackedWeight& w = p.parts[n];
      for (int64_t o = 0; o < w.O; ++o, ++column) {
        double sum = 0, size = 0, rounding = 0;
        for (int64_t i = 0; i < p.C; ++i) {
          auto at = static_cast<size_t>(i);
          double W = c.weights[static_cast<size_t>(n)][static_cast<size_t>(o * p.C) + at];
          // Unsigned codes are larger than those that they stand for.
          double scale = std::fabs(read(
              w.scales, w.scale_type,
              (o / kTileRows * (p.C / w.block) + i / w.block) * kTileRows + o % kTileRows));
          int64_t group = (o / kTileRows * (p.C / w.group) + i / w.group) * kTileRows;
          if (w.factors != nullptr) scale *= std::abs(w.factors[group + o % kTileRows]);
          sum += x[at] * W, rounding += step[at] / 2 * std::fabs(W);
          size += std::fabs(x[at]) * (std::fabs(W) + 128 * scale);
        }
        double y = read(p.y, p.type, m * p.O + column);
        double most = rounding + 4e-6 * size + 2 * step_of(as_stored(p.type)) * std::fabs(sum);
        if (p.type == Type::kF16 && std::fabs(sum) > 60000) continue;  // not a float16
        if (!(std::fabs(y - sum) <= most + 1e-6)) {
          return fail("y[" + std::to_string(m) + ", " + std::to_string(column) + "]",
                      std::to_string(y) + " for " + std::to_string(sum) + " +- " +
                          std::to_string(most));
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return run_cases("packed", argc, argv, test); }
