"""Paged attention in plain JAX: runs everywhere, takes every mod. See `kernels.paged`.

Rows are cut into tasks, each some rows of one sequence, and a task visits the pages of
its sequence one by one with a running softmax.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..._core.types import position_indices
from ...mods import apply_mask, apply_score
from ...quant.rows import dequantize, quantize
from ..softmax import OnlineSoftmax, accumulator, finite, poison
from ..tiles import if_any, lift, times_keys, times_values
from .problem import Batch, Pool, Row, ScoreSettings, Where

MAX_ROWS = 64  # query rows of one sequence that share a pass over its pages


def append(batch: Batch) -> Pool:
    """The pool with the new rows written; those without a place are dropped."""
    if batch.new is None:
        return batch.pool
    pool, (key, value) = batch.pool, batch.new
    row = Row.of(batch)
    page = jnp.where(row.real, row.page, pool.keys.shape[1])  # mode="drop" skips it
    slot = row.position % pool.keys.shape[3]

    def put(pages: Any, rows: jax.Array) -> jax.Array:
        at = pages.at[batch.where.layer, page, :, slot]
        written: jax.Array = at.set(rows.astype(pages.dtype), mode="drop")
        return written

    if pool.key_scales is None:
        return Pool(put(pool.keys, key), put(pool.values, value))
    (key, key_scales), (value, value_scales) = (
        quantize(x, pool.keys.dtype) for x in (key, value)
    )
    return Pool(*map(put, pool, (key, value, key_scales, value_scales)))


class Call(NamedTuple):
    """The static half of a call. Mods take the arrays that they carry or capture."""

    allow: Callable[..., jax.Array] | None
    change: Callable[..., jax.Array] | None


Captured = tuple[list[jax.Array], list[jax.Array], jax.Array | None]
"""The arrays of the mask and of the score_mod, and the scale."""


def prepare(batch: Batch, settings: ScoreSettings) -> tuple[Call, Captured]:
    """The call, and the arrays that its mods carry or capture."""
    H, P = batch.query.shape[1], batch.pool.keys.shape[3]
    dtype = accumulator(batch.query.dtype)
    scale = (
        None if settings.scale is None else jnp.asarray(settings.scale).astype(dtype)
    )
    rows, allow, change = _rows_of_task(batch), None, None
    _, h_idx, q_idx, kv_idx = position_indices(
        1, H, jnp.zeros((1, rows), jnp.int32), jnp.zeros(P, jnp.int32)
    )
    at = jnp.zeros((1, 1, 1, 1), jnp.int32), h_idx, q_idx, kv_idx
    captured: Captured = ([], [], scale)
    if settings.mask_mod is not None:
        allow, arrays = lift(functools.partial(apply_mask, settings.mask_mod), *at)
        captured[0].extend(arrays)
    if settings.score_mod is not None:
        scores = jnp.zeros((1, H, rows, P), dtype)
        apply = functools.partial(apply_score, settings.score_mod)
        change, arrays = lift(apply, scores, *at)
        captured[1].extend(arrays)
    return Call(allow, change), captured


def run(
    call: Call, captured: Captured, batch: Batch, sinks: Float[Array, " H"] | None
) -> tuple[Float[Array, "R H E"], Float[Array, "R H"], Pool]:
    """The output, the log-sum-exp and the pool after appending."""
    batch = batch._replace(pool=append(batch))
    work = _Work(call, captured, batch, batch.where, batch.keys, sinks)
    _, done = lax.scan(lambda _, n: (None, _task(work, n)), None, work.tasks)
    # done (tasks, rows, H, ...): back to one row after another
    row = Row.of(batch)
    R, rows = batch.query.shape[0], work.rows
    number = jnp.arange(R, dtype=jnp.int32) - work.where.row_offsets[row.sequence]
    task = work.first_task(row.sequence) + number // rows
    at = jnp.clip(task, 0, work.tasks.shape[0] - 1), number % rows
    out, lse = (x[at] for x in done)
    out = jnp.where(row.real[:, None, None], out, 0)
    return out, jnp.where(row.real[:, None], lse, -jnp.inf), batch.pool


def _rows_of_task(batch: Batch) -> int:
    """1 in decode, so that nothing is wasted, else a power of 2."""
    mean = max(1, batch.query.shape[0] // batch.where.table.shape[0])
    return min(MAX_ROWS, 1 << (mean - 1).bit_length())


class _Work(NamedTuple):
    """A ragged batch cut into tasks, each some rows of one sequence, in order."""

    call: Call
    captured: Captured
    batch: Batch  # its pool holds the new rows as well
    where: Where
    lengths: jax.Array  # keys of each sequence, the new ones included
    sinks: jax.Array | None

    @property
    def rows(self) -> int:
        """Rows of a task."""
        return _rows_of_task(self.batch)

    @property
    def tasks(self) -> jax.Array:
        """Numbers of as many tasks as there can be; some may find no rows."""
        R, B = self.batch.query.shape[0], self.where.table.shape[0]
        return jnp.arange(min(R, R // self.rows + B), dtype=jnp.int32)

    @property
    def ends(self) -> jax.Array:
        """For each sequence, the number of tasks up to and with its own."""
        return jnp.cumsum(-(-self.where.counts // self.rows))

    def first_task(self, sequence: jax.Array) -> jax.Array:
        return self.ends[sequence] - -(-self.where.counts[sequence] // self.rows)

    def page(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one page, ``(1, K, P, D)``."""
        pool, dtype = self.batch.pool, self.batch.query.dtype

        def cut(pages: jax.Array) -> jax.Array:
            start = self.where.layer, number, *(0 for _ in pages.shape[2:])
            return lax.dynamic_slice(pages, start, (1, 1, *pages.shape[2:]))[0]

        k, v = cut(pool.keys), cut(pool.values)
        if pool.key_scales is not None and pool.value_scales is not None:
            k, v = (
                dequantize(x, cut(scales))
                for x, scales in ((k, pool.key_scales), (v, pool.value_scales))
            )
        return k.astype(dtype), v.astype(dtype)


