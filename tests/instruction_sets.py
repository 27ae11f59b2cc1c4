"""What tests of native kernels share: instruction sets, and how a refusal shows."""

import jax
import pytest

# RAPTAX_ISA forces one.
INSTRUCTION_SETS = ("generic", "avx2", "avx512", "avx512bf16", "amx")

# In quick tests the generic one alone, if any: all others run with the best that there
# is.
GENERIC_FIRST = (
    "generic",
    *(pytest.param(name, marks=pytest.mark.slow) for name in INSTRUCTION_SETS[1:]),
)

# JAX raises the one or the other, as the call was waited for at once or later.
REFUSED = (jax.errors.JaxRuntimeError, ValueError)
