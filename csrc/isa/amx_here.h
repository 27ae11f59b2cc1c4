// Whether this process may use AMX's tiles for bfloat16.
#pragma once

namespace raptax {

// Asks the kernel for the tile registers, once per process.
bool amx_here();

}  // namespace raptax
