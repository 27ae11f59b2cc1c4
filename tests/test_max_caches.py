"""KVCacheParams, and the caches without a page table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raptax import (
    Causal,
    KVCacheParams,
    KVCacheStrategy,
    PagedKVCache,
    SlotAllocator,
    SlotKVCache,
    TensorKVCache,
)

BASE = dict(dtype=jnp.float32, n_kv_heads=2, head_dim=8, page_size=4)


def params(**changes):
    return KVCacheParams(**BASE | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(n_kv_heads=0), "n_kv_heads=0 must be at least 1"),
        (dict(head_dim=0), "head_dim=0"),
        (dict(num_layers=0), "num_layers=0"),
        (dict(page_size=0), "page_size=0"),
        (dict(page_size=None), "page_size=None"),
        (dict(value_head_dim=0), "value_head_dim=0"),
        (dict(data_parallel_degree=0), "data_parallel_degree=0"),
        (dict(dtype=jnp.int32), "must be a float type: one of float32, bfloat16"),
        (dict(cache_strategy="heap"), "not one of 'paged', 'continuous', 'naive'"),
        (dict(is_mla=True, value_head_dim=4), "no meaning with is_mla=True"),
        (dict(data_parallel_degree=2), "exceeds the number of devices, 1"),
        (
            dict(data_parallel_degree=4, devices=range(3)),
            "exceeds the number of devices, 3",
        ),
        (dict(data_parallel_degree=2, devices=range(3)), "3 devices do not divide"),
        (
            dict(enable_prefix_caching=True, cache_strategy="continuous"),
            "enable_prefix_caching=True needs pages",
        ),
        (
            dict(enable_kvcache_swapping_to_host=True, cache_strategy="naive"),
            "enable_kvcache_swapping_to_host=True needs pages",
        ),
        (
            dict(enable_kvcache_swapping_to_host=True, host_kvcache_swap_space_gb=1),
            "needs enable_prefix_caching=True",
        ),
        (
            dict(enable_kvcache_swapping_to_host=True, enable_prefix_caching=True),
            "needs host_kvcache_swap_space_gb above 0; got None",
        ),
        (
            dict(host_kvcache_swap_space_gb=1.0),
            "is for enable_kvcache_swapping_to_host",
        ),
    ],
)
def test_params_that_make_no_sense(unchecked, changes, named):
    with pytest.raises(ValueError, match=named):
        params(**changes)


@pytest.mark.parametrize(
    ("devices", "replicas", "heads", "tensor_parallel", "per_device"),
    [
        (1, 1, 8, 1, 8),
        (4, 1, 8, 4, 2),
        (4, 4, 8, 1, 8),
        (4, 2, 8, 2, 4),  # both at once
        (8, 2, 8, 4, 2),
        (3, 1, 8, 3, 3),  # 3, 3, 2
        (8, 1, 2, 8, 1),  # copies
        (2, 1, 1, 2, 1),
    ],
)
def test_devices_share_heads(devices, replicas, heads, tensor_parallel, per_device):
    many = params(
        devices=range(devices), data_parallel_degree=replicas, n_kv_heads=heads
    )
    assert many.n_devices == devices
    assert many.tensor_parallel_degree == tensor_parallel
    assert many.n_kv_heads_per_device == per_device
    assert many.shape_per_block == (2, 1, 4, per_device, 8)
    assert many.bytes_per_page == 2 * 4 * per_device * 8 * 4 * tensor_parallel
    one = many.copy_as_dp_1()
    assert one.n_devices == one.tensor_parallel_degree == tensor_parallel
    assert one.data_parallel_degree == 1
    assert hash(one) == hash(dataclasses.replace(one))


def test_what_fits_a_budget():
    one = params(num_layers=3)  # a page: 3 layers * 2 heads * 4 tokens * 16 * 4 bytes
    assert one.bytes_per_page == 1536
    assert one.compute_num_device_blocks(1536 * 100, 4, 33) == 36  # 4 * ceil(33 / 4)
    assert one.estimated_memory_size(1536 * 100, 4, 33) == 36 * 1536
    assert one.compute_num_device_blocks(1536 * 20 + 1535, 4, 33) == 20
    assert one.compute_max_seq_len_fitting_in_cache(1536 * 5 + 7) == 20
    two = params(num_layers=3, devices=range(2), data_parallel_degree=2)
    assert two.compute_num_device_blocks(1536 * 20, 4, 33) == 10
    assert two.estimated_memory_size(1536 * 20, 4, 33) == 20 * 1536
    with pytest.raises(MemoryError, match="do not hold a single page of 1536 bytes"):
        one.compute_num_device_blocks(1535, 4, 33)
    with pytest.warns(UserWarning, match="3 pages cannot hold a token of each"):
        assert one.compute_num_device_blocks(1536 * 3, 4, 8) == 3
    with pytest.warns(UserWarning, match="cannot hold one sequence"):
        assert one.compute_num_device_blocks(1536 * 3, 1, 100) == 3
    host = params(
        enable_prefix_caching=True,
        enable_kvcache_swapping_to_host=True,
        host_kvcache_swap_space_gb=0.5,
    )
    assert host.compute_num_host_blocks() == 2**29 // host.bytes_per_page
    assert one.compute_num_host_blocks() == 0
    codes = params(dtype=jnp.int8)  # and a float32 for each token, head and half
    assert codes.bytes_per_page == 4 * 2 * (2 * 8 + 2 * 4)
    with pytest.raises(ValueError, match="this cache holds floats"):
        TensorKVCache.create(
            params(dtype=jnp.float8_e5m2, cache_strategy="naive"),
            sequences=1,
            max_length=4,
        )
    latent = params(is_mla=True)
    assert latent.shape_per_block[0] == 1
    assert latent.bytes_per_page * 2 == params().bytes_per_page


def make(strategy):
    """A cache for two sequences of up to 16 tokens, and its params."""
    made = params(cache_strategy=strategy, value_head_dim=6)
    match strategy:
        case "paged":
            cache = PagedKVCache.create(made, pages=8, sequences=2, max_pages=4)
            return cache.with_tables([[7, 1, 4, 0], [2, 3, 6, 5]], [0, 0])
        case "continuous":
            cache = SlotKVCache.create(made, slots=3, sequences=2, max_length=15)
            return cache.with_slots([2, 0], [0, 0])
        case _:
            return TensorKVCache.create(made, sequences=2, max_length=16)


@jax.jit
def three_calls(cache, q, k, v):
    outs = []
    for offsets in ([0, 5, 9], [0, 1, 4], [0, 2, 3]):  # ragged, mixed
        rows, offsets = offsets[-1], jnp.asarray(offsets, jnp.int32)
        at = cache.positions(rows, offsets)
        out, cache = cache.append_and_attend(
            q[:rows], k[:rows], v[:rows], row_offsets=offsets, mask_mod=Causal()
        )
        cache = cache.advance(offsets)
        outs += [out, at]
        q, k, v = q * 0.9, k * 0.9, v * 0.9
    return outs, cache


def test_slots_and_tensors_hold_what_pages_hold():
    rng = np.random.default_rng(0)
    shapes = (9, 4, 8), (9, 2, 8), (9, 2, 6)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    expected, _ = three_calls(make("paged"), q, k, v)
    for strategy in ("continuous", "naive"):
        outs, cache = three_calls(make(strategy), q, k, v)
        for out, want in zip(outs, expected, strict=True):
            np.testing.assert_allclose(out, want, rtol=0, atol=2e-6)
        np.testing.assert_array_equal(cache.lengths, [8, 8])
    np.testing.assert_array_equal(cache.k[0, 0, :, :5], k[:5].swapaxes(0, 1))
    assert not cache.v[0, :, :, 8:].any()


def test_slots():
    cache = make("continuous")
    assert (cache.slots, cache.max_length) == (3, 16)
    np.testing.assert_array_equal(cache.lookup_table, [2, 0])
    for slots, lengths, named in (
        ([3, 0], [0, 0], r"slots must lie in \[0, 3\)"),
        ([1, 1], [0, 0], "one owner"),
        ([1, 0], [0, 17], "max_length=16"),
    ):
        with pytest.raises(ValueError, match=named):
            cache.with_slots(slots, lengths)
    np.testing.assert_array_equal(cache.with_slots([1, 2], [3, 16]).lengths, [3, 16])


def test_slot_allocator():
    slots = SlotAllocator(2, max_length=10)
    first, second = slots.claim(), slots.claim()
    assert {first, second} == {0, 1}
    with pytest.raises(MemoryError, match="all 2 slots"):
        slots.claim()
    slots.grow(first, 10)
    with pytest.raises(ValueError, match="would overrun max_length=10: 11"):
        slots.grow(first, 1)
    assert slots.length(first) == 10
    slots.release(first)
    assert slots.free == 1
    for call in (slots.release, slots.length, lambda s: slots.grow(s, 1)):
        with pytest.raises(ValueError, match="is not owned"):
            call(first)
    assert slots.length(slots.claim()) == 0


def test_params_of_another_strategy_are_refused():
    for strategy in KVCacheStrategy:
        made = params(cache_strategy=strategy)
        creators = {
            KVCacheStrategy.PAGED: lambda p: PagedKVCache.create(
                p, pages=1, sequences=1, max_pages=1
            ),
            KVCacheStrategy.CONTINUOUS: lambda p: SlotKVCache.create(
                p, slots=1, sequences=1, max_length=4
            ),
            KVCacheStrategy.NAIVE: lambda p: TensorKVCache.create(
                p, sequences=1, max_length=4
            ),
        }
        for wanted, create in creators.items():
            if wanted is strategy:
                create(made)
            else:
                with pytest.raises(
                    ValueError, match=f"cache_strategy='{strategy.value}'"
                ):
                    create(made)


@pytest.mark.parametrize(
    "make_it",
    [
        lambda: SlotKVCache.create(
            params(cache_strategy="continuous"), slots=1, sequences=2, max_length=4
        ),
        lambda: TensorKVCache.create(
            params(cache_strategy="naive"), sequences=0, max_length=4
        ),
        lambda: make("naive").with_lengths([1, 17]),
        lambda: make("naive").with_lengths([1]),
        lambda: SlotAllocator(0, 4),
    ],
)
def test_sizes_that_do_not_fit(make_it):
    with pytest.raises(ValueError, match=r"must be"):
        make_it()
