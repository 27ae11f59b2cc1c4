"""Attention in O(S) memory, in plain JAX: runs everywhere, takes every mod.

FlashAttention-2's two loops (Dao 2023, arXiv:2307.08691): queries tile by tile, and for
each the keys tile by tile with a running softmax. Backward keeps only the output and
the log-sum-exp of each row, and works the weights out again. Tiles in which the mask
allows nothing are skipped, in both directions. The loops are rolled, so compile time
does not depend on the lengths.

The last tile of an axis is moved back until it fits, so nothing is padded or copied.
Keys that it shares with the tile before are masked; query rows that it shares are worked
out twice going forward, and count once going backward.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._errors import check_mask, check_qkv
from .._types import (
    DropoutKey,
    Indices,
    MaskMod,
    ScoreMod,
    position_indices,
    query_positions,
)
from ..mods import apply_mask, apply_score, as_mod, with_scale
from .dropout import Dropout
from .softmax import Running, accumulator, finite, poison

TILE = 256
SCORES_PER_TILE = 2**22  # bounds a tile's scores over all batches and heads: 16 MiB


def blockwise_attention(
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S E"],
    *,
    mask: Bool[Array, "#B #H #T #S"] | None = None,
    mask_mod: MaskMod | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | Float[Array, ""] | None = None,
    query_start: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    dropout_rng: DropoutKey | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
) -> Float[Array, "B H T E"]:
    """See `AttentionFn`.

    Weights are rounded to the value's dtype before they meet the values, and summed in
    float32, as FlashAttention does. Gradients reach the arrays that ``score_mod``
    carries or captures, and ``scale`` when it is an array.
    """
    check_qkv(query, key, value)
    B, H, T, D = query.shape
    S, E = value.shape[2:]
    check_mask(mask, (B, H, T, S))
    dropout = Dropout.create(dropout_rng, dropout_rate, deterministic)
    if 0 in (B, H, T, S, D, E):
        return jnp.zeros((B, H, T, E), query.dtype)
    scale, score_mod = with_scale(D**-0.5 if scale is None else scale, score_mod)
    return _blockwise(
        query,
        key,
        value,
        S - T if query_start is None else query_start,
        mask=mask,
        mask_mod=as_mod(mask_mod),
        score_mod=score_mod,
        dropout=dropout,
        scale=scale,
    )


@functools.partial(jax.jit, static_argnames="scale")
def _blockwise(query, key, value, start, *, mask, mask_mod, score_mod, dropout, scale):
    B, H, T, _ = query.shape
    S = key.shape[2]
    start = jnp.asarray(start, jnp.int32).reshape(-1)
    tile = tile_sizes(B, H, T, S)
    problem = Problem(tile, (B, H, T, S), scale)
    at = problem.indices(start, 0, 0)
    scores = jnp.zeros((B, H, *tile), accumulator(query.dtype))
    allow_arrays: list[jax.Array] = []
    change_arrays: list[jax.Array] = []
    if mask_mod is not None:
        allow, allow_arrays = lift(functools.partial(apply_mask, mask_mod), *at)
        problem = problem._replace(allow=allow)
    if score_mod is not None:
        change, change_arrays = lift(
            functools.partial(apply_score, score_mod), scores, *at
        )
        problem = problem._replace(change=change)
    fixed = Fixed(start, mask, allow_arrays, dropout)
    out, _ = _attend(problem, fixed, change_arrays, query, key, value)
    return out


class Tile(NamedTuple):
    """Rows of queries and of keys in one tile."""

    queries: int
    keys: int


def tile_sizes(B: int, H: int, T: int, S: int) -> Tile:
    """Square tiles, with fewer queries each when there are many heads to hold."""
    keys = min(TILE, S)
    queries = max(16, SCORES_PER_TILE // (B * H * keys) // 16 * 16)
    return Tile(min(TILE, queries, T), keys)


# ------------------------------------------------------------- rules with their arrays


def lift(
    function: Callable[..., Any], *args: Any
) -> tuple[Callable[..., Any], list[jax.Array]]:
    """``(run, arrays)`` such that ``run(arrays, *args) == function(*args)``.

    ``arrays`` holds every array that ``function`` carries or captures, so that a custom
    gradient can have them as arguments and no tracer hides in a closure.
    """
    closed = jax.make_jaxpr(function)(*args)

    def run(arrays: list[jax.Array], *args: Any) -> jax.Array:
        return jax.core.eval_jaxpr(closed.jaxpr, arrays, *args)[0]

    return run, [jnp.asarray(x) for x in closed.consts]


class Fixed(NamedTuple):
    """The arrays of a problem that have no gradient."""

    start: Int[Array, " #B"]
    mask: Bool[Array, "#B #H #T #S"] | None
    allow_arrays: list[jax.Array]
    dropout: Dropout | None

    def drop(self, weights: jax.Array, at: Indices) -> jax.Array:
        """Weights, or what multiplies them, after dropout."""
        return weights if self.dropout is None else self.dropout(weights, at)


class Problem(NamedTuple):
    """What happens to scores, tile by tile. Static; its arrays travel beside it.

    A tile is named by ``(i, j)``, its place in the grid, and starts at query row
    ``rows(i)`` and key ``keys(j)``.
    """

    tile: Tile
    shape: tuple[int, int, int, int]  # B, H, T, S
    scale: float
    allow: Callable[..., jax.Array] | None = None
    change: Callable[..., jax.Array] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        _, _, T, S = self.shape
        return -(-T // self.tile.queries), -(-S // self.tile.keys)

    def rows(self, i: Any) -> jax.Array:
        return jnp.minimum(i * self.tile.queries, self.shape[2] - self.tile.queries)

    def keys(self, j: Any) -> jax.Array:
        return jnp.minimum(j * self.tile.keys, self.shape[3] - self.tile.keys)

    def indices(self, start: jax.Array, i: Any, j: Any) -> Indices:
        """Position indices of tile ``(i, j)``."""
        B, H = self.shape[:2]
        q_idx = query_positions(start + self.rows(i), self.tile.queries, 0)
        kv_idx = self.keys(j) + jnp.arange(self.tile.keys, dtype=jnp.int32)
        return position_indices(B, H, q_idx, kv_idx)

    def allowed(self, fixed: Fixed, i: jax.Array, j: jax.Array) -> jax.Array | None:
        """Which scores of the tile count, broadcastable; None if all do."""
        at = self.indices(fixed.start, i, j)
        parts = []
        if self.shape[3] % self.tile.keys:  # keys that the tile before has done
            parts.append(at[3] >= j * self.tile.keys)
        if (mask := fixed.mask) is not None:
            if mask.shape[2] > 1:
                mask = cut(mask, self.rows(i), self.tile.queries)
            if mask.shape[3] > 1:
                mask = cut(mask, self.keys(j), self.tile.keys, axis=3)
            parts.append(mask)
        if self.allow is not None:
            parts.append(self.allow(fixed.allow_arrays, *at))
        return functools.reduce(jnp.logical_and, parts) if parts else None

    def scores(
        self,
        learned: list[jax.Array],
        raw: jax.Array,
        at: Indices,
        allowed: jax.Array | None,
    ) -> jax.Array:
        """From ``q @ k.T`` to what the softmax sees: scaled, changed, masked."""
        scores = raw * self.scale
        if self.change is not None:
            scores = self.change(learned, scores, *at)
        return scores if allowed is None else jnp.where(allowed, scores, -jnp.inf)


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


# ------------------------------------------------------------------- forward, backward


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem, fixed, learned, query, key, value):
    """``(out, log-sum-exp)``: (B, H, T, E) and (B, H, T)."""
    return _forward(problem, fixed, learned, query, key, value)[0]


def _forward(problem, fixed, learned, query, key, value):
    B, H, T, _ = query.shape
    E, dtype = value.shape[3], accumulator(query.dtype)
    tile = problem.tile
    k, v, nan = finite(key), finite(value), _nan_by_key(key, value, H)

    def query_tile(i, outputs):
        t = problem.rows(i)
        q_i = cut(query, t, tile.queries)

        def key_tile(j, state):
            s = problem.keys(j)
            allowed = problem.allowed(fixed, i, j)

            def work():
                at = problem.indices(fixed.start, i, j)
                raw = times_keys(q_i, cut(k, s, tile.keys))
                raw += cut(nan, s, tile.keys)[:, :, None]
                scores = problem.scores(learned, raw, at, allowed)
                v_j = cut(v, s, tile.keys)
                return state.add(scores, lambda w: times_values(fixed.drop(w, at), v_j))

            return if_any(allowed, work, state)

        empty = Running.empty((B, H, tile.queries), E, dtype)
        state = lax.fori_loop(0, problem.grid[1], key_tile, empty)
        out, lse = state.finish()
        return put(outputs[0], out, t), put(outputs[1], lse, t)

    outputs = jnp.zeros((B, H, T, E), query.dtype), jnp.zeros((B, H, T), dtype)
    out, lse = lax.fori_loop(0, problem.grid[0], query_tile, outputs)
    return (out, lse), (fixed, learned, query, key, value, out, lse)


def _nan_by_key(key, value, heads):
    """What `poison` adds to each head's scores of each key: (B, H, S)."""
    nan = poison(key, jnp.float32) + poison(value, jnp.float32)
    nan = nan.astype(accumulator(key.dtype))
    return jnp.repeat(nan, heads // nan.shape[1], axis=1)


def _backward(problem, residuals, cotangents):
    """FlashAttention-2's backward: see `_tile_gradients` for the formulas."""
    fixed, learned, query, key, value, out, lse = residuals
    d_out, d_lse = cotangents
    dtype, tile = lse.dtype, problem.tile
    # Row sums of dO * O, less what reaches the log-sum-exp itself.
    delta = jnp.einsum("bhte,bhte->bht", d_out.astype(dtype), out.astype(dtype)) - d_lse
    rows = query, finite(d_out), lse, delta
    columns = finite(key), finite(value), _nan_by_key(key, value, query.shape[1])
    zeros = tuple(jnp.zeros(x.shape, dtype) for x in (query, key, value))

    def query_tile(i, sums):
        t = problem.rows(i)
        rows_i = tuple(cut(x, t, tile.queries) for x in rows)
        first_time = t + jnp.arange(tile.queries) >= i * tile.queries

        def key_tile(j, sums):
            allowed = problem.allowed(fixed, i, j)
            s = problem.keys(j)

            def work():
                if problem.shape[2] % tile.queries:
                    counted = first_time[None, None, :, None]
                    seen = counted if allowed is None else allowed & counted
                else:
                    seen = allowed
                columns_j = tuple(cut(x, s, tile.keys) for x in columns)
                d_tile, d_learned = _tile_gradients(
                    problem, fixed, learned, rows_i, columns_j, (i, j), seen
                )
                d_arrays = tuple(
                    put(whole, cut(whole, at, part.shape[2]) + part, at)
                    for whole, part, at in zip(sums[0], d_tile, (t, s, s), strict=True)
                )
                return d_arrays, jax.tree.map(jnp.add, sums[1], d_learned)

            return if_any(allowed, work, sums)

        return lax.fori_loop(0, problem.grid[1], key_tile, sums)

    floats = [x for x in learned if jnp.issubdtype(x.dtype, jnp.inexact)]
    sums = zeros, [jnp.zeros_like(x) for x in floats]
    (d_q, d_k, d_v), d_floats = lax.fori_loop(0, problem.grid[0], query_tile, sums)
    grads = iter(d_floats)
    d_learned = [
        next(grads) if jnp.issubdtype(x.dtype, jnp.inexact) else None for x in learned
    ]
    d_inputs = (d_q.astype(query.dtype), d_k.astype(key.dtype), d_v.astype(value.dtype))
    return None, d_learned, *d_inputs


def _tile_gradients(problem, fixed, learned, rows, columns, tile, allowed):
    """With W the weights, S the raw scores, and f the change from S to logits:

    dV = W^T dO,  dW = dO V^T,  dS = f'(W * (dW - delta)),  dQ = dS K,  dK = dS^T Q.
    """
    q, d_out, lse, delta = rows
    k, v, nan = columns
    kv_heads, at = k.shape[1], problem.indices(fixed.start, *tile)
    floats = [x for x in learned if jnp.issubdtype(x.dtype, jnp.inexact)]

    def change(floats, raw):
        new = iter(floats)
        every = [
            next(new) if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in learned
        ]
        return problem.scores(every, raw, at, allowed)

    raw = times_keys(q, k) + nan[:, :, None]
    scores, pull = jax.vjp(change, floats, raw)
    shift = jnp.where(jnp.isneginf(lse), 0, lse)
    weights = jnp.exp(scores - shift[..., None])
    d_v = gather_rows(fixed.drop(weights, at), d_out, kv_heads)
    d_weights = fixed.drop(times_keys(d_out, v), at)
    d_floats, d_raw = pull(weights * (d_weights - delta[..., None]))
    if (
        allowed is not None
    ):  # a change of steep slope may make 0 * inf of a masked score
        d_raw = jnp.where(allowed, d_raw, 0)
    d_q = times_values(d_raw, k)
    d_k = gather_rows(d_raw, finite(q), kv_heads)
    return (d_q, d_k, d_v), d_floats


_attend.defvjp(_forward, _backward)
