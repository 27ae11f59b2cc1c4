#include "back_turns.h"

#include <thread>

namespace raptax {

void back_wait(const int32_t* turns, int32_t turn) {
  for (int tries = 0; __atomic_load_n(turns, __ATOMIC_ACQUIRE) != turn; ++tries) {
    if (tries > 100) std::this_thread::yield();
  }
}

void back_pass(int32_t* turns, int32_t turn) {
  __atomic_store_n(turns, turn, __ATOMIC_RELEASE);
}

}  // namespace raptax
