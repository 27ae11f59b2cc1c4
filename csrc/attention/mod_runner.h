// Runs mod programs (mod_program.h) on rows of scores, a few vectors at a time.

#pragma once

#include "api/mod_program.h"
#include "attention/mod_ops.h"
#include "simd/vec.h"

namespace raptax {
namespace RAPTAX_ISA {

// The axis along a row of scores. Forward kernels have a row per query; backward
// kernels may hold the scores transposed, a row per key.
enum class Along { kKeys, kQueries };

// An interpreter of one program on rows of up to `columns` scores. Each value is
// evaluated as seldom as its inputs allow: those of (b, h) alone in begin(), of the
// column alone in columns(), of the row alone for kRowBatch rows at once, of the
// distance alone once per diagonal; only the rest per score.
//
// Rows are read and written in whole vectors: memory must extend to the next multiple
// of kLanes. Nothing is allocated after the constructor. `program` must have passed
// unsupported_reason() and outlive the Runner.
class Runner {
 public:
  // Bytes that the constructor needs at `memory`, 64-byte aligned.
  static size_t bytes(const Program& program, int64_t columns);

  Runner(const Program& program, Along along, int64_t columns, void* memory);

  void begin(int64_t b, int64_t h);
  void columns(int64_t first_position, int64_t count);

  // Score programs: scores = score_mod(scores), in place, for `rows` rows from `position`
  // on, which lie `stride` floats apart.
  void apply_score_mod(int64_t position, int64_t rows, float* scores, int64_t stride) {
    run(position, rows, scores, scores, stride);
  }
  void apply_score_mod(int64_t position, float* scores) {
    apply_score_mod(position, 1, scores, 0);
  }

  // Slope programs: slope = d score_mod(x) / dx at x = base. `slope` may be `base`.
  void apply_slope(int64_t position, int64_t rows, const float* base, float* slope,
                   int64_t stride) {
    run(position, rows, base, slope, stride);
  }
  void apply_slope(int64_t position, const float* base, float* slope) {
    run(position, 1, base, slope, 0);
  }

  // Mask programs: scores = -inf where masked, and beyond the last column.
  // Returns whether any score is left.
  bool apply_mask(int64_t position, int64_t rows, float* scores, int64_t stride);
  bool apply_mask(int64_t position, float* scores) {
    return apply_mask(position, 1, scores, 0);
  }

 private:
  // Which indices a value depends on, besides (b, h); kFull: one value per score.
  enum Domain : int8_t { kUniform, kRow, kColumn, kDiagonal, kFull };
  // Row values are worked out for kRows rows at once, diagonal ones for kDiagonals, and
  // full ones for kBatch: few enough to stay in the first-level cache.
  static constexpr int64_t kRowBatch = 16, kDiagonals = 64, kFullBatch = 8;

  struct Step {
    Instruction code;
    Domain domain;
    const float* data;  // of its value
    int64_t stride;     // from row to row, of a full value
    bool same;          // all that scores read of a row of values is equal
  };

  static Domain join(Domain a, Domain b) {
    if (a == b || b == kUniform) return a;
    return a == kUniform ? b : kFull;
  }
  static Domain domain_of(Op op, Along along) {
    if (op == Op::kScore) return kFull;
    if (op == Op::kDistance) return kDiagonal;
    if (op == Op::kQuery) return along == Along::kKeys ? kRow : kColumn;
    if (op == Op::kKey) return along == Along::kKeys ? kColumn : kRow;
    return kUniform;
  }
  static int64_t round_up_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
  static size_t lay_out(const Program& program, Along along, int64_t columns, Step* steps,
                        float* memory);

  void run(int64_t position, int64_t rows, const float* base, float* out, int64_t stride);
  int64_t prepare_rows(int64_t position, int64_t rows);
  void prepare_batch(int64_t rows, const float* base, int64_t stride);
  void evaluate(Domain domain, int64_t n);
  Operand operand(const Step& step, int number) const;
  static bool is_identity(Op op, const Operand* in, const float* out);
  static void apply(Op op, int operands, const Operand* in, Area area, Store store);
  void execute(const Step& step, float* out, int64_t stride, Area area) const;

