"""What the machine can do, how to time in turns, and tables next to PyTorch."""

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    import torch
except ImportError:
    torch = None

SETTLED = 0.03
DTYPES = ("float32", "bfloat16")


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


def torch_rate(dtype: str) -> float:
    """Operations a second of PyTorch's product of 2048 x 2048; NaN if it is not there."""
    if torch is None:
        return float("nan")
    x = torch.ones(2048, 2048, dtype=getattr(torch, dtype))
    return 2 * 2048**3 / np.median(seconds({"product": lambda: x @ x}, 9)["product"])


def arguments(description: str, longest: int | None = None) -> argparse.Namespace:
    """--dtype, both unless given, --repeats, and --long if there is a longest length."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--repeats", type=int, default=9)
    if longest is not None:
        parser.add_argument(
            "--long", action="store_true", help=f"up to {longest} queries"
        )
    options = parser.parse_args()
    options.dtype = options.dtype or DTYPES
    return options


def print_line(
    row: Any, dtype: str, calls: dict[str, Any], repeats: int, operations: float
) -> None:
    """Our time, its spread, the share of PyTorch's product rate, and others' times."""
    times = seconds(calls, repeats)
    ours = times.pop("raptax")
    low, median, high = np.quantile(ours, [0.1, 0.5, 0.9])
    others = "  ".join(
        f"{name} {np.median(t) * 1e3:8.2f} ms {np.median(t) / median:5.2f}x"
        for name, t in times.items()
    )
    share = operations / median / torch_rate(dtype)
    print(
        f"{dtype:9}{row.name:22}{row.S:6}{row.D:5}{median * 1e3:10.2f} ms"
        f"{high / low:6.2f}{share:7.0%}   {others}",
        flush=True,
    )


def print_table(
    dtypes: Iterable[str], rows: list[Any], measure: Callable[[Any, str], bool]
) -> int:
    """A line for each row; ``measure`` prints it and says whether the result is right."""
    print(
        "dtype    rule                    S     D       ours   p90/p10 share   others"
    )
    wrong = [
        f"{dtype} {row.name} S={row.S} D={row.D}"
        for dtype in dtypes
        for row in rows
        if not measure(row, dtype)
    ]
    print("\n".join(f"wrong: {name}" for name in wrong) or "all results are right")
    return bool(wrong)
