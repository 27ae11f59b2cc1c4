"""Derivatives of paged attention: `blockwise` on pages that are brought together.

The pages of all sequences, in the order of the table, are ``B * M * P`` slots of keys;
the packed (ragged) tokens are queries. A mask leaves each row the slots of its own
sequence, tiles of rows and slots that share no sequence are never visited, and mods are
asked about positions. So derivatives of every kind are those of `blockwise`, in memory
that grows with the rows and with the pages of the table, never with their product.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..._core.manual_axes import same_manual_axes
from ...block_mask import EMPTY, PARTIAL
from ...mods import apply_mask, apply_score
from ...quant.rows import dequantize
from .. import blockwise
from ..softmax import accumulator
from ..tiles import DiffInputs, NonDiffArrays, Plan, TiledProblem, lift, tile_sizes
from .jax_kernel import append
from .problem import Batch, Pool, Row, ScoreSettings

Learned = list[jax.Array]


def prepare(
    batch: Batch, settings: ScoreSettings
) -> tuple[TiledProblem, NonDiffArrays, Learned]:
    """The static half, the arrays without derivatives, and those of the score_mod."""
    (R, H, _), (B, M) = batch.query.shape, batch.where.table.shape
    shape = 1, H, R, B * M * batch.pool.keys.shape[3]
    score_mod, dtype = settings.score_mod, accumulator(batch.query.dtype)
    scale = (
        None if settings.scale is None else jnp.asarray(settings.scale).astype(dtype)
    )
    problem = TiledProblem(tile_sizes(*shape), shape)
    start = jnp.zeros(1, jnp.int32)
    at = problem.indices(start, 0, 0)
    rows = Row.of(batch)
    allowed = functools.partial(_allow, batch, rows, settings.mask_mod)
    allow, allow_arrays = lift(allowed, *at)
    problem = problem._replace(allow=allow)
    arrays: list[jax.Array] = []
    if score_mod is not None:
        scores = jnp.zeros((1, H, *problem.tile), dtype)
        change = functools.partial(_change, batch, rows, score_mod)
        run, arrays = lift(change, scores, *at)
        is_float = tuple(jnp.issubdtype(x.dtype, jnp.inexact) for x in arrays)
        problem = problem._replace(change=run, learned=is_float)
    learned = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)]
    others = [x for x in arrays if not jnp.issubdtype(x.dtype, jnp.inexact)]
    return (
        problem,
        NonDiffArrays(start, None, allow_arrays, others, None, None, scale),
        learned,
    )


def _allow(batch: Batch, rows: Row, mask_mod: Any, *at: jax.Array) -> jax.Array:
    """The mask of rows and slots: whether the slot is one that the row may see."""
    _, h_idx, row, slot = at
    size = batch.where.table.shape[1] * batch.pool.keys.shape[3]  # slots of a sequence
    sequence, position = rows.sequence[row], slot % size
    allowed = (slot // size == sequence) & rows.real[row] & _held(batch)[slot]
    if mask_mod is not None:
        at = sequence, h_idx, rows.position[row], position
        allowed &= apply_mask(mask_mod, *at)
    return allowed


def _change(
    batch: Batch, rows: Row, score_mod: Any, scores: jax.Array, *at: jax.Array
) -> jax.Array:
    """``score_mod`` asked about sequences and positions, not about rows and slots."""
    _, h_idx, row, slot = at
    position = slot % (batch.where.table.shape[1] * batch.pool.keys.shape[3])
    at = rows.sequence[row], h_idx, rows.position[row], position
    return apply_score(score_mod, scores, *at)


def _plan(batch: Batch, rows: Row, problem: TiledProblem) -> Plan:
    """The tiles whose rows and slots share a sequence."""
    i, j = (jnp.arange(n, dtype=jnp.int32) for n in problem.grid)
    first, key = problem.rows(i), problem.keys(j)
    slots = batch.where.table.shape[1] * batch.pool.keys.shape[3]
    last = rows.sequence[first + problem.tile.queries - 1]
    apart = key[None] // slots > last[:, None]
    apart |= (key + problem.tile.keys - 1)[None] // slots < rows.sequence[first][
        :, None
    ]
    return Plan.create(jnp.where(apart, EMPTY, PARTIAL)[None, None])


def run(
    problem: TiledProblem,
    fixed: NonDiffArrays,
    batch: Batch,
    sinks: Float[Array, " H"] | None,
    learned: Learned,
) -> tuple[Float[Array, "R H E"], Float[Array, "R H"], Pool]:
    """The output, the log-sum-exp and the pool, with every derivative of `blockwise`.

    Numbers that are stored as codes are constants: rounding has no derivative.
    """
    if batch.pool.key_scales is not None:
        batch = jax.lax.stop_gradient(batch)._replace(query=batch.query)
    rows, pool = Row.of(batch), append(batch)
    fixed = fixed._replace(plan=_plan(batch, rows, problem))
    held = _held(batch)
    key, value = (_slots(batch, held, *x) for x in zip(pool[:2], pool[2:], strict=True))
    query = jnp.where(rows.real[:, None, None], batch.query, 0).swapaxes(0, 1)[None]
    inputs = DiffInputs(query, key, value, None, sinks, learned)
    fixed, inputs = same_manual_axes((fixed, inputs))
    out, lse = (x[0].swapaxes(0, 1) for x in blockwise._attend(problem, fixed, inputs))
    # A row of no sequence has a sink, too, until here.
    return out, jnp.where(rows.real[:, None], lse, -jnp.inf), pool


def _held(batch: Batch) -> Bool[Array, " slots"]:
    """The slots that hold a token of their sequence."""
    table, (N, P) = batch.where.table, (batch.pool.keys.shape[n] for n in (1, 3))
    position = jnp.arange(table.shape[1] * P, dtype=jnp.int32)[None]
    there = jnp.repeat((table >= 0) & (table < N), P, axis=1)
    return (there & (position < batch.keys[:, None])).reshape(-1)


def _slots(
    batch: Batch,
    held: Bool[Array, " slots"],
    pages: jax.Array,
    scales: jax.Array | None,
) -> jax.Array:
    """The table's pages one after another, ``(1, K, B * M * P, D)``; 0 if not held."""
    where, N = batch.where, pages.shape[1]
    at = where.layer, jnp.clip(where.table, 0, N - 1).reshape(-1)
    x = pages[at] if scales is None else dequantize(pages[at], scales[at])
    x = x.swapaxes(0, 1).reshape(1, x.shape[1], -1, x.shape[3])
    return jnp.where(held[:, None], x, 0).astype(batch.query.dtype)
