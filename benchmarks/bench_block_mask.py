"""Which tiles a mask leaves empty, full or partial: time, next to PyTorch's; and its use.

    python -m benchmarks.bench_block_mask

Block masks by interval arithmetic, inside jit and with traced ids of documents, in turns
with `create_block_mask` of PyTorch's FlexAttention, which stores the mask of all scores,
and with the same through torch.compile, which does not. Neither is needed for the rest.
Then what a window costs per token, and what derivatives take in memory. Exits with 1 if
a tile is called empty or full that is not.
"""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from benchmarks.machine import seconds
from raptax import Causal, Documents, SlidingWindow, attention, create_block_mask
from raptax.block_mask import EMPTY, FULL, PARTIAL

BLOCK, WINDOW, LENGTH = 128, 1024, 700  # LENGTH: tokens of a document, in the mean
LENGTHS, CHECKED = (4096, 16384, 65536), 4096
NARROW, WINDOW_LENGTHS = 256, (4096, 8192, 16384, 32768)
MEMORY = 64e6

# Each mask of ours, and the same as a function that NumPy and PyTorch can read.
MASKS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "causal": (
        lambda ids: Causal(),
        lambda ids: lambda b, h, q, k: k <= q,
    ),
    "window": (
        lambda ids: SlidingWindow(WINDOW),
        lambda ids: lambda b, h, q, k: (k <= q) & (q - k < WINDOW),
    ),
    "documents": (
        lambda ids: Causal() & Documents(ids),
        lambda ids: lambda b, h, q, k: (k <= q) & (ids[q] == ids[k]),
    ),
    "all three": (
        lambda ids: Causal() & SlidingWindow(WINDOW) & Documents(ids),
        lambda ids: lambda b, h, q, k: (k <= q) & (q - k < WINDOW) & (ids[q] == ids[k]),
    ),
}


def document_ids(S: int) -> np.ndarray:
    """Documents one after another, which end at places of no regularity."""
    ends = np.random.default_rng(0).random(S) < 1 / LENGTH
    return np.cumsum(ends).astype(np.int32)


# -------------------------------------------------------------------------------- ours


def ours(name: str, S: int) -> Callable[[jax.Array], Any]:
    def build(ids: jax.Array) -> Any:
        mask, block = MASKS[name][0](ids), (BLOCK, BLOCK)
        return create_block_mask(mask, seq_q=S, seq_kv=S, block=block)

    return build


def every_array(jaxpr: Any) -> Iterator[Any]:
    """The abstract value of every array that a program makes, inside loops too."""
    for eqn in jaxpr.eqns:
        yield from (x.aval for x in eqn.outvars)
        for inner in jax.tree.leaves(eqn.params, is_leaf=is_program):
            if is_program(inner):
                yield from every_array(getattr(inner, "jaxpr", inner))


def is_program(x: Any) -> bool:
    return isinstance(x, (core.Jaxpr, core.ClosedJaxpr))


def largest_array(name: str, S: int) -> int:
    ids = jax.ShapeDtypeStruct((1, S), jnp.int32)
    closed = jax.make_jaxpr(lambda ids: ours(name, S)(ids).kinds)(ids)
    return max(aval.size for aval in every_array(closed.jaxpr))


# ------------------------------------------------------------------------------- theirs


