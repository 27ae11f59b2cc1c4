"""Who may write to a page and who reads it: no page, shared pages, drafts, windows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raptax import (
    Causal,
    Documents,
    KVCacheParams,
    PageAllocator,
    PagedKVCache,
    SinkWindow,
    SlidingWindow,
    SlotKVCache,
    TensorKVCache,
    paged_attention,
)
from raptax._core.types import position_indices
from raptax.compat.maxtext import ragged_paged_attention
from raptax.kernels.cpu import library as native
from tests.instruction_sets import REFUSED

H, K, D, P = 4, 2, 8, 4
BUILT = pytest.mark.skipif(not native.available(), reason="native was not built")
KERNELS = pytest.mark.parametrize(
    "kernel", [pytest.param("native", marks=BUILT), "jax"]
)


def numbers(*shape: int, seed: int = 0) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x.astype(np.float32))


def tokens(length: int, seed: int = 0) -> list[jax.Array]:
    sizes = (H, D), (K, D), (K, D)
    return [numbers(length, *s, seed=3 * seed + n) for n, s in enumerate(sizes)]


def empty(pages=12, sequences=2, max_pages=4, dtype=jnp.float32) -> PagedKVCache:
    params = KVCacheParams(dtype=dtype, n_kv_heads=K, head_dim=D, page_size=P)
    return PagedKVCache.create(
        params, pages=pages, sequences=sequences, max_pages=max_pages
    )


def call(cache, parts, **options):
    """Appends the rows of each sequence, and counts them."""
    rows = [jnp.concatenate(x) for x in zip(*parts, strict=True)]
    counts = [len(part[0]) for part in parts]
    offsets = jnp.asarray(np.cumsum([0, *counts]), jnp.int32)
    out, cache = cache.append_and_attend(*rows, row_offsets=offsets, **options)
    ends = np.cumsum(counts)[:-1]
    return [out[a] for a in np.split(np.arange(sum(counts)), ends)], cache.advance(
        offsets
    )


jitted = functools.partial(jax.jit, static_argnames=("kernel", "mask_mod"))(call)


def dense(rows, mask_mod=Causal()):
    """One pass over a whole sequence, the first of its batch, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in rows)
    k, v = (np.repeat(x, H // K, axis=1) for x in (k, v))
    index = jnp.arange(len(q), dtype=jnp.int32)
    at = position_indices(1, H, index[None], index)
    scores = np.einsum("thd,shd->hts", q, k) * D**-0.5
    scores = np.where(np.asarray(mask_mod(*at))[0], scores, -np.inf)
    high = np.maximum(scores.max(-1, keepdims=True), -1e300)  # of an empty row
    weights = np.exp(scores - high)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("hts,shd->thd", weights, v)


def cut(rows, start, stop):
    return [x[start:stop] for x in rows]


def close(actual, expected, atol=3e-6):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


# ----------------------------------------------------------------------------- no page


def test_entries_without_a_page_are_minus_one():
    cache = empty()
    np.testing.assert_array_equal(cache.table, np.full((2, 4), -1))
    cache = cache.with_tables([[3], []], [2, 0])
    np.testing.assert_array_equal(cache.table, [[3, -1, -1, -1], [-1] * 4])


OUTGROWN = {
    "before with_tables": lambda: empty(),
    "idle": lambda: empty().with_tables([[0, 1, 2, 3], []], [8, 0]),
    "outgrown": lambda: empty().with_tables([[0, 1, 2, 3], [4]], [8, 4]),
    "a full table": lambda: empty().with_tables([[0, 1], [4, 5, 6, 7]], [5, 16]),
}


@KERNELS
@pytest.mark.parametrize("name", OUTGROWN)
def test_a_row_without_a_page_is_refused(name, kernel):
    """Both kernels refuse it, with one sentence, where the table is known."""
    cache = OUTGROWN[name]()
    nothing = cut(tokens(4), 0, 0)
    with pytest.raises(REFUSED, match=r"is needed for tokens|does not fit"):
        jax.block_until_ready(call(cache, [nothing, tokens(1)], kernel=kernel))


@BUILT
@pytest.mark.parametrize("name", OUTGROWN)
def test_native_refuses_a_row_without_a_page_inside_jit(name):
    nothing = cut(tokens(4), 0, 0)
    with pytest.raises(REFUSED, match=r"is needed for tokens|does not fit"):
        jax.block_until_ready(
            jitted(OUTGROWN[name](), [nothing, tokens(1)], kernel="native")
        )


@pytest.mark.parametrize("name", OUTGROWN)
def test_plain_jax_drops_a_row_without_a_page_inside_jit(name):
    """It touches no page, is zero as padding is, and the cache says so."""
    cache = OUTGROWN[name]()
    full = jnp.full_like(cache.k_pages, 0.5)
    cache = dataclasses.replace(cache, k_pages=full, v_pages=full)
    mine = tokens(1) if name == "a full table" else cut(tokens(1), 0, 0)
    (first, second), after = jitted(cache, [mine, tokens(1, seed=1)], kernel="jax")
    assert (second == 0).all()
    assert after.overflowed.tolist() == [False, True]
    touched = np.asarray(after.k_pages != full).any((0, 2, 3, 4))
    assert touched.sum() == len(mine[0])
    assert np.abs(np.asarray(first)).sum() > 0 or not len(mine[0])
    with pytest.raises(ValueError, match=r"sequence 1 has .* more than its pages hold"):
        after.advance(jnp.asarray([0, 0, 0], jnp.int32))


@pytest.mark.parametrize("make", ["slots", "tensors"])
def test_caches_without_a_table_refuse_what_does_not_fit(make):
    common = dict(dtype=jnp.float32, n_kv_heads=K, head_dim=D, page_size=P)
    if make == "slots":
        params = KVCacheParams(**common, cache_strategy="continuous")
        cache = SlotKVCache.create(params, slots=2, sequences=2, max_length=8)
        cache = cache.with_slots([1, 0], [8, 3])
    else:
        params = KVCacheParams(**common, cache_strategy="naive")
        cache = TensorKVCache.create(params, sequences=2, max_length=8)
        cache = cache.with_lengths([8, 3])
    with pytest.raises(REFUSED, match="does not fit"):
        jax.block_until_ready(call(cache, [tokens(1), tokens(1)], kernel="jax"))
    (out, _), after = jitted(cache, [tokens(1), tokens(1)], kernel="jax")
    assert (out == 0).all()
    assert after.overflowed.tolist() == [True, False]
    np.testing.assert_array_equal(cache.truncate([5, 3]).lengths, [5, 3])
    with pytest.raises(ValueError, match="must lie between 0 and those"):
        cache.truncate([5, 4])


def test_a_layer_that_does_not_exist_is_neither_written_nor_read():
    cache = empty().with_tables([[0, 1], [2]], [0, 0])
    parts = [tokens(2), tokens(2)]
    for layer in (-1, 1):
        with pytest.raises(ValueError, match=f"layer={layer}"):
            call(cache, parts, kernel="jax", layer=layer)
        (out, _), after = jitted(cache, parts, kernel="jax", layer=jnp.int32(layer))
        assert (out == 0).all()
        assert (after.k_pages == 0).all()


@pytest.mark.parametrize("offsets", [[0, 3, 2], [1, 2, 4], [0, 2, 5]])
def test_offsets_that_cannot_be(offsets):
    cache = empty().with_tables([[0, 1], [2]], [0, 0])
    with pytest.raises(ValueError, match="must begin with 0, must not fall"):
        cache.append_and_attend(
            *tokens(4), row_offsets=jnp.asarray(offsets, jnp.int32), kernel="jax"
        )


# ----------------------------------------------------------------- pages given away


def documents() -> Documents:
    return Documents(jnp.asarray([[0] * 9 + [1] * 7, [2] * 16]))


GIVEN_AWAY = {  # a mask that leaves pages unread, and which of the first sequence's
    "window": (SlidingWindow(4), [0, 1]),
    "sinks and window": (SinkWindow(2, 4), [1]),
    "a function": (lambda b, h, q, k: (k <= q) & (k >= 8), [0, 1]),
    "documents": (documents() & Causal(), [0, 1]),
}


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        *(pytest.param(name, "native", marks=BUILT) for name in GIVEN_AWAY),
        ("sinks and window", "jax"),
        pytest.param("window", "jax", marks=pytest.mark.slow),
        pytest.param("a function", "jax", marks=pytest.mark.slow),
        pytest.param("documents", "jax", marks=pytest.mark.slow),
    ],
)
def test_pages_that_the_mask_leaves_unread_may_be_missing(name, kernel):
    mask_mod, gone = GIVEN_AWAY[name]
    rows, other = tokens(14), tokens(6, seed=1)
    cache = empty(8).with_tables([[0, 1, 2, 3], [4, 5]], [0, 0])
    parts = [cut(rows, 0, 13), cut(other, 0, 5)]
    _, cache = call(cache, parts, mask_mod=mask_mod, kernel=kernel)
    last = [cut(rows, 13, 14), cut(other, 5, 6)]
    good, _ = call(cache, last, mask_mod=mask_mod, kernel=kernel)
    close(good[0], dense(rows, mask_mod)[13:])
    held = [[-1 if m in gone else m for m in range(4)], [4, 5]]
    cache = cache.with_tables(held, [13, 5])
    step = jax.jit(functools.partial(call, mask_mod=mask_mod, kernel=kernel))
    for run in (functools.partial(call, mask_mod=mask_mod, kernel=kernel), step):
        out, _ = run(cache, last)
        for a, b in zip(out, good, strict=True):
            np.testing.assert_array_equal(a, b)


