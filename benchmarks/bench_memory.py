"""Memory that attention takes beyond its inputs and outputs, at 32768 tokens on a CPU.

Run:  python -m benchmarks.bench_memory [--length 32768]
Each row runs in a process of its own: the peak of resident memory during one call, less
what was resident before it and the outputs. The program is compiled before, and has run
on a short sequence, so that threads exist. A gradient's outputs are those of its three
inputs; between the passes the output and its log-sum-exp have to be kept. Needs Linux.
"""

import argparse
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import raptax
from raptax.kernels import native_attention

ROWS = (  # heads, head size, dtype, with gradients
    (8, 64, "float32", False),
    (8, 64, "bfloat16", False),
    (8, 128, "float32", False),
    (8, 128, "bfloat16", False),
    (1, 64, "float32", True),
    (8, 64, "float32", True),
    (8, 64, "bfloat16", True),
)
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(name: str) -> int:
    """Bytes: VmRSS is now, VmHWM the peak."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def function(gradients: bool) -> Any:
    attend = functools.partial(native_attention, mask_mod=raptax.Causal())
    if not gradients:
        return jax.jit(attend)
    loss = lambda q, k, v: attend(q, k, v).astype(jnp.float32).sum()
    return jax.jit(jax.grad(loss, (0, 1, 2)))


def measure(H: int, D: int, dtype: str, gradients: bool, S: int) -> tuple[int, int]:
    """Bytes beyond inputs and outputs, and bytes of these."""
    rng = np.random.default_rng(0)

    def arrays(length: int) -> list[jax.Array]:
        shape = (1, H, length, D)
        return [jnp.asarray(rng.random(shape, np.float32)).astype(dtype) for _ in "qkv"]

    run = function(gradients)
    jax.block_until_ready(run(*arrays(64)))
    inputs = jax.block_until_ready(arrays(S))
    compiled = run.lower(*inputs).compile()
    before = resident("VmRSS")
    CLEAR.write_text("5")  # the peak starts again from here
    outputs = jax.block_until_ready(compiled(*inputs))
    outside = sum(x.nbytes for x in jax.tree.leaves(outputs))
    return resident("VmHWM") - before - outside, outside + sum(x.nbytes for x in inputs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--row", type=int, help="this row alone, in this process")
    options = parser.parse_args()
    if options.row is not None:
        print(*measure(*ROWS[options.row], options.length))
        return 0
    print("  H    D dtype      pass                beyond   in and out   scores alone")
    for n, (H, D, dtype, gradients) in enumerate(ROWS):
        command = [sys.executable, "-m", "benchmarks.bench_memory", f"--row={n}"]
        command.append(f"--length={options.length}")
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        beyond, outside = (int(x) / 2**20 for x in done.stdout.split())
        scores = H * options.length**2 * jnp.dtype(dtype).itemsize / 2**20
        name = "forward, backward" if gradients else "forward"
        print(
            f"{H:3}{D:5} {dtype:10} {name:17}{beyond:8.1f} MB{outside:10.1f} MB"
            f"{scores:12.0f} MB",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
