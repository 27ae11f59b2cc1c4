"""The parts of a call of paged attention: the pool, the ragged batch, the settings."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ...mods import with_scale
from ..problem import traced_mods
from ..softmax import accumulator


class Pool(NamedTuple):
    """Keys and values of all layers, in pages that sequences share out among them.

    Attributes:
        keys: ``(L, N, K, P, D)``: floats, or codes of one byte with scales.
        values: ``(L, N, K, P, E)``, of the same type.
        key_scales: What codes are to be multiplied with, for each token and kv head;
            None for floats.
        value_scales: Likewise.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: Float[Array, "L N K P"] | None = None
    value_scales: Float[Array, "L N K P"] | None = None


class Where(NamedTuple):
    """Which rows are whose, and where their keys lie. ``lengths`` count old keys."""

    table: Int[Array, "B M"]
    lengths: Int[Array, " B"]
    row_offsets: Int[Array, " B+1"]
    layer: int | Int[Array, ""]

    @property
    def counts(self) -> Int[Array, " B"]:
        """Rows of each sequence."""
        return self.row_offsets[1:] - self.row_offsets[:-1]


class Batch(NamedTuple):
    """The arrays of one call. ``new`` holds keys and values to append, or is None."""

    query: Float[Array, "R H D"]
    new: tuple[jax.Array, jax.Array] | None
    pool: Pool
    where: Where

    @property
    def keys(self) -> Int[Array, " B"]:
        """Keys of each sequence, the new ones included."""
        where = self.where
        return where.lengths + where.counts if self.new is not None else where.lengths


class ScoreSettings(NamedTuple):
    """What happens to a score; an array scale is the first part of ``score_mod``."""

    mask_mod: Any
    score_mod: Any
    scale: float | None
    sinks: Float[Array, " H"] | None

    @classmethod
    def create(cls, query, mask_mod, score_mod, scale, sinks) -> "ScoreSettings":
        """The settings, with plain functions traced as they are now."""
        R, H, D = query.shape
        shape, dtype = (1, H, R, 1), accumulator(query.dtype)
        mask_mod, score_mod = traced_mods(mask_mod, score_mod, shape, dtype)
        scale, score_mod = with_scale(D**-0.5 if scale is None else scale, score_mod)
        return cls(mask_mod, score_mod, scale, sinks)


def places(rows: int, lengths: jax.Array, row_offsets: jax.Array):
    """For each row its sequence, its absolute position, and whether it is real."""
    row = jnp.arange(rows, dtype=jnp.int32)
    sequence = jnp.searchsorted(row_offsets[1:], row, side="right").astype(jnp.int32)
    real = sequence < lengths.shape[0]
    sequence = jnp.minimum(sequence, lengths.shape[0] - 1)
    return sequence, lengths[sequence] + row - row_offsets[sequence], real


class Row(NamedTuple):
    """Where each row stands; one that is not ``real`` is neither written nor read."""

    sequence: Int[Array, " R"]
    position: Int[Array, " R"]
    page: Int[Array, " R"]
    real: Bool[Array, " R"]

    @classmethod
    def of(cls, batch: Batch) -> "Row":
        """Rows are real if a sequence owns them and has a place for them.

        A row that is appended needs its page; any row must stand inside the table.
        """
        table, _, offsets, layer = batch.where
        (L, N, _, P, _), M = batch.pool.keys.shape, table.shape[1]
        R = batch.query.shape[0]
        lengths = batch.keys - batch.where.counts
        sequence, position, real = places(R, lengths, offsets)
        page = table[sequence, jnp.clip(position // P, 0, M - 1)]
        layer = jnp.asarray(layer, jnp.int32)
        real &= (position < M * P) & (layer >= 0) & (layer < L)
        if batch.new is not None:
            real &= (position >= 0) & (page >= 0) & (page < N)
        return cls(sequence, position, page, real)
