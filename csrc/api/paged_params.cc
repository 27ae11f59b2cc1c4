#include "api/paged_params.h"

#include <cstdio>

namespace raptax {
namespace {

// Pages of sequence b that hold the keys from .. end - 1.
bool check_ids(const PagedParams& p, int64_t b, int64_t from, int64_t end, char* message,
               size_t size) {
  for (int64_t m = from / p.P; from < end && m <= (end - 1) / p.P; ++m) {
    if (p.page_exists(b, m)) continue;
    describe_missing_page(p, b * p.M + m, message, size);
    return false;
  }
  return true;
}

bool check_sequence(const PagedParams& p, int64_t b, char* message, size_t size) {
  long long rows = p.rows(b), length = p.lengths[b], at = b;
  if (rows < 0 || p.row_offsets[b + 1] > p.R) {
    std::snprintf(message, size,
                  "row_offsets give sequence %lld the rows %lld to %lld of %lld; they must "
                  "not fall.",
                  at, static_cast<long long>(p.row_offsets[b]),
                  static_cast<long long>(p.row_offsets[b + 1]), static_cast<long long>(p.R));
    return false;
  }
  if (rows == 0) return true;
  if (length < 0 || p.keys(b) > p.M * p.P) {
    std::snprintf(message, size,
                  "lengths[%lld]=%lld with %lld rows does not fit: a sequence has room for "
                  "%lld tokens, in %lld pages of %lld.",
                  at, length, rows, static_cast<long long>(p.M * p.P),
                  static_cast<long long>(p.M), static_cast<long long>(p.P));
    return false;
  }
  int64_t appended = p.key != nullptr ? p.first(b) : p.keys(b);
  int64_t read = p.mask_program != nullptr ? 0 : p.end_key(b, rows - 1);
  return check_ids(p, b, p.first_key(b), read, message, size) &&
         check_ids(p, b, appended, p.keys(b), message, size);
}

}  // namespace

void describe_missing_page(const PagedParams& p, int64_t entry, char* message, size_t size) {
  long long b = entry / p.M, m = entry % p.M, page = p.table[entry];
  std::snprintf(message, size,
                "table[%lld, %lld]=%lld is needed for tokens %lld and on, but the pool "
                "has pages 0 to %lld. Was the sequence given too few pages?",
                b, m, page, m * static_cast<long long>(p.P), static_cast<long long>(p.N - 1));
}

bool check(const PagedParams& p, char* message, size_t size) {
  if (p.layer < 0 || p.layer >= p.L) {
    std::snprintf(message, size, "layer=%lld must lie in [0, %lld).",
                  static_cast<long long>(p.layer), static_cast<long long>(p.L));
    return false;
  }
  if (p.row_offsets[0] != 0) {
    std::snprintf(message, size, "row_offsets must begin with 0; got %lld.",
                  static_cast<long long>(p.row_offsets[0]));
    return false;
  }
  for (int64_t b = 0; b < p.B; ++b) {
    if (!check_sequence(p, b, message, size)) return false;
  }
  return true;
}

}  // namespace raptax
