// Members of the api's structs that kernels call.
#pragma once

// Inline functions outside the namespaces of instruction sets are weak symbols, of which
// the linker keeps one copy for all objects, perhaps the one compiled with AVX-512: these
// must be inlined wherever they are called. tools/check_symbols.py looks for others.
#define RAPTAX_API_INLINE inline __attribute__((always_inline))
