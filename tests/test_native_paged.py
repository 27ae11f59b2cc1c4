"""Paged attention in C++ equals plain JAX, whatever the batch, the pages or the mods."""

import dataclasses
import functools
import itertools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raptax import (
    ALiBi,
    Causal,
    KeyLengths,
    KVCacheParams,
    PagedKVCache,
    SinkWindow,
    SlidingWindow,
    SoftCap,
    Window,
    alibi_slopes,
    paged_attention,
)
from raptax.kernels.cpu import library as native
from raptax.kernels.paged import attention as paged
from raptax.mods import FunctionMod
from raptax.quant.rows import is_code, quantize
from tests.instruction_sets import INSTRUCTION_SETS, REFUSED

pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"no native kernels: {native.missing_reason()}"
)
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
CODES = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences that hold ``held`` tokens and get ``new`` ones; numbers follow."""

    held: tuple[int, ...] = (37, 0, 200, 5)
    new: tuple[int, ...] = (1, 9, 3, 0)
    H: int = 6
    K: int = 2
    D: int = 16
    E: int = 16
    P: int = 8
    L: int = 2
    dtype: Any = jnp.float32
    stored: Any = jnp.float32
    padding: int = 2

    @property
    def offsets(self) -> np.ndarray:
        return np.cumsum([0, *self.new]).astype(np.int32)

    def random(self, seed: int, *shape: int) -> jax.Array:
        rng = np.random.default_rng(seed)
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def rows(self) -> list[jax.Array]:
        """Query, key, value; filler in the rows of no sequence."""
        R = sum(self.new)
        sizes = (self.H, self.D), (self.K, self.D), (self.K, self.E)
        rows = [self.random(n, R, *size) for n, size in enumerate(sizes)]
        filler = [jnp.full((self.padding, *size), jnp.nan) for size in sizes]
        both = zip(rows, filler, strict=True)
        return [jnp.concatenate(x).astype(self.dtype) for x in both]

    def tables(self, seed: int | None = 0) -> tuple[list[list[int]], int]:
        """Pages of each sequence, in disorder, and how many there are in all."""
        need = [-(-(h + n) // self.P) for h, n in zip(self.held, self.new, strict=True)]
        order = np.arange(sum(need) + 3)
        if seed is not None:
            order = np.random.default_rng(seed).permutation(order)
        ends = np.cumsum([0, *need])
        pages = [order[a:b].tolist() for a, b in itertools.pairwise(ends)]
        return pages, len(order)

    def cache(self, order: int | None = 0, filler: float = jnp.nan) -> PagedKVCache:
        """Holds its tokens in layer 1; ``filler`` lies wherever there are none."""
        pages, count = self.tables(order)
        params = KVCacheParams(
            dtype=self.stored,
            n_kv_heads=self.K,
            head_dim=self.D,
            value_head_dim=self.E,
            num_layers=self.L,
            page_size=self.P,
        )
        width = max(1, *map(len, pages))
        cache = PagedKVCache.create(
            params, pages=count, sequences=len(pages), max_pages=width
        )
        tables = cache.with_tables(pages, self.held)
        pool = [self.fill(x, pages, filler, n) for n, x in enumerate(cache.pool[:2])]
        return self.with_pool(tables, *pool)

    def fill(self, empty: jax.Array, pages, filler: float, seed: int) -> np.ndarray:
        pool = np.full(empty.shape, filler, np.float32)
        for b, (held, mine) in enumerate(zip(self.held, pages, strict=True)):
            numbers = self.random(
                100 * b + seed, held, *empty.shape[2:3], empty.shape[4]
            )
            for s in range(held):
                pool[1, mine[s // self.P], :, s % self.P] = numbers[s]
        return pool

    def with_pool(self, cache: PagedKVCache, k: np.ndarray, v: np.ndarray):
        if not is_code(self.stored):
            pages = [jnp.asarray(x).astype(self.stored) for x in (k, v)]
            return dataclasses.replace(cache, k_pages=pages[0], v_pages=pages[1])
        (k, k_scales), (v, v_scales) = (
            quantize(jnp.asarray(x), self.stored) for x in (k, v)
        )
        return dataclasses.replace(
            cache, k_pages=k, v_pages=v, k_scales=k_scales, v_scales=v_scales
        )


@functools.partial(jax.jit, static_argnames="kernel", donate_argnums=0)
def step(cache, rows, offsets, mods, kernel):
    return cache.append_and_attend(
        *rows, row_offsets=offsets, layer=jnp.int32(1), kernel=kernel, **mods
    )


def run(batch: Batch, kernel: str = "native", cache=None, **mods: Any):
    cache = batch.cache() if cache is None else cache
    mods = {"mask_mod": Causal()} | mods
    return step(cache, batch.rows(), jnp.asarray(batch.offsets), mods, kernel)


def numbers(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32))


def dense(batch: Batch, cache: PagedKVCache, **mods: Any) -> np.ndarray:
    """The definition in float64, sequence by sequence, from what the pages now hold."""
    k, v, k_scales, v_scales = (
        None if x is None else np.asarray(x[1].astype(jnp.float32), np.float64)
        for x in cache.pool
    )
    if k_scales is not None:
        k, v = k * k_scales[..., None], v * v_scales[..., None]
    query, pages = numbers(batch.rows()[0]), batch.tables()[0]
    out = np.zeros((len(query), batch.H, batch.E))
    scale = float(mods.get("scale", batch.D**-0.5))
    mask_mod, score_mod = (mods.get(n) for n in ("mask_mod", "score_mod"))
    for b, (held, new) in enumerate(zip(batch.held, batch.new, strict=True)):
        if not new:
            continue
        keys, values = (
            np.repeat(
                x[pages[b]]
                .swapaxes(0, 1)
                .reshape(batch.K, -1, x.shape[-1])[:, : held + new],
                batch.H // batch.K,
                axis=0,
            )
            for x in (k, v)
        )
        mine = slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))
        q = query[mine].swapaxes(0, 1).astype(np.float64)
        q_idx, kv_idx = np.arange(held, held + new), np.arange(held + new)
        at = np.full((1, 1, 1, 1), b), np.arange(batch.H)[None, :, None, None]
        at = *at, q_idx[None, None, :, None], kv_idx[None, None, None]
        at = [jnp.asarray(x, jnp.int32) for x in at]
        scores = (scale * q @ keys.swapaxes(1, 2))[None]
        if score_mod is not None:
            scores = np.asarray(score_mod(jnp.asarray(scores, jnp.float32), *at), float)
        if mask_mod is not None:
            scores = np.where(np.asarray(mask_mod(*at)), scores, -np.inf)
        high = scores.max(-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isneginf(high), 0, high))[0]
        total = weights.sum(-1, keepdims=True)
        mean = weights / np.where(total == 0, 1, total) @ values
        out[mine] = mean.swapaxes(0, 1)
    return out


CLOSE = {"float32": 5e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def agree(batch: Batch, **mods: Any) -> PagedKVCache:
    mods = {"mask_mod": Causal()} | mods
    out, after = run(batch, **mods)
    close = CLOSE[jnp.dtype(batch.dtype).name]
    expected = dense(batch, after, **mods)
    np.testing.assert_allclose(numbers(out), expected, rtol=0, atol=close)
    assert (out[batch.offsets[-1] :] == 0).all()
    return after


BATCHES = {
    "mixed": Batch(),
    "one page each": Batch(P=1),
    "pages of 5": Batch(P=5),
    "pages of 64": Batch(P=64),
    "pages of 128": Batch(P=128, held=(300, 127, 128), new=(1, 1, 1)),
    "splits": Batch(held=(2500, 1023, 1024), new=(1, 2, 1), P=16),
    "chunks": Batch(held=(0, 100, 1500), new=(150, 77, 40), P=16, H=8, K=2),
    "odd sizes": Batch(D=63, E=5, H=3, K=1),
    "size 1": Batch(D=1, E=1, H=1, K=1, held=(3, 9), new=(1, 2)),
    "size 80": Batch(D=80, E=80),
    "size 256": Batch(D=256, E=192, H=2, K=1),
    "values wider": Batch(D=24, E=40, new=(20, 1, 30, 0)),
    "large group": Batch(H=34, K=2, new=(1, 2, 8, 1)),
    "huge group": Batch(H=200, K=1, held=(40, 3), new=(2, 1), D=8, E=8),
    "no group": Batch(H=3, K=3),
    "pairs": Batch(H=4, K=2, new=(1, 1, 1, 1)),
}


def every_third(b, h, q, k):
    return ((q + k + h + b) % 3 > 0) & (k <= q)


MODS = {
    "window": dict(mask_mod=SlidingWindow(7)),
    "nothing": dict(mask_mod=KeyLengths(0)),
    "both ways": dict(mask_mod=Window(20, 3)),
    "no mask": dict(mask_mod=None),
    "scale": dict(scale=0.3),
    "array scale": dict(scale=jnp.float32(0.3)),
    "soft cap": dict(score_mod=SoftCap(1.5)),
    "alibi": dict(score_mod=ALiBi(alibi_slopes(6))),
    "sinks and window": dict(mask_mod=SinkWindow(4, 9)),
    "function": dict(mask_mod=FunctionMod(every_third)),
    "all": dict(mask_mod=Causal() & SinkWindow(2, 90), score_mod=SoftCap(2.0)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_agrees_with_the_definition(name):
    agree(BATCHES[name])


@pytest.mark.parametrize("new", [(1, 1, 2, 1), (50, 3, 70, 1)])
@pytest.mark.parametrize("mods", MODS)
def test_masks_and_score_mods(mods, new):
    agree(Batch(new=new), **MODS[mods])


QUICK = [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.bfloat16)]
QUICK += [(jnp.bfloat16, jnp.int8), (jnp.float32, jnp.float8_e4m3fn)]
PAIRS = [
    pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)
    for pair in itertools.product(FLOATS, [*FLOATS, *CODES])
]


@pytest.mark.parametrize(("dtype", "stored"), PAIRS, ids=lambda x: jnp.dtype(x).name)
def test_dtypes(dtype, stored):
    batch = Batch(
        dtype=dtype, stored=stored, P=16, new=(1, 40, 3, 0), D=40, held=(300, 0, 200, 9)
    )
    after = agree(batch)
    cache = batch.cache()
    plain = paged.append(
        cache.pool,
        *batch.rows()[1:],
        table=cache.table,
        lengths=cache.lengths,
        row_offsets=jnp.asarray(batch.offsets),
        layer=1,
    )
    for mine, expected in zip(after.pool, plain, strict=True):
        if expected is not None:
            np.testing.assert_array_equal(numbers(mine), numbers(expected))


@pytest.mark.parametrize("stored", CODES, ids=lambda x: jnp.dtype(x).name)
def test_rows_of_zeros_and_of_nan(stored):
    batch = Batch(held=(0,), new=(4,), stored=stored, padding=0)
    rows = batch.rows()
    rows[1] = rows[1].at[1].set(0)
    rows[2] = rows[2].at[1].set(0).at[3, 0, 2].set(jnp.inf)
    mods = dict(mask_mod=Causal())
    offsets = jnp.asarray(batch.offsets)
    out, cache = step(batch.cache(), rows, offsets, mods, "native")
    plain, other = step(batch.cache(), rows, offsets, mods, "jax")
    for x, y in zip(cache.pool, other.pool, strict=True):
        np.testing.assert_array_equal(numbers(x), numbers(y))
    assert np.isnan(numbers(out[3, :3])).all()
    assert np.isfinite(numbers(out[:3])).all()
    np.testing.assert_allclose(numbers(out), numbers(plain), rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda x: jnp.dtype(x).name)
@pytest.mark.parametrize("new", [(1, 1, 1, 1), (70, 9, 3, 40)])
def test_what_is_not_finite_reaches_who_sees_it(dtype, new):
    """And nothing else: the rows before it, other sequences, other heads."""
    batch = Batch(dtype=dtype, stored=dtype, new=new, padding=0)
    cache = batch.cache()
    page, slot = int(cache.table[2, 150 // 8]), 150 % 8
    at = (1, page, 0, slot, 3)
    bad = {
        "key": dataclasses.replace(cache, k_pages=cache.k_pages.at[at].set(jnp.nan)),
        "value": dataclasses.replace(cache, v_pages=cache.v_pages.at[at].set(jnp.inf)),
        "far": dataclasses.replace(cache, k_pages=cache.k_pages.at[at].set(-jnp.inf)),
    }
    good, _ = run(batch)
    for name, poisoned in bad.items():
        mods = {} if name != "far" else dict(mask_mod=SlidingWindow(50))
        clean = good if not mods else run(batch, **mods)[0]
        out, _ = run(batch, cache=jax.tree.map(jnp.copy, poisoned), **mods)
        mine = slice(int(batch.offsets[2]), int(batch.offsets[3]))
        if name != "far":
            assert np.isnan(numbers(out[mine, :3])).all()
            out = out.at[mine, :3].set(clean[mine, :3])
        np.testing.assert_array_equal(numbers(out), numbers(clean))


def test_queries_that_are_not_finite():
    batch = Batch(padding=0)
    rows = batch.rows()
    rows[0] = rows[0].at[0, 1, 4].set(jnp.inf)
    out, _ = step(
        batch.cache(),
        rows,
        jnp.asarray(batch.offsets),
        dict(mask_mod=Causal()),
        "native",
    )
    good, _ = run(batch)
    assert np.isnan(out[0, 1]).all()
    np.testing.assert_array_equal(out.at[0, 1].set(good[0, 1]), good)


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_unused_slots_and_page_ids_change_no_bit(stored):
    batch = Batch(stored=stored, dtype=jnp.bfloat16, new=(1, 60, 3, 0))
    out, _ = run(batch)
    for order, filler in ((1, jnp.nan), (None, 7.0), (2, -jnp.inf)):
        other, _ = run(batch, cache=batch.cache(order, filler))
        np.testing.assert_array_equal(numbers(out), numbers(other))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_do_not_depend_on_their_company(dtype):
    batch = Batch(
        held=(2500, 40, 300), new=(1, 5, 90), P=16, dtype=dtype, stored=dtype, padding=0
    )
    out, cache = run(batch)
    lengths = jnp.asarray(batch.held, jnp.int32) + jnp.asarray(batch.new, jnp.int32)
    for b in range(3):
        mine = slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))
        alone = paged_attention(
            batch.rows()[0][mine],
            cache.k_pages[1],
            cache.v_pages[1],
            table=cache.table[b : b + 1],
            lengths=lengths[b : b + 1],
            row_offsets=jnp.asarray([0, batch.new[b]], jnp.int32),
            kernel="native",
        )
        np.testing.assert_array_equal(numbers(alone), numbers(out[mine]))


def test_two_runs_agree_to_the_bit():
    batch = Batch(held=(2500, 40, 300), new=(1, 5, 90), P=16)
    first, _ = run(batch)
    for _ in range(3):
        np.testing.assert_array_equal(first, run(batch)[0])


# ------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize("page", [-1, 10**6, -(2**31)])
def test_a_page_that_is_needed_must_be_in_the_pool(page):
    batch = Batch()
    cache = batch.cache()
    cache = dataclasses.replace(cache, table=cache.table.at[0, 4].set(page))
    with pytest.raises(REFUSED, match=r"table\[0, 4\]"):
        jax.block_until_ready(run(batch, cache=cache))


@pytest.mark.parametrize("page", [-1, 10**6])
def test_a_page_that_is_not_needed_may_be_anything(page):
    """Behind the last key, of a sequence without rows, and before the window."""
    batch = Batch(new=(1, 9, 3, 0))
    cache = batch.cache()
    good, _ = run(batch, mask_mod=SlidingWindow(20))
    table = cache.table.at[0, 5:].set(page).at[3].set(page).at[2, :20].set(page)
    cache = dataclasses.replace(cache, table=table)
    out, _ = run(batch, cache=cache, mask_mod=SlidingWindow(20))
    np.testing.assert_array_equal(out, good)


@pytest.mark.parametrize("new", [(1, 0, 3), (40, 1, 70)])
@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_pages_that_a_program_masks_may_be_missing(stored, new):
    """Parts of blocks, whole blocks and whole splits of keys; heads of odd sizes."""
    sizes = dict(D=40, E=24, P=16, H=4)
    batch = Batch((600, 3, 2500), new, dtype=jnp.bfloat16, stored=stored, **sizes)
    mask_mod = SinkWindow(4, 90)
    good, _ = run(batch, mask_mod=mask_mod)
    cache = batch.cache()
    table = cache.table.at[0, 1:31].set(-1).at[2, 1:150].set(-1)
    seen = dataclasses.replace(batch.cache(), table=table.at[0, 32].set(-1))
    cache = dataclasses.replace(cache, table=table)
    out, _ = run(batch, cache=cache, mask_mod=mask_mod)
    np.testing.assert_array_equal(numbers(out), numbers(good))
    with pytest.raises(REFUSED, match=r"table\[0, 32\]=-1 is needed for tokens 512"):
        jax.block_until_ready(run(batch, cache=seen, mask_mod=mask_mod))


def test_lengths_that_the_pages_cannot_hold():
    batch = Batch()
    cache = batch.cache()
    cache = dataclasses.replace(cache, lengths=cache.lengths.at[2].set(10**6))
    with pytest.raises(REFUSED, match=r"lengths\[2\]=1000000"):
        jax.block_until_ready(run(batch, cache=cache))


@pytest.mark.parametrize("layer", [-1, 2])
def test_layers_that_the_pool_does_not_have(layer):
    batch = Batch()
    with pytest.raises(REFUSED, match=f"layer={layer}"):
        jax.block_until_ready(
            batch.cache().append_and_attend(
                *batch.rows(), row_offsets=jnp.asarray(batch.offsets), layer=layer
            )
        )


def test_the_reason_is_a_sentence_and_naming_makes_it_an_error():
    batch = Batch()
    cache, query = batch.cache(), batch.rows()[0]
    options = dict(mask_mod=Causal(), score_mod=None)
    assert paged.native_unsupported_reason(query, cache.pool, **options) is None
    odd = lambda s, b, h, q, k: jnp.cumsum(s, -1)
    reason = paged.native_unsupported_reason(
        query, cache.pool, mask_mod=None, score_mod=odd
    )
    assert "cumsum" in reason
    mods = dict(row_offsets=jnp.asarray(batch.offsets), score_mod=odd)
    with pytest.raises(NotImplementedError, match="cumsum"):
        cache.append_and_attend(*batch.rows(), kernel="native", **mods)
    with pytest.raises(ValueError, match="kernel='cuda' is not one of 'native', 'jax'"):
        cache.append_and_attend(*batch.rows(), kernel="cuda", **mods)


# ------------------------------------------------------------------------------- in place


def no_copy_of_pool(text: str, batch: Batch) -> None:
    pool = f"f32[{batch.L},{batch.cache().k_pages.shape[1]},{batch.K},{batch.P}"
    assert pool in text
    copies = [
        x
        for x in text.splitlines()
        if " copy(" in x and x.split("=")[1].strip().startswith(pool)
    ]
    assert not copies


def loop(cache, rows, offsets):
    def turn(carry):
        n, cache, _ = carry
        out, cache = cache.append_and_attend(
            *rows, row_offsets=offsets, kernel="native"
        )
        return n + 1, cache, out

    zeros = jnp.zeros_like(rows[0])
    return jax.lax.while_loop(lambda c: c[0] < 3, turn, (jnp.int32(0), cache, zeros))[
        1:
    ]


def layers(cache, rows, offsets):
    def layer(carry, number):
        cache, query = carry
        out, cache = cache.append_and_attend(
            query, *rows[1:], row_offsets=offsets, layer=number, kernel="native"
        )
        return (cache, out), None

    return jax.lax.scan(layer, (cache, rows[0]), jnp.arange(2, dtype=jnp.int32))[0]


def choice(cache, rows, offsets):
    def attend(cache):
        out, cache = cache.append_and_attend(
            *rows, row_offsets=offsets, kernel="native"
        )
        return cache, out

    return jax.lax.cond(
        offsets[-1] > 0, attend, lambda cache: (cache, jnp.zeros_like(rows[0])), cache
    )


def chain(cache, rows, offsets):
    for number in range(2):
        out, cache = cache.append_and_attend(
            *rows, row_offsets=offsets, layer=number, kernel="native"
        )
    return cache, out


@pytest.mark.parametrize("program", [loop, layers, choice, chain])
def test_the_pool_stays_where_it_is(program):
    batch = Batch(padding=0)
    arguments = batch.cache(), batch.rows(), jnp.asarray(batch.offsets)
    jitted = jax.jit(program, donate_argnums=0)
    no_copy_of_pool(jitted.lower(*arguments).compile().as_text(), batch)
    before = [x.unsafe_buffer_pointer() for x in arguments[0].pool[:2]]
    cache, _ = jitted(*arguments)
    assert before == [x.unsafe_buffer_pointer() for x in cache.pool[:2]]


def test_without_donation_the_old_cache_stays():
    batch = Batch()
    cache = batch.cache(filler=1.5)
    old = np.array(cache.k_pages)
    _, after = cache.append_and_attend(
        *batch.rows(), row_offsets=jnp.asarray(batch.offsets), layer=1
    )
    np.testing.assert_array_equal(cache.k_pages, old)
    assert (np.asarray(after.k_pages) != old).any()


def test_quantized_pools_stay_where_they_are():
    batch = Batch(stored=jnp.int8)
    cache = batch.cache()
    before = [x.unsafe_buffer_pointer() for x in cache.pool]
    _, after = run(batch, cache=cache)
    assert before == [x.unsafe_buffer_pointer() for x in after.pool]


# ---------------------------------------------------------------------- transformations


def attend_alone(query: jax.Array, cache: PagedKVCache, batch: Batch, kernel: str):
    return paged_attention(
        query,
        cache.k_pages[1],
        cache.v_pages[1],
        table=cache.table,
        lengths=cache.lengths,
        row_offsets=jnp.asarray(batch.offsets),
        kernel=kernel,
    )


def test_tangents_are_those_of_plain_jax():
    batch = Batch(padding=0, held=(37, 12, 200, 5))
    cache, (query, *_) = batch.cache(), batch.rows()
    tangent = lambda kernel: jax.jvp(
        lambda q: attend_alone(q, cache, batch, kernel), (query,), (query,)
    )[1]
    moved = [tangent(kernel) for kernel in ("native", "jax")]
    np.testing.assert_allclose(*moved, rtol=0, atol=3e-6)
    assert np.abs(moved[0]).max() > 0.01


def test_vmap():
    batch = Batch(padding=0, held=(37, 12, 200, 5))
    cache, (query, *_) = batch.cache(), batch.rows()
    queries = jnp.stack([query, 2 * query])
    outs = jax.vmap(lambda q: attend_alone(q, cache, batch, "native"))(queries)
    for q, out in zip(queries, outs, strict=True):
        np.testing.assert_array_equal(out, attend_alone(q, cache, batch, "native"))


# --------------------------------------------------------------------- instruction sets

EACH_SET = """
import sys
sys.path.insert(0, "tests")
import test_native_paged as t
import jax.numpy as jnp
for name in ("mixed", "splits", "chunks", "odd sizes", "large group"):
    t.agree(t.BATCHES[name])
for stored in (*t.FLOATS, *t.CODES):
    t.agree(t.Batch(dtype=jnp.bfloat16, stored=stored, new=(1, 40, 3, 0), H=12))
t.agree(t.Batch(stored=jnp.float16, new=(1, 40, 3, 0)), **t.MODS["all"])
t.test_pages_that_a_program_masks_may_be_missing(jnp.bfloat16, (40, 1, 70))
print("agrees")
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set(isa):
    environment = os.environ | {"RAPTAX_ISA": isa, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", EACH_SET],
        env=environment,
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(__file__)),
    )
    if "names no instruction set of this machine" in done.stderr or (
        "names nothing that runs here" in done.stderr
    ):
        pytest.skip(f"this machine does not have {isa}")
    assert done.stdout.endswith("agrees\n"), done.stderr[-2000:]
