// Random attention problems, forward and backward, against plain loops in double
// precision. Outputs are NaN beforehand and every array has just its size, so that a
// sanitizer sees any step beyond it. Threads must not change a bit. See `make native-test`;
// RAPTAX_ISA picks the instruction set.
//
//   attention_fuzz [cases [seed]]

#include "tests/fuzz/attention_case.h"
#include "tests/fuzz/pool.h"

using namespace raptax;
using namespace raptax::fuzz;

namespace {

typedef std::vector<double> Numbers;

// Sums, and how far from them a kernel may be.
struct Sums {
  Numbers value, slack;

  explicit Sums(int64_t count)
      : value(static_cast<size_t>(count)), slack(static_cast<size_t>(count)) {}
  void add(int64_t i, double x, double relative) {
    value[static_cast<size_t>(i)] += x;
    slack[static_cast<size_t>(i)] += std::abs(x) * relative;
  }
};

struct Results {
  Arrays arrays;
  BackwardParams p;
  int64_t biases;

  explicit Results(const Case& c) : p(c.p), biases(c.entries(c.p.d_bias)) {
    const Shape& s = c.shape();
    int64_t rows = s.B * s.H * s.T, bytes = bytes_of(p.forward.type);
    p.forward.out = poisoned(rows * s.E * bytes);
    p.forward.lse = static_cast<float*>(poisoned(rows * 4));
    p.d_query = poisoned(rows * s.D * bytes);
    p.d_key = poisoned(s.B * s.K * s.S * s.D * bytes);
    p.d_value = poisoned(s.B * s.K * s.S * s.E * bytes);
    if (p.d_bias.data != nullptr) {
      p.d_bias.data = arrays.keep(std::vector<float>(static_cast<size_t>(biases), 0.0f));
    }
    if (p.forward.score_params.sinks != nullptr) {
      p.d_sinks = static_cast<float*>(poisoned(s.H * 4));
    }
  }
  void run(const Kernels& kernels, const ThreadPool& parallel) {
    kernels.forward(p.forward, parallel);
    kernels.backward(p, parallel);
  }
  bool same(const Results& other) const {
    const Shape& s = p.forward.shape;
    int64_t rows = s.B * s.H * s.T, keys = s.B * s.K * s.S;
    int64_t bytes = bytes_of(p.forward.type);
    auto equal = [](const void* a, const void* b, int64_t count) {
      return a == nullptr || std::memcmp(a, b, static_cast<size_t>(count)) == 0;
    };
    return equal(p.forward.out, other.p.forward.out, rows * s.E * bytes) &&
           equal(p.forward.lse, other.p.forward.lse, rows * 4) &&
           equal(p.d_query, other.p.d_query, rows * s.D * bytes) &&
           equal(p.d_key, other.p.d_key, keys * s.D * bytes) &&
           equal(p.d_value, other.p.d_value, keys * s.E * bytes) &&
           equal(p.d_bias.data, other.p.d_bias.data, biases * 4) &&
           equal(p.d_sinks, other.p.d_sinks, s.H * 4);
  }

 private:
  void* poisoned(int64_t count) {
    Bytes bytes(count);
    if (count > 0) std::memset(bytes.data, 0xff, static_cast<size_t>(count));
    return arrays.keep(std::move(bytes));
  }
};

// One query row: its scores, how they depend on their bases, and how exact they can be.
struct Row {
  Numbers score, slope, kept;
  double inexact = 0;     // of a score, absolutely
  bool strange = false;   // some score is neither finite nor -inf
  bool infinite = false;  // so is the base of one

  Row(const Case& c, int64_t b, int64_t h, int64_t t) {
    const Shape& s = c.shape();
    const ScoreParams& score_params = c.score_params();
    const ForwardParams& f = c.p.forward;
    int64_t query = ((b * s.H + h) * s.T + t) * s.D;
    bool good_query = finite(f.query, query, s.D, f.type);
    for (int64_t k = 0; k < s.S; ++k) {
      Place at = c.place(b, h, t, k);
      int64_t row = (b * s.K + h / (s.H / s.K)) * s.S + k;
      bool seen = c.allowed(at);
      if (score_params.mask.data != nullptr) {
        seen &= score_params.mask.row(b, h, t)[k * score_params.mask.stride[3]] != 0;
      }
      kept.push_back(c.kept(at));
      if (!seen) {
        score.push_back(-kInfinite);
        slope.push_back(0);
        continue;
      }
      double product = 0, size = 0;
      for (int64_t d = 0; d < s.D; ++d) {
        double x = read(f.query, f.type, query + d) * read(f.key, f.type, row * s.D + d);
        product += x, size += std::abs(x);
      }
      double scale = static_cast<double>(score_params.scale), base = product * scale, bias = 0;
      if (score_params.bias.data != nullptr) {
        bias = static_cast<double>(
            score_params.bias.row(b, h, t)[k * score_params.bias.stride[3]]);
      }
      base += bias;
      bool good = good_query && finite(f.key, row * s.D, s.D, f.type) &&
                  finite(f.value, row * s.E, s.E, f.type);
      if (!good) base = std::nan("");
      double changed = c.score ? c.score.value(at, base) : base;
      double by = c.score && c.score.derivative ? c.score.derivative(at, base) : 1;
      score.push_back(changed);
      slope.push_back(by);
      strange |= !std::isfinite(changed) && changed != -kInfinite;
      infinite |= !std::isfinite(base);
      if (!std::isfinite(base)) continue;
      size = size * std::abs(scale) + std::abs(bias);
      inexact = std::max(inexact,
                         1e-6 * (size * std::max(1.0, std::abs(by)) + std::abs(changed) + 1));
    }
  }