@KERNELS
@pytest.mark.parametrize("name", GIVEN_AWAY)
def test_a_page_that_the_mask_reads_is_refused(name, kernel):
    mask_mod, _ = GIVEN_AWAY[name]
    cache = empty(8).with_tables([[0, 1, -1, 3], [4, 5]], [13, 5])
    with pytest.raises(
        REFUSED, match=r"table\[0, 2\]=-1 is needed for tokens 8 and on"
    ):
        jax.block_until_ready(
            call(cache, [tokens(1), tokens(1)], mask_mod=mask_mod, kernel=kernel)
        )


def test_evicting_gives_back_what_a_window_has_left_behind():
    window, rows = 6, tokens(16)
    allocator, held = PageAllocator(3, P), []  # 12 slots for 16 tokens
    cache, outs = empty(3, sequences=1), []
    for start in range(16):
        allocator.evict_before(held, max(0, start - window + 1)) if held else None
        allocator.grow(held, start + 1)
        cache = cache.with_tables([held], [start])
        out, cache = call(
            cache, [cut(rows, start, start + 1)], mask_mod=SlidingWindow(window)
        )
        np.testing.assert_array_equal(
            cache.evict_before(max(0, start - window + 1)).table, cache.table
        )
        outs += out
    close(jnp.concatenate(outs), dense(rows, SlidingWindow(window)))
    assert held[:2] == [-1, -1]
    assert allocator.free == 1
    allocator.release(held)
    assert (held, allocator.free) == ([], 3)


