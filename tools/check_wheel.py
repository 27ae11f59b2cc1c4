"""An installed wheel, outside the source tree: the C++ library loads and computes.

Run:  python tools/check_wheel.py   (in a clean environment with the wheel alone)
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import raptax
from raptax.kernels.cpu import library


def main() -> int:
    """0 if attention runs in C++ and agrees with its definition."""
    if Path(__file__).parents[1] / "src" in Path(raptax.__file__).parents:
        print("this is the source tree's raptax, not an installed one")
        return 1
    if (reason := library.missing_reason()) is not None:
        print(f"no native kernels: {reason}")
        return 1
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 4, 33, 16))
    outs = [
        raptax.attention(q, k, v, mask_mod=raptax.Causal(), kernel=name)
        for name in ("native", "reference")
    ]
    error = float(jnp.abs(outs[0] - outs[1]).max())
    python = sys.version.split()[0]
    print(f"raptax on Python {python}, jax {jax.__version__}: {error:.1e}")
    return error > 1e-5


if __name__ == "__main__":
    sys.exit(main())
