// Random ragged batches against plain loops in double precision: what pages hold after
// appending, what rows get, and that slots no sequence owns, which are NaN here, are neither
// seen nor touched. Every array has just its size, so that a sanitizer sees any step
// beyond it. See `make native-test`; RAPTAX_ISA picks the instruction set.
//
//   paged_fuzz [cases [seed]]

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "tests/fuzz/fuzz.h"

using namespace raptax;
using namespace raptax::fuzz;

namespace {

struct Case {
  PagedParams p{};
  std::vector<int64_t> page_exists;
  int32_t *table = nullptr, *lengths = nullptr;  // as p has them
  Arrays arrays;
  bool quantised = false;

  Case() {
    p.B = between(0, 4), p.K = between(1, 3);
    p.H = p.K * (chance(80) ? between(1, 6) : between(7, 70));
    auto size = [] { return chance(70) ? between(1, 24) : between(25, 140); };
    p.D = size(), p.E = chance(60) ? p.D : size();
    p.L = between(1, 2), p.layer = between(0, p.L - 1), p.P = between(1, 20);
    p.type = static_cast<Type>(between(0, 2)), p.new_type = static_cast<Type>(between(0, 2));
    p.stored = static_cast<PageType>(between(0, 5));
    quantised = bytes_of(p.stored) == 1;
    p.scale = 1 / std::sqrt(static_cast<float>(p.D));
    if (chance(50)) p.band.right = chance(70) ? 0 : between(0, 5);
    if (chance(40)) p.band.left = between(-1, 40);
    fill_sequences();
    fill_pool();
  }

  void fill_sequences() {
    bool appends = chance(70);
    std::vector<int32_t> stored_lengths, offsets = {0};
    int64_t pages = 0;
    p.M = 1;
    for (int64_t b = 0; b < p.B; ++b) {
      int64_t rows = chance(85) ? between(0, 4) : between(5, 40);
      int64_t before = chance(90) ? between(0, 70) : between(1000, 1200);
      page_exists.push_back(before + rows);
      stored_lengths.push_back(static_cast<int32_t>(appends ? before : before + rows));
      offsets.push_back(offsets.back() + static_cast<int32_t>(rows));
      int64_t needed = (before + rows + p.P - 1) / p.P;
      p.M = needed > p.M ? needed : p.M;
      pages += needed;
    }
    p.M += between(0, 2), p.N = pages + between(1, 3), p.R = offsets.back() + between(0, 3);
    std::vector<int32_t> order(static_cast<size_t>(p.N)), pages_of;
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    std::shuffle(order.begin(), order.end(), rng);
    for (int64_t b = 0, next = 0; b < p.B; ++b) {
      for (int64_t m = 0; m < p.M; ++m) {
        bool needed = m * p.P < page_exists[static_cast<size_t>(b)];
        const int32_t rubbish[] = {-1, static_cast<int32_t>(p.N), INT32_MAX, INT32_MIN};
        pages_of.push_back(needed ? order[static_cast<size_t>(next++)] : rubbish[rng() % 4]);
      }
    }
    p.table = table = arrays.keep(pages_of);
    p.lengths = lengths = arrays.keep(stored_lengths);
    p.row_offsets = arrays.keep(offsets);
    p.query = arrays.keep(random_rows(p.type, p.R * p.H * p.D));
    p.out = arrays.keep(Bytes(p.R * p.H * p.E * bytes_of(p.type)));
    p.lse = arrays.keep(std::vector<float>(static_cast<size_t>(p.R * p.H)));
    if (chance(40)) {
      std::vector<float> sinks;
      for (int64_t h = 0; h < p.H; ++h) {
        sinks.push_back(chance(10) ? -std::numeric_limits<float>::infinity() : normal());
      }
      p.sinks = arrays.keep(sinks);
    }
    if (!appends) return;
    p.key = arrays.keep(random_rows(p.new_type, p.R * p.K * p.D));
    p.value = arrays.keep(random_rows(p.new_type, p.R * p.K * p.E));
  }

  // All NaN but for what sequences hold.
  void fill_pool() {
    int64_t tokens = p.L * p.N * p.K * p.P;
    auto poisoned = [&](int64_t size) {
      Bytes pool(tokens * size * bytes_of(p.stored));
      std::memset(pool.data, p.stored == PageType::kE4M3 ? 0x7f : 0xff,
                  static_cast<size_t>(tokens * size * bytes_of(p.stored)));
      return arrays.keep(std::move(pool));
    };
    p.k_pages = poisoned(p.D), p.v_pages = poisoned(p.E);
    if (quantised) {
      std::vector<float> scales(static_cast<size_t>(tokens), std::nanf(""));
      p.k_scales = arrays.keep(scales), p.v_scales = arrays.keep(scales);
    }
    for (int64_t b = 0; b < p.B; ++b) {
      for (int64_t s = 0; s < p.lengths[b]; ++s) {
        for (int64_t k = 0; k < p.K; ++k) fill_token(p.place(b, s) + k * p.P);
      }
    }
  }

