"""What the machine can do, and how to time in turns."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

SETTLED = 0.03


def seconds(functions: dict[str, Callable[[], object]], repeats: int = 7):
    """Times of each function, sorted; they take turns, so noise falls on all alike.

    At its turn a function first runs untimed for SETTLED seconds: the threads of the one
    before go on waiting for work, at full speed, for about 10 ms.
    """
    for function in functions.values():
        jax.block_until_ready(function())  # compile, and warm the caches
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            settled = time.perf_counter() + SETTLED
            while time.perf_counter() < settled:
                jax.block_until_ready(function())
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: np.sort(taken) for name, taken in times.items()}


def read_bandwidth(megabytes: int = 256) -> float:
    """Bytes a second of summing a float32 array: what decoding cannot beat."""
    x = jnp.ones((megabytes * 2**18,), jnp.float32)
    total = jax.jit(jnp.sum)
    return x.nbytes / seconds({"sum": lambda: total(x)})["sum"][0]


def matmul_rate(size: int = 2048) -> float:
    """Floating-point operations a second of a float32 matrix product."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / seconds({"product": lambda: product(x, x)}, 5)["product"][0]
