"""Pages: ragged batches equal one pass, and a page belongs to its owner alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raptax import (
    ALiBi,
    Causal,
    KVCacheParams,
    PageAllocator,
    PagedKVCache,
    SlidingWindow,
    SoftCap,
    alibi_slopes,
    attention,
    paged_attention,
)

H, K, D, E, P, L = 6, 2, 16, 8, 8, 2
LENGTHS = (37, 5, 64)
PARAMS = KVCacheParams(
    dtype=jnp.float32,
    n_kv_heads=K,
    head_dim=D,
    value_head_dim=E,
    num_layers=L,
    page_size=P,
)
MODS = {
    "causal": dict(mask_mod=Causal()),
    "window": dict(mask_mod=SlidingWindow(7)),
    "soft cap": dict(mask_mod=Causal(), score_mod=SoftCap(2.0)),
    "alibi": dict(mask_mod=Causal(), score_mod=ALiBi(alibi_slopes(H))),
    "scale": dict(mask_mod=Causal(), scale=0.1),
    "array scale": dict(mask_mod=Causal(), scale=jnp.float32(0.1)),
}
SPLITS = {  # new rows of each sequence in each step
    "one pass": [LENGTHS],
    "chunks": [(10, 2, 30), (10, 2, 30), (17, 1, 4)],
    "prefill, decode": [(35, 3, 62), (1, 1, 1), (1, 1, 1)],
    "mixed": [(30, 0, 64), (1, 5, 0), (0, 0, 0), (6, 0, 0)],
}


def tokens(length: int, seed: int) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    sizes = ((H, D), (K, D), (K, E))
    return [jnp.asarray(rng.normal(size=(length, *s)), jnp.float32) for s in sizes]


SEQUENCES = [tokens(length, seed) for seed, length in enumerate(LENGTHS)]


@functools.cache
def one_pass(mods: str) -> list[jax.Array]:
    """Each sequence by itself, without a cache."""
    return [
        attention(*(x.swapaxes(0, 1)[None] for x in rows), **MODS[mods])[0].swapaxes(
            0, 1
        )
        for rows in SEQUENCES
    ]


def empty_cache(pages: int = 30, fill: float = jnp.nan) -> PagedKVCache:
    cache = PagedKVCache.create(PARAMS, pages=pages, sequences=3, max_pages=9)
    return dataclasses.replace(
        cache, k_pages=cache.k_pages + fill, v_pages=cache.v_pages + fill
    )


@functools.partial(jax.jit, static_argnames=("mods", "kernel"), donate_argnums=0)
def step(cache, rows, row_offsets, mods, kernel=None):
    out, cache = cache.append_and_attend(
        *rows, row_offsets=row_offsets, layer=1, kernel=kernel, **MODS[mods]
    )
    return out, cache.advance(row_offsets)


def serve(mods, split, cache, held, allocator=None, padding=3, kernel=None):
    """Runs a split through the cache; the outputs of each sequence, put together."""
    done, outs = np.zeros(3, int), [[], [], []]
    for new in split:
        if allocator is not None:
            for pages, length in zip(held, done + new, strict=True):
                allocator.grow(pages, int(length))
        cache = cache.with_tables(held, done.tolist())
        parts = [
            [x[d : d + n] for x in rows]
            for rows, d, n in zip(SEQUENCES, done, new, strict=True)
        ]
        filler = [jnp.full((padding, *x.shape[1:]), jnp.nan) for x in SEQUENCES[0]]
        rows = [jnp.concatenate([*x, r]) for *x, r in zip(*parts, filler, strict=True)]
        offsets = np.cumsum([0, *new])
        out, cache = step(cache, rows, jnp.asarray(offsets, jnp.int32), mods, kernel)
        assert (out[offsets[-1] :] == 0).all()
        for b in range(3):
            outs[b].append(out[offsets[b] : offsets[b + 1]])
        done += new
    np.testing.assert_array_equal(cache.lengths, done)
    return [jnp.concatenate(o) for o in outs], cache


@pytest.mark.parametrize("kernel", [None, pytest.param("jax", marks=pytest.mark.slow)])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("mods", MODS)
def test_any_split_equals_one_pass(mods, split, kernel):
    """Pages start as NaN, padding rows are NaN: what is not held is never seen."""
    allocator = PageAllocator(30, P)
    outs, _ = serve(
        mods, SPLITS[split], empty_cache(), [[], [], []], allocator, kernel=kernel
    )
    for out, expected in zip(outs, one_pass(mods), strict=True):
        np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)


def tables(order) -> list[list[int]]:
    order = list(map(int, order))
    return [order[:5], order[5:6], order[6:14]]


def test_shuffled_page_ids_change_no_bit():
    orders = [range(30), np.random.default_rng(0).permutation(30)]
    a, b = (
        serve("causal", SPLITS["mixed"], empty_cache(), tables(order))[0]
        for order in orders
    )
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_reused_pages_leak_nothing():
    allocator = PageAllocator(14, P)  # just enough: every page is used again
    held = [[], [], []]
    first, cache = serve("causal", SPLITS["chunks"], empty_cache(14), held, allocator)
    assert allocator.free == 0
    for pages in held:
        allocator.release(pages)
    poisoned = dataclasses.replace(
        cache, k_pages=cache.k_pages + jnp.nan, v_pages=cache.v_pages + jnp.inf
    )
    second, _ = serve("causal", SPLITS["chunks"], poisoned, held[::-1], allocator)
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


def test_what_lies_beyond_a_length_changes_no_bit():
    """A finite rest in the last page, too: row 6 of what breaks elsewhere."""
    out, _ = serve(
        "causal", SPLITS["one pass"], empty_cache(fill=0.0), tables(range(30))
    )
    other, _ = serve(
        "causal", SPLITS["one pass"], empty_cache(fill=3.0), tables(range(30))
    )
    for x, y in zip(out, other, strict=True):
        np.testing.assert_array_equal(x, y)


def test_other_layers_and_pages_are_left_alone():
    cache = empty_cache(fill=1.5)
    held = tables(range(30))
    _, after = serve("causal", SPLITS["one pass"], cache, held)
    assert (after.k_pages[0] == 1.5).all()
    for pages, length in zip(held, LENGTHS, strict=True):
        mine = after.k_pages[1, np.array(pages)].swapaxes(1, 2).reshape(-1, K, D)
        assert (mine[length:] == 1.5).all()
        assert (mine[:length] != 1.5).any(-1).all()
    assert (after.k_pages[1, 14:] == 1.5).all()
    assert (after.v_pages[1, 14:] == 1.5).all()


@pytest.mark.parametrize("page", [-1, 30, 2**31 - 1])
def test_page_ids_outside_the_pool_write_and_read_nothing(page):
    """In plain JAX, which cannot raise in jit; `with_tables` raises before (below)."""
    cache = empty_cache(fill=0.5)
    table = jnp.full_like(cache.table, page)
    cache = dataclasses.replace(cache, table=table)
    rows = SEQUENCES[0]
    offsets = jnp.array([0, 37, 37, 37], jnp.int32)
    out, after = step(cache, rows, offsets, "causal", "jax")
    assert (out == 0).all()
    assert (after.k_pages == 0.5).all()


def test_rows_past_the_last_page_are_dropped():
    cache = PagedKVCache.create(PARAMS, pages=4, sequences=1, max_pages=2)
    cache = cache.with_tables([[0, 1]], [2 * P - 1])
    rows = [x[:3] for x in SEQUENCES[0]]
    _, after = step(cache, rows, jnp.array([0, 3], jnp.int32), "causal", "jax")
    assert (after.k_pages[1, 1, :, P - 1] == rows[1][0]).all()
    assert (after.k_pages[1, 0] == 0).all()
    assert (after.k_pages[1, 2:] == 0).all()


@pytest.mark.parametrize(
    ("rows", "sequences", "pages"), [(0, 3, 9), (4, 0, 9), (4, 3, 0)]
)
def test_empty_batches(rows, sequences, pages):
    cache = PagedKVCache.create(PARAMS, pages=2, sequences=sequences, max_pages=pages)
    offsets = jnp.zeros(sequences + 1, jnp.int32)
    new = [x[:rows] for x in SEQUENCES[0]]
    out, after = cache.append_and_attend(*new, row_offsets=offsets)
    assert out.shape == (rows, H, E)
    assert (out == 0).all()
    assert (after.k_pages == 0).all()


def test_the_update_is_in_place():
    cache = empty_cache().with_tables(tables(range(30)), [0, 0, 0])
    before = (
        cache.k_pages.unsafe_buffer_pointer(),
        cache.v_pages.unsafe_buffer_pointer(),
    )
    rows = [jnp.concatenate(x) for x in zip(*SEQUENCES, strict=True)]
    offsets = jnp.asarray(np.cumsum([0, *LENGTHS]), jnp.int32)
    text = step.lower(cache, rows, offsets, "causal").compile().as_text()
    pool = f"f32[{L},30,{K},{P},{D}]"
    copies = [
        line for line in text.splitlines() if f"= {pool}" in line and "copy(" in line
    ]
    assert pool in text
    assert not copies
    _, cache = step(cache, rows, offsets, "causal")
    after = cache.k_pages.unsafe_buffer_pointer(), cache.v_pages.unsafe_buffer_pointer()
    assert before == after


def test_paged_attention_reads_what_was_written():
    out, cache = serve("causal", SPLITS["one pass"], empty_cache(), tables(range(30)))
    for last in (1, 5):  # the last rows of each sequence
        query = jnp.concatenate([rows[0][-last:] for rows in SEQUENCES])
        again = paged_attention(
            query,
            cache.k_pages[1],
            cache.v_pages[1],
            table=cache.table,
            lengths=cache.lengths,
            row_offsets=jnp.arange(4, dtype=jnp.int32) * last,
        )
        expected = jnp.concatenate([o[-last:] for o in out])
        np.testing.assert_allclose(again, expected, rtol=0, atol=2e-6)


def test_rows_do_not_depend_on_their_company():
    """One sequence alone and among others, decoding: equal to the bit."""
    _, cache = serve("causal", SPLITS["one pass"], empty_cache(), tables(range(30)))
    query = jnp.concatenate([rows[0][-1:] for rows in SEQUENCES])
    pages = cache.k_pages[1], cache.v_pages[1]
    every = paged_attention(
        query,
        *pages,
        table=cache.table,
        lengths=cache.lengths,
        row_offsets=jnp.arange(4, dtype=jnp.int32),
    )
    for b in range(3):
        alone = paged_attention(
            query[b : b + 1],
            *pages,
            table=cache.table[b : b + 1],
            lengths=cache.lengths[b : b + 1],
            row_offsets=jnp.arange(2, dtype=jnp.int32),
        )
        np.testing.assert_array_equal(alone[0], every[b])


class TestPageAllocator:
    def test_grows_by_whole_pages(self):
        allocator, held = PageAllocator(4, P), []
        allocator.grow(held, 1)
        allocator.grow(held, P)
        assert len(held) == 1
        allocator.grow(held, P + 1)
        assert (len(set(held)), allocator.free) == (2, 2)

    def test_out_of_pages_takes_nothing(self):
        allocator, held = PageAllocator(4, P), []
        allocator.grow(held, 2 * P)
        with pytest.raises(MemoryError, match="needs 9 more pages but only 2 are free"):
            allocator.grow(held, 11 * P)
        assert (len(held), allocator.free) == (2, 2)

    def test_released_twice(self):
        allocator, held = PageAllocator(4, P), []
        allocator.grow(held, 2 * P)
        copy = list(held)
        allocator.release(held)
        assert held == []
        with pytest.raises(ValueError, match="released twice"):
            allocator.release(copy)
        assert allocator.free == 4

    def test_sizes(self):
        with pytest.raises(ValueError, match="pages=0"):
            PageAllocator(0, P)


@pytest.mark.parametrize(
    ("held", "lengths", "named"),
    [
        ([[0], [1]], [1, 1], "got 2 tables"),
        ([[0], [30], [2]], [1, 1, 1], r"must lie in \[0, 30\)"),
        ([[0], [-1], [2]], [1, 1, 1], r"must lie in \[0, 30\)"),
        ([[0, 0], [1], [2]], [1, 1, 1], "holds a page twice"),
        ([[0], [1], [2]], [1, 9, 1], "9 tokens do not fit 1 pages of 8"),
        ([list(range(10)), [11], [12]], [1, 1, 1], "exceed max_pages=9"),
    ],
)
def test_tables_that_cannot_be(held, lengths, named):
    with pytest.raises(ValueError, match=named):
        empty_cache().with_tables(held, lengths)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(head_dim=0), "head_dim=0"),
        (dict(page_size=-1), "page_size=-1"),
        (dict(value_head_dim=0), "value_head_dim=0"),
        (dict(dtype=jnp.int32), "must be a float type"),
    ],
)
def test_cache_sizes_that_cannot_be(change, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(PARAMS, **change)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_bytes_per_page(dtype):
    params = dataclasses.replace(PARAMS, dtype=dtype)
    cache = PagedKVCache.create(params, pages=3, sequences=1, max_pages=3)
    held = sum(x.nbytes for x in cache.pool if x is not None)
    assert 3 * params.bytes_per_page == held
