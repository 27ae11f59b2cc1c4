// AMX support of the CPU and the operating system.
#pragma once

namespace raptax {

// Asks the kernel for the tile registers, once per process.
bool amx_available();

}  // namespace raptax
