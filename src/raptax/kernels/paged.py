"""Attention over keys and values that lie in pages, for ragged batches.

A pool holds pages of ``P`` tokens for every layer; ``table[b, m]`` names the page with
tokens ``m * P`` to ``m * P + P - 1`` of sequence ``b``. New rows of all sequences come
one after another, ``row_offsets`` apart: prefill chunks and single decode steps mix
freely. Kwon et al. 2023, arXiv:2309.06180.

One function appends and attends, because XLA updates the pool in place only if nothing
reads the old one afterwards. Rows that belong to no sequence, and table entries that
name no page, are dropped: no page is set aside for rubbish, so none can be read.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .._types import MaskMod, ScoreMod, position_indices
from ..mods import apply_mask, apply_score, as_mod, with_scale
from .softmax import Running, accumulator, finite, poison
from .tiles import if_any, times_keys, times_values

MAX_ROWS = 64  # query rows of one sequence that share a pass over its pages


def append_and_attend(
    query: Float[Array, "R H D"],
    key: Float[Array, "R K D"],
    value: Float[Array, "R K E"],
    k_pages: Float[Array, "L N K P D"],
    v_pages: Float[Array, "L N K P E"],
    *,
    table: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    row_offsets: Int[Array, " B+1"],
    layer: int | Int[Array, ""],
    mask_mod: MaskMod | None,
    score_mod: ScoreMod | None = None,
    scale: float | Float[Array, ""] | None = None,
) -> tuple[Float[Array, "R H E"], Float[Array, "L N K P D"], Float[Array, "L N K P E"]]:
    """Writes new keys and values after each sequence's last, then attends to all.

    Row ``r`` of sequence ``b`` stands at ``lengths[b] + r - row_offsets[b]`` and sees
    the keys up to the sequence's last new one that ``mask_mod`` allows. Donate the
    pages to have them updated in place.

    Returns:
        The attended values, zeros in rows from ``row_offsets[B]`` on, and both pools.
    """
    k_pages, v_pages = (
        append(
            pages,
            rows,
            table=table,
            lengths=lengths,
            row_offsets=row_offsets,
            layer=layer,
        )
        for pages, rows in ((k_pages, key), (v_pages, value))
    )
    new = row_offsets[1:] - row_offsets[:-1]
    out = attend(
        query,
        k_pages,
        v_pages,
        table=table,
        lengths=lengths + new,
        row_offsets=row_offsets,
        layer=layer,
        mask_mod=mask_mod,
        score_mod=score_mod,
        scale=scale,
    )
    return out, k_pages, v_pages


def append(
    pages: Float[Array, "L N K P D"],
    new: Float[Array, "R K D"],
    *,
    table: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    row_offsets: Int[Array, " B+1"],
    layer: int | Int[Array, ""],
) -> Float[Array, "L N K P D"]:
    """Writes each row of ``new`` at its place; rows that have none are dropped."""
    if not new.size or not table.size:
        return pages
    return _append(pages, new, table, lengths, row_offsets, layer)


@jax.jit
def _append(pages, new, table, lengths, row_offsets, layer):
    N, P, M = pages.shape[1], pages.shape[3], table.shape[1]
    sequence, position, real = places(new.shape[0], lengths, row_offsets)
    page = table[sequence, jnp.minimum(position // P, M - 1)]
    real &= (position < M * P) & (page >= 0)
    page = jnp.where(real, page, N)  # out of bounds, which mode="drop" skips
    at = pages.at[layer, page, :, position % P]
    return at.set(new.astype(pages.dtype), mode="drop")


def places(rows: int, lengths: jax.Array, row_offsets: jax.Array):
    """For each row its sequence, its absolute position, and whether it is real."""
    row = jnp.arange(rows, dtype=jnp.int32)
    sequence = jnp.searchsorted(row_offsets[1:], row, side="right").astype(jnp.int32)
    real = sequence < lengths.shape[0]
    sequence = jnp.minimum(sequence, lengths.shape[0] - 1)
    return sequence, lengths[sequence] + row - row_offsets[sequence], real


def attend(
    query: Float[Array, "R H D"],
    k_pages: Float[Array, "L N K P D"],
    v_pages: Float[Array, "L N K P E"],
    *,
    table: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    row_offsets: Int[Array, " B+1"],
    layer: int | Int[Array, ""],
    mask_mod: MaskMod | None,
    score_mod: ScoreMod | None = None,
    scale: float | Float[Array, ""] | None = None,
) -> Float[Array, "R H E"]:
    """Attends to what the pages hold; ``lengths`` counts the keys of each sequence.

    The last row of a sequence stands at its last key. Works through tasks, each up to
    `MAX_ROWS` query rows of one sequence, page by page with a running softmax; pages
    past a sequence's length are not read, and those its mask empties not multiplied.
    """
    D = query.shape[-1]
    if not query.size or not table.size:
        return jnp.zeros((*query.shape[:2], v_pages.shape[4]), query.dtype)
    scale, score_mod = with_scale(D**-0.5 if scale is None else scale, score_mod)
    pages = k_pages, v_pages
    work = _Work(query, pages, table, lengths, row_offsets, layer)
    return _attend(work, as_mod(mask_mod), score_mod, scale=scale)


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


class _Rules(NamedTuple):
    mask_mod: MaskMod | None
    score_mod: ScoreMod | None
    scale: float


class _Work(NamedTuple):
    """A ragged batch cut into tasks, each some rows of one sequence, in order."""

    query: jax.Array
    pages: tuple[jax.Array, jax.Array]
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
        k, v = (
            lax.dynamic_slice(p, (self.layer, number, 0, 0, 0), (1, 1, *p.shape[2:]))
            for p in self.pages
        )
        return k[0].astype(self.query.dtype), v[0].astype(self.query.dtype)


def _task(work: _Work, rules: _Rules, number: jax.Array) -> jax.Array:
    """The output of one task's rows: (rows, H, E)."""
    R, H, _ = work.query.shape
    M, (P, E) = work.table.shape[1], work.pages[1].shape[3:]
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
        allowed &= page < work.pages[0].shape[1]
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
