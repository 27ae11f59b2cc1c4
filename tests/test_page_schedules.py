"""Any schedule of a paged cache equals attention without pages, sequence by sequence.

Sequences grow, fork, are cut short, give pages away and stand idle; pages change places;
the pool runs out. What each row sees is compared with float64.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raptax import KVCacheParams, PageAllocator, PagedKVCache, SlidingWindow
from raptax.kernels.cpu import library as native
from raptax.quant.rows import dequantize, quantize
from tests.instruction_sets import REFUSED

B, H, K, D, P = 3, 4, 2, 8, 4
PAGES, MAX_PAGES, WINDOW, MOST = 10, 4, 3, 3  # MOST rows of a sequence in a step
BUILT = pytest.mark.skipif(not native.available(), reason="native was not built")
MASK = SlidingWindow(WINDOW)

sequence = st.integers(0, B - 1)
number = st.integers(0, 1000)
append = st.tuples(st.just("append"), st.tuples(*[st.integers(0, MOST)] * B), number)
steps = st.one_of(
    append,
    append,
    st.tuples(st.just("fork"), sequence, sequence),
    st.tuples(st.just("truncate"), sequence, number),
    st.tuples(st.just("evict"), sequence, number),
    st.tuples(st.just("reorder"), st.just(0), number),
    st.tuples(st.just("overflow"), sequence, number),
)


@functools.partial(jax.jit, static_argnames="kernel", donate_argnums=0)
def attend(cache, rows, offsets, kernel):
    out, cache = cache.append_and_attend(
        *rows, row_offsets=offsets, mask_mod=MASK, kernel=kernel
    )
    return out, cache.advance(offsets)


def vectors(token: int, dtype) -> list[np.ndarray]:
    """Query, key and value of a token, as numbers that the pages hold exactly."""
    rng = np.random.default_rng(token)
    rows = [rng.normal(size=(heads, D)).astype(np.float32) for heads in (H, K, K)]
    return [rows[0], *(stored(x, dtype) for x in rows[1:])]


def stored(x: np.ndarray, dtype) -> np.ndarray:
    if dtype == jnp.float32:
        return x
    return np.asarray(dequantize(*quantize(jnp.asarray(x), dtype)))


class Model:
    """The cache, its pages on the host, and the tokens that sequences should hold."""

    def __init__(self, kernel: str, dtype):
        params = KVCacheParams(dtype=dtype, n_kv_heads=K, head_dim=D, page_size=P)
        self.kernel, self.dtype = kernel, dtype
        self.cache = PagedKVCache.create(
            params, pages=PAGES, sequences=B, max_pages=MAX_PAGES
        )
        self.allocator = PageAllocator(PAGES, P)
        self.held: list[list[int]] = [[] for _ in range(B)]
        self.tokens: list[list[int]] = [[] for _ in range(B)]

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self.tokens]

    def place(self) -> None:
        self.cache = self.cache.with_tables(self.held, self.lengths)

    def append(self, counts, seed: int) -> None:
        counts = [
            n if self.fits(b, len(self.tokens[b]) + n) else 0
            for b, n in enumerate(counts)
        ]
        self.place()
        new = [
            [1000 * seed + 10 * b + i for i in range(n)] for b, n in enumerate(counts)
        ]
        offsets = np.cumsum([0, *counts]).astype(np.int32)
        rows = self.rows([token for tokens in new for token in tokens])
        out, self.cache = attend(self.cache, rows, jnp.asarray(offsets), self.kernel)
        assert (out[offsets[-1] :] == 0).all()
        for b, tokens in enumerate(new):
            self.tokens[b] += tokens
            for i, _ in enumerate(tokens):
                position = len(self.tokens[b]) - len(tokens) + i
                np.testing.assert_allclose(
                    out[offsets[b] + i], self.expected(b, position), rtol=0, atol=5e-6
                )

    def fits(self, b: int, tokens: int) -> bool:
        """Gives sequence ``b`` its pages, unless table or pool have too few."""
        if tokens > MAX_PAGES * P:
            return False
        before = list(self.held[b])
        try:
            self.allocator.grow(self.held[b], tokens)
        except MemoryError:
            assert self.held[b] == before
            return False
        return True

    def rows(self, tokens: list[int]) -> list[jax.Array]:
        """Rows of a fixed number; the rest are NaN."""
        shapes = (H, D), (K, D), (K, D)
        rows = [np.full((B * MOST, *shape), np.nan, np.float32) for shape in shapes]
        for i, token in enumerate(tokens):
            for row, x in zip(rows, vectors(token, self.dtype), strict=True):
                row[i] = x
        return [jnp.asarray(x) for x in rows]

    def expected(self, b: int, position: int) -> np.ndarray:
        seen = self.tokens[b][max(0, position - WINDOW + 1) : position + 1]
        _, k, v = (
            np.stack(x).astype(np.float64)
            for x in zip(*(vectors(t, self.dtype) for t in seen), strict=True)
        )
        q = vectors(self.tokens[b][position], self.dtype)[0].astype(np.float64)
        k, v = (np.repeat(x, H // K, axis=1) for x in (k, v))
        scores = np.einsum("hd,shd->hs", q, k) * D**-0.5
        weights = np.exp(scores - scores.max(1, keepdims=True))
        return np.einsum("hs,shd->hd", weights / weights.sum(1, keepdims=True), v)

    def fork(self, parent: int, child: int) -> None:
        if parent == child:
            return
        self.allocator.release(self.held[child])
        self.tokens[child] = []
        self.place()
        length = len(self.tokens[parent])
        try:
            self.held[child], copies = self.allocator.fork(self.held[parent], length)
        except MemoryError:
            return
        self.tokens[child] = list(self.tokens[parent])
        self.cache = self.cache.fork(parent, child, *(new for _, new in copies))
        self.same_tables()

    def truncate(self, b: int, where: int) -> None:
        """To a length from which the window reaches no page that was given away."""
        gone = self.held[b].count(-1) * P
        least = gone + WINDOW - 1 if gone else 0
        if least > len(self.tokens[b]):
            return
        length = least + where % (len(self.tokens[b]) - least + 1)
        try:
            copies = self.allocator.truncate(self.held[b], length)
        except MemoryError:
            return
        del self.tokens[b][length:]
        if copies:
            source, target = (
                jnp.asarray(x, jnp.int32) for x in zip(*copies, strict=True)
            )
            self.cache = self.cache.copy_pages(source, target)
        else:
            self.cache = self.cache.truncate(self.lengths)
        self.place()

    def evict(self, b: int, _: int) -> None:
        position = len(self.tokens[b]) - WINDOW + 1
        if position < 0:
            return
        before = self.cache.lengths
        self.allocator.evict_before(self.held[b], position)
        at = np.where(np.arange(B) == b, position, 0).astype(np.int32)
        self.cache = self.cache.evict_before(jnp.asarray(at))
        np.testing.assert_array_equal(self.cache.lengths, before)
        self.same_tables()

    def same_tables(self) -> None:
        placed = self.cache.with_tables(self.held, self.lengths)
        np.testing.assert_array_equal(self.cache.table, placed.table)
        np.testing.assert_array_equal(self.cache.lengths, placed.lengths)

    def reorder(self, _: int, seed: int) -> None:
        """Sequences stay as they are; the pages below them change places."""
        order = np.random.default_rng(seed).permutation(PAGES)
        back = np.argsort(order)
        pool = [
            None if x is None else x[:, jnp.asarray(order)] for x in self.cache.pool
        ]
        names = "k_pages", "v_pages", "k_scales", "v_scales"
        moved = dict(zip(names, pool, strict=True))
        self.cache = dataclasses.replace(self.cache, **moved)
        rename = lambda pages: [-1 if p < 0 else int(back[p]) for p in pages]
        self.held = [rename(pages) for pages in self.held]
        self.allocator._free = rename(self.allocator._free)
        self.allocator._owners = {
            int(back[page]): count for page, count in self.allocator._owners.items()
        }
        self.place()

    def overflow(self, b: int, _: int) -> None:
        """A token for which there is no page is refused, and changes nothing."""
        length = len(self.held[b]) * P
        if not length or length > len(self.tokens[b]) + MOST:
            return
        count = length + 1 - len(self.tokens[b])
        offsets = np.where(np.arange(B + 1) > b, count, 0).astype(np.int32)
        rows = [
            jnp.zeros((MOST + 1, *x), jnp.float32) for x in ((H, D), (K, D), (K, D))
        ]
        before = jax.tree.map(np.array, self.cache)
        with pytest.raises(REFUSED, match=r"is needed for tokens|does not fit"):
            jax.block_until_ready(
                self.cache.append_and_attend(
                    *rows,
                    row_offsets=jnp.asarray(offsets),
                    mask_mod=MASK,
                    kernel=self.kernel,
                )
            )
        jax.tree.map(np.testing.assert_array_equal, self.cache, before)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8], ids=["float32", "int8"])
@pytest.mark.parametrize("kernel", [pytest.param("native", marks=BUILT), "jax"])
def test_any_schedule_equals_attention_without_pages(kernel, dtype):
    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(st.lists(steps, min_size=4, max_size=14))
    def run(schedule):
        model = Model(kernel, dtype)
        for seed in range(2):
            model.append((MOST,) * B, seed)
        for name, *arguments in schedule:
            getattr(model, name)(*arguments)
        model.append((1,) * B, 3)
        for pages in model.held:
            model.allocator.release(pages)
        assert model.allocator.free == PAGES

    run()