 private:
  static bool finite(const void* data, int64_t first, int64_t count, Type type) {
    for (int64_t i = first; i < first + count; ++i) {
      if (!std::isfinite(read(data, type, i))) return false;
    }
    return true;
  }
};

class Check {
 public:
  explicit Check(const Case& c, const Results& results)
      : c_(c),
        s_(c.shape()),
        p_(results.p),
        type_(p_.forward.type),
        // Weights and gradients of scores are rounded to bfloat16 before a product.
        rounding_(type_ == Type::kBF16 ? 1.0 / 64 : 3e-6),
        d_query_(s_.B * s_.H * s_.T * s_.D),
        d_key_(s_.B * s_.K * s_.S * s_.D),
        d_value_(s_.B * s_.K * s_.S * s_.E),
        d_bias_(results.biases),
        d_sinks_(s_.H) {}

  void run() {
    bool strange = false;
    for (int64_t n = 0; n < s_.B * s_.H * s_.T; ++n) {
      int64_t b = n / (s_.H * s_.T), h = n / s_.T % s_.H, t = n % s_.T;
      Row row(c_, b, h, t);
      forward(row, n, b, h);
      strange |= row.strange || row.infinite;
      if (!strange) backward(row, n, b, h, t);
    }
    if (strange) return;  // gradients of what is not finite are not promised
    compare("dQ", p_.d_query, type_, d_query_);
    compare("dK", p_.d_key, type_, d_key_);
    compare("dV", p_.d_value, type_, d_value_);
    if (p_.d_bias.data != nullptr) compare("dbias", p_.d_bias.data, Type::kF32, d_bias_);
    if (p_.d_sinks != nullptr) compare("dsinks", p_.d_sinks, Type::kF32, d_sinks_);
  }

 private:
  void forward(const Row& row, int64_t n, int64_t b, int64_t h) {
    double sink = -kInfinite;
    if (c_.score_params().sinks != nullptr)
      sink = static_cast<double>(c_.score_params().sinks[h]);
    double high = sink;
    for (double x : row.score) high = std::max(high, x);  // passes over NaN
    bool nothing = high == -kInfinite && !row.strange;
    double total = nothing ? 0 : std::exp(sink - high);
    Sums out(s_.E);
    for (int64_t k = 0; k < s_.S; ++k) {
      auto i = static_cast<size_t>(k);
      if (row.score[i] == -kInfinite) continue;
      double weight = std::exp(row.score[i] - high);
      total += weight;
      int64_t first = ((b * s_.K + h / (s_.H / s_.K)) * s_.S + k) * s_.E;
      for (int64_t e = 0; e < s_.E; ++e) {
        double x = weight * row.kept[i] * read(p_.forward.value, type_, first + e);
        out.add(e, x, 2 * row.inexact + rounding_);
      }
    }
    for (int64_t e = 0; e < s_.E; ++e) {
      double actual = read(p_.forward.out, type_, n * s_.E + e);
      if (row.strange) {
        if (!std::isnan(actual)) report("out", e, actual, std::nan(""), 0);
        continue;
      }
      auto i = static_cast<size_t>(e);
      double share = total == 0 ? 0 : 1 / total;
      check("out", e, actual, out.value[i] * share, out.slack[i] * share, type_);
    }
    if (row.strange) return;
    double lse = nothing ? -kInfinite : high + std::log(total);
    double actual = static_cast<double>(p_.forward.lse[n]);
    if (lse == -kInfinite
            ? actual != lse
            : !(std::abs(actual - lse) < row.inexact + 2e-4 * (1 + std::abs(lse)))) {
      report("lse", n, actual, lse, row.inexact);
    }
  }

