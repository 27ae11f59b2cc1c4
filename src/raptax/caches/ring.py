"""A key/value cache that keeps the last tokens alone, for layers with a window.

Token ``p`` lies in slot ``p % slots``, so a layer whose mask never looks back further
than ``slots`` tokens finds all that it may see, in memory that does not grow.
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from .._pytree import pytree
from .contiguous import ACTIVE, Partition
from .held import Held, Rules, attend


@pytree
class RingKVCache:
    """The last tokens of a batch of sequences.

    Attributes:
        ring: Keys and values; a slot's segment id is `ACTIVE` once it was written.
        lengths: Tokens that each sequence has had so far.
    """

    ring: Partition
    lengths: Int[Array, " B"]

    @classmethod
    def create(cls, ring: Partition) -> "RingKVCache":
        """With nothing in it."""
        return cls(ring, jnp.zeros(ring.segment_ids.shape[0], jnp.int32))

    @property
    def empty(self) -> "RingKVCache":
        """The same memory with nothing in it."""
        ids = jnp.zeros_like(self.ring.segment_ids)
        return RingKVCache.create(dataclasses.replace(self.ring, segment_ids=ids))

    @property
    def positions(self) -> Int[Array, "B S"]:
        """The position of the token in each slot, -1 where there is none."""
        slots = self.ring.slots
        slot = jnp.arange(slots, dtype=jnp.int32)[None]
        last = self.lengths[:, None] - 1
        position = last - (last - slot) % slots
        return jnp.where(self.ring.segment_ids == ACTIVE, position, -1)

    def held(self, dtype: DTypeLike) -> Held:
        return Held(*self.ring.read(dtype), self.positions)

    def append_and_attend(
        self,
        query: Float[Array, "B T H D"],
        key: Float[Array, "B T K D"],
        value: Float[Array, "B T K E"],
        rules: Rules,
        *,
        real: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T H E"], "RingKVCache"]:
        """Attends to the ring and the new tokens, then writes these.

        ``rules.mask_mod`` must not look back further than the ring is long: what was
        overwritten cannot be seen. Rows that are not ``real`` are padding, wherever they
        stand: they take no position, are not written, and what they return means
        nothing.
        """
        if real is None:
            real = jnp.ones(key.shape[:2], bool)
        count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
        at = self.lengths[:, None] + count - 1
        # Heads go before lengths, as kernels want them.
        q, k, v = (x.swapaxes(1, 2) for x in (query, key, value))
        new = Held(k, v, jnp.where(real, at, -1))
        out = attend(q, [self.held(query.dtype), new], at, rules)
        return out.swapaxes(1, 2), self.append(key, value, real)

    def append(
        self,
        key: Float[Array, "B T K D"],
        value: Float[Array, "B T K E"],
        real: Bool[Array, "B T"],
    ) -> "RingKVCache":
        """Writes the new tokens over the oldest; see `append_and_attend`."""
        slots = self.ring.slots
        count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
        lengths = self.lengths + count[:, -1]
        at = self.lengths[:, None] + count - 1
        # Only the last tokens are written: a scatter does not say which of two wins.
        stays = real & (at >= lengths[:, None] - slots)
        ids = jnp.full(key.shape[:2], ACTIVE, jnp.int32)
        ring = self.ring.put(key, value, ids, jnp.where(stays, at % slots, slots))
        return dataclasses.replace(self, ring=ring, lengths=lengths)