  void fill_token(int64_t token) {
    auto fill = [&](void* pages, int64_t size, float* scale) {
      char* data = static_cast<char*>(pages);
      for (int64_t i = token * size; i < (token + 1) * size; ++i) {
        if (!quantised) {
          Type type = static_cast<Type>(p.stored);
          write_float(data, type, i, normal());
        } else {
          data[i] = static_cast<char>(p.stored == PageType::kS8 ? rng() : rng() & 0xbb);
        }
      }
      if (quantised) scale[token] = (p.stored == PageType::kE5M2 ? 1.0f : 0.02f) * 0.5f;
    };
    fill(p.k_pages, p.D, p.k_scales);
    fill(p.v_pages, p.E, p.v_scales);
  }

  double element(const void* pages, const float* scale, int64_t token, int64_t size,
                 int64_t i) const {
    double x = read(pages, p.stored, token * size + i);
    return scale == nullptr ? x : x * static_cast<double>(scale[token]);
  }
};

void fail(const Case& c, const std::string& what) {
  const PagedParams& p = c.p;
  char problem[300];
  std::snprintf(problem, sizeof problem,
                "B=%lld H=%lld K=%lld D=%lld E=%lld P=%lld type=%d new=%d stored=%d "
                "append=%d left=%lld right=%lld",
                (long long)p.B, (long long)p.H, (long long)p.K, (long long)p.D, (long long)p.E,
                (long long)p.P, (int)p.type, (int)p.new_type, (int)p.stored, p.key != nullptr,
                (long long)p.band.left, (long long)p.band.right);
  fuzz::fail(what, problem);
}

// What was appended is there, rounded once.
void check_appended(const Case& c) {
  const PagedParams& p = c.p;
  for (int64_t b = 0; p.key != nullptr && b < p.B; ++b) {
    for (int64_t t = 0; t < p.rows(b); ++t) {
      for (int64_t k = 0; k < p.K; ++k) {
        int64_t row = (p.row_offsets[b] + t) * p.K + k;
        int64_t token = p.place(b, p.first(b) + t) + k * p.P;
        for (int64_t i = 0; i < p.D + p.E; ++i) {
          bool key = i < p.D;
          int64_t size = key ? p.D : p.E, at = key ? i : i - p.D;
          double x = read(key ? p.key : p.value, p.new_type, row * size + at);
          const float* scale = key ? p.k_scales : p.v_scales;
          double y = c.element(key ? p.k_pages : p.v_pages, scale, token, size, at);
          double unit = scale == nullptr ? 6e-8 : static_cast<double>(scale[token]);
          if (p.stored == PageType::kE4M3) unit /= 512;
          if (p.stored == PageType::kE5M2) unit /= 65536;
          double bound = std::fabs(x) * step_of(p.stored) * 1.001 + 0.501 * unit;
          if (!(std::fabs(x - y) <= bound)) return fail(c, "appended wrongly");
        }
      }
    }
  }
}

// What every token of the pool holds, as plain numbers.
std::vector<double> unpacked(const Case& c, const void* pages, const float* scale,
                             int64_t size) {
  int64_t tokens = c.p.L * c.p.N * c.p.K * c.p.P;
  std::vector<double> x(static_cast<size_t>(tokens * size));
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t i = 0; i < size; ++i) {
      x[static_cast<size_t>(token * size + i)] = c.element(pages, scale, token, size, i);
    }
  }
  return x;
}

