// Random problems for the forward and the backward kernel.
#pragma once

#include <algorithm>
#include <cmath>

#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/hand_mods.h"

namespace raptax {
namespace fuzz {

constexpr double kInfinite = std::numeric_limits<double>::infinity();

struct Case {
  BackwardParams p{};  // without results
  Mod score, mask;
  Arrays arrays;

  Case() {
    p.forward.type = static_cast<Type>(between(0, 2));
    draw_shape();
    draw_arrays();
    draw_band();
    draw_rules();
  }

  const Shape& shape() const { return p.forward.shape; }
  const ScoreParams& score_params() const { return p.forward.score_params; }
  Place place(int64_t b, int64_t h, int64_t t, int64_t k) const {
    return {b, h, score_params().first(b) + t, k};
  }
  // What tiles sum up: the band and the mask's program.
  bool allowed(const Place& at) const {
    const Band& band = score_params().band;
    if (at.k < at.q - band.left || at.k > at.q + band.right) return false;
    return !mask || mask.value(at, 0) != 0;
  }
  // Entries of an array that broadcasts to the scores.
  template <typename T>
  int64_t entries(const Broadcast<T>& x) const {
    const Shape& s = shape();
    const int64_t axes[] = {s.B, s.H, s.T, s.S};
    int64_t last = 0;
    for (int i = 0; i < 4; ++i) last += x.stride[i] * (axes[i] - 1);
    return x.data == nullptr ? 0 : last + 1;
  }
  // A factor of dropout; see src/raptax/kernels/dropout.py.
  double kept(const Place& at) const {
    const DropoutParams& dropout = score_params().dropout;
    if (dropout.words == nullptr) return 1;
    uint32_t state = 0;
    auto absorb = [&state](int64_t word) {
      uint32_t x = state ^ static_cast<uint32_t>(word);
      x = (x ^ x >> 16) * 0x85ebca6bu;
      x = (x ^ x >> 13) * 0xc2b2ae35u;
      state = (x ^ x >> 16) + 0x9e3779b9u;
    };
    for (int64_t i = 0; i < dropout.count; ++i) absorb(dropout.words[i]);
    for (int64_t word : {at.b, at.h, at.q, at.k}) absorb(word);
    double uniform = std::ldexp(static_cast<double>(state >> 8), -24);
    double rate = static_cast<double>(dropout.rate);
    return uniform >= rate ? 1 / (1 - rate) : 0;
  }

 private:
  static int64_t draw_length() {
    const int64_t blocks[] = {16, 32, 64, 96, 128, 192, 256, 288};
    int64_t which = between(1, 100);
    if (which <= 40) return between(1, 40);
    return which <= 85 ? blocks[between(0, 7)] + between(-1, 1) : between(1, 300);
  }
  static int64_t draw_size() {
    const int64_t vectors[] = {16, 32, 64, 96, 128};
    int64_t which = between(1, 100);
    if (which <= 50) return between(1, 24);
    return which <= 75 ? vectors[between(0, 4)] + between(-1, 1) : between(1, 130);
  }

  // Sizes whose work for plain loops is limited.
  void draw_shape() {
    Shape& s = p.forward.shape;
    s = {1, 1, 1, draw_length(), draw_length(), draw_size(), draw_size()};
    switch (between(1, 500)) {
      case 1:  // too many keys to be packed beforehand
        s.T = between(1, 2), s.S = between(39500, 39600), s.D = s.E = between(129, 130);
        return;
      case 2:  // too many heads for sums of dQ
        s.H = between(412, 430), s.T = between(1, 2), s.S = between(1, 9);
        s.D = between(129, 130), s.E = between(1, 8);
        return;
      case 3:  // kv heads that are packed in turns
        s.H = s.K = between(70, 75), s.T = 1, s.S = between(257, 300);
        s.D = s.E = between(129, 130);
        return;
    }
    int64_t limit = chance(85) ? 100000 : chance(90) ? 700000 : 3000000;
    auto work = [&s] { return s.T * s.S * (s.D + s.E); };
    while (work() > limit) {
      switch (between(0, 3)) {
        case 0: s.T = between(1, s.T); break;
        case 1: s.S = between(1, s.S); break;
        default: s.D = between(1, s.D), s.E = between(1, s.E);
      }
    }
    auto up_to = [&](int64_t most) {
      return between(1, std::min(most, std::max<int64_t>(1, limit / (work() * s.B * s.H))));
    };
    s.B = up_to(3);
    s.H = s.K = up_to(3);
    s.H *= up_to(chance(80) ? 5 : 40);
  }

  // Some rows that are not finite.
  void spoil(char* data, int64_t count) {
    const double bad[] = {std::nan(""), kInfinite, -kInfinite};
    for (int64_t n = between(1, 3); n > 0; --n) {
      write_float(data, p.forward.type, between(0, count - 1),
                  static_cast<float>(bad[between(0, 2)]));
    }
  }
  char* draw_rows(int64_t count, int64_t percent_spoiled) {
    char* data = arrays.keep(random_rows(p.forward.type, count));
    if (chance(percent_spoiled)) spoil(data, count);
    return data;
  }
  float* draw_floats(int64_t count) {
    return reinterpret_cast<float*>(arrays.keep(random_rows(Type::kF32, count)));
  }

  void draw_arrays() {
    const Shape& s = shape();
    int64_t spoiled = chance(20) ? 50 : 0;
    p.forward.query = draw_rows(s.B * s.H * s.T * s.D, spoiled);
    p.forward.key = draw_rows(s.B * s.K * s.S * s.D, spoiled);
    p.forward.value = draw_rows(s.B * s.K * s.S * s.E, spoiled);
    p.d_out = draw_rows(s.B * s.H * s.T * s.E, 0);
    p.d_lse = draw_floats(s.B * s.H * s.T);
  }

