"""Caches without a page table: one slot for each sequence, or plain tensors.

Both are written and read as pages are: a slot is a run of neighbouring pages, and a
tensor one page per sequence.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._core.pytree import pytree, static
from .._core.types import MaskMod, ScoreMod
from ..mods import Causal
from .config import KVCacheParams, KVCacheStrategy, check_floats, check_strategy
from .paged import PagedKVCache


@pytree
class SlotKVCache:
    """Continuous batching: each sequence owns a slot of ``max_length`` tokens.

    Simpler than pages and no table to keep; memory is held for the longest sequence.

    Attributes:
        pages: Slot ``s`` is pages ``s * n`` to ``s * n + n - 1`` of them, in order.
        pages_per_slot: That ``n``.
    """

    pages: PagedKVCache
    pages_per_slot: int = static()

    @classmethod
    def create(
        cls, params: KVCacheParams, *, slots: int, sequences: int, max_length: int
    ) -> "SlotKVCache":
        """An empty cache; ``max_length`` is rounded up to whole pages.

        Sequence ``b`` of a batch has slot ``b`` until `with_slots` says otherwise.
        """
        check_strategy(params, KVCacheStrategy.CONTINUOUS)
        if min(slots, sequences, max_length) < 1 or sequences > slots:
            raise ValueError(
                f"slots={slots}, sequences={sequences} and max_length={max_length} must "
                "be at least 1, and no more sequences than slots."
            )
        n = -(-max_length // params.page_size)
        pages = PagedKVCache.create(
            dataclasses.replace(params, cache_strategy=KVCacheStrategy.PAGED),
            pages=slots * n,
            sequences=sequences,
            max_pages=n,
        )
        return cls(pages, n).with_slots(range(sequences), [0] * sequences)

    @property
    def slots(self) -> int:
        return self.pages.k_pages.shape[1] // self.pages_per_slot

    @property
    def max_length(self) -> int:
        return self.pages_per_slot * self.pages.page_size

    @property
    def lengths(self) -> Int[Array, " B"]:
        """Tokens held by each sequence."""
        return self.pages.lengths

    @property
    def lookup_table(self) -> Int[Array, " B"]:
        """The slot of each sequence."""
        return self.pages.table[:, 0] // self.pages_per_slot

    def with_slots(self, slots: Sequence[int], lengths: Sequence[int]) -> "SlotKVCache":
        """Says which slot each sequence owns and how many tokens lie in it.

        Raises ValueError for a slot that does not exist, one owned twice, or a length
        beyond ``max_length``.
        """
        n, slots = self.pages_per_slot, list(slots)
        if any(not 0 <= slot < self.slots for slot in slots):
            raise ValueError(f"slots must lie in [0, {self.slots}); got {slots}.")
        if len(set(slots)) < len(slots):
            raise ValueError(f"a slot has one owner; got {slots}.")
        if max(lengths, default=0) > self.max_length or min(lengths, default=0) < 0:
            raise ValueError(
                f"lengths={list(lengths)} must lie in [0, max_length={self.max_length}]."
            )
        tables = [[slot * n + i for i in range(n)] for slot in slots]
        return dataclasses.replace(self, pages=self.pages.with_tables(tables, lengths))

    def append_and_attend(
        self, query: Any, key: Any, value: Any, **options: Any
    ) -> tuple[Any, "SlotKVCache"]:
        """As `PagedKVCache.append_and_attend`, also for tokens beyond a slot's end."""
        out, pages = self.pages.append_and_attend(query, key, value, **options)
        return out, dataclasses.replace(self, pages=pages)

    def positions(self, rows: int, row_offsets: Int[Array, " offsets"]) -> Any:
        """The absolute position of each new row."""
        return self.pages.positions(rows, row_offsets)

    def advance(self, row_offsets: Int[Array, " offsets"]) -> "SlotKVCache":
        """See `PagedKVCache.advance`."""
        return dataclasses.replace(self, pages=self.pages.advance(row_offsets))

    @property
    def overflowed(self) -> Bool[Array, " B"]:
        """Whether a sequence had a token beyond the end of its slot."""
        return self.pages.overflowed

    def truncate(self, lengths: Sequence[int] | Int[Array, " B"]) -> "SlotKVCache":
        """See `PagedKVCache.truncate`."""
        return dataclasses.replace(self, pages=self.pages.truncate(lengths))


