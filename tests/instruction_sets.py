"""What tests of native kernels share: instruction sets, and how a refusal shows."""

import os
import subprocess
import sys
from pathlib import Path

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

NOT_HERE = "names no set that runs here", "names no instruction set of this machine"


def run_file(file: str, isa: str) -> None:
    """Runs a file of tests by itself with an instruction set, where there is that."""
    ran = subprocess.run(
        [sys.executable, file],
        env={**os.environ, "RAPTAX_ISA": isa, "PYTHONPATH": "."},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    if any(sentence in ran.stderr for sentence in NOT_HERE):
        pytest.skip(f"this machine has no {isa}")
    assert ran.returncode == 0, ran.stderr