  void draw_band() {
    const Shape& s = shape();
    ScoreParams& score_params = p.forward.score_params;
    score_params.starts = chance(60) ? 1 : s.B;
    std::vector<int32_t> starts;
    for (int64_t b = 0; b < score_params.starts; ++b) {
      int64_t start = chance(60) ? s.S - s.T + between(-2, 2) : between(-s.T - 2, s.S + 2);
      if (chance(2)) start = between(-(1 << 29), 1 << 29);
      starts.push_back(static_cast<int32_t>(start));
    }
    score_params.start = arrays.keep(starts);
    if (chance(50)) score_params.band.right = chance(70) ? 0 : between(0, s.S);
    if (chance(40)) score_params.band.left = chance(50) ? between(0, 20) : between(0, s.S);
  }

  void draw_rules() {
    const Shape& s = shape();
    ScoreParams& score_params = p.forward.score_params;
    score_params.scale = (chance(85) ? 1.0f : 6.0f) / std::sqrt(static_cast<float>(s.D));
    if (chance(6)) score_params.scale = chance(50) ? 0 : -score_params.scale;
    if (chance(25)) draw_mask();
    if (chance(30)) draw_bias();
    if (chance(30)) {
      float* sinks = draw_floats(s.H);
      if (chance(20)) sinks[between(0, s.H - 1)] = -std::numeric_limits<float>::infinity();
      score_params.sinks = sinks;
    }
    if (chance(25)) {
      score = random_score_mod(&arrays, s);
      score_params.score_program = &score.program;
      if (score.slope.code != nullptr) p.slope_program = &score.slope;
    }
    if (chance(25)) {
      mask = random_mask_mod(&arrays, s);
      score_params.mask_program = &mask.program;
    }
    if (chance(20)) {
      std::vector<uint32_t> words;
      for (int64_t i = chance(70) ? 2 : 4; i > 0; --i) {
        words.push_back(static_cast<uint32_t>(rng()));
      }
      score_params.dropout = {arrays.keep(words), static_cast<int64_t>(words.size()),
                              static_cast<float>(between(1, 19)) * 0.05f};
    }
    if (chance(mask ? 70 : 20)) draw_kinds();
  }

  // Strides of an array of which some axes have length 1; returns how many entries.
  int64_t draw_strides(int64_t* strides) {
    const Shape& s = shape();
    const int64_t axes[] = {s.B, s.H, s.T, s.S};
    int64_t count = 1;
    for (int i = 3; i >= 0; --i) {
      bool whole = chance(i < 2 ? 40 : 75);
      strides[i] = whole && axes[i] > 1 ? count : 0;
      if (whole) count *= axes[i];
    }
    return count;
  }

  void draw_mask() {
    Broadcast<const uint8_t>& mask = p.forward.score_params.mask;
    int64_t count = draw_strides(mask.stride), percent = between(0, 3) * 33 + 1;
    std::vector<uint8_t> entries;
    for (int64_t i = 0; i < count; ++i) entries.push_back(chance(percent));
    mask.data = arrays.keep(entries);
  }

  void draw_bias() {
    Broadcast<const float>& bias = p.forward.score_params.bias;
    int64_t count = draw_strides(bias.stride);
    float* data = draw_floats(count);
    float by = chance(10) ? 300 : 1;
    bool masks = chance(10);
    for (int64_t i = 0; i < count; ++i) {
      data[i] = masks && chance(20) ? static_cast<float>(-kInfinite) : data[i] * by;
    }
    if (chance(3)) data[between(0, count - 1)] = static_cast<float>(kInfinite);
    bias.data = data;
    if (chance(10)) return;
    std::copy(bias.stride, bias.stride + 4, p.d_bias.stride);
    p.d_bias.data = data;  // for now: it says that one is wanted
  }

  // Kinds of tiles of any size, perhaps shared by sequences or heads; now and then
  // nobody looked.
  void draw_kinds() {
    const Shape& s = shape();
    BlockKinds& kinds = p.forward.score_params.kinds;
    kinds.queries = chance(50) ? 128 : between(1, 150);
    kinds.keys = chance(50) ? 128 : between(1, 150);
    int64_t down = (s.T + kinds.queries - 1) / kinds.queries;
    kinds.across = (s.S + kinds.keys - 1) / kinds.keys;
    bool every_b = chance(50), every_h = chance(50);
    kinds.stride_h = every_h ? down * kinds.across : 0;
    kinds.stride_b = every_b ? (every_h ? s.H : 1) * down * kinds.across : 0;
    int64_t count = (every_b ? s.B : 1) * (every_h ? s.H : 1) * down * kinds.across;
    std::vector<int8_t> some(static_cast<size_t>(count), 0), every(some.size(), 1);
    for (int64_t n = 0; n < s.B * s.H * s.T; ++n) {
      int64_t b = n / (s.H * s.T), h = n / s.T % s.H, t = n % s.T;
      int64_t tile = b * kinds.stride_b + h * kinds.stride_h;
      tile += t / kinds.queries * kinds.across;
      for (int64_t k = 0; k < s.S; ++k) {
        bool seen = allowed(place(b, h, t, k));
        some[static_cast<size_t>(tile + k / kinds.keys)] |= seen;
        every[static_cast<size_t>(tile + k / kinds.keys)] &= seen;
      }
    }
    for (size_t i = 0; i < some.size(); ++i) {
      int8_t kind = every[i] ? kFull : some[i] ? kPartial : kEmpty;
      some[i] = chance(10) ? int8_t{kPartial} : kind;
    }
    kinds.data = arrays.keep(some);
  }
};

}  // namespace fuzz
}  // namespace raptax