class SlotAllocator:
    """Hands out slots to requests and takes them back. Host side, not traced."""

    def __init__(self, slots: int, max_length: int):
        if slots < 1 or max_length < 1:
            raise ValueError(
                f"slots={slots} and max_length={max_length} must be at least 1."
            )
        self.max_length = max_length
        self._free = list(range(slots))[::-1]
        self._lengths: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Slots that no sequence owns."""
        return len(self._free)

    def claim(self) -> int:
        """A slot that no sequence owns. Raises MemoryError when there is none."""
        if not self._free:
            raise MemoryError(f"all {len(self._lengths)} slots are owned.")
        slot = self._free.pop()
        self._lengths[slot] = 0
        return slot

    def length(self, slot: int) -> int:
        """Tokens in an owned slot."""
        self._check(slot)
        return self._lengths[slot]

    def grow(self, slot: int, tokens: int) -> None:
        """Counts ``tokens`` more, before they are written.

        Raises ValueError when they would overrun the slot; nothing is counted then.
        """
        self._check(slot)
        if (new := self._lengths[slot] + tokens) > self.max_length:
            raise ValueError(
                f"{tokens} more tokens in slot {slot} would overrun max_length="
                f"{self.max_length}: {new}."
            )
        self._lengths[slot] = new

    def release(self, slot: int) -> None:
        """Takes a slot back."""
        self._check(slot)
        del self._lengths[slot]
        self._free.append(slot)

    def _check(self, slot: int) -> None:
        if slot not in self._lengths:
            raise ValueError(f"slot {slot} is not owned: released twice?")


@pytree
class TensorKVCache:
    """Keys and values as plain tensors, one row of a batch for each sequence.

    For small models and for looking inside: ``k[layer, b, :, :lengths[b]]`` are the keys.
    Every step reads all ``S`` places.

    Attributes:
        k: Keys.
        v: Values.
        lengths: Tokens held by each sequence.
    """

    k: Float[Array, "L B K S D"]
    v: Float[Array, "L B K S E"]
    lengths: Int[Array, " B"]

    @classmethod
    def create(
        cls, params: KVCacheParams, *, sequences: int, max_length: int
    ) -> "TensorKVCache":
        """An empty cache for ``max_length`` tokens of each sequence."""
        check_strategy(params, KVCacheStrategy.NAIVE)
        check_floats(params)
        if min(sequences, max_length) < 1:
            raise ValueError(
                f"sequences={sequences} and max_length={max_length} must be at least 1."
            )
        shape = (params.num_layers, sequences, params.n_kv_heads, max_length)
        return cls(
            jnp.zeros((*shape, params.head_dim), params.dtype),
            jnp.zeros((*shape, params.value_size), params.dtype),
            jnp.zeros(sequences, jnp.int32),
        )

    def append_and_attend(
        self,
        query: Float[Array, "R H D"],
        key: Float[Array, "R K D"],
        value: Float[Array, "R K E"],
        *,
        row_offsets: Int[Array, " offsets"],
        layer: int | Int[Array, ""] = 0,
        mask_mod: MaskMod | None = Causal(),
        score_mod: ScoreMod | None = None,
        scale: float | Float[Array, ""] | None = None,
        sinks: Float[Array, " H"] | None = None,
        return_lse: bool = False,
        kernel: str | None = None,
    ) -> tuple[Any, "TensorKVCache"]:
        """As `PagedKVCache.append_and_attend`, also for tokens beyond the end."""
        out, pages = self._pages.append_and_attend(
            query,
            key,
            value,
            row_offsets=row_offsets,
            layer=layer,
            mask_mod=mask_mod,
            score_mod=score_mod,
            scale=scale,
            sinks=sinks,
            return_lse=return_lse,
            kernel=kernel,
        )
        return out, dataclasses.replace(self, k=pages.k_pages, v=pages.v_pages)

    @property
    def _pages(self) -> PagedKVCache:
        """The same arrays as one page per sequence."""
        each = jnp.arange(self.lengths.shape[0], dtype=jnp.int32)
        return PagedKVCache(self.k, self.v, each[:, None], self.lengths)

    def positions(self, rows: int, row_offsets: Int[Array, " offsets"]) -> Any:
        """The absolute position of each new row."""
        return self._pages.positions(rows, row_offsets)

    def advance(self, row_offsets: Int[Array, " offsets"]) -> "TensorKVCache":
        """See `PagedKVCache.advance`."""
        return dataclasses.replace(
            self, lengths=self._pages.advance(row_offsets).lengths
        )

    @property
    def overflowed(self) -> Bool[Array, " B"]:
        """Whether a sequence had a token for which there was no place."""
        return self._pages.overflowed

    def truncate(self, lengths: Sequence[int] | Int[Array, " B"]) -> "TensorKVCache":
        """See `PagedKVCache.truncate`."""
        return dataclasses.replace(self, lengths=self._pages.truncate(lengths).lengths)

    def with_lengths(self, lengths: Sequence[int]) -> "TensorKVCache":
        """Says how many tokens each sequence has; ValueError if they do not fit."""
        capacity = self.k.shape[3]
        counts = np.asarray(lengths, np.int32)
        if (
            counts.shape != self.lengths.shape
            or ((counts < 0) | (counts > capacity)).any()
        ):
            raise ValueError(
                f"lengths={list(lengths)} must be {self.lengths.shape[0]} numbers in "
                f"[0, {capacity}]."
            )
        return dataclasses.replace(self, lengths=jnp.asarray(counts))