  void backward(const Row& row, int64_t n, int64_t b, int64_t h, int64_t t) {
    double lse = static_cast<double>(p_.forward.lse[n]);
    if (lse == -kInfinite) return;
    double delta = -static_cast<double>(p_.d_lse[n]), size = std::abs(delta);
    for (int64_t e = 0; e < s_.E; ++e) {
      double x = d_out(n, e) * read(p_.forward.out, type_, n * s_.E + e);
      delta += x, size += std::abs(x);
    }
    if (p_.d_sinks != nullptr) {
      double weight = std::exp(static_cast<double>(c_.score_params().sinks[h]) - lse);
      d_sinks_.add(h, -weight * delta, row.inexact + 1e-5);
      d_sinks_.slack[static_cast<size_t>(h)] += weight * size * 1e-5;
    }
    for (int64_t k = 0; k < s_.S; ++k) {
      auto i = static_cast<size_t>(k);
      if (row.score[i] == -kInfinite) continue;
      int64_t kv = (b * s_.K + h / (s_.H / s_.K)) * s_.S + k;
      double weight = std::exp(row.score[i] - lse), d_weight = 0, most = size;
      double relative = 2 * row.inexact + rounding_;
      for (int64_t e = 0; e < s_.E; ++e) {
        d_value_.add(kv * s_.E + e, weight * row.kept[i] * d_out(n, e), relative);
        double x = d_out(n, e) * read(p_.forward.value, type_, kv * s_.E + e) * row.kept[i];
        d_weight += x, most += std::abs(x);
      }
      double d_base = weight * (d_weight - delta) * row.slope[i];
      // Its slack comes from the parts, which may cancel.
      double slack = weight * most * std::abs(row.slope[i]) * (relative + 1e-6);
      double scale = static_cast<double>(c_.score_params().scale);
      auto spread = [&](Sums* sums, int64_t at, double factor) {
        sums->value[static_cast<size_t>(at)] += d_base * factor;
        sums->slack[static_cast<size_t>(at)] += slack * std::abs(factor);
      };
      for (int64_t d = 0; d < s_.D; ++d) {
        spread(&d_query_, n * s_.D + d, scale * read(p_.forward.key, type_, kv * s_.D + d));
        spread(&d_key_, kv * s_.D + d, scale * read(p_.forward.query, type_, n * s_.D + d));
      }
      if (p_.d_bias.data == nullptr) continue;
      const int64_t* stride = p_.d_bias.stride;
      spread(&d_bias_, b * stride[0] + h * stride[1] + t * stride[2] + k * stride[3], 1);
    }
  }
  double d_out(int64_t n, int64_t e) const { return read(p_.d_out, type_, n * s_.E + e); }

  void compare(const char* name, const void* actual, Type type, const Sums& wanted) {
    for (size_t i = 0; i < wanted.value.size(); ++i) {
      auto at = static_cast<int64_t>(i);
      check(name, at, read(actual, type, at), wanted.value[i], wanted.slack[i], type);
    }
  }
  void check(const char* name, int64_t at, double actual, double wanted, double slack,
             Type type) {
    slack += std::abs(wanted) * step_of(as_stored(type)) + 2e-6;
    if (!(std::abs(actual - wanted) <= slack)) report(name, at, actual, wanted, slack);
  }
  void report(const char* name, int64_t at, double actual, double wanted, double slack) {
    if (reported_++ > 0) return;
    char text[400];
    std::snprintf(text, sizeof text,
                  "%s[%lld] is %g, not %g +- %g; type %d B %lld H %lld K %lld T %lld S %lld "
                  "D %lld E %lld%s%s%s%s%s%s%s",
                  name, (long long)at, actual, wanted, slack, static_cast<int>(type_),
                  (long long)s_.B, (long long)s_.H, (long long)s_.K, (long long)s_.T,
                  (long long)s_.S, (long long)s_.D, (long long)s_.E,
                  c_.score_params().mask.data ? " mask" : "",
                  c_.score_params().bias.data ? " bias" : "",
                  c_.score_params().sinks ? " sinks" : "", c_.score ? " score" : "",
                  c_.mask ? " mod" : "", c_.score_params().dropout.words ? " dropout" : "",
                  c_.score_params().kinds.data ? " kinds" : "");
    fail("attention", text);
  }

  const Case& c_;
  const Shape& s_;
  const BackwardParams& p_;
  Type type_;
  double rounding_;
  Sums d_query_, d_key_, d_value_, d_bias_, d_sinks_;
  int reported_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  Serial serial(true);
  Threads threads(1);
  return run_cases("attention", argc, argv, [&](const Kernels& kernels) {
    Case c;
    Results results(c), again(c);
    results.run(kernels, serial);
    again.run(kernels, threads);
    if (!results.same(again)) fail("attention", "threads change the result");
    Check(c, results).run();
  });
}