class Torch:
    """PyTorch's block masks, as it makes them and compiled."""

    def __init__(self) -> None:
        import torch
        from torch.nn.attention import flex_attention

        torch.set_num_threads(os.cpu_count() or 1)
        self.torch, self.eager = torch, flex_attention.create_block_mask
        self.version = torch.__version__
        self.compiled: dict[str, Any] = {}

    def build(self, name: str, S: int, create: Any) -> Callable[[], Any]:
        rule = MASKS[name][1](self.torch.from_numpy(document_ids(S)))
        return lambda: create(rule, 1, 1, S, S, device="cpu", BLOCK_SIZE=BLOCK)

    def compile(self, name: str) -> Any:
        """Once for each mask, of any length."""
        if name not in self.compiled:
            self.torch._dynamo.reset()
            self.compiled[name] = self.torch.compile(self.eager, dynamic=True)
        return self.compiled[name]

    def fits(self, S: int) -> bool:
        """Whether S x S booleans and the distances they come from are free to take."""
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return free > S * S * (1 + 2 * 8)

    def kinds(self, name: str, S: int) -> np.ndarray:
        made = self.build(name, S, self.eager)()
        kinds = np.full((-(-S // BLOCK),) * 2, EMPTY, np.int8)
        parts = (
            (PARTIAL, made.kv_num_blocks, made.kv_indices),
            (FULL, made.full_kv_num_blocks, made.full_kv_indices),
        )
        for kind, number, indices in parts:
            for row, (n, columns) in enumerate(
                zip(number[0, 0].tolist(), indices[0, 0].tolist(), strict=True)
            ):
                kinds[row, columns[:n]] = kind
        return kinds


def find_torch() -> Torch | None:
    try:
        peer = Torch()
    except ImportError:
        print("PyTorch is not installed: ours alone")
        return None
    try:
        peer.build("causal", 256, peer.compile("causal"))()
    except RuntimeError as error:  # no C++ compiler, or none that it likes
        print(f"torch.compile does not work here: {type(error).__name__}")
        peer.compile = lambda name: None  # type: ignore[method-assign]
    return peer


# --------------------------------------------------------------------------------- runs


def dense_kinds(name: str, S: int) -> np.ndarray:
    """Kinds of all tiles from the mask of all scores, by NumPy."""
    at = np.arange(S, dtype=np.int32)
    allowed = MASKS[name][1](document_ids(S))(0, 0, at[:, None], at[None])
    tiles = allowed.reshape(S // BLOCK, BLOCK, S // BLOCK, BLOCK)
    return tiles.any((1, 3)).astype(np.int8) + tiles.all((1, 3))


def agree(peer: Torch | None, S: int) -> bool:
    """Whether no tile is called empty or full that is not; prints how many are open."""
    right = True
    for name in MASKS:
        ids = jnp.asarray(document_ids(S))[None]
        kinds = np.asarray(jax.jit(ours(name, S))(ids).kinds)[0, 0]
        truths = {"NumPy": dense_kinds(name, S)}
        if peer is not None:
            truths["PyTorch"] = peer.kinds(name, S)
        for by, truth in truths.items():
            wrong = (kinds != truth) & (kinds != PARTIAL)
            undecided = (kinds != truth) & (kinds == PARTIAL)
            print(
                f"S={S} {name:10} by {by:8} {kinds.size} tiles: {wrong.sum()} wrong, "
                f"{undecided.sum()} called partial that are empty or full"
            )
            right &= not wrong.any()
    return right


def build_times(name: str, S: int, peer: Torch | None) -> dict[str, np.ndarray]:
    jitted, ids = jax.jit(ours(name, S)), jnp.asarray(document_ids(S))[None]
    runs: dict[str, Callable[[], Any]] = {"ours": lambda: jitted(ids).kinds}
    if peer is not None:
        if peer.fits(S):
            runs["eager"] = peer.build(name, S, peer.eager)
        if (create := peer.compile(name)) is not None:
            runs["compiled"] = peer.build(name, S, create)
    return seconds(runs, 5 if S > CHECKED else 9)


def shown(times: np.ndarray | None, base: np.ndarray | None = None) -> str:
    """Median in milliseconds, spread, and how many times the median of ``base``."""
    if times is None:
        return f"{'-':>{17 if base is None else 26}}"
    text = f"{1e3 * np.median(times):10.3f} ({times[-1] / times[0]:.2f})"
    return (
        text if base is None else f"{text} {np.median(times) / np.median(base):7.1f}x"
    )


def print_build_times(peer: Torch | None) -> None:
    print(
        f"\nblock masks of tiles {BLOCK} x {BLOCK}: median ms (slowest / fastest), and"
    )
    print("how many times ours; our largest array in multiples of tiles x tiles")
    print(
        f"{'mask':10} {'S':>6} {'tiles':>7} {'empty':>7} {'largest':>8} {'ours':>17} "
        f"{'PyTorch':>26} {'PyTorch, compiled':>26}"
    )
    for name in MASKS:
        for S in LENGTHS:
            tiles, ids = (S // BLOCK) ** 2, jnp.asarray(document_ids(S))[None]
            largest, empty = largest_array(name, S), ours(name, S)(ids).sparsity()
            times = build_times(name, S, peer)
            base = times["ours"]
            print(
                f"{name:10} {S:6} {tiles:7} {empty:6.1f}% {largest / tiles:8.2f} "
                f"{shown(base)} {shown(times.get('eager'), base)} "
                f"{shown(times.get('compiled'), base)}",
                flush=True,
            )


def print_window_times() -> None:
    """Forward attention with a window: linear in S if the time of a token is the same."""
    runs = {}
    for S in WINDOW_LENGTHS:
        rng = np.random.default_rng(0)
        q, k, v = (
            jnp.asarray(rng.normal(size=(1, 1, S, 64)), jnp.float32) for _ in range(3)
        )
        attend = jax.jit(
            lambda q, k, v: attention(
                q, k, v, mask_mod=SlidingWindow(NARROW), kernel="blockwise"
            )
        )
        runs[str(S)] = lambda attend=attend, q=q, k=k, v=v: attend(q, k, v)
    times = seconds(runs, 9)
    base = np.median(times[str(WINDOW_LENGTHS[0])]) / WINDOW_LENGTHS[0]
    print(f"\nblockwise forward, SlidingWindow({NARROW}), H=1, D=64, float32")
    print("     S        ms (spread)  us/token  of the first")
    for S in WINDOW_LENGTHS:
        taken = times[str(S)]
        each = np.median(taken) / S
        print(f"{S:6} {shown(taken):>18} {1e6 * each:9.3f} {each / base:13.2f}")


def temporary_memory() -> float:
    """Bytes that forward and backward take beside arguments and results."""
    shape = jax.ShapeDtypeStruct((1, 8, 4096, 64), jnp.float32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, mask_mod=Causal(), kernel="blockwise").sum()

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    analysis: Any = gradient.lower(shape, shape, shape).compile().memory_analysis()
    return float(analysis.temp_size_in_bytes)


def main() -> None:
    load = os.getloadavg()[0]
    peer = find_torch()
    theirs = "no PyTorch" if peer is None else f"PyTorch {peer.version}"
    print(f"JAX {jax.__version__}, {theirs}, {os.cpu_count()} cores, load {load:.2f}")
    right = agree(peer, CHECKED)
    print_build_times(peer)
    print_window_times()
    print(
        "\nforward and backward, Causal, B=1 H=8 S=4096 D=64 float32: "
        f"{temporary_memory() / 1e6:.1f} MB temporary, of {MEMORY / 1e6:.0f} MB at most"
    )
    if not right:
        sys.exit("a tile is called empty or full that is not")


if __name__ == "__main__":
    main()
