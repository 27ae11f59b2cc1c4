#include "runtime/ordered_counter.h"

#include <thread>

namespace raptax {

void wait_for(const int32_t* counter, int32_t value) {
  for (int tries = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) != value; ++tries) {
    if (tries > 100) std::this_thread::yield();
  }
}

void publish(int32_t* counter, int32_t value) {
  __atomic_store_n(counter, value, __ATOMIC_RELEASE);
}

}  // namespace raptax
