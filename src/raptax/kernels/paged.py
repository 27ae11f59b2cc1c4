"""Attention over keys and values that lie in pages, for ragged batches.

A pool holds pages of ``P`` tokens for every layer; ``table[b, m]`` names the page with
tokens ``m * P`` to ``m * P + P - 1`` of sequence ``b``. New rows of all sequences come
one after another, ``row_offsets`` apart: prefill chunks and single decode steps mix
freely. Kwon et al. 2023, arXiv:2309.06180.

One function appends and attends, because XLA updates the pool in place only if nothing
reads the old one afterwards. Rows that belong to no sequence are dropped: no page is set
aside for rubbish, so none can be read.

Two kernels do it: ``"native"``, in C++ on CPUs, and ``"jax"``, below. They differ by
rounding, and in what cannot be raised inside jit: the native kernel raises for a table
entry that is needed but names no page, where this one drops what it cannot write or read.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .._errors import Unsupported, choices
from .._types import MaskMod, ScoreMod, position_indices
from ..mods import apply_mask, apply_score, as_mod, with_scale
from ..quant.rows import dequantise, quantise
from . import native_paged
from .native_paged import Pool as Pool
from .softmax import Running, accumulator, finite, poison
from .tiles import if_any, times_keys, times_values

KERNELS = ("native", "jax")  # best first
MAX_ROWS = 64  # query rows of one sequence that share a pass over its pages


def append_and_attend(
    query: Float[Array, "R H D"],
    key: Float[Array, "R K D"],
    value: Float[Array, "R K E"],
    pool: Pool,
    *,
    table: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    row_offsets: Int[Array, " B+1"],
    layer: int | Int[Array, ""],
    mask_mod: MaskMod | None,
    score_mod: ScoreMod | None = None,
    scale: float | Float[Array, ""] | None = None,
    kernel: str | None = None,
) -> tuple[Float[Array, "R H E"], Pool]:
    """Writes new keys and values after each sequence's last, then attends to all.

    Row ``r`` of sequence ``b`` stands at ``lengths[b] + r - row_offsets[b]`` and sees
    the keys up to the sequence's last new one that ``mask_mod`` allows. Donate the
    pool to have it updated in place. A ``kernel`` of `KERNELS` may be named.

    Returns:
        The attended values, zeros in rows from ``row_offsets[B]`` on, and the pool.

    Raises:
        ValueError: No kernel has this name.
        Unsupported: The kernel named cannot do what is asked.
        jax.errors.JaxRuntimeError, ValueError: From the native kernel, before it touches
            any memory: a sequence is longer than its pages, or a page it needs is not
            in the pool.
    """
    if not query.size or not table.size:
        return _nothing(query, pool), pool
    batch = _Batch(query, (key, value), pool, table, lengths, row_offsets, layer)
    return _run(batch, _Rules.create(query, mask_mod, score_mod, scale), kernel)


def attend(
    query: Float[Array, "R H D"],
    pool: Pool,
    *,
    table: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    row_offsets: Int[Array, " B+1"],
    layer: int | Int[Array, ""],
    mask_mod: MaskMod | None,
    score_mod: ScoreMod | None = None,
    scale: float | Float[Array, ""] | None = None,
    kernel: str | None = None,
) -> Float[Array, "R H E"]:
    """Attends to what the pages hold; ``lengths`` counts the keys of each sequence.

    The last row of a sequence stands at its last key. Otherwise as `append_and_attend`.
    """
    if not query.size or not table.size:
        return _nothing(query, pool)
    batch = _Batch(query, None, pool, table, lengths, row_offsets, layer)
    return _run(batch, _Rules.create(query, mask_mod, score_mod, scale), kernel)[0]


def why_not_native(
    query: Float[Array, "R H D"],
    pool: Pool,
    *,
    mask_mod: MaskMod | None,
    score_mod: ScoreMod | None = None,
) -> str | None:
    """Why the C++ kernel cannot do this, in one sentence; None if it can."""
    return native_paged.why_not(query, pool, as_mod(mask_mod), as_mod(score_mod))


def _nothing(query: jax.Array, pool: Pool) -> jax.Array:
    return jnp.zeros((*query.shape[:2], pool.values.shape[4]), query.dtype)


class _Batch(NamedTuple):
    """The arrays of one call. ``new`` holds keys and values to append, or is None."""

    query: jax.Array
    new: tuple[jax.Array, jax.Array] | None
    pool: Pool
    table: jax.Array
    lengths: jax.Array
    row_offsets: jax.Array
    layer: int | jax.Array


class _Rules(NamedTuple):
    """What happens to a score. The scale may be an array."""

    mask_mod: Any
    score_mod: Any
    scale: float | jax.Array

    @classmethod
    def create(cls, query, mask_mod, score_mod, scale) -> "_Rules":
        if scale is None:
            scale = query.shape[-1] ** -0.5
        return cls(as_mod(mask_mod), as_mod(score_mod), scale)


def _run(batch: _Batch, rules: _Rules, kernel: str | None) -> tuple[jax.Array, Pool]:
    """The first kernel that can, or the one named."""
    if kernel not in (None, *KERNELS):
        raise ValueError(f"kernel={kernel!r} is not one of {choices(KERNELS)}.")
    if kernel == "jax":
        return _run_jax(batch, rules)
    reason = native_paged.why_not(
        batch.query, batch.pool, rules.mask_mod, rules.score_mod, batch.new
    )
    if reason is None:
        return _run_native(batch, rules)
    if kernel is not None:
        raise Unsupported(f"kernel={kernel!r} cannot run this: {reason}.")
    return _run_jax(batch, rules)


@jax.custom_jvp
def _native(batch: _Batch, rules: _Rules) -> tuple[jax.Array, Pool]:
    return native_paged.run(batch, rules)


@_native.defjvp
def _native_jvp(primals, tangents):
    return jax.jvp(_run_jax, primals, tangents)


_run_native = jax.jit(_native)


def _run_jax(batch: _Batch, rules: _Rules) -> tuple[jax.Array, Pool]:
    pool, lengths = batch.pool, batch.lengths
    if batch.new is not None:
        pool = append(
            pool,
            *batch.new,
            table=batch.table,
            lengths=lengths,
            row_offsets=batch.row_offsets,
            layer=batch.layer,
        )
        lengths = lengths + batch.row_offsets[1:] - batch.row_offsets[:-1]
    scale, score_mod = with_scale(rules.scale, rules.score_mod)
    work = _Work(
        batch.query, pool, batch.table, lengths, batch.row_offsets, batch.layer
    )
    return _attend(work, rules.mask_mod, score_mod, scale=scale), pool


def append(
    pool: Pool,
    key: Float[Array, "R K D"],
    value: Float[Array, "R K E"],
    *,
    table: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    row_offsets: Int[Array, " B+1"],
    layer: int | Int[Array, ""],
) -> Pool:
    """Writes each row of ``key`` and ``value`` at its place, in plain JAX.

    Rows that have no place, because no sequence owns them or its table names no page
    for them, are dropped.
    """
    if not key.size or not table.size:
        return pool
    return _append(pool, key, value, table, lengths, row_offsets, layer)


@jax.jit
def _append(pool, key, value, table, lengths, row_offsets, layer):
    N, P, M = pool.keys.shape[1], pool.keys.shape[3], table.shape[1]
    sequence, position, real = places(key.shape[0], lengths, row_offsets)
    page = table[sequence, jnp.minimum(position // P, M - 1)]
    real &= (position < M * P) & (page >= 0)
    page = jnp.where(real, page, N)  # out of bounds, which mode="drop" skips

    def put(pages: jax.Array, rows: jax.Array) -> jax.Array:
        at = pages.at[layer, page, :, position % P]
        return at.set(rows.astype(pages.dtype), mode="drop")

    if pool.key_scales is None:
        return Pool(put(pool.keys, key), put(pool.values, value))
    (key, key_scales), (value, value_scales) = (
        quantise(x, pool.keys.dtype) for x in (key, value)
    )
    rows = key, value, key_scales, value_scales
    return Pool(*map(put, pool, rows))


def places(rows: int, lengths: jax.Array, row_offsets: jax.Array):
    """For each row its sequence, its absolute position, and whether it is real."""
    row = jnp.arange(rows, dtype=jnp.int32)
    sequence = jnp.searchsorted(row_offsets[1:], row, side="right").astype(jnp.int32)
    real = sequence < lengths.shape[0]
    sequence = jnp.minimum(sequence, lengths.shape[0] - 1)
    return sequence, lengths[sequence] + row - row_offsets[sequence], real


@functools.partial(jax.jit, static_argnames="scale")
def _attend(work: "_Work", mask_mod, score_mod, *, scale):
    rules, query = _Rules(mask_mod, score_mod, scale), work.query
    _, done = lax.scan(lambda _, n: (None, _task(work, rules, n)), None, work.tasks)
    # done (tasks, rows, H, E): back to one row after another
    R, rows = query.shape[0], work.rows
    sequence, _, real = places(R, work.lengths, work.row_offsets)
    row = jnp.arange(R, dtype=jnp.int32) - work.row_offsets[sequence]
    task = work.first_task(sequence) + row // rows
    out = done[jnp.clip(task, 0, done.shape[0] - 1), row % rows]
    return jnp.where(real[:, None, None], out, 0)


class _Work(NamedTuple):
    """A ragged batch cut into tasks, each some rows of one sequence, in order."""

    query: jax.Array
    pool: Pool
    table: jax.Array
    lengths: jax.Array
    row_offsets: jax.Array
    layer: int | jax.Array

    @property
    def counts(self) -> jax.Array:
        """New rows of each sequence."""
        return self.row_offsets[1:] - self.row_offsets[:-1]

    @property
    def rows(self) -> int:
        """Rows of a task: 1 in decode, so that nothing is wasted, else a power of 2."""
        mean = max(1, self.query.shape[0] // self.table.shape[0])
        return min(MAX_ROWS, 1 << (mean - 1).bit_length())

    @property
    def tasks(self) -> jax.Array:
        """Numbers of as many tasks as there can be; some may find no rows."""
        (R, *_), (B, _) = self.query.shape, self.table.shape
        return jnp.arange(min(R, R // self.rows + B), dtype=jnp.int32)

    @property
    def ends(self) -> jax.Array:
        """For each sequence, the number of tasks up to and with its own."""
        return jnp.cumsum(-(-self.counts // self.rows))

    def first_task(self, sequence: jax.Array) -> jax.Array:
        return self.ends[sequence] - -(-self.counts[sequence] // self.rows)

    def page(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one page, ``(1, K, P, D)``."""

        def cut(pages: jax.Array) -> jax.Array:
            start = self.layer, number, *(0 for _ in pages.shape[2:])
            return lax.dynamic_slice(pages, start, (1, 1, *pages.shape[2:]))[0]

        k, v = cut(self.pool.keys), cut(self.pool.values)
        k_scales, v_scales = self.pool.key_scales, self.pool.value_scales
        if k_scales is not None and v_scales is not None:
            k, v = dequantise(k, cut(k_scales)), dequantise(v, cut(v_scales))
        return k.astype(self.query.dtype), v.astype(self.query.dtype)