  const Program& program_;
  const Along along_;
  const int64_t size_;
  Step* const steps_;
  int64_t count_ = 0, padded_ = 0;
  int64_t b_ = 0, h_ = 0, first_row_ = 0, first_column_ = 0;
  // The first row of the batch: among the kRows that are worked out, and where its
  // diagonal values start.
  int64_t row_ = 0, diagonal_ = 0;
  int64_t first_diagonal_ = 0;  // the row whose diagonal values start last
  bool rows_ready_ = false, diagonals_ready_ = false;
};

// ------------------------------------------------------------------------------- layout

// Fills `steps` if there are any; returns the floats that the values take. Full values
// share memory when they are no longer needed.
inline size_t Runner::lay_out(const Program& program, Along along, int64_t columns, Step* steps,
                              float* memory) {
  const int64_t size = program.size(), width = round_up_lanes(columns);
  Domain domain[Program::kMaxInstructions];
  int64_t last_use[Program::kMaxInstructions];
  for (int64_t n = 0; n < size; ++n) {
    const Instruction code = program.at(n);
    domain[n] = domain_of(code.op, along);
    for (int i = 0; i < code.operands(); ++i) {
      domain[n] = join(domain[n], domain[code.operand(i)]);
      last_use[code.operand(i)] = n;
    }
    last_use[n] = n;
  }
  int64_t used = 0, slots = 0, owner[Program::kMaxInstructions];
  int64_t place[Program::kMaxInstructions];
  for (int64_t n = 0; n < size; ++n) {
    place[n] = used;
    if (domain[n] == kUniform) used += 16;
    if (domain[n] == kRow) used += kRowBatch;
    if (domain[n] == kColumn) used += (width + 15) / 16 * 16;
    if (domain[n] == kDiagonal) used += (width + 15) / 16 * 16 + kDiagonals;
  }
  const int64_t slot_size = kFullBatch * ((width + 15) / 16 * 16);
  for (int64_t n = 0; n < size; ++n) {
    if (domain[n] != kFull || program.at(n).op == Op::kScore) continue;
    // A value that is read here for the last time is not in the way: every operation
    // reads a vector before it writes it.
    int64_t slot = slots, own = -1;
    for (int64_t i = slots - 1; i >= 0; --i) {
      if (last_use[owner[i]] <= n) slot = i;
    }
    const Instruction code = program.at(n);
    for (int i = 0; i < code.operands(); ++i) {
      for (int64_t j = 0; j < slots; ++j) {
        if (owner[j] == code.operand(i) && last_use[owner[j]] == n) own = j;
      }
    }
    if (own >= 0) slot = own;  // in place, so that identities cost nothing
    if (slot == slots) ++slots;
    owner[slot] = n;
    place[n] = used + slot * slot_size;
  }
  for (int64_t n = 0; n < size && steps != nullptr; ++n) {
    steps[n] = {program.at(n), domain[n], memory + place[n], slot_size / kFullBatch, false};
  }
  return static_cast<size_t>(used + slots * slot_size);
}

inline size_t Runner::bytes(const Program& program, int64_t columns) {
  const size_t a = lay_out(program, Along::kKeys, columns, nullptr, nullptr);
  const size_t b = lay_out(program, Along::kQueries, columns, nullptr, nullptr);
  return (a > b ? a : b) * sizeof(float) + static_cast<size_t>(program.size()) * sizeof(Step);
}

inline Runner::Runner(const Program& program, Along along, int64_t columns, void* memory)
    : program_(program),
      along_(along),
      size_(program.size()),
      steps_(reinterpret_cast<Step*>(static_cast<float*>(memory) +
                                     lay_out(program, along, columns, nullptr, nullptr))) {
  lay_out(program, along, columns, steps_, static_cast<float*>(memory));
}

// ------------------------------------------------------------------------------ running

inline void Runner::begin(int64_t b, int64_t h) {
  b_ = b;
  h_ = h;
  rows_ready_ = diagonals_ready_ = false;
  evaluate(kUniform, kLanes);
}

inline void Runner::columns(int64_t first_position, int64_t count) {
  first_column_ = first_position;
  count_ = count;
  padded_ = round_up_lanes(count);
  evaluate(kColumn, padded_);
  diagonals_ready_ = false;
}

// Of the `rows` rows from `position` on, how many can be run at once; what they need is
// worked out.
inline int64_t Runner::prepare_rows(int64_t position, int64_t rows) {
  row_ = position - first_row_;
  if (!rows_ready_ || row_ < 0 || row_ >= kRowBatch) {
    first_row_ = position;
    row_ = 0;
    rows_ready_ = true;
    evaluate(kRow, kRowBatch);
  }
  diagonal_ = first_diagonal_ + kDiagonals - 1 - position;
  if (!diagonals_ready_ || diagonal_ < 0 || diagonal_ >= kDiagonals) {
    first_diagonal_ = position;
    diagonal_ = kDiagonals - 1;
    diagonals_ready_ = true;
    evaluate(kDiagonal, padded_ + kDiagonals);
  }
  if (rows > kFullBatch) rows = kFullBatch;
  if (rows > kRowBatch - row_) rows = kRowBatch - row_;
  return rows > diagonal_ + 1 ? diagonal_ + 1 : rows;
}

inline void Runner::evaluate(Domain domain, int64_t n) {
  for (int64_t i = 0; i < size_; ++i) {
    Step& step = steps_[i];
    if (step.domain != domain) continue;
    execute(step, const_cast<float*>(step.data), 0, {1, n});
    if (domain == kColumn || domain == kDiagonal) {
      step.same = all_same(step.data, domain == kColumn ? count_ : n);
    }
  }
}

// All full values of a batch of rows but for the answer.
inline void Runner::prepare_batch(int64_t rows, const float* base, int64_t stride) {
  for (int64_t i = 0; i < size_; ++i) {
    Step& step = steps_[i];
    if (step.domain != kFull) continue;
    if (step.code.op == Op::kScore) {
      step.data = base;
      step.stride = stride;
    } else if (i + 1 < size_) {
      execute(step, const_cast<float*>(step.data), step.stride, {rows, padded_});
    }
  }
}

inline void Runner::run(int64_t position, int64_t rows, const float* base, float* out,
                        int64_t stride) {
  const Step& answer = steps_[size_ - 1];
  if (answer.code.op == Op::kScore && base == out) return;
  for (int64_t from = 0; from < rows;) {
    const int64_t batch = prepare_rows(position + from, rows - from);
    prepare_batch(batch, base + from * stride, stride);
    float* to = out + from * stride;
    if (answer.domain == kFull && answer.code.op != Op::kScore) {
      execute(answer, to, stride, {batch, padded_});
    } else {
      Store store{to, stride};
      map([](F32 x) { return x; }, operand(answer, -1), {batch, padded_}, store);
    }
    from += batch;
  }
}

inline bool Runner::apply_mask(int64_t position, int64_t rows, float* scores, int64_t stride) {
  const Step& answer = steps_[size_ - 1];
  I32 seen = I32{};
  for (int64_t from = 0; from < rows;) {
    const int64_t batch = prepare_rows(position + from, rows - from);
    prepare_batch(batch, nullptr, 0);
    const auto same = [](F32 x) { return x; };
    const Area area{batch, padded_};
    const Operand own = operand(answer, -1);
    MaskScores sink{scores + from * stride, stride, count_};
    if (answer.domain != kFull) {
      for (int64_t row = 0; row < batch; ++row) {
        const Operand allowed = own.of_row(row);
        if (!own.is_row && as_bits(load_broadcast(allowed.data))[0] != 0 && count_ == padded_) {
          sink.seen = ~I32{};
          sink.next_row();
        } else {
          map(same, allowed, {1, padded_}, sink);
        }
      }
    } else if (answer.code.operands() != 2 ||
               !map_logic(answer.code.op, operand(answer, 0), operand(answer, 1), area, sink)) {
      // Only comparisons go straight to the scores.
      execute(answer, const_cast<float*>(answer.data), answer.stride, area);
      map(same, own, area, sink);
    }
    seen |= sink.seen;
    from += batch;
  }
  return any(seen);
}

// Where operand `number` of a step lies for the first row of the batch, or the step's own
// value for -1.
inline Operand Runner::operand(const Step& step, int number) const {
  const Step& from = number < 0 ? step : steps_[step.code.operand(number)];
  const bool own = number >= 0 && step.domain == from.domain;
  switch (from.domain) {
    case kUniform: return {from.data, own, 0};
    case kRow: return own ? Operand{from.data, true, 0} : Operand{from.data + row_, false, 1};
    case kColumn: return {from.data, own || !from.same, 0};
    case kDiagonal:
      return own ? Operand{from.data, true, 0} : Operand{from.data + diagonal_, !from.same, -1};
    default: return {from.data, true, from.stride};
  }
}

// Whether `x & true`, `x | false` or `true ? x : y` finds x where it is to be put.
inline bool Runner::is_identity(Op op, const Operand* in, const float* out) {
  const bool swap = op != Op::kSelect && in[0].is_row;
  const Operand condition = in[swap], x = in[!swap];
  if (condition.is_row) return false;
  const int32_t bits = as_bits(load_broadcast(condition.data))[0];
  if (op == Op::kSelect) {
    const Operand chosen = bits != 0 ? x : in[2];
    return chosen.is_row && chosen.data == out;
  }
  return x.is_row && x.data == out && bits == (op == Op::kAnd ? -1 : 0);
}

inline void Runner::apply(Op op, int operands, const Operand* in, Area area, Store store) {
  if (operands == 1) return map_unary(op, in[0], area, store);
  if (operands == 2) return map_binary(op, in[0], in[1], area, store);
  return map_ternary(op, in[0], in[1], in[2], area, store);
}

inline void Runner::execute(const Step& step, float* out, int64_t stride, Area area) const {
  const Instruction code = step.code;
  const Op op = code.op;
  auto fill = [&](int64_t first, int32_t by) {
    Store store{out, stride};
    for (int64_t i = 0; i < area.columns; i += kLanes) {
      store(i, I32{} + static_cast<int32_t>(first + by * i) + by * lane_indices());
    }
  };
  const int64_t first = step.domain == kRow ? first_row_ : first_column_;
  switch (op) {
    case Op::kSequence: return fill(b_, 0);
    case Op::kHead: return fill(h_, 0);
    case Op::kQuery:
    case Op::kKey: return fill(first, 1);
    case Op::kDistance:
      // Value i stands for column first_column_ + i of the last of kDiagonals rows.
      if (along_ == Along::kKeys) {
        return fill(first_column_ - (first_diagonal_ + kDiagonals - 1), 1);
      }
      return fill(first_diagonal_ + kDiagonals - 1 - first_column_, -1);
    case Op::kScore: return;
    case Op::kConstant: return fill(code.a, 0);
    case Op::kGather:
      for (int64_t row = 0; row < area.rows; ++row) {
        const Operand index = operand(step, 0).of_row(row);
        gather(program_.arrays[code.a], index, out + row * stride, area.columns);
      }
      return;
    default: break;
  }
  const int operands = code.operands();
  Operand in[3];
  for (int i = 0; i < operands; ++i) in[i] = operand(step, i);
  if (step.domain != kFull || (op != Op::kAnd && op != Op::kOr && op != Op::kSelect)) {
    return apply(op, operands, in, area, {out, stride});
  }
  for (int64_t row = 0; row < area.rows; ++row, out += stride) {
    Operand of_row[3];
    for (int i = 0; i < operands; ++i) of_row[i] = in[i].of_row(row);
    if (is_identity(op, of_row, out)) continue;
    apply(op, operands, of_row, {1, area.columns}, {out, stride});
  }
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
