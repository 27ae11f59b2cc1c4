"""A key/value cache in fixed-size pages, so that memory follows the tokens held.

Two halves, because they live in two worlds:

* `PagedKVCache` is arrays. It is written and read inside ``jit``.
* `PageAllocator` is bookkeeping on the host. It decides which page is whose, between
  steps, and never touches a token.

Sequences may share pages that are full: a prefix, or what beams have in common. A page
that is still written to has one owner; `PagedKVCache.fork` copies the half-full one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8

from .._core.pytree import pytree
from .._core.types import MaskMod, ScoreMod
from ..kernels import paged
from ..mods import Causal
from ..quant.rows import is_code
from .config import KVCacheParams, KVCacheStrategy, check_strategy
from .contiguous import check_shorter
from .page_allocator import NO_PAGE
from .page_allocator import PageAllocator as PageAllocator


@pytree
class PagedKVCache:
    """Keys and values of a batch of sequences, in pages.

    Attributes:
        k_pages: Keys of all layers.
        v_pages: Values of all layers.
        table: Page ids by sequence; -1 where there is no page, which is never written to
            or read from.
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
        """An empty cache: ``pages`` in the pool, up to ``max_pages`` a sequence.

        No sequence holds a page until `with_tables` gives it some.
        """
        check_strategy(params, KVCacheStrategy.PAGED)
        shape = (params.num_layers, pages, params.n_kv_heads, params.page_size)
        scales = lambda: jnp.zeros(shape) if is_code(params.dtype) else None
        return cls(
            jnp.zeros((*shape, params.head_dim), params.dtype),
            jnp.zeros((*shape, params.value_size), params.dtype),
            jnp.full((sequences, max_pages), NO_PAGE, jnp.int32),
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
        sinks: Float[Array, " H"] | None = None,
        return_lse: bool = False,
        kernel: str | None = None,
    ) -> tuple[Any, "PagedKVCache"]:
        """Writes one layer's new keys and values, then attends; see `kernels.paged`.

        ``lengths`` stay as they were, so that every layer of a model writes to the same
        places: call `advance` when the last one is done.

        A row that has no page is refused. Where ``table`` or ``lengths`` are traced, the
        native kernel refuses it when it runs; the other one drops the row, whose output
        is zero, and `overflowed` says so after `advance`.

        Returns:
            The output ``(R, H, E)``, or with ``return_lse`` the pair of it and the
            log-sum-exp ``(R, H)``; and the cache.
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
            sinks=sinks,
            return_lse=return_lse,
            kernel=kernel,
        )
        return out, self._with_pool(pool)

    def _with_pool(self, pool: paged.Pool) -> "PagedKVCache":
        return dataclasses.replace(
            self,
            k_pages=pool.keys,
            v_pages=pool.values,
            k_scales=pool.key_scales,
            v_scales=pool.value_scales,
        )

    def positions(
        self, rows: int, row_offsets: Int[Array, " offsets"]
    ) -> Int[Array, " {rows}"]:
        """The absolute position of each new row."""
        return paged.places(rows, self.lengths, row_offsets)[1]

    def advance(self, row_offsets: Int[Array, " offsets"]) -> "PagedKVCache":
        """Counts the rows that all layers have written.

        Raises:
            ValueError: A row had no page. Where numbers are traced, `overflowed` says so.
        """
        new = row_offsets[1:] - row_offsets[:-1]
        after = dataclasses.replace(self, lengths=self.lengths + new)
        if (over := _known(after.overflowed)) is not None and over.any():
            b = int(np.flatnonzero(over)[0])
            raise ValueError(
                f"sequence {b} has {after.lengths[b]} tokens now, more than its pages "
                "hold; give it pages by `with_tables` before they are written."
            )
        return after

    @property
    def overflowed(self) -> Bool[Array, " B"]:
        """Whether the page of a sequence's last token is missing."""
        (N, P), M = self._pages, self.table.shape[1]
        if not M:
            return self.lengths > 0
        m = jnp.clip((self.lengths - 1) // P, 0, M - 1)
        page = jnp.take_along_axis(self.table, m[:, None], axis=1)[:, 0]
        missing = (page < 0) | (page >= N) | (self.lengths > M * P)
        return (self.lengths > 0) & missing

    @property
    def _pages(self) -> tuple[int, int]:
        """Pages in the pool, and tokens in a page."""
        return self.k_pages.shape[1], self.page_size

    def with_tables(
        self, tables: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> "PagedKVCache":
        """Says which pages each sequence holds and how many tokens lie in them.

        -1 stands for a page that was given away, as behind a sliding window; that of the
        last token cannot be. Sequences may share pages that are full in each of them.

        Raises:
            ValueError: A page id outside the pool, a page held twice by a sequence, or
                by two that may write to it, or lengths that need other pages than are
                held.
        """
        sequences, max_pages = self.table.shape
        if not len(tables) == len(lengths) == sequences:
            raise ValueError(
                f"the cache holds {sequences} sequences; got {len(tables)} tables and "
                f"{len(lengths)} lengths."
            )
        table = np.full((sequences, max_pages), NO_PAGE, np.int32)
        for row, pages, length in zip(table, tables, lengths, strict=True):
            self._check_pages(pages, length)
            row[: len(pages)] = pages
        _check_shared(table, np.asarray(lengths), self.page_size)
        return dataclasses.replace(
            self, table=jnp.asarray(table), lengths=jnp.asarray(lengths, jnp.int32)
        )

    def _check_pages(self, pages: Sequence[int], length: int) -> None:
        """Raises ValueError for pages that one sequence cannot hold."""
        (N, P), max_pages = self._pages, self.table.shape[1]
        held = [page for page in pages if page != NO_PAGE]
        if any(not 0 <= page < N for page in held):
            raise ValueError(
                f"page ids must lie in [0, {N}), or be -1 where there is no page; got "
                f"{sorted(held)}."
            )
        if len(pages) > max_pages:
            raise ValueError(
                f"{len(pages)} pages exceed max_pages={max_pages} per sequence."
            )
        if len(set(held)) < len(held):
            raise ValueError(f"a sequence holds a page twice: {list(pages)}.")
        if not 0 <= length <= len(pages) * P:
            raise ValueError(f"{length} tokens do not fit {len(pages)} pages of {P}.")
        if length and pages[(length - 1) // P] == NO_PAGE:
            raise ValueError(
                f"page ids must lie in [0, {N}), and -1 may only stand for a page before "
                f"that of the last token; got {list(pages)} for {length} tokens."
            )

    # ------------------------------------------------------- beams, drafts and windows

    def copy_pages(
        self, source: Int[Array, " n"], target: Int[Array, " n"]
    ) -> "PagedKVCache":
        """Copies pages of all layers, in place if the cache is donated.

        A pair with a negative number is skipped. No page may be a target twice, or be
        source and target.
        """
        N = self.k_pages.shape[1]
        target = jnp.where(
            (source < 0) | (target < 0), N, target
        )  # mode="drop" skips N
        source = jnp.clip(source, 0, N - 1)

        def copy(x: Any) -> Any:
            return None if x is None else x.at[:, target].set(x[:, source], mode="drop")

        return self._with_pool(paged.Pool(*map(copy, self.pool)))

    def fork(
        self,
        parent: int | Int[Array, ""],
        child: int | Int[Array, ""],
        page: int | Int[Array, ""] = NO_PAGE,
    ) -> "PagedKVCache":
        """Sequence ``child`` becomes a copy of ``parent``, for beams and shared prompts.

        They share the pages that are full. The half-full one is copied into ``page``, so
        that each writes to its own; where the last one is full, ``page`` is the child's
        next, if any. `PageAllocator.fork` hands it out. In place under donation.

        Raises:
            ValueError: There is no such sequence, or ``page`` is needed and missing, or
                held already; where these numbers are traced, a child without its page
                cannot be attended to.
        """
        P, M = self.page_size, self.table.shape[1]
        self._check_fork(parent, child, page)
        row, length = self.table[parent], self.lengths[parent]
        full = length // P
        half = jnp.where(length % P > 0, row[jnp.minimum(full, M - 1)], NO_PAGE)
        entry = jnp.arange(M, dtype=jnp.int32)
        page = jnp.asarray(page, jnp.int32)
        row = jnp.where(entry < full, row, jnp.where(entry == full, page, NO_PAGE))
        after = self.copy_pages(half[None], page[None])
        return dataclasses.replace(
            after,
            table=self.table.at[child].set(row),
            lengths=self.lengths.at[child].set(length),
        )

    def _check_fork(self, parent: Any, child: Any, page: Any) -> None:
        known = [_known(x) for x in (parent, child, page, self.table, self.lengths)]
        if any(x is None for x in known):
            return
        parent, child, page, table, lengths = known
        B, N = table.shape[0], self.k_pages.shape[1]
        if not (0 <= parent < B and 0 <= child < B and parent != child):
            raise ValueError(
                f"parent={parent} and child={child} must be two of {B} sequences."
            )
        others = np.delete(table, child, axis=0)
        if page != NO_PAGE and (not 0 <= page < N or (others == page).any()):
            raise ValueError(f"page={page} must be one of {N} that no sequence holds.")
        full, half = divmod(int(lengths[parent]), self.page_size)
        if page != NO_PAGE and full == table.shape[1]:
            raise ValueError(
                f"page={page} has no place: sequence {parent} fills all {full} pages."
            )
        if half and page == NO_PAGE:
            raise ValueError(
                f"the last page of sequence {parent} is half full and has to be copied: "
                "fork(..., page=) must name a free one."
            )

    def truncate(self, lengths: Sequence[int] | Int[Array, " B"]) -> "PagedKVCache":
        """Forgets the tokens from ``lengths[b]`` on, such as rejected drafts.

        Pages stay where they are, to be written again; `PageAllocator.truncate` takes
        back those that are empty.

        Raises:
            ValueError: A sequence has fewer tokens, or the page of its last one was given
                away, or would be half full and is shared with another sequence. Where
                numbers are traced, a sequence with fewer tokens keeps these.
        """
        new = jnp.asarray(lengths, jnp.int32)
        check_shorter(new, self.lengths)
        known = [_known(x) for x in (new, self.lengths, self.table)]
        if all(x is not None for x in known):
            wanted, _, table = known
            for row, length in zip(table.tolist(), wanted.tolist(), strict=True):
                self._check_pages(row, length)
            _check_shared(table, wanted, self.page_size)
        return dataclasses.replace(self, lengths=jnp.minimum(new, self.lengths))

    def evict_before(
        self, position: int | Int[Array, ""] | Int[Array, " B"]
    ) -> "PagedKVCache":
        """Gives back the pages whose tokens all stand before ``position``.

        The mask must let no row see them any more: with ``SlidingWindow(w)`` the next
        row sees the tokens from ``lengths - w + 1`` on. The page of the last token stays.
        `PageAllocator.evict_before` takes the pages back.
        """
        P, M = self.page_size, self.table.shape[1]
        ends = jnp.arange(1, M + 1, dtype=jnp.int32)[None] * P
        at = jnp.asarray(position, jnp.int32).reshape(-1, 1)
        gone = (ends <= at) & (ends < self.lengths[:, None])
        return dataclasses.replace(self, table=jnp.where(gone, NO_PAGE, self.table))


def _known(x: Any) -> Any:
    """``x`` in numbers, or None where it is traced."""
    return None if isinstance(x, jax.core.Tracer) else np.asarray(x)


def _check_shared(table: Any, lengths: Any, page_size: int) -> None:
    """Raises ValueError if two sequences hold a page that one of them may write to."""
    pages, owners = np.unique(table[table != NO_PAGE], return_counts=True)
    ends = np.arange(1, table.shape[1] + 1) * page_size
    written = (ends > lengths[:, None]) & np.isin(table, pages[owners > 1])
    for b, m in np.argwhere(written)[:1]:
        others = np.flatnonzero((table == table[b, m]).any(1))
        raise ValueError(
            f"page {table[b, m]} is held by sequences {others.tolist()}, and {b} would "
            "write to it; give that one a copy of its own (`fork`)."
        )
