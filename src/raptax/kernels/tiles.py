"""What a blockwise kernel does to one tile of the scores, and to which tiles.

What is static (`TiledProblem`) travels apart from the arrays: those that derivatives
reach (`DiffInputs`) and those that they do not (`NonDiffArrays`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._core.types import Indices, position_indices, query_positions
from ..block_mask import EMPTY
from .dropout import Dropout
from .softmax import accumulator
from .wide import eval_wide

TILE = 256
SCORES_PER_TILE = 2**22  # bounds a tile's scores over all batches and heads: 16 MiB
UNKNOWN_BATCH = 8  # sequences that tiles are sized for where their number is symbolic
MANY_TILES = 16  # from here on it pays to find the empty tiles first


class Tile(NamedTuple):
    """Rows of queries and of keys in one tile."""

    queries: int
    keys: int


def tile_sizes(B: int, H: int, T: int, S: int) -> Tile:
    """Square tiles, with fewer queries each when there are many heads to hold.

    A symbolic length is one that was padded to whole tiles; see `problem.with_lengths`.
    """
    keys = min(TILE, S) if isinstance(S, int) else TILE
    batch = B if isinstance(B, int) else UNKNOWN_BATCH
    queries = max(16, SCORES_PER_TILE // (batch * H * keys) // 16 * 16)
    most = T if isinstance(T, int) else TILE
    return Tile(min(TILE, queries, most), keys)


def cut_short(length: int, size: int) -> bool:
    """Whether the last tile of an axis is."""
    return isinstance(length, int) and length % size != 0


# ------------------------------------------------------------- mods with their arrays


def lift(
    function: Callable[..., Any], *args: Any
) -> tuple[Callable[..., Any], list[jax.Array]]:
    """``(run, arrays)`` such that ``run(arrays, *args) == function(*args)``.

    ``arrays`` holds every array that ``function`` carries or captures, so that a custom
    gradient can have them as arguments and no tracer hides in a closure. An array of 16
    bits may be `widened`: the values are the same, and its gradient is summed up wide.
    """
    closed = jax.make_jaxpr(function)(*args)
    arrays = [jnp.asarray(x) for x in closed.consts]
    # Traced again with the arrays as arguments: they may be tracers, and the function
    # that is returned outlives these.
    call = lambda arrays, *args: jax.core.eval_jaxpr(closed.jaxpr, arrays, *args)
    jaxpr = jax.make_jaxpr(call)(arrays, *args).jaxpr

    def run(arrays: list[jax.Array], *args: Any) -> jax.Array:
        return eval_wide(jaxpr, [*arrays, *args])[0]

    return run, arrays


class DiffInputs(NamedTuple):
    """The arrays of a problem that have a derivative."""

    query: Float[Array, "B H T D"]
    key: Float[Array, "B K S D"]
    value: Float[Array, "B K S E"]
    bias: Float[Array, "#B #H #T #S"] | None
    sinks: Float[Array, " H"] | None
    learned: list[jax.Array]


class Plan(NamedTuple):
    """Which tiles to visit: for each tile of queries, those of keys that may count.

    Row ``i`` visits ``order[i, :number[i]]``.
    """

    order: Int[Array, "QT KT"]
    number: Int[Array, " QT"]

    @classmethod
    def create(cls, kinds: Int[Array, "#B #H QT KT"]) -> "Plan":
        empty = (kinds == EMPTY).all((0, 1))
        order = jnp.argsort(empty, axis=1, stable=True).astype(jnp.int32)
        return cls(order, (~empty).sum(1, dtype=jnp.int32))


class NonDiffArrays(NamedTuple):
    """The arrays of a problem that have no derivative."""

    start: Int[Array, " #B"]
    mask: Bool[Array, "#B #H #T #S"] | None
    allow_arrays: list[jax.Array]
    change_arrays: list[jax.Array]
    dropout: Dropout | None
    plan: Plan | None
    scale: Float[Array, ""] | None

    def scaled(self, products: jax.Array) -> jax.Array:
        """Products of queries and keys as scores, or gradients the other way."""
        return products if self.scale is None else products * self.scale

    def drop(self, weights: jax.Array, at: Indices) -> jax.Array:
        """Weights, or what multiplies them, after dropout."""
        return weights if self.dropout is None else self.dropout(weights, at)


class TiledProblem(NamedTuple):
    """What happens to scores, tile by tile. Static; its arrays travel beside it.

    A tile is named by ``(i, j)``, its place in the grid, and starts at query row
    ``rows(i)`` and key ``keys(j)``. ``learned`` says which of the arrays of ``change``
    have a derivative. ``reversible`` asks for loops that JAX can run backwards.
    """

    tile: Tile
    shape: tuple[int, int, int, int]  # B, H, T, S
    allow: Callable[..., jax.Array] | None = None
    change: Callable[..., jax.Array] | None = None
    learned: tuple[bool, ...] = ()
    reversible: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        _, _, T, S = self.shape
        return -(-T // self.tile.queries), -(-S // self.tile.keys)

    @property
    def many_tiles(self) -> bool:
        """Whether it pays to find the empty ones beforehand."""
        rows, columns = self.grid
        known = isinstance(rows, int) and isinstance(columns, int)
        return known and rows * columns >= MANY_TILES

    def rows(self, i: Any) -> jax.Array:
        return jnp.minimum(i * self.tile.queries, self.shape[2] - self.tile.queries)

    def keys(self, j: Any) -> jax.Array:
        return jnp.minimum(j * self.tile.keys, self.shape[3] - self.tile.keys)

    def first_time(self, i: jax.Array) -> Bool[Array, "1 1 rows 1"]:
        """Which query rows of tile ``i`` the tile before has not done."""
        row = self.rows(i) + jnp.arange(self.tile.queries)
        return (row >= i * self.tile.queries)[None, None, :, None]

    def indices(self, start: jax.Array, i: Any, j: Any) -> Indices:
        """Position indices of tile ``(i, j)``."""
        B, H = self.shape[:2]
        q_idx = query_positions(start + self.rows(i), self.tile.queries, 0)
        kv_idx = self.keys(j) + jnp.arange(self.tile.keys, dtype=jnp.int32)
        return position_indices(B, H, q_idx, kv_idx)

    def of_tile(self, x: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """What tile ``(i, j)`` sees of an array that broadcasts to the scores."""
        if x.shape[2] != 1:
            x = cut(x, self.rows(i), self.tile.queries)
        return cut(x, self.keys(j), self.tile.keys, axis=3) if x.shape[3] != 1 else x

    def allowed(
        self, fixed: NonDiffArrays, i: jax.Array, j: jax.Array
    ) -> jax.Array | None:
        """Which scores of the tile count, broadcastable; None if all do."""
        at = self.indices(fixed.start, i, j)
        parts = []
        if cut_short(self.shape[2], self.tile.queries):
            parts.append(self.first_time(i))
        if cut_short(self.shape[3], self.tile.keys):
            parts.append(at[3] >= j * self.tile.keys)
        if fixed.mask is not None:
            parts.append(self.of_tile(fixed.mask, i, j))
        if self.allow is not None:
            parts.append(self.allow(fixed.allow_arrays, *at))
        return functools.reduce(jnp.logical_and, parts) if parts else None

    def scores(
        self,
        fixed: NonDiffArrays,
        learned: list[jax.Array],
        base: jax.Array,
        at: Indices,
    ) -> jax.Array:
        """What the softmax sees of the scaled and biased scores, but for the mask."""
        if self.change is None:
            return base
        moved, others = iter(learned), iter(fixed.change_arrays)
        arrays = [next(moved if is_learned else others) for is_learned in self.learned]
        return self.change(arrays, base, *at)

    def over_keys(
        self, fixed: NonDiffArrays, i: jax.Array, visit: Callable[..., Any], state: Any
    ) -> Any:
        """``state`` after ``state = visit(j, allowed, state)`` for each tile that counts.

        ``allowed`` says which scores of tile ``(i, j)`` do.
        """

        def visit_if_any(j: jax.Array, state: Any) -> Any:
            allowed = self.allowed(fixed, i, j)
            return if_any(allowed, lambda: visit(j, allowed, state), state)

        if fixed.plan is None:
            return lax.fori_loop(0, self.grid[1], visit_if_any, state)
        order, count = fixed.plan.order[i], fixed.plan.number[i]
        if not self.reversible:
            listed = lambda n, state: visit_if_any(order[n], state)
            return lax.fori_loop(0, count, listed, state)

        def if_listed(n: jax.Array, state: Any) -> Any:
            there = lambda: visit_if_any(order[n], state)
            return lax.cond(n < count, there, lambda: state)

        return lax.fori_loop(0, self.grid[1], if_listed, state)


# ----------------------------------------------------------------------------- products


def cut(x: jax.Array, start: jax.Array, size: int, axis: int = 2) -> jax.Array:
    """``size`` entries of an axis, from ``start`` on."""
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def put(x: jax.Array, update: jax.Array, start: jax.Array) -> jax.Array:
    """``x[:, :, start : start + size] = update``, in place inside a loop."""
    return lax.dynamic_update_slice_in_dim(x, update.astype(x.dtype), start, 2)


def by_group(x: jax.Array, kv_heads: int) -> jax.Array:
    """``(B, H, ...)`` to ``(B, K, G, ...)``: query heads beside the kv head they read."""
    B, H = x.shape[:2]
    return x.reshape(B, kv_heads, H // kv_heads, *x.shape[2:])


def times_keys(x: jax.Array, keys: jax.Array) -> jax.Array:
    """``x (B, H, T, D) @ keys (B, K, S, D).T``: (B, H, T, S), accumulated wide."""
    x = by_group(x, keys.shape[1])
    out = jnp.einsum(
        "bkgtd,bksd->bkgts", x, keys, preferred_element_type=accumulator(x.dtype)
    )
    return out.reshape(x.shape[0], -1, *out.shape[3:])


def times_values(x: jax.Array, values: jax.Array) -> jax.Array:
    """``x (B, H, T, S) @ values (B, K, S, E)``: (B, H, T, E), accumulated wide."""
    x = by_group(x.astype(values.dtype), values.shape[1])
    out = jnp.einsum(
        "bkgts,bkse->bkgte", x, values, preferred_element_type=accumulator(x.dtype)
    )
    return out.reshape(x.shape[0], -1, *out.shape[3:])


def gather_rows(x: jax.Array, rows: jax.Array, kv_heads: int) -> jax.Array:
    """``x (B, H, T, S).T @ rows (B, H, T, E)``, summed over each group: (B, K, S, E)."""
    x, rows = by_group(x.astype(rows.dtype), kv_heads), by_group(rows, kv_heads)
    return jnp.einsum(
        "bkgts,bkgte->bkse", x, rows, preferred_element_type=accumulator(x.dtype)
    )


def if_any(allowed: jax.Array | None, work: Callable[[], Any], otherwise: Any) -> Any:
    """``work()``, or ``otherwise`` without working when nothing is allowed."""
    if allowed is None:
        return work()
    return lax.cond(allowed.any(), work, lambda: otherwise)
