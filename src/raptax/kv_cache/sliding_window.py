"""A key/value cache that keeps the last tokens alone, for layers with a window.

Token ``p`` lies in slot ``p % slots``, so a layer whose mask never looks back further
than ``slots`` tokens finds all that it may see, in memory that does not grow.

A token that is rolled back, such as a rejected draft, has overwritten the one that stood
``slots`` before it. So a ring that is to forget up to ``rollback`` tokens needs as many
slots more than its mask looks back.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from .._core.pytree import pytree, static
from .contiguous import ACTIVE, Partition, check_shorter
from .positioned import AttendSettings, KVSegment, attend


@pytree
class RingKVCache:
    """The last tokens of a batch of sequences.

    Attributes:
        ring: Keys and values; a slot's segment id is `ACTIVE` once it was written.
        lengths: Tokens that each sequence has.
        written: Tokens that each sequence has had at most: more than ``lengths`` after
            `truncate`. ``lengths`` unless given.
        rollback: How many tokens `truncate` may forget after the last that was written.

    Raises:
        ValueError: ``lengths`` are more than ``rollback`` below what was written, so that
            tokens which the next row sees are overwritten. Where they are traced,
            `rolled_back_too_far` says so.
    """

    ring: Partition
    lengths: Int[Array, " B"]
    written: Int[Array, " B"] | None = None
    rollback: int = static(default=0)

    def __post_init__(self) -> None:
        if self.written is None:
            # A copy: one buffer cannot be donated twice.
            object.__setattr__(self, "written", jnp.array(self.lengths))
        self._check()

    @classmethod
    def create(cls, ring: Partition, *, rollback: int = 0) -> "RingKVCache":
        """With nothing in it.

        A mask may look back over ``ring.slots - rollback`` tokens, a row's own included.

        Raises ValueError unless ``0 <= rollback < ring.slots``.
        """
        if not 0 <= rollback < ring.slots:
            raise ValueError(
                f"rollback={rollback} must lie in [0, {ring.slots}): of the ring's "
                f"{ring.slots} slots so many hold tokens that may be forgotten."
            )
        zeros = jnp.zeros(ring.segment_ids.shape[0], jnp.int32)
        return cls(ring, zeros, rollback=rollback)

    @property
    def empty(self) -> "RingKVCache":
        """The same memory with nothing in it."""
        ids = jnp.zeros_like(self.ring.segment_ids)
        ring = dataclasses.replace(self.ring, segment_ids=ids)
        return RingKVCache.create(ring, rollback=self.rollback)

    @property
    def positions(self) -> Int[Array, "B S"]:
        """The position of the token in each slot, -1 where there is none."""
        slots = self.ring.slots
        slot = jnp.arange(slots, dtype=jnp.int32)[None]
        last = self._written[:, None] - 1
        position = last - (last - slot) % slots
        there = (self.ring.segment_ids == ACTIVE) & (position < self.lengths[:, None])
        return jnp.where(there, position, -1)

    @property
    def _written(self) -> Int[Array, " B"]:
        return self.lengths if self.written is None else self.written

    @property
    def rolled_back_too_far(self) -> Bool[Array, " B"]:
        """Whether tokens that the next row may see were overwritten by forgotten ones."""
        return self._written - self.lengths > self.rollback

    def _check(self) -> None:
        arrays = self.lengths, self._written
        if all(isinstance(x, jax.Array) for x in arrays) and not any(
            isinstance(x, jax.core.Tracer) for x in arrays
        ):
            for b in np.flatnonzero(np.asarray(self.rolled_back_too_far))[:1]:
                raise ValueError(
                    f"sequence {b} goes back from {self._written[b]} tokens to "
                    f"{self.lengths[b]}, and this ring can forget {self.rollback}: what "
                    "came before was overwritten; create it with a larger rollback."
                )

    def truncate(self, lengths: Sequence[int] | Int[Array, " B"]) -> "RingKVCache":
        """Forgets the tokens from ``lengths[b]`` on, such as rejected drafts.

        Raises:
            ValueError: A sequence has fewer tokens, or has to go back further than
                ``rollback``. Where numbers are traced, a sequence with fewer tokens keeps
                these, and `rolled_back_too_far` says the other.
        """
        new = jnp.asarray(lengths, jnp.int32)
        check_shorter(new, self.lengths)
        return dataclasses.replace(self, lengths=jnp.minimum(new, self.lengths))

    def held(self, dtype: DTypeLike) -> KVSegment:
        return KVSegment(*self.ring.read(dtype), self.positions)

    def append_and_attend(
        self,
        query: Float[Array, "B T H D"],
        key: Float[Array, "B T K D"],
        value: Float[Array, "B T K E"],
        settings: AttendSettings,
        *,
        real: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T H E"], "RingKVCache"]:
        """Attends to the ring and the new tokens, then writes these.

        ``settings.mask_mod`` must not look back further than the ring is long,
        ``rollback`` left aside: what was overwritten cannot be seen. Rows that are not
        ``real`` are padding, wherever they stand: they take no position, are not
        written, and what they return means nothing.
        """
        if real is None:
            real = jnp.ones(key.shape[:2], bool)
        count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
        at = self.lengths[:, None] + count - 1
        # Heads go before lengths, as kernels want them.
        q, k, v = (x.swapaxes(1, 2) for x in (query, key, value))
        new = KVSegment(k, v, jnp.where(real, at, -1))
        out = attend(q, [self.held(query.dtype), new], at, settings)
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
        written = jnp.maximum(self._written, lengths)
        return dataclasses.replace(self, ring=ring, lengths=lengths, written=written)
