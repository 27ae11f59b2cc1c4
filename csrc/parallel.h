// Work shared among threads: numbered pieces, handed out one by one.
#pragma once

#include <cstdint>

namespace raptax {

// Runs pieces 0 .. count - 1. The caller works too, so it finishes even if no thread of
// the pool ever comes. Pieces are handed out in ascending order. Which thread runs which
// piece is open; results must not depend on it.
class Parallel {
 public:
  virtual ~Parallel() = default;

  // Threads that may work at once, the caller included. A hint for cutting work up;
  // never let it change a result.
  virtual int threads() const = 0;

  virtual void run(int64_t count, void (*piece)(void* context, int64_t number),
                   void* context) const = 0;

  // run() for anything callable with a number.
  template <typename Piece>
  void each(int64_t count, const Piece& piece) const {
    run(
        count,
        [](void* context, int64_t number) {
          (*static_cast<const Piece*>(context))(number);
        },
        const_cast<void*>(static_cast<const void*>(&piece)));
  }
};

}  // namespace raptax