def _task(work: _Work, rules: _Rules, number: jax.Array) -> jax.Array:
    """The output of one task's rows: (rows, H, E).

    Pages past the sequence's length are not read, and those its mask empties are not
    multiplied.
    """
    R, H, _ = work.query.shape
    M, (P, E) = work.table.shape[1], work.pool.values.shape[3:]
    b = jnp.searchsorted(work.ends, number, side="right").astype(jnp.int32)
    exists = b < work.table.shape[0]
    b = jnp.minimum(b, work.table.shape[0] - 1)
    row = (number - work.first_task(b)) * work.rows  # within the sequence
    row += jnp.arange(work.rows, dtype=jnp.int32)
    q = work.query[jnp.clip(work.row_offsets[b] + row, 0, R - 1)]
    q = q.swapaxes(0, 1)[None]  # (1, H, rows, D)
    q_idx = work.lengths[b] - work.counts[b] + row
    dtype = accumulator(q.dtype)

    def one_page(m, state):
        page = work.table[b, m]
        kv_idx = m * P + jnp.arange(P, dtype=jnp.int32)
        at = position_indices(1, H, q_idx[None], kv_idx)
        at = b.reshape(1, 1, 1, 1), *at[1:]
        allowed = (at[3] < work.lengths[b]) & (page >= 0)
        allowed &= page < work.pool.keys.shape[1]
        if rules.mask_mod is not None:
            allowed &= apply_mask(rules.mask_mod, *at)

        def attend_page():
            k, v = work.page(page)
            nan = poison(k, dtype) + poison(v, dtype)
            scores = times_keys(q, finite(k)) * rules.scale
            scores += jnp.repeat(nan, H // nan.shape[1], axis=1)[:, :, None]
            if rules.score_mod is not None:
                scores = apply_score(rules.score_mod, scores, *at)
            scores = jnp.where(allowed, scores, -jnp.inf)
            return state.add(scores, lambda w: times_values(w, finite(v)))

        return if_any(allowed, attend_page, state)

    pages = jnp.where(exists, jnp.minimum(-(-work.lengths[b] // P), M), 0)
    state = Running.empty(jnp.zeros_like(q, dtype, shape=(1, H, work.rows)), E)
    out, _ = lax.fori_loop(0, pages, one_page, state).finish()
    return out[0].swapaxes(0, 1).astype(q.dtype)
