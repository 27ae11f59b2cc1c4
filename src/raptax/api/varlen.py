"""Attention over sequences of any lengths, packed one after another without padding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._core.pytree import pytree, static
from .._core.types import DropoutKey, Indices, MaskMod, ScoreMod, as_array
from ..mods import Causal, Mask, apply_mask, as_mod, check_mods
from .attention import attention


def varlen_attention(
    query: Float[Array, "R H D"],
    key: Float[Array, "RK K D"],
    value: Float[Array, "RK K E"],
    *,
    row_offsets: Int[Array, " offsets"],
    key_offsets: Int[Array, " offsets"] | None = None,
    mask_mod: MaskMod | None = Causal(),
    score_mod: ScoreMod | None = None,
    bias: Float[Array, "#H #R #RK"] | None = None,
    sinks: Float[Array, " H"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    dropout_rng: DropoutKey | None = None,
    dropout_rate: float | Float[Array, ""] = 0.0,
    deterministic: bool = True,
    return_lse: bool = False,
    kernel: str | None = None,
) -> Float[Array, "R H E"] | tuple[Float[Array, "R H E"], Float[Array, "R H"]]:
    """`attention` of each sequence to itself, and to no other.

    Sequence ``b`` owns the rows ``row_offsets[b]`` to ``row_offsets[b + 1] - 1`` of the
    query and those between its ``key_offsets`` of key and value. Its last query stands
    at its last key, and mods see positions within the sequence. Tiles of two sequences
    that have nothing in common are not worked on. Offsets may be traced; new ones
    compile nothing anew.

    Args:
        row_offsets: Not decreasing, from 0. Rows from ``row_offsets[B]`` on are padding.
        key_offsets: The same for keys. Defaults to ``row_offsets``.
        mask_mod: Which of its sequence's keys a query may see; gets ``b_idx`` of shape
            (1, 1, R, 1).
        score_mod: A change of the scaled scores; gets the same indices.
        bias: Added to the scaled scores, for each head, row and packed key. What it
            says between two sequences is not used. Takes O(R * RK) memory.

    Returns:
        As `attention` does, in rows; zeros, and -inf, in rows of padding.

    Raises:
        ValueError: The offsets do not speak of the same sequences, or `attention` does.
    """
    query, key, value = (as_array(x) for x in (query, key, value))
    key_offsets = row_offsets if key_offsets is None else key_offsets
    row_offsets, key_offsets = as_array(row_offsets), as_array(key_offsets)
    if row_offsets.shape != key_offsets.shape:
        raise ValueError(
            f"row_offsets {row_offsets.shape} and key_offsets {key_offsets.shape} must "
            "speak of the same sequences."
        )
    bias = as_array(bias)
    if bias is not None and bias.ndim != 3:
        raise ValueError(
            f"bias {bias.shape} must broadcast to (heads, rows, keys), one axis each."
        )
    _check_offsets("row_offsets", row_offsets, query.shape[0])
    _check_offsets("key_offsets", key_offsets, key.shape[0])
    check_mods([mask_mod, score_mod], row_offsets.size - 1, query.shape[1])
    q_seq, q_pos = _places(row_offsets, query.shape[0])
    k_seq, k_pos = _places(key_offsets, key.shape[0])
    ends = (offsets[1:] - offsets[:-1] for offsets in (key_offsets, row_offsets))
    keys, queries = (jnp.append(lengths, 0) for lengths in ends)  # 0: of padding
    rows = _Rows(q_seq, q_pos + (keys - queries)[q_seq], k_seq, k_pos, keys.size - 1)
    attended: Any = attention(
        *(x.swapaxes(0, 1)[None] for x in (query, key, value)),
        mask_mod=_PackedMask(rows, as_mod(mask_mod)),
        score_mod=None if score_mod is None else _PackedScore(rows, as_mod(score_mod)),
        bias=None if bias is None else bias[None],
        sinks=sinks,
        scale=scale,
        query_start=0,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        return_lse=return_lse,
        kernel=kernel,
    )
    if not return_lse:
        return attended[0].swapaxes(0, 1)
    return tuple(x[0].swapaxes(0, 1) for x in attended)


def _check_offsets(name: str, offsets: jax.Array, rows: int) -> None:
    if offsets.ndim != 1 or not offsets.size:
        raise ValueError(
            f"{name} {offsets.shape} must be one axis of sequences + 1 numbers."
        )
    if isinstance(offsets, jax.core.Tracer):
        return
    numbers = np.asarray(offsets)
    if numbers[0] != 0 or (np.diff(numbers) < 0).any() or numbers[-1] > rows:
        raise ValueError(
            f"{name}={numbers.tolist()} must start at 0, not decrease, and end within "
            f"the {rows} rows. Are these lengths? Give their sums: append 0 in front and "
            "add up."
        )


def _places(offsets: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """For each row its sequence, one too many for padding, and its place in that."""
    row = jnp.arange(rows, dtype=jnp.int32)
    sequence = jnp.searchsorted(offsets[1:], row, side="right").astype(jnp.int32)
    return sequence, row - offsets[sequence]


@pytree
class _Rows:
    """Where the rows of queries and keys stand: in which sequence, and where in it."""

    q_seq: Int[Array, " R"]
    q_pos: Int[Array, " R"]
    k_seq: Int[Array, " RK"]
    k_pos: Int[Array, " RK"]
    sequences: int = static()

    def within(self, h_idx: jax.Array, q_idx: jax.Array, kv_idx: jax.Array) -> Indices:
        """Indices within a sequence, of rows and keys."""
        b_idx = jnp.minimum(self.q_seq[q_idx], self.sequences - 1)
        return b_idx, h_idx, self.q_pos[q_idx], self.k_pos[kv_idx]


@pytree
class _PackedMask(Mask):
    """``mask_mod`` within each sequence, and nothing between them."""

    rows: _Rows
    mask_mod: Any

    def check_sizes(self, batch: int, heads: int) -> None:
        """The mask is one of the packed sequences, which `varlen_attention` checks."""

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        own = self.rows.q_seq[q_idx]
        allowed = (own == self.rows.k_seq[kv_idx]) & (own < self.rows.sequences)
        if self.mask_mod is None:
            return allowed
        at = self.rows.within(h_idx, q_idx, kv_idx)
        return allowed & apply_mask(self.mask_mod, *at)


@pytree
class _PackedScore:
    """``score_mod`` within each sequence."""

    rows: _Rows
    score_mod: Any

    def __call__(self, scores, b_idx, h_idx, q_idx, kv_idx):
        return self.score_mod(scores, *self.rows.within(h_idx, q_idx, kv_idx))