// What row t of sequence b gets for head h, followed by the log-sum-exp.
std::vector<double> expected_row(const Case& c, const std::vector<double>& keys,
                                 const std::vector<double>& values, int64_t b, int64_t t,
                                 int64_t h) {
  const PagedParams& p = c.p;
  std::vector<double> query;
  for (int64_t d = 0; d < p.D; ++d) {
    int64_t row = (p.row_offsets[b] + t) * p.H + h;
    query.push_back(read(p.query, p.type, row * p.D + d));
  }
  int64_t k = h / (p.H / p.K), position = p.first(b) + t;
  std::vector<double> out(static_cast<size_t>(p.E), 0.0), scores;
  std::vector<int64_t> tokens;
  double sink = p.sinks == nullptr ? -std::numeric_limits<double>::infinity()
                                   : static_cast<double>(p.sinks[h]);
  double high = sink;
  for (int64_t s = 0; s < p.keys(b); ++s) {
    if (s < position - p.band.left || s > position + p.band.right) continue;
    int64_t token = p.place(b, s) + k * p.P;
    double score = 0;
    for (int64_t d = 0; d < p.D; ++d) {
      score += query[static_cast<size_t>(d)] * keys[static_cast<size_t>(token * p.D + d)];
    }
    scores.push_back(score * static_cast<double>(p.scale)), tokens.push_back(token);
    high = std::fmax(high, scores.back());
  }
  double total = std::isinf(sink) ? 0 : std::exp(sink - high);
  for (size_t i = 0; i < scores.size(); ++i) {
    double weight = std::exp(scores[i] - high);
    total += weight;
    for (int64_t e = 0; e < p.E; ++e) {
      out[static_cast<size_t>(e)] += weight * values[static_cast<size_t>(tokens[i] * p.E + e)];
    }
  }
  for (double& x : out) x = total > 0 ? x / total : 0;
  out.push_back(high + std::log(total));
  return out;
}

void check_out(const Case& c) {
  const PagedParams& p = c.p;
  std::vector<double> keys = unpacked(c, p.k_pages, p.k_scales, p.D);
  std::vector<double> values = unpacked(c, p.v_pages, p.v_scales, p.E);
  // Weights may be rounded to bfloat16 where the query is.
  double close = p.type == Type::kF32 ? 4e-5 : p.type == Type::kF16 ? 2e-3 : 1.6e-2;
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t t = 0; t < p.rows(b); ++t) {
      for (int64_t h = 0; h < p.H; ++h) {
        std::vector<double> wanted = expected_row(c, keys, values, b, t, h);
        for (int64_t e = 0; e < p.E; ++e) {
          double x = wanted[static_cast<size_t>(e)];
          double y = read(p.out, p.type, ((p.row_offsets[b] + t) * p.H + h) * p.E + e);
          if (std::fabs(x - y) <= close * (1 + std::fabs(x))) continue;
          return fail(c, "row " + std::to_string(t) + " of sequence " + std::to_string(b) +
                             ": " + std::to_string(y) + " for " + std::to_string(x));
        }
        double x = wanted.back();
        double y = static_cast<double>(p.lse[(p.row_offsets[b] + t) * p.H + h]);
        bool same = std::isinf(x) ? x == y : std::fabs(x - y) <= close * (1 + std::fabs(x));
        if (!same) {
          return fail(c, "log-sum-exp " + std::to_string(y) + " for " + std::to_string(x));
        }
      }
    }
  }
  for (int64_t i = p.row_offsets[p.B] * p.H * p.E; i < p.R * p.H * p.E; ++i) {
    if (read(p.out, p.type, i) != 0) return fail(c, "padding is not zero");
  }
  for (int64_t i = p.row_offsets[p.B] * p.H; i < p.R * p.H; ++i) {
    if (!std::isinf(p.lse[i])) return fail(c, "padding has a log-sum-exp");
  }
}

// Breaks one number that matters; check() must say so.
void check_refusal(Case& c) {
  PagedParams& p = c.p;
  char message[400] = "";
  for (int64_t b = 0; b < p.B; ++b) {
    if (p.rows(b) == 0) continue;
    int32_t& last = c.table[b * p.M + (p.keys(b) - 1) / p.P];
    bool needed = p.key != nullptr || p.end_key(b, p.rows(b) - 1) == p.keys(b);
    if (!needed || p.first_key(b) >= p.keys(b)) continue;
    int32_t before = last;
    last = chance(50) ? -1 : static_cast<int32_t>(p.N);
    if (check(p, message, sizeof message)) fail(c, "a bad page passed");
    last = before;
    int32_t& length = c.lengths[b];
    before = length;
    length = static_cast<int32_t>(p.M * p.P + 1);
    if (check(p, message, sizeof message)) fail(c, "a bad length passed");
    length = before;
  }
}

void test(const Kernels& kernels) {
  Case c;
  char message[400];
  if (!check(c.p, message, sizeof message)) return fail(c, message);
  int64_t missing = kernels.paged(c.p, Serial(false));  // backwards: order is open
  if (missing >= 0) return fail(c, "a page was said to be missing");
  check_appended(c);
  check_out(c);
  check_refusal(c);
}

}  // namespace

int main(int argc, char** argv) { return run_cases("paged", argc, argv, test); }
