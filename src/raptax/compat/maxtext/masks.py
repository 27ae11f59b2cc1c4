"""MaxText's attention types as masks on absolute positions.

    global, mla       keys up to the query's own
    local_sliding     the last ``window`` of these
    chunk             those of the query's own chunk; chunks are cut by position, also
                      where several sequences are packed into a row
    block_diffusion   the query's own block, all of it, and the blocks before
    full              every key

Segment ids narrow this down: a query sees the keys with its own id, 0 (padding) included,
and no token sees a negative one. Bidirectional runs come last: tokens of one run see each
other, whatever the rest says.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..._core.pytree import pytree, static
from ..._core.types import MaskMod
from ...kv_cache.positioned import KVSegment
from ...mods import (
    BlockCausal,
    Causal,
    Chunked,
    Mask,
    Segments,
    SlidingWindow,
    and_masks,
)
from ...mods.combine import entries, per_sequence, within
from ...rope.turns import wide_dtype


def base_mask(o: Any) -> MaskMod | None:
    """The mask of a layer's attention type; None for "full"."""
    if o.kind == "local_sliding":
        return SlidingWindow(o.window)
    if o.kind == "chunk":
        return Chunked(o.window)
    if o.kind == "block_diffusion":
        return BlockCausal(o.settings.causal_block_size)
    return None if o.kind == "full" else Causal()


@pytree
class Runs(Mask):
    """Tokens of one run see each other. ``ids[b, i]`` is its number, -1 for no run."""

    ids: Int[Array, "B S"]

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        length = self.ids.shape[1]
        own, other = entries(self.ids, b_idx, q_idx), entries(self.ids, b_idx, kv_idx)
        inside = within(q_idx, length) & within(kv_idx, length)
        return (own == other) & (own >= 0) & inside


def runs(bidirectional_mask: Int[Array, "B S"] | Bool[Array, "B S"]) -> Runs:
    """The unbroken runs of ones, as images are inside text."""
    inside = bidirectional_mask.astype(jnp.int32)
    before = jnp.pad(inside, ((0, 0), (1, 0)))[:, :-1]
    number = jnp.cumsum((inside == 1) & (before == 0), axis=1, dtype=jnp.int32)
    return Runs(jnp.where(inside == 1, number, -1))


def segments(
    query_ids: Int[Array, "B T"], key_ids: Int[Array, "B S"], start: int
) -> Segments:
    """Equal ids see each other; -1 and below, which stand for nothing, see no token."""
    return Segments(
        jnp.where(query_ids < 0, -2, query_ids),
        jnp.where(key_ids < 0, -1, key_ids),
        start,
    )


def combined(
    *masks: MaskMod | None, bidirectional: Runs | None = None
) -> MaskMod | None:
    """All of ``masks``, and what the runs open again."""
    some = [mask for mask in masks if mask is not None]
    if not some:
        return None
    both = and_masks(*some)
    return both if bidirectional is None else both | bidirectional


# ------------------------------------------------------------- mixture of block attention


@pytree
class ChosenBlocks(Mask):
    """Query row ``t`` sees the blocks of ``size`` keys that are ``chosen[b, h, t]``."""

    chosen: Bool[Array, "B H T N"]
    start: Int[Array, " B"]
    size: int = static()

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        row = q_idx - per_sequence(self.start, b_idx)
        return entries(self.chosen, b_idx, h_idx, row, kv_idx // self.size)


def moba(
    query: Float[Array, "B H T D"],
    held: list[KVSegment],
    positions: Int[Array, "B T"],
    o: Any,
) -> ChosenBlocks:
    """The blocks that each query looks at: its own, and those it likes best before it.

    A block's keys are averaged, a query likes a block by its product with the mean, and
    config.moba_topk blocks of config.moba_chunk_size are chosen, the own one among them;
    of equals the earlier. Lu et al. 2025 (MoBA), arXiv:2502.13189.
    """
    size, count = o.settings.moba_chunk_size, o.settings.moba_topk
    blocks = -(-max(o.max_target_length, *(p.key.shape[2] for p in held)) // size)
    wide = wide_dtype(query)
    total: Any = 0
    number: Any = 0
    for part in held:
        block = jnp.where(part.positions >= 0, part.positions // size, blocks)
        member = jax.nn.one_hot(block, blocks, dtype=wide)  # (B, S, blocks)
        keys = jnp.where(part.positions[:, None, :, None] >= 0, part.key, 0)
        total += jnp.einsum("bsn,bksd->bknd", member, keys.astype(wide))
        number += member.sum(1)
    mean = total / jnp.maximum(number, 1)[:, None, :, None]
    B, H, T, D = query.shape
    K = mean.shape[1]
    grouped = query.astype(wide).reshape(B, K, H // K, T, D)
    liking = jnp.einsum("bkgtd,bknd->bkgtn", grouped, mean).reshape(B, H, T, blocks)
    own = (positions // size)[:, None, :, None]
    block = jnp.arange(blocks, dtype=jnp.int32)[None, None, None]
    liking = jnp.where(block == own, jnp.inf, jnp.where(block > own, -jnp.inf, liking))
    best = jnp.argsort(-jax.lax.stop_gradient(liking), axis=-1, stable=True)
    chosen = jax.nn.one_hot(best[..., :count], blocks, dtype=jnp.int32).sum(-2) > 0
    return ChosenBlocks(chosen & (block <= own), positions[:, 0], size)
