"""Checks of page tables where the numbers are known: outside jit."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from ..._core.types import position_indices
from ...mods import apply_mask
from .problem import Batch, ScoreSettings


def check(batch: Batch, settings: ScoreSettings) -> None:
    """Raises ValueError for what the native kernel refuses when it runs.

    Does nothing where the table, the lengths, the offsets or the layer are traced.
    """
    if (where := _known(batch)) is None:
        return
    _check_places(batch, where)
    first = np.arange(where.missing.shape[1]) * batch.pool.keys.shape[3]
    missing = where.missing & (first < where.keys[:, None])
    for b in map(int, np.flatnonzero(missing.any(1) & (where.rows > 0))):
        seen = _seen(batch, where, settings.mask_mod, b)
        _refuse_missing(batch, b, missing[b] & seen)


def check_places(batch: Batch) -> None:
    """Raises ValueError for a row that has no place, or a layer that does not exist."""
    if (where := _known(batch)) is not None:
        _check_places(batch, where)


class _Known(NamedTuple):
    """`Where` in numbers; ``keys`` count the new ones, ``missing`` entries no page."""

    lengths: Int[np.ndarray, " B"]
    offsets: Int[np.ndarray, " B+1"]
    rows: Int[np.ndarray, " B"]
    keys: Int[np.ndarray, " B"]
    missing: Bool[np.ndarray, "B M"]
    layer: int


def _known(batch: Batch) -> _Known | None:
    """None where one of the arrays is traced."""
    if any(isinstance(x, jax.core.Tracer) for x in batch.where):
        return None
    table, lengths, offsets, layer = map(np.asarray, batch.where)
    rows = np.diff(offsets)
    keys = lengths if batch.new is None else lengths + rows
    missing = (table < 0) | (table >= batch.pool.keys.shape[1])
    return _Known(lengths, offsets, rows, keys, missing, int(layer))


def _check_places(batch: Batch, where: _Known) -> None:
    (L, _, _, P, _), M = batch.pool.keys.shape, where.missing.shape[1]
    if not 0 <= where.layer < L:
        raise ValueError(f"layer={where.layer} must lie in [0, {L}).")
    offsets, rows, R = where.offsets, where.rows, batch.query.shape[0]
    if offsets[0] != 0 or (rows < 0).any() or offsets[-1] > R:
        raise ValueError(
            f"row_offsets={offsets.tolist()} must begin with 0, must not fall, and must "
            f"end within the {R} rows."
        )
    page = np.arange(M)
    for b in map(int, np.flatnonzero(rows)):
        length = where.lengths[b]
        if length < 0 or where.keys[b] > M * P:
            raise ValueError(
                f"lengths[{b}]={length} with {rows[b]} rows does not fit: a sequence "
                f"holds {M * P} tokens, in {M} pages of {P}."
            )
        if batch.new is not None:
            written = (page >= length // P) & (page * P < where.keys[b])
            _refuse_missing(batch, b, written & where.missing[b])


def _refuse_missing(batch: Batch, b: int, needed: Bool[np.ndarray, " M"]) -> None:
    N, P = batch.pool.keys.shape[1], batch.pool.keys.shape[3]
    for m in map(int, np.flatnonzero(needed)[:1]):
        raise ValueError(
            f"table[{b}, {m}]={batch.where.table[b, m]} is needed for tokens {m * P} and "
            f"on, but the pool has pages 0 to {N - 1}. Was the sequence given too few "
            "pages?"
        )


def _seen(batch: Batch, where: _Known, mask_mod: Any, b: int) -> Bool[np.ndarray, " M"]:
    """Whether the mask lets a row of sequence ``b`` see a key, for each of its pages.

    None is seen as far as one can tell where the mask carries traced arrays.
    """
    M, P = where.missing.shape[1], batch.pool.keys.shape[3]
    keys, rows = int(where.keys[b]), int(where.rows[b])
    with jax.ensure_compile_time_eval():
        q_idx = jnp.arange(keys - rows, keys, dtype=jnp.int32)[None]
        kv_idx = jnp.arange(M * P, dtype=jnp.int32)
        _, *at = position_indices(1, batch.query.shape[1], q_idx, kv_idx)
        allowed: Any = at[2] < keys
        if mask_mod is not None:
            allowed &= apply_mask(mask_mod, jnp.full((1, 1, 1, 1), b, jnp.int32), *at)
        if isinstance(allowed, jax.core.Tracer):
            return np.zeros(M, bool)
        seen: Any = np.asarray(allowed).reshape(-1, M, P).any((0, 2))
        return seen
