// Turns: counters on which threads wait for what goes before.
#pragma once

#include <cstdint>

namespace raptax {

// Waits until *turns == turn. Whoever is to bring it there must be at work already:
// pieces of Parallel::run wait only for pieces of lower numbers, which have started.
void back_wait(const int32_t* turns, int32_t turn);

// Sets *turns to `turn`, and lets others see all that was written before.
void back_pass(int32_t* turns, int32_t turn);

}  // namespace raptax
