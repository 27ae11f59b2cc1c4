"""Attention to keys by their positions, wherever they lie in memory.

In a cache a key's slot says little: prompts are padded, rings wrap around, partitions lie
apart. Masks and score_mods are functions of positions, as in training; `PositionMask`
looks up the position of each slot for them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .._core.pytree import pytree
from .._core.types import DropoutKey, MaskMod, ScoreMod
from ..api.attention import attention
from ..kernels.softmax import accumulator, merge
from ..mods import Mask, as_mod


class KVSegment(NamedTuple):
    """Keys and values, and the position of each; a negative one is an empty slot."""

    key: Float[Array, "B K S D"]
    value: Float[Array, "B K S E"]
    positions: Int[Array, "B S"]


@pytree
class PositionMask(Mask):
    """``mod`` for rows and slots that stand at the positions given.

    Row ``t`` stands at ``query[b, t]``, slot ``s`` at ``key[b, s]``; a negative position
    is an empty slot, which no query sees. Attend with ``query_start=0``. Without a mod
    every slot that is not empty is seen.
    """

    mod: Any
    query: Int[Array, "B T"]
    key: Int[Array, "B S"]

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        rows, slots = self.query.shape[1], self.key.shape[1]
        q = self.query[b_idx, jnp.clip(q_idx, 0, rows - 1)]
        kv = self.key[b_idx, jnp.clip(kv_idx, 0, slots - 1)]
        allowed = (kv >= 0) & (kv_idx >= 0) & (kv_idx < slots)
        return allowed if self.mod is None else allowed & self.mod(b_idx, h_idx, q, kv)


class AttendSettings(NamedTuple):
    """What holds for every part that is attended to; see `attention`."""

    mask_mod: MaskMod | None = None
    score_mod: ScoreMod | None = None
    sinks: Float[Array, " H"] | None = None
    scale: float | None = None
    dropout_rng: DropoutKey | None = None
    dropout_rate: float = 0.0
    deterministic: bool = True
    kernel: str | None = None


def attend(
    query: Float[Array, "B H T D"],
    held: Sequence[KVSegment],
    positions: Int[Array, "B T"],
    settings: AttendSettings,
    *,
    block: int | None = None,
) -> Float[Array, "B H T E"]:
    """Attends to all that is held, part by part.

    Args:
        query: Rows.
        held: At least one part. Each position is held at most once.
        positions: Where the rows stand.
        settings: ``mask_mod`` is asked about positions, not about slots.
        block: Reads that many slots at a time, and none behind the last one that is
            held, whatever the length of a part. None leaves that to the kernel.
    """
    some = [
        _blocks(query, part, positions, settings, n, block)
        for n, part in enumerate(held)
    ]
    return merge(*some)[0].astype(query.dtype)


def _part(query, part: KVSegment, positions, settings: AttendSettings, number: Any):
    """``(out, lse)`` over one part; sinks belong to the first alone."""
    mask_mod = PositionMask(as_mod(settings.mask_mod), positions, part.positions)
    options = settings._replace(mask_mod=mask_mod)._asdict()
    if (
        settings.dropout_rng is not None
    ):  # the hash of a weight's place knows slots only
        options["dropout_rng"] = jax.random.fold_in(settings.dropout_rng, number)
    if settings.sinks is not None:
        first = jnp.asarray(number) == 0
        options["sinks"] = jnp.where(first, settings.sinks, -jnp.inf)
    return attention(
        query, part.key, part.value, query_start=0, return_lse=True, **options
    )


def _blocks(
    query,
    part: KVSegment,
    positions,
    settings: AttendSettings,
    number: int,
    block: int | None,
):
    if block is None:
        return _part(query, part, positions, settings, number)
    slots = part.key.shape[2]
    size = min(block, slots)
    last = jnp.where(part.positions >= 0, jnp.arange(1, slots + 1)[None], 0).max()

    def add(i, so_far):
        start = jnp.minimum(i * size, slots - size)
        cut = lambda x, axis: lax.dynamic_slice_in_dim(x, start, size, axis)
        new = start + jnp.arange(size, dtype=jnp.int32) >= i * size
        at = jnp.where(new[None], cut(part.positions, 1), -1)
        few = KVSegment(cut(part.key, 2), cut(part.value, 2), at)
        out, lse = _part(query, few, positions, settings, number * slots + i)
        return merge(so_far, (out.astype(dtype), lse))

    dtype = accumulator(query.dtype)
    rows = query.shape[:3]
    nothing = (
        jnp.zeros((*rows, part.value.shape[3]), dtype),
        jnp.full(rows, -jnp.inf, dtype),
    )
    return lax.fori_loop(0, -(-last // size), add, nothing)
