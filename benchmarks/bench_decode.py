"""Decoding from pages: how close to memory speed, and how far from PyTorch?

    python -m benchmarks.bench_decode

A decode step reads every key and value that the cache holds once and does about four
operations per byte and head of a group, so the yardstick is how fast this machine reads.
That is measured in the same run, by the same threads, in turns with the steps: a sum over
as many bytes of float32.

PyTorch, where it is installed, attends to keys and values that lie in one piece: once
with `enable_gqa`, and once with the heads of a group as rows of one query, its best form.
A chunk of a prompt through pages is set against plain attention to the same keys. Exits
with 1 if a result is wrong.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import seconds
from raptax import Causal, attention
from raptax.kernels.paged import attention as paged
from raptax.quant.rows import is_code, quantize

H, K, D, P = 32, 8, 128, 128
DECODE = ((1, 4096), (1, 16384), (8, 4096), (8, 16384))  # sequences, context
PREFILL = ((1024, 4096), (512, 8192))  # new rows, context
STORED = (jnp.bfloat16, jnp.int8)
REPEATS = 15


class Cache(NamedTuple):
    """A full pool and who holds what of it; pages lie in disorder."""

    pool: paged.Pool
    table: jax.Array
    keys: np.ndarray  # (B, K, S, D) float32, what the pool holds rounded
    values: np.ndarray


def rounded(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal numbers that bfloat16 holds."""
    x = jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)
    return np.asarray(x.astype(jnp.float32))


