// Runs mod programs (program.h) on rows of scores, a few vectors at a time.

#include "program.h"
#include "simd.h"

namespace raptax {
namespace RAPTAX_ISA {

// Which positions change along a row of scores. Forward kernels hold a row per query;
// backward kernels may hold the scores transposed, a row per key.
enum class Along { kKeys, kQueries };

// A program, ready to run on rows of up to `columns` scores. A value of the program that
// depends on (b, h) alone is worked out in begin(), one that depends on the column alone
// in columns(), one that depends on the row once per row; only the rest costs per score.
//
// Rows are read and written in whole vectors: their memory must reach up to the next
// multiple of kLanes. Nothing is allocated after the constructor.
class Runner {
 public:
  // Bytes that the constructor needs at `memory`, 64-byte aligned.
  static size_t bytes(const Program& program, int64_t columns);

  Runner(const Program& program, Along along, int64_t columns, void* memory);

  void begin(int64_t b, int64_t h);
  void columns(int64_t first_position, int64_t count);

  // Score programs: scores = score_mod(scores), in place, for the row at `position`.
  void change(int64_t position, float* scores);
  // Slope programs: slope = d score_mod(x) / dx at x = base.
  void slope(int64_t position, const float* base, float* slope);
  // Mask programs: scores = -inf where the mask says no. Returns whether any is allowed.
  bool mask(int64_t position, float* scores);
};

}  // namespace RAPTAX_ISA
}  // namespace raptax
