"""A key/value cache of two arrays: one for prompts, one for what is generated.

The array of generated tokens is written a token at a time and that of prompts stays
still, so each may lie in memory as suits it: an ``axis_order`` is the order of the axes
(batch, length, heads, head size) as they are stored.

What a sequence holds is said by segment ids. `ACTIVE` marks a token that later ones see;
anything else (0 is padding) is not seen. Positions follow: a prompt's token stands at its
slot, and what is generated counts on from behind the prompt's last active token. So
prompts may be padded on either side, and a mask on positions means what it does in
training.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from .._core.pytree import pytree, static
from .positioned import KVSegment
from .quantization import KVQuantization

ACTIVE = 1  # the segment id of tokens that generated ones see


@pytree
class Partition:
    """Keys and values of a fixed number of slots, stored in any order of axes.

    Attributes:
        key: ``(batch, slots, heads, size)``, transposed by ``axis_order``.
        value: Likewise; its size may be another.
        segment_ids: Of each slot; see the module.
        key_scale: Scales of quantized keys, stored like them; None for plain numbers.
        value_scale: Likewise.
    """

    key: Array
    value: Array
    segment_ids: Int[Array, "B S"]
    key_scale: Array | None = None
    value_scale: Array | None = None
    axis_order: tuple[int, int, int, int] = static(default=(0, 1, 2, 3))
    quantization: KVQuantization | None = static(default=None)

    @classmethod
    def create(
        cls,
        shape: tuple[int, int, int, int],
        dtype: DTypeLike,
        *,
        value_size: int | None = None,
        axis_order: Sequence[int] = (0, 1, 2, 3),
        quantization: KVQuantization | None = None,
    ) -> "Partition":
        """Empty, for ``shape`` (batch, slots, heads, size)."""
        if sorted(axis_order) != [0, 1, 2, 3]:
            raise ValueError(f"axis_order={axis_order} must be an order of 0, 1, 2, 3.")
        if min(shape) < 1:
            raise ValueError(
                f"a cache of (batch, slots, heads, size)={shape} is empty."
            )
        parts: list[Any] = []
        scales: list[Any] = []
        for size in (shape[3], value_size or shape[3]):
            whole = (*shape[:3], size)
            if quantization is None:
                parts.append(jnp.zeros([whole[axis] for axis in axis_order], dtype))
                scales.append(None)
            else:
                blank = quantization.quantize(jnp.zeros(whole, jnp.float32))
                codes, scale = (x.transpose(axis_order) for x in blank)
                parts.append(codes)
                scales.append(scale)
        ids = jnp.zeros(shape[:2], jnp.int32)
        order: Any = tuple(int(axis) for axis in axis_order)
        (key, value), (k_scale, v_scale) = parts, scales
        return cls(key, value, ids, k_scale, v_scale, order, quantization)

    @property
    def slots(self) -> int:
        return self.segment_ids.shape[1]

    def _encoded(self, new: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        if self.quantization is None:
            return new, None
        return self.quantization.quantize(new)

    def put(
        self,
        key: Float[Array, "B T K D"],
        value: Float[Array, "B T K E"],
        segment_ids: Int[Array, "B T"],
        slots: Int[Array, "B T"],
    ) -> "Partition":
        """Writes token ``t`` of sequence ``b`` into ``slots[b, t]``.

        A slot that does not exist drops its token.
        """
        new = dict(zip(("key", "key_scale"), self._encoded(key), strict=True))
        new |= zip(("value", "value_scale"), self._encoded(value), strict=True)
        changed: dict[str, Any] = {
            name: self._scatter(getattr(self, name), rows, slots)
            for name, rows in new.items()
            if rows is not None
        }
        batch = jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]
        at = self.segment_ids.at[batch, slots]
        changed["segment_ids"] = at.set(segment_ids.astype(jnp.int32), mode="drop")
        return dataclasses.replace(self, **changed)

    def _scatter(self, stored: jax.Array, rows: jax.Array, slots: jax.Array):
        """Writes into the stored order itself, so that nothing is transposed."""
        places = [self.axis_order.index(axis) for axis in (0, 1)]
        rest = [axis for axis in self.axis_order if axis > 1]
        first = min(places) if abs(places[0] - places[1]) == 1 else 0
        rows = jnp.moveaxis(rows.transpose(0, 1, *rest), (0, 1), (first, first + 1))
        index: list[Any] = [slice(None)] * 4
        index[places[0]] = jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]
        index[places[1]] = slots
        return stored.at[tuple(index)].set(rows.astype(stored.dtype), mode="drop")

    def read(
        self, dtype: DTypeLike, stop: int | None = None
    ) -> tuple[Float[Array, "B K S D"], Float[Array, "B K S E"]]:
        """Keys and values of the slots before ``stop``, in the layout of kernels."""
        out = []
        for name in ("key", "value"):
            x, scale = (self._cut(n, stop) for n in (name, f"{name}_scale"))
            if self.quantization is None:
                out.append(x.astype(dtype))
            else:
                out.append(self.quantization.dequantize(x, scale, dtype))
        return out[0], out[1]

    def _cut(self, name: str, stop: int | None) -> Any:
        """One array's slots before ``stop``, as (batch, heads, slots, size)."""
        if (x := getattr(self, name)) is None:
            return None
        axis = self.axis_order.index(1)
        x = lax.slice_in_dim(x, 0, self.slots if stop is None else stop, axis=axis)
        return x.transpose([self.axis_order.index(axis) for axis in (0, 2, 1, 3)])