def _task(work: _Work, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output and log-sum-exp of one task's rows: (rows, H, E) and (rows, H).

    Pages past the sequence's length are not read, and those its mask empties are not
    multiplied.
    """
    query, table, pool = work.batch.query, work.where.table, work.batch.pool
    R, H, _ = query.shape
    M, (P, E) = table.shape[1], pool.values.shape[3:]
    b = jnp.searchsorted(work.ends, number, side="right").astype(jnp.int32)
    exists = b < table.shape[0]
    b = jnp.minimum(b, table.shape[0] - 1)
    row = (number - work.first_task(b)) * work.rows  # within the sequence
    row += jnp.arange(work.rows, dtype=jnp.int32)
    q = query[jnp.clip(work.where.row_offsets[b] + row, 0, R - 1)]
    q = q.swapaxes(0, 1)[None]  # (1, H, rows, D)
    q_idx = work.lengths[b] - work.where.counts[b] + row
    call, (allow_arrays, change_arrays, scale) = work.call, work.captured
    dtype = accumulator(q.dtype)

    def one_page(m, state):
        page = table[b, m]
        kv_idx = m * P + jnp.arange(P, dtype=jnp.int32)
        at = position_indices(1, H, q_idx[None], kv_idx)
        at = b.reshape(1, 1, 1, 1), *at[1:]
        allowed = (at[3] < work.lengths[b]) & (page >= 0)
        allowed &= page < pool.keys.shape[1]
        if call.allow is not None:
            allowed &= call.allow(allow_arrays, *at)

        def attend_page():
            k, v = work.page(page)
            nan = poison(k, dtype) + poison(v, dtype)
            scores = times_keys(q, finite(k))
            if scale is not None:
                scores = scores * scale
            scores += jnp.repeat(nan, H // nan.shape[1], axis=1)[:, :, None]
            if call.change is not None:
                scores = call.change(change_arrays, scores, *at)
            scores = jnp.where(allowed, scores, -jnp.inf)
            return state.add(scores, lambda w: times_values(w, finite(v)))

        return if_any(allowed, attend_page, state)

    pages = jnp.where(exists, jnp.minimum(-(-work.lengths[b] // P), M), 0)
    zeros = jnp.zeros_like(q, dtype, shape=(1, H, work.rows))
    state = OnlineSoftmax.empty(zeros, E, work.sinks)
    out, lse = lax.fori_loop(0, pages, one_page, state).finish()
    return out[0].swapaxes(0, 1).astype(q.dtype), lse[0].swapaxes(0, 1)
