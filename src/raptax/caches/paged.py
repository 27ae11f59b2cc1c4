"""A key/value cache in fixed-size pages, so that memory follows the tokens held.

Two halves, because they live in two worlds:

* `PagedKVCache` is arrays. It is written and read inside ``jit``.
* `PageAllocator` is bookkeeping on the host. It decides which page is whose, between
  steps, and never touches a token.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from .._pytree import pytree
from .._types import MaskMod, ScoreMod
from ..kernels import paged
from ..mods import Causal
from ..quant.rows import is_code
from .params import KVCacheParams, KVCacheStrategy, check_strategy


@pytree
class PagedKVCache:
    """Keys and values of a batch of sequences, in pages.

    Attributes:
        k_pages: Keys of all layers.
        v_pages: Values of all layers.
        table: Page ids by sequence; entries past a sequence's pages are never read.
        lengths: Tokens held by each sequence.
        k_scales: What codes of keys are to be multiplied with; None for floats.
        v_scales: Likewise for values.
    """

    k_pages: Float[Array, "L N K P D"] | Int8[Array, "L N K P D"]
    v_pages: Float[Array, "L N K P E"] | Int8[Array, "L N K P E"]
    table: Int[Array, "B M"]
    lengths: Int[Array, " B"]
    k_scales: Float[Array, "L N K P"] | None = None
    v_scales: Float[Array, "L N K P"] | None = None

    @classmethod
    def create(
        cls, params: KVCacheParams, *, pages: int, sequences: int, max_pages: int
    ) -> "PagedKVCache":
        """An empty cache: ``pages`` in the pool, up to ``max_pages`` a sequence."""
        check_strategy(params, KVCacheStrategy.PAGED)
        shape = (params.num_layers, pages, params.n_kv_heads, params.page_size)
        scales = lambda: jnp.zeros(shape) if is_code(params.dtype) else None
        return cls(
            jnp.zeros((*shape, params.head_dim), params.dtype),
            jnp.zeros((*shape, params.value_size), params.dtype),
            jnp.zeros((sequences, max_pages), jnp.int32),
            jnp.zeros(sequences, jnp.int32),
            scales(),
            scales(),
        )

    @property
    def pool(self) -> paged.Pool:
        """The pages as kernels take them."""
        return paged.Pool(self.k_pages, self.v_pages, self.k_scales, self.v_scales)

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[3]

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
        kernel: str | None = None,
    ) -> tuple[Float[Array, "R H E"], "PagedKVCache"]:
        """Writes one layer's new keys and values, then attends; see `kernels.paged`.

        ``lengths`` stay as they were, so that every layer of a model writes to the same
        places: call `advance` when the last one is done.
        """
        out, pool = paged.append_and_attend(
            query,
            key,
            value,
            self.pool,
            table=self.table,
            lengths=self.lengths,
            row_offsets=row_offsets,
            layer=layer,
            mask_mod=mask_mod,
            score_mod=score_mod,
            scale=scale,
            kernel=kernel,
        )
        after = dataclasses.replace(
            self,
            k_pages=pool.keys,
            v_pages=pool.values,
            k_scales=pool.key_scales,
            v_scales=pool.value_scales,
        )
        return out, after

    def positions(
        self, rows: int, row_offsets: Int[Array, " offsets"]
    ) -> Int[Array, " {rows}"]:
        """The absolute position of each new row."""
        return paged.places(rows, self.lengths, row_offsets)[1]

    def advance(self, row_offsets: Int[Array, " offsets"]) -> "PagedKVCache":
        """Counts the rows that all layers have written."""
        new = row_offsets[1:] - row_offsets[:-1]
        return dataclasses.replace(self, lengths=self.lengths + new)

    def with_tables(
        self, tables: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> "PagedKVCache":
        """Says which pages each sequence holds and how many tokens lie in them.

        Raises ValueError for a page id outside the pool, a page held twice, or lengths
        that need more pages than are held.
        """
        sequences, max_pages = self.table.shape
        if not len(tables) == len(lengths) == sequences:
            raise ValueError(
                f"the cache holds {sequences} sequences; got {len(tables)} tables and "
                f"{len(lengths)} lengths."
            )
        table = np.zeros((sequences, max_pages), np.int32)
        held = [page for pages in tables for page in pages]
        if any(not 0 <= page < self.k_pages.shape[1] for page in held):
            raise ValueError(
                f"page ids must lie in [0, {self.k_pages.shape[1]}); got {sorted(held)}."
            )
        for row, pages, length in zip(table, tables, lengths, strict=True):
            if len(pages) > max_pages:
                raise ValueError(
                    f"{len(pages)} pages exceed max_pages={max_pages} per sequence."
                )
            if len(set(pages)) < len(pages):
                raise ValueError(f"a sequence holds a page twice: {list(pages)}.")
            if length > len(pages) * self.page_size:
                raise ValueError(
                    f"{length} tokens do not fit {len(pages)} pages of "
                    f"{self.page_size}."
                )
            row[: len(pages)] = pages
        return dataclasses.replace(
            self, table=jnp.asarray(table), lengths=jnp.asarray(lengths, jnp.int32)
        )


class PageAllocator:
    """Hands out the pages of a pool and takes them back. Host side, not traced."""

    def __init__(self, pages: int, page_size: int):
        if pages < 1 or page_size < 1:
            raise ValueError(
                f"pages={pages} and page_size={page_size} must be at least 1."
            )
        self.page_size = page_size
        self._free = list(range(pages))[::-1]
        self._used: set[int] = set()

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def grow(self, held: list[int], tokens: int) -> None:
        """Extends ``held`` in place until it has room for ``tokens`` tokens.

        Raises MemoryError when the pool has too few pages; nothing is taken then.
        """
        short = -(-tokens // self.page_size) - len(held)
        if short > len(self._free):
            raise MemoryError(
                f"the sequence needs {short} more pages but only {len(self._free)} are "
                "free; evict a sequence or build the cache with more pages."
            )
        for _ in range(short):
            page = self._free.pop()
            self._used.add(page)
            held.append(page)

    def release(self, held: list[int]) -> None:
        """Takes back all of ``held`` and empties it.

        Raises ValueError for pages that are not handed out; nothing is released then.
        """
        if len(set(held)) < len(held) or not self._used.issuperset(held):
            raise ValueError(f"pages {held} are not all handed out: released twice?")
        self._used.difference_update(held)
        self._free.extend(held)
        held.clear()