def check_shorter(new: Int[Array, " sequences"], lengths: Int[Array, " B"]) -> None:
    """Raises ValueError for new lengths that are not between 0 and the old, if known."""
    if any(isinstance(x, jax.core.Tracer) for x in (new, lengths)):
        return
    wanted, held = np.asarray(new), np.asarray(lengths)
    if wanted.shape != held.shape or ((wanted < 0) | (wanted > held)).any():
        raise ValueError(
            f"lengths={wanted.tolist()} must lie between 0 and those of the "
            f"{len(held)} sequences, {held.tolist()}."
        )


@pytree
class ContiguousKVCache:
    """Prompts and what was generated after them, for a batch of sequences.

    Attributes:
        prefill: Prompts.
        generated: Tokens after them.
        index: How many tokens were appended: the next one's slot.
        lengths: How many of them each sequence has.
    """

    prefill: Partition
    generated: Partition
    index: Int[Array, "1"]
    lengths: Int[Array, " B"]

    @classmethod
    def create(cls, prefill: Partition, generated: Partition) -> "ContiguousKVCache":
        """With nothing in it."""
        batch = prefill.segment_ids.shape[0]
        return cls(
            prefill, generated, jnp.zeros(1, jnp.int32), jnp.zeros(batch, jnp.int32)
        )

    def with_prompt(
        self,
        key: Float[Array, "B T K D"],
        value: Float[Array, "B T K E"],
        segment_ids: Int[Array, "B T"] | None = None,
        start: int = 0,
    ) -> "ContiguousKVCache":
        """Writes a prompt, or the chunk of one that begins at ``start``.

        Slots behind it and everything generated are empty afterwards. Without segment
        ids every token is active.

        Raises:
            ValueError: The prompt is longer than the slots for it.
        """
        B, T = key.shape[:2]
        if start + T > self.prefill.slots:
            raise ValueError(
                f"a prompt of {start + T} tokens does not fit the {self.prefill.slots} "
                "slots of the prefill cache (max_prefill_predict_length)."
            )
        if segment_ids is None:
            segment_ids = jnp.full((B, T), ACTIVE, jnp.int32)
        slots = start + jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        later = jnp.arange(self.prefill.slots, dtype=jnp.int32) >= start
        ids = jnp.where(later[None], 0, self.prefill.segment_ids)
        prefill = dataclasses.replace(self.prefill, segment_ids=ids)
        nothing = jnp.zeros_like(self.generated.segment_ids)
        return ContiguousKVCache.create(
            prefill.put(key, value, segment_ids, slots),
            dataclasses.replace(self.generated, segment_ids=nothing),
        )

    def append(
        self,
        key: Float[Array, "B 1 K D"],
        value: Float[Array, "B 1 K E"],
        segment_ids: Int[Array, "B 1"] | None = None,
    ) -> "ContiguousKVCache":
        """Writes one more token of every sequence, all into one slot.

        With a segment id other than `ACTIVE` a token takes its slot and is not seen.

        Raises:
            ValueError: Every slot is taken. Where ``index`` is traced, and so cannot be
                looked at, the token is dropped and `overflowed` says so.
        """
        slots = jnp.broadcast_to(self.index, self.lengths.shape)
        return self._append(key, value, segment_ids, slots)

    def append_ragged(
        self,
        key: Float[Array, "B 1 K D"],
        value: Float[Array, "B 1 K E"],
        segment_ids: Int[Array, "B 1"] | None = None,
    ) -> "ContiguousKVCache":
        """The same, into slot ``lengths[b]`` of each sequence."""
        return self._append(key, value, segment_ids, self.lengths)

    def _append(self, key, value, segment_ids, slots) -> "ContiguousKVCache":
        last = self.generated.slots
        if not isinstance(slots, jax.core.Tracer) and (np.asarray(slots) >= last).any():
            raise ValueError(
                f"the cache is full: {last} tokens were generated, and there are no more "
                "slots (max_target_length - max_prefill_predict_length)."
            )
        if segment_ids is None:
            segment_ids = jnp.full((key.shape[0], 1), ACTIVE, jnp.int32)
        slots = jnp.minimum(slots, last)[:, None]  # one behind the last is dropped
        generated = self.generated.put(key, value, segment_ids, slots)
        return dataclasses.replace(
            self, generated=generated, index=self.index + 1, lengths=self.lengths + 1
        )

    def truncate(
        self, lengths: Sequence[int] | Int[Array, " B"]
    ) -> "ContiguousKVCache":
        """Forgets the generated tokens of ``b`` from ``lengths[b]`` on: rejected drafts.

        Their slots are empty, and written again by `append_ragged`, or by `append` if
        all lengths are equal.

        Raises:
            ValueError: A sequence has fewer tokens. Where numbers are traced, it keeps
                these.
        """
        new = jnp.asarray(lengths, jnp.int32)
        check_shorter(new, self.lengths)
        new = jnp.minimum(new, self.lengths)
        later = jnp.arange(self.generated.slots, dtype=jnp.int32)[None] >= new[:, None]
        ids = jnp.where(later, 0, self.generated.segment_ids)
        return dataclasses.replace(
            self,
            generated=dataclasses.replace(self.generated, segment_ids=ids),
            index=new.max(keepdims=True),
            lengths=new,
        )

    @property
    def overflowed(self) -> Bool[Array, " B"]:
        """Whether a sequence had a token for which there was no slot."""
        return self.lengths > self.generated.slots

    @property
    def prompt_lengths(self) -> Int[Array, " B"]:
        """One more than the slot of a prompt's last active token."""
        ends = jnp.arange(1, self.prefill.slots + 1, dtype=jnp.int32)[None]
        return jnp.where(self.prefill.segment_ids == ACTIVE, ends, 0).max(1)

    @property
    def next_positions(self) -> Int[Array, " B"]:
        """Where each sequence's next token will stand."""
        active = self.generated.segment_ids == ACTIVE
        return self.prompt_lengths + active.sum(1, dtype=jnp.int32)

    def held(self, dtype: DTypeLike) -> list[KVSegment]:
        """Both partitions with the position of every slot."""
        slot = jnp.arange(self.prefill.slots, dtype=jnp.int32)[None]
        first = jnp.where(self.prefill.segment_ids == ACTIVE, slot, -1)
        active = self.generated.segment_ids == ACTIVE
        count = jnp.cumsum(active, axis=1, dtype=jnp.int32)
        later = jnp.where(active, self.prompt_lengths[:, None] + count - 1, -1)
        return [
            KVSegment(*self.prefill.read(dtype), first),
            KVSegment(*self.generated.read(dtype), later),
        ]
