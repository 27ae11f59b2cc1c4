// An ordered counter: threads publish their results in a fixed order.
#pragma once

#include <cstdint>

namespace raptax {

// Waits until *counter == value. The thread that publishes it must have started: tasks
// of ThreadPool::run wait only for tasks of lower indices, which start earlier.
void wait_for(const int32_t* counter, int32_t value);

// Sets *counter to `value` with release semantics: writes before it are visible to the
// threads that wait_for(counter, value).
void publish(int32_t* counter, int32_t value);

}  // namespace raptax
