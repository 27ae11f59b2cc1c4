// Runs a mod program over whole arrays, tile by tile as kernels do; for tests.

#pragma once

#include "attention/mod_runner.h"
#include "runtime/scratch.h"

namespace raptax {
namespace RAPTAX_ISA {

static void run_program(const ProgramRun& run) {
  const int64_t along = run.along_queries ? run.T : run.S;
  const int64_t across = run.along_queries ? run.S : run.T;
  const int64_t padded = (run.columns + kLanes - 1) / kLanes * kLanes;
  Buffer values(Runner::bytes(run.program, run.columns));
  Buffer tile(static_cast<size_t>(run.rows * padded) * sizeof(float));
  float* scores = tile.as<float>();
  Runner runner(run.program, run.along_queries ? Along::kQueries : Along::kKeys, run.columns,
                values.as<void>());

  // Element (row, column) of the scores of one (b, h).
  const int64_t step = run.along_queries ? run.S : 1;
  const int64_t stride = run.along_queries ? 1 : run.S;
  for (int64_t bh = 0; bh < run.B * run.H; ++bh) {
    runner.begin(bh / run.H, bh % run.H);
    for (int64_t c = 0; c < along; c += run.columns) {
      const int64_t count = along - c < run.columns ? along - c : run.columns;
      runner.columns((run.along_queries ? run.first : 0) + c, count);
      for (int64_t r = 0; r < across; r += run.rows) {
        const int64_t rows = across - r < run.rows ? across - r : run.rows;
        const int64_t corner = bh * run.T * run.S + r * stride + c * step;
        const float* from = run.scores + corner;
        float* to = run.out + corner;
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < count; ++j) {
            scores[i * padded + j] = from[i * stride + j * step];
          }
        }
        const int64_t position = (run.along_queries ? 0 : run.first) + r;
        bool any = true;
        if (run.what == ProgramRun::kScoreMod) {
          runner.apply_score_mod(position, rows, scores, padded);
        } else if (run.what == ProgramRun::kSlope) {
          runner.apply_slope(position, rows, scores, scores, padded);
        } else {
          any = runner.apply_mask(position, rows, scores, padded);
        }
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < count; ++j) {
            to[i * stride + j * step] = any ? scores[i * padded + j] : -kInf;
          }
        }
      }
    }
  }
}

}  // namespace RAPTAX_ISA
}  // namespace raptax