def make_cache(B: int, S: int, dtype: Any, checked: bool) -> Cache:
    rng = np.random.default_rng(B * S)
    M = -(-S // P)
    order = rng.permutation(B * M)
    table = order.reshape(B, M)
    sequences = B if checked else 1  # further ones are copies: numbers are slow to draw
    keys, values = (rounded(rng, sequences, K, M * P, D) for _ in range(2))

    def pages(x: np.ndarray) -> jax.Array:
        x = x.reshape(sequences, K, M, P, D).swapaxes(1, 2)
        whole = np.broadcast_to(x, (B, M, K, P, D)).reshape(B * M, K, P, D)
        return jnp.asarray(whole[np.argsort(order)], jnp.bfloat16)[None]

    k, v = pages(keys), pages(values)
    if is_code(dtype):
        pack = jax.jit(quantize, static_argnums=1)
        (k, k_scales), (v, v_scales) = pack(k, dtype), pack(v, dtype)
        pool = paged.Pool(k, v, k_scales, v_scales)
    else:
        pool = paged.Pool(k.astype(dtype), v.astype(dtype))
    return Cache(pool, jnp.asarray(table, jnp.int32), keys[:, :, :S], values[:, :, :S])


def bytes_read(B: int, S: int, dtype: Any) -> int:
    token = 2 * K * (D * jnp.dtype(dtype).itemsize + 4 * is_code(dtype))
    return B * S * token


# ----------------------------------------------------------------------------- the runs


def paged_step(
    cache: Cache, query: jax.Array, S: int, kernel: str
) -> Callable[[], Any]:
    """Attention of the last rows of each sequence to all of it."""
    B, R = cache.table.shape[0], query.shape[0]

    @jax.jit
    def run(query: jax.Array, pool: paged.Pool) -> jax.Array:
        return paged.attend(
            query,
            pool,
            table=cache.table,
            lengths=jnp.full(B, S, jnp.int32),
            row_offsets=jnp.arange(B + 1, dtype=jnp.int32) * (R // B),
            layer=0,
            mask_mod=Causal(),
            kernel=kernel,
        )

    return lambda: run(query, cache.pool)


def streaming_read(size: int) -> Callable[[], Any]:
    x = jnp.ones(size // 4, jnp.float32)
    # One sum per thread's share: XLA cuts a sum over rows into as many pieces.
    total = jax.jit(lambda x: x.reshape(64, -1).sum(1))
    return lambda: total(x)


def torch_steps(cache: Cache, query: jax.Array, B: int) -> dict[str, Callable[[], Any]]:
    """PyTorch's attention to the same keys, contiguous and in bfloat16."""
    try:
        import torch
        from torch.nn.functional import scaled_dot_product_attention as sdpa
    except ImportError:
        return {}
    torch.set_num_threads(os.cpu_count() or 1)

    def tensor(x: np.ndarray) -> Any:
        whole = torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16)
        return whole.expand(B, *whole.shape[1:]).contiguous()

    k, v = tensor(cache.keys), tensor(cache.values)
    q = torch.from_numpy(np.array(query.astype(jnp.float32))).to(torch.bfloat16)
    one, folded = q.reshape(B, H, 1, D), q.reshape(B, K, H // K, D)

    def run(query: Any, **options: Any) -> Any:
        with torch.inference_mode():
            return sdpa(query, k, v, **options)

    return {
        "torch": lambda: run(folded),
        "torch gqa": lambda: run(one, enable_gqa=True),
    }


def exact(cache: Cache, query: jax.Array, B: int) -> np.ndarray:
    """The right answer for one row per sequence, in float64."""
    q = np.asarray(query.astype(jnp.float32), np.float64).reshape(B, K, H // K, D)
    scores = np.einsum("bkgd,bksd->bkgs", q, cache.keys) * D**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bkgs,bksd->bkgd", weights, cache.values).reshape(B, H, D)


# -------------------------------------------------------------------------------- tables


def check() -> bool:
    """Whether small steps are right: bfloat16 to its rounding, codes to theirs."""
    right = True
    for dtype, close in ((jnp.float32, 4e-3), (jnp.bfloat16, 4e-3), (jnp.int8, 8e-3)):
        cache = make_cache(2, 3000, dtype, checked=True)
        query = jnp.asarray(
            np.random.default_rng(1).normal(size=(2, H, D)), jnp.bfloat16
        )
        out = paged_step(cache, query, 3000, "native")()
        error = np.abs(
            np.asarray(out.astype(jnp.float32)) - exact(cache, query, 2)
        ).max()
        print(
            f"largest error, {jnp.dtype(dtype).name:9} pages: {error:.1e} of {close:.0e}"
        )
        right &= bool(error < close)
    return right


def median(times: np.ndarray) -> float:
    return float(np.median(times))


def print_decode() -> None:
    print(
        f"\none decode step, {H} query and {K} kv heads, D={D}, pages of {P}, bfloat16"
    )
    print(
        "  B context  pages         ms (slowest/fastest)  GB/s  of read   torch  its gqa"
    )
    for B, S in DECODE:
        query = jnp.asarray(
            np.random.default_rng(1).normal(size=(B, H, D)), jnp.bfloat16
        )
        caches = {jnp.dtype(x).name: make_cache(B, S, x, checked=False) for x in STORED}
        runs = {n: paged_step(c, query, S, "native") for n, c in caches.items()}
        runs["read"] = streaming_read(bytes_read(B, S, jnp.bfloat16))
        runs |= torch_steps(caches["bfloat16"], query, B)
        times = seconds(runs, REPEATS)
        speed = bytes_read(B, S, jnp.bfloat16) / median(times["read"])
        for name in caches:
            taken, size = times[name], bytes_read(B, S, jnp.dtype(name))
            rate = size / median(taken)
            peers = "".join(
                f"{median(times[peer]) / median(taken):7.2f}x"
                for peer in ("torch", "torch gqa")
                if peer in times
            )
            print(
                f"{B:3} {S:7}  {name:9} {1e3 * median(taken):8.2f} "
                f"({taken[-1] / taken[0]:5.2f})       {rate / 1e9:6.1f} "
                f"{100 * rate / speed:6.0f} % {peers}",
                flush=True,
            )
        gain = median(times["bfloat16"]) / median(times["int8"])
        print(f"    int8: {gain:.2f} times the tokens; read {speed / 1e9:.1f} GB/s")


def print_prefill() -> None:
    print("\na chunk of a prompt through pages, and plain attention to the same keys")
    print("   rows context  dtype       paged ms   plain ms   ratio")
    for rows, S in PREFILL:
        for dtype in (jnp.bfloat16, jnp.float32):
            cache = make_cache(1, S, dtype, checked=False)
            rng = np.random.default_rng(1)
            query = jnp.asarray(rng.normal(size=(rows, H, D)), dtype)
            k, v = (jnp.asarray(x, dtype) for x in (cache.keys, cache.values))
            plain = jax.jit(functools.partial(attention, mask_mod=Causal()))
            batch = query.swapaxes(0, 1)[None]
            runs = {
                "paged": paged_step(cache, query, S, "native"),
                "plain": lambda q=batch, k=k, v=v, plain=plain: plain(q, k, v),
            }
            times = seconds(runs, 5)
            a, b = median(times["paged"]), median(times["plain"])
            print(
                f"{rows:7} {S:7}  {jnp.dtype(dtype).name:9} {1e3 * a:10.1f} "
                f"{1e3 * b:10.1f} {a / b:7.2f}",
                flush=True,
            )


def main() -> None:
    print(
        f"JAX {jax.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}"
    )
    right = check()
    print_decode()
    print_prefill()
    if not right:
        sys.exit("a result is wrong")


if __name__ == "__main__":
    main()
