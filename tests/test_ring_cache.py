"""Rings and contiguous caches forget rejected drafts, or say that they cannot."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raptax import SlidingWindow, attention
from raptax.kv_cache.contiguous import ContiguousKVCache, Partition
from raptax.kv_cache.positioned import AttendSettings, attend
from raptax.kv_cache.quantization import KVQuantization
from raptax.kv_cache.sliding_window import RingKVCache

B, H, D, WINDOW = 2, 2, 4, 4


def rows(length: int, seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    shape = B, length, H, D
    return [jnp.asarray(rng.normal(size=shape).astype(np.float32)) for _ in range(3)]


def ring(rollback: int, slots: int | None = None, **options) -> RingKVCache:
    slots = WINDOW + rollback if slots is None else slots
    part = Partition.create((B, slots, H, D), jnp.float32, **options)
    return RingKVCache.create(part, rollback=rollback)


@jax.jit
def feed(cache, x):
    settings = AttendSettings(mask_mod=SlidingWindow(WINDOW), kernel="blockwise")
    return cache.append_and_attend(*x, settings)


@functools.cache
def whole(length: int) -> np.ndarray:
    q, k, v = (x.swapaxes(1, 2) for x in rows(length))
    out = attention(q, k, v, mask_mod=SlidingWindow(WINDOW), kernel="reference")
    return np.asarray(out.swapaxes(1, 2))


def cut(x, start, stop):
    return [a[:, start:stop] for a in x]


@pytest.mark.parametrize("held", [2, 9])
@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("traced", [False, True])
def test_rejected_drafts_leave_no_trace(held, drafts, traced):
    """After each accepted token so many drafts come and are rejected."""
    cache, real = ring(rollback=3), rows(held + 5)
    _, cache = feed(cache, cut(real, 0, held))
    back = jax.jit(RingKVCache.truncate) if traced else RingKVCache.truncate
    for start in range(held, held + 5):
        _, ahead = feed(cache, rows(drafts, seed=start))
        cache = back(ahead, jnp.full(B, start, jnp.int32))
        out, cache = feed(cache, cut(real, start, start + 1))
        np.testing.assert_allclose(
            out[:, 0], whole(held + 5)[:, start], rtol=0, atol=2e-6
        )
    assert not cache.rolled_back_too_far.any()


def test_sequences_go_back_by_numbers_of_their_own():
    cache, real = ring(rollback=3), rows(8)
    _, cache = feed(cache, cut(real, 0, 7))
    cache = cache.truncate([5, 7])
    np.testing.assert_array_equal(cache.positions.max(1), [4, 6])
    out, _ = feed(cache, [jnp.stack([a[0, 5:6], a[1, 7:8]]) for a in real])
    np.testing.assert_allclose(out[0, 0], whole(8)[0, 5], rtol=0, atol=2e-6)
    np.testing.assert_allclose(out[1, 0], whole(8)[1, 7], rtol=0, atol=2e-6)


def test_a_ring_of_codes_goes_back_as_well():
    options = dict(quantization=KVQuantization("int8"))
    cache, real = ring(3, **options), rows(8)
    _, cache = feed(cache, cut(real, 0, 7))
    _, ahead = feed(cache, rows(3, seed=9))
    plain, _ = feed(cache, cut(real, 7, 8))
    out, _ = feed(ahead.truncate([7, 7]), cut(real, 7, 8))
    np.testing.assert_array_equal(out, plain)


@pytest.mark.parametrize("rollback", [0, 2])
def test_going_back_further_is_refused(rollback):
    """A ring of 4 that gave up 3 tokens returned outputs that were off by 9."""
    _, cache = feed(ring(rollback), rows(9))
    np.testing.assert_array_equal(
        cache.truncate([9, 9 - rollback]).lengths, [9, 9 - rollback]
    )
    named = (
        rf"sequence 1 goes back from 9 tokens to 6, and this ring can forget {rollback}"
    )
    lengths = jnp.asarray([9, 6], jnp.int32)
    with pytest.raises(ValueError, match=named):
        cache.truncate(lengths)
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(cache, lengths=lengths)
    after = jax.jit(RingKVCache.truncate)(cache, lengths)
    assert after.rolled_back_too_far.tolist() == [False, True]
    with pytest.raises(ValueError, match="must lie between 0 and those"):
        cache.truncate([10, 9])


def test_emptied_rings_keep_their_rollback():
    _, cache = feed(ring(2), rows(9))
    fresh = cache.empty
    assert fresh.rollback == 2
    np.testing.assert_array_equal(fresh.lengths, [0, 0])
    out, _ = feed(fresh, rows(3))
    np.testing.assert_allclose(out, whole(3), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rollback", [-1, 4])
def test_a_rollback_leaves_slots_to_look_back_to(rollback):
    with pytest.raises(ValueError, match=rf"rollback={rollback} must lie in \[0, 4\)"):
        ring(rollback, slots=4)


def test_a_ring_can_be_donated():
    cache = ring(1)
    step = jax.jit(lambda c, x: feed(c, x)[1], donate_argnums=0)
    np.testing.assert_array_equal(step(cache, rows(2)).written, [2, 2])


@pytest.mark.parametrize("traced", [False, True])
def test_a_contiguous_cache_forgets_drafts(traced):
    """Of both sequences, by numbers of their own."""
    part = functools.partial(Partition.create, dtype=jnp.float32)
    cache = ContiguousKVCache.create(part((B, 4, H, D)), part((B, 6, H, D)))
    q, k, v = rows(8)
    drafts = rows(8, seed=5)
    cache = cache.with_prompt(k[:, :4], v[:, :4])
    for n in range(2):  # one token that stays, and one of the drafts
        cache = cache.append_ragged(k[:, 4 + n : 5 + n], v[:, 4 + n : 5 + n])
    for n in range(3):
        cache = cache.append_ragged(*(x[:, n : n + 1] for x in drafts[1:]))
    back = jax.jit(ContiguousKVCache.truncate) if traced else ContiguousKVCache.truncate
    cache = back(cache, jnp.asarray([1, 2], jnp.int32))
    np.testing.assert_array_equal(cache.next_positions, [5, 6])
    put = lambda x: jnp.stack([x[0, 5:6], x[1, 6:7]])
    cache = cache.append_ragged(put(k), put(v))
    at = jnp.asarray([[5], [6]], jnp.int32)
    settings = AttendSettings(mask_mod=SlidingWindow(WINDOW), kernel="blockwise")
    out = attend(put(q).swapaxes(1, 2), cache.held(jnp.float32), at, settings)[:, :, 0]
    expected = np.stack([whole(8)[0, 5], whole(8)[1, 6]])
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="must lie between 0 and those"):
        cache.truncate([3, 3])
