"""Gradients of attention on a CPU next to PyTorch, the backward pass alone.

Run:  python -m benchmarks.bench_backward [--dtype float32] [--repeats 9] [--long]
Five matrix products with something in between, so the yardstick is the rate of a large
matrix product: PyTorch's own, measured in the same run. raptax and PyTorch take turns,
so that noise falls on both alike. Prints medians, the spread of ours (90th over 10th
percentile), the share of that rate that allowed scores alone account for, and how many
times faster we are. Ends with an error if a gradient is wrong. PyTorch is optional.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import raptax
from benchmarks.machine import arguments, print_line, print_table, torch
from raptax.kernels import native_attention

CHECKED = 512  # lengths up to here are compared with the definition


class Row(NamedTuple):
    """What is attended to. The mask is `Causal`, or what ``options`` make of it."""

    name: str
    S: int
    D: int
    H: int = 8
    K: int = 8
    window: int | None = None
    options: Callable[["Row"], dict[str, Any]] = lambda row: dict(
        mask_mod=raptax.Causal()
    )

    def scores(self) -> float:
        """Allowed ones."""
        w = min(self.window or self.S, self.S)
        return self.H * (w * (w + 1) / 2 + (self.S - w) * w)


def rows(long: bool) -> Iterator[Row]:
    for D in (64, 128):
        for S in (512, 1024, 2048, 4096, *((8192,) if long else ())):
            yield Row("causal", S, D)
    yield Row("causal, 4 heads share", 2048, 128, K=2)
    window = lambda row: dict(mask_mod=raptax.SlidingWindow(row.window))
    yield Row("window", 4096, 64, window=256, options=window)
    capped = lambda row: dict(mask_mod=raptax.Causal(), score_mod=raptax.SoftCap(20.0))
    yield Row("soft cap", 2048, 64, options=capped)


def random_arrays(row: Row, dtype: str) -> list[np.ndarray]:
    """Query, key, value and the gradient of the output."""
    rng = np.random.default_rng(0)
    shapes = [(1, heads, row.S, row.D) for heads in (row.H, row.K, row.K, row.H)]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    return [np.asarray(jnp.asarray(x).astype(dtype), np.float32) for x in arrays]


def ours(
    row: Row, arrays: list[np.ndarray], dtype: str, attend: Any
) -> Callable[[], Any]:
    q, k, v, d_out = (jnp.asarray(x).astype(dtype) for x in arrays)
    run = functools.partial(attend, **row.options(row))
    _, pull = jax.vjp(run, q, k, v)
    back = jax.jit(lambda pull, d_out: pull(d_out))
    return lambda: back(pull, d_out)


def theirs(row: Row, arrays: list[np.ndarray], dtype: str) -> Callable[[], Any]:
    q, k, v, d_out = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in arrays)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    attend = torch.nn.functional.scaled_dot_product_attention
    out = attend(*inputs, is_causal=True, enable_gqa=row.H != row.K)
    return lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True)


def correct(row: Row, dtype: str) -> bool:
    """A short problem of this kind against the definition in float32."""
    short = row._replace(S=min(row.S, CHECKED))
    arrays = random_arrays(short, dtype)
    wanted = ours(short, arrays, "float32", raptax.kernels.reference_attention)()
    actual = ours(short, arrays, dtype, native_attention)()
    tolerance = max(1e-5, 4 * float(jnp.finfo(dtype).eps))
    return all(
        bool((jnp.abs(a - w) <= tolerance * jnp.abs(w).max()).all())
        for a, w in zip(actual, wanted, strict=True)
    )


def measure(row: Row, dtype: str, repeats: int) -> bool:
    """Prints a row's line; returns whether its gradients are right."""
    arrays = random_arrays(row, dtype)
    calls = {"raptax": ours(row, arrays, dtype, native_attention)}
    if torch is not None and row.name.startswith("causal"):
        calls["torch"] = theirs(row, arrays, dtype)
    print_line(row, dtype, calls, repeats, 10 * row.D * row.scores())
    return correct(row, dtype)


def main() -> int:
    options = arguments(__doc__, longest=8192)
    return print_table(
        options.dtype,
        list(rows(options.long)),
        lambda row, dtype: measure(row, dtype, options.repeats),
    )


if __name__ == "__main__":
    sys.exit(main())