@pytest.mark.parametrize("traced", [False, True])
def test_the_page_of_the_last_token_stays(traced):
    cache = empty().with_tables([[0, 1, 2], [3]], [8, 3])
    evict = jax.jit(PagedKVCache.evict_before) if traced else PagedKVCache.evict_before
    np.testing.assert_array_equal(
        evict(cache, 12).table[:, :3], [[-1, 1, 2], [3, -1, -1]]
    )
    at = jnp.asarray([4, 0], jnp.int32)
    np.testing.assert_array_equal(evict(cache, at).table[:, :2], [[-1, 1], [3, -1]])


# -------------------------------------------------------------------- shared pages


def test_two_writers_of_one_page_are_refused():
    with pytest.raises(ValueError, match=r"page 1 is held by sequences \[0, 1\]"):
        empty().with_tables([[0, 1], [0, 1]], [6, 6])
    empty().with_tables([[0, 1, 2], [0, 1, 3]], [8, 8])  # full pages may be shared
    with pytest.raises(ValueError, match=r"page 1 .* and 1 would write to it"):
        empty().with_tables([[0, 1, 2], [0, 1]], [8, 7])


@pytest.mark.parametrize(
    ("length", "dtype", "kernel"),
    [
        pytest.param(4, jnp.float32, "native", marks=BUILT),
        pytest.param(6, jnp.float32, "native", marks=BUILT),
        pytest.param(6, jnp.int8, "native", marks=BUILT),
        (6, jnp.float32, "jax"),
        pytest.param(6, jnp.int8, "jax", marks=pytest.mark.slow),
    ],
)
def test_beams_write_to_pages_of_their_own(length, dtype, kernel):
    prompt, ends = tokens(length), [tokens(5, seed=1), tokens(5, seed=2)]
    allocator, parent = PageAllocator(12, P), []
    allocator.grow(parent, length)
    cache = empty(dtype=dtype).with_tables([parent, []], [0, 0])
    _, cache = call(cache, [prompt, cut(prompt, 0, 0)], kernel=kernel)
    child, copies = allocator.fork(parent, length)
    assert [allocator.owners(page) for page in child[: length // P]] == [2] * (
        length // P
    )
    assert bool(copies) == bool(length % P)
    fork = jax.jit(PagedKVCache.fork, donate_argnums=0)
    before = [x.unsafe_buffer_pointer() for x in cache.pool if x is not None]
    cache = fork(cache, 0, 1, copies[0][1] if copies else -1)
    assert before == [x.unsafe_buffer_pointer() for x in cache.pool if x is not None]
    for pages in (parent, child):
        allocator.grow(pages, length + 5)
    again = cache.with_tables([parent, child], [length, length])
    np.testing.assert_array_equal(
        again.table[:, : len(copies)], cache.table[:, : len(copies)]
    )
    outs, _ = call(again, ends, kernel=kernel)
    for out, end in zip(outs, ends, strict=True):
        rows = [jnp.concatenate(x) for x in zip(prompt, end, strict=True)]
        close(out, dense(rows)[length:], 3e-6 if dtype == jnp.float32 else 0.05)


def test_forks_that_cannot_be():
    cache = empty(sequences=3).with_tables([[0, 1], [2], []], [6, 1, 0])
    for arguments, named in (
        ((0, 2), "half full and has to be copied"),
        ((0, 0, 5), "must be two of 3 sequences"),
        ((0, 3, 5), "must be two of 3 sequences"),
        ((0, 2, 1), "page=1 must be one of 12 that no sequence holds"),
        ((0, 2, 12), "page=12 must be one of 12"),
    ):
        with pytest.raises(ValueError, match=named):
            cache.fork(*arguments)
    np.testing.assert_array_equal(cache.fork(0, 2, 5).table[2], [0, 5, -1, -1])
    full = cache.with_tables([[0, 1, 2, 3], [4], []], [16, 1, 0])
    with pytest.raises(ValueError, match="sequence 0 fills all 4 pages"):
        full.fork(0, 2, 5)
    np.testing.assert_array_equal(full.fork(0, 2).table[2], [0, 1, 2, 3])


@KERNELS
def test_rejected_drafts_are_forgotten(kernel):
    rows, drafts = tokens(11), tokens(5, seed=7)
    allocator, held = PageAllocator(4, P), []
    allocator.grow(held, 12)
    cache = empty(4, sequences=1).with_tables([held], [0])
    _, cache = call(cache, [cut(rows, 0, 7)], kernel=kernel)
    out, cache = call(cache, [cut(drafts, 0, 5)], kernel=kernel)
    back = jax.jit(PagedKVCache.truncate)(cache, jnp.asarray([7], jnp.int32))
    np.testing.assert_array_equal(back.lengths, cache.truncate([7]).lengths)
    assert allocator.truncate(held, 7) == []
    assert (len(held), allocator.free) == (2, 2)
    allocator.grow(held, 11)
    out, _ = call(back.with_tables([held], [7]), [cut(rows, 7, 11)], kernel=kernel)
    close(out[0], dense(rows)[7:])
    with pytest.raises(ValueError, match="must lie between 0 and those"):
        back.truncate([8])


def test_truncating_into_a_shared_page_copies_it():
    rows = tokens(10)
    allocator, parent = PageAllocator(6, P), []
    allocator.grow(parent, 8)
    cache = empty(6).with_tables([parent, []], [0, 0])
    _, cache = call(cache, [cut(rows, 0, 8), cut(rows, 0, 0)])
    child, copies = allocator.fork(parent, 8)
    assert copies == []
    cache = cache.with_tables([parent, child], [8, 8])
    with pytest.raises(ValueError, match="is held by sequences"):
        cache.truncate([8, 6])
    copies = allocator.truncate(child, 6)
    assert copies == [(parent[1], child[1])]
    assert allocator.owners(parent[1]) == allocator.owners(child[1]) == 1
    source, target = (jnp.asarray(x, jnp.int32) for x in zip(*copies, strict=True))
    allocator.grow(parent, 10)
    cache = cache.copy_pages(source, target).with_tables([parent, child], [8, 6])
    other = tokens(2, seed=9)
    outs, _ = call(cache, [cut(rows, 8, 10), other])
    close(outs[0], dense(rows)[8:])
    changed = [jnp.concatenate([x[:6], y]) for x, y in zip(rows, other, strict=True)]
    close(outs[1], dense(changed)[6:])


def test_the_allocator_counts_owners():
    allocator, held = PageAllocator(3, P), []
    allocator.grow(held, 8)
    child, copies = allocator.fork(held, 7)
    assert (copies, allocator.free) == ([(held[1], child[1])], 0)
    with pytest.raises(MemoryError, match="none is free"):
        allocator.fork(held, 7)
    with pytest.raises(ValueError, match="9 tokens must lie within the 8 of 2 pages"):
        allocator.fork(held, 9)
    assert [allocator.owners(page) for page in held] == [2, 1]
    shared, _ = allocator.fork(held, 4)
    with pytest.raises(MemoryError, match="would be half full and is shared"):
        allocator.truncate(shared, 3)
    allocator.release(shared)
    allocator.release(held)
    assert allocator.free == 1  # the child holds two
    assert allocator.truncate(child, 0) == []
    assert (child, allocator.free) == ([], 3)


def test_evicting_further_than_there_are_tokens():
    allocator, held = PageAllocator(3, P), []
    allocator.grow(held, 8)
    with pytest.raises(ValueError, match="9 tokens must lie within"):
        allocator.evict_before(held, 8)
    allocator.evict_before(held, 7)
    assert held[0] == -1
    with pytest.raises(ValueError, match=r"-1 may only stand for a page before"):
        empty().with_tables([held, []], [3, 0])


def test_pages_shared_by_two_are_read_by_paged_attention():
    rows = tokens(8)
    cache = empty().with_tables([[0, 1], []], [0, 0])
    _, cache = call(cache, [rows, cut(rows, 0, 0)])
    out = paged_attention(
        jnp.concatenate([rows[0][-1:]] * 2),
        cache.k_pages[0],
        cache.v_pages[0],
        table=jnp.asarray([[0, 1], [0, 1]], jnp.int32),
        lengths=jnp.asarray([8, 8], jnp.int32),
        row_offsets=jnp.arange(3, dtype=jnp.int32),
    )
    close(out, jnp.concatenate([dense(rows)[-1:]] * 2))


@BUILT
@pytest.mark.parametrize("page", [-1, 3])
def test_interleaved_pages_are_not_clamped_to_another(page):
    """A page that is needed and missing was read as page 0, or the last one."""
    pages = numbers(3, P, 2 * K, D)
    where = dict(
        kv_lens=jnp.asarray([7], jnp.int32),
        cu_q_lens=jnp.asarray([0, 1], jnp.int32),
        num_seqs=jnp.asarray([1], jnp.int32),
    )
    run = lambda first, **options: ragged_paged_attention(
        numbers(1, H, D),
        pages,
        page_indices=jnp.asarray([[first, 1]], jnp.int32),
        **where,
        **options,
    )
    with pytest.raises(REFUSED, match=r"table\[0, 0\]=-1 is needed"):
        jax.block_until_ready(run(page))
    np.testing.assert_array_equal(run(page, sliding_window=3), run(2, sliding_window=3))
