"""Attention on a CPU next to PyTorch: how fast, and how close to the machine's limit.

Run:  python -m benchmarks.bench_attention [--dtype float32] [--repeats 9] [--long]
Attention is two matrix products with something in between, so the yardstick is the rate
of a large matrix product: PyTorch's own, measured in the same run. raptax, PyTorch and,
where scores are few, `jax.nn.dot_product_attention` take turns, so that noise falls on
all alike. Prints medians, the spread of ours (90th over 10th percentile), how many times
faster we are, and the share of that rate. A window's share counts allowed scores alone.
Ends with an error if an output is wrong. PyTorch is optional.
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

FEW = 1024  # from here on jax.nn takes too long to be waited for


class Row(NamedTuple):
    """What is attended to. The mask is `Causal` and what ``options`` add to it."""

    name: str
    S: int
    D: int
    H: int = 8
    K: int = 8
    window: int | None = None
    options: Callable[["Row"], dict[str, Any]] = lambda row: {}

    def scores(self) -> float:
        """Allowed ones."""
        w = min(self.window or self.S, self.S)
        return self.H * (w * (w + 1) / 2 + (self.S - w) * w)


def documents(row: Row) -> dict[str, Any]:
    ids = jnp.arange(row.S, dtype=jnp.int32)[None] // (row.S // 7 + 1)
    return dict(mask_mod=raptax.Documents(ids) & raptax.Causal())


def rows(long: bool) -> Iterator[Row]:
    lengths = (512, 1024, 2048, 4096, *((8192, 16384) if long else ()))
    for D in (64, 128):
        for S in lengths:
            yield Row("causal", S, D)
    yield Row("causal, 4 heads share", 2048, 128, K=2)
    S = 16384 if long else 4096
    window = lambda row: dict(mask_mod=raptax.SlidingWindow(row.window))
    yield Row("window", S, 64, window=256, options=window)
    cap = lambda row: dict(score_mod=raptax.SoftCap(20.0))
    yield Row("soft cap", 2048, 64, options=cap)
    alibi = lambda row: dict(score_mod=raptax.ALiBi(raptax.alibi_slopes(row.H)))
    yield Row("ALiBi", 2048, 64, options=alibi)
    yield Row("documents", 2048, 64, options=documents)


def attend(row: Row) -> Callable[..., jax.Array]:
    options = dict(mask_mod=raptax.Causal()) | row.options(row)
    return jax.jit(functools.partial(native_attention, **options))


def competitors(row: Row, arrays: list[np.ndarray], dtype: str) -> dict[str, Any]:
    """A call for each that can do what this row asks for."""
    q, k, v = (jnp.asarray(x).astype(dtype) for x in arrays)
    ours = attend(row)
    calls: dict[str, Any] = {"raptax": lambda: ours(q, k, v)}
    if row.name not in ("causal", "causal, 4 heads share"):
        return calls
    if torch is not None:
        t, u, w = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in arrays)
        sdpa = functools.partial(
            torch.nn.functional.scaled_dot_product_attention,
            is_causal=True,
            enable_gqa=row.H != row.K,
        )
        calls["torch"] = lambda: sdpa(t, u, w)
    if row.S <= FEW:
        x, y, z = (a.swapaxes(1, 2) for a in (q, k, v))
        plain = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True))
        calls["jax.nn"] = lambda: plain(x, y, z)
    return calls


def correct(row: Row, arrays: list[np.ndarray], dtype: str) -> bool:
    """Our last 64 queries against the definition in float32."""
    q, k, v = (jnp.asarray(x).astype(dtype) for x in arrays)
    options = dict(mask_mod=raptax.Causal()) | row.options(row)
    wide = [x.astype(jnp.float32) for x in (q[:, :, -64:], k, v)]
    wanted = raptax.kernels.reference_attention(*wide, **options)
    actual = attend(row)(q, k, v)[:, :, -64:].astype(jnp.float32)
    tolerance = max(2e-5, 2 * float(jnp.finfo(dtype).eps))
    return bool((jnp.abs(actual - wanted) <= tolerance).all())


def measure(row: Row, dtype: str, repeats: int) -> bool:
    """Prints a row's line; returns whether its output is right."""
    rng = np.random.default_rng(0)
    shapes = [(1, heads, row.S, row.D) for heads in (row.H, row.K, row.K)]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    calls = competitors(row, arrays, dtype)
    print_line(row, dtype, calls, repeats, 4 * row.D * row.scores())
    return correct(row, arrays, dtype)


def main() -> int:
    options = arguments(__doc__, longest=16384)
    return print_table(
        options.dtype,
        list(rows(options.long)),
        lambda row, dtype: measure(row, dtype, options.repeats),
    )


if __name__ == "__main__":
    sys.exit(main())
