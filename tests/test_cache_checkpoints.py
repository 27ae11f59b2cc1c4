"""A cache that was saved comes back as it was, into a structure without arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raptax import KVCacheParams, PagedKVCache, SlotKVCache, TensorKVCache
from raptax.kv_cache.contiguous import ContiguousKVCache, Partition
from raptax.kv_cache.quantization import KVQuantization
from raptax.kv_cache.sliding_window import RingKVCache

checkpoint = pytest.importorskip(
    "orbax.checkpoint", reason="orbax-checkpoint is not installed"
)
K, D = 2, 8
ROWS = [
    jnp.asarray(np.random.default_rng(n).normal(size=(3, heads, D)), jnp.float32)
    for n, heads in enumerate((4, K, K))
]
OFFSETS = jnp.asarray([0, 2, 3], jnp.int32)


def params(strategy: str, dtype=jnp.float32) -> KVCacheParams:
    return KVCacheParams(
        dtype=dtype, n_kv_heads=K, head_dim=D, page_size=4, cache_strategy=strategy
    )


def paged(dtype) -> PagedKVCache:
    cache = PagedKVCache.create(
        params("paged", dtype), pages=5, sequences=2, max_pages=2
    )
    return cache.with_tables([[4, 0], [2]], [0, 0])


def slots() -> SlotKVCache:
    made = params("continuous")
    return SlotKVCache.create(made, slots=2, sequences=2, max_length=8)


def tensors() -> TensorKVCache:
    return TensorKVCache.create(params("naive"), sequences=2, max_length=8)


def partition() -> Partition:
    codes = KVQuantization("int8")
    return Partition.create((1, 4, K, D), jnp.float32, quantization=codes)


def appended(cache):
    _, cache = cache.append_and_attend(*ROWS, row_offsets=OFFSETS)
    return cache.advance(OFFSETS)


def contiguous() -> ContiguousKVCache:
    cache = ContiguousKVCache.create(partition(), partition())
    return cache.with_prompt(*(x[None] for x in ROWS[1:]))


def ring() -> RingKVCache:
    real = jnp.ones((1, 3), bool)
    cache = RingKVCache.create(partition(), rollback=1)
    return cache.append(*(x[None] for x in ROWS[1:]), real).truncate([2])


CACHES = {
    "pages": lambda: appended(paged(jnp.float32)),
    "pages of codes": lambda: appended(paged(jnp.int8)),
    "slots": lambda: appended(slots()),
    "tensors": lambda: appended(tensors()),
    "contiguous": contiguous,
    "ring": ring,
}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_saved_and_restored(name, tmp_path):
    cache = CACHES[name]()
    with checkpoint.StandardCheckpointer() as files:
        files.save(tmp_path / "cache", cache)
        files.wait_until_finished()
        restored = files.restore(tmp_path / "cache", jax.eval_shape(CACHES[name]))
    assert type(restored) is type(cache)
    assert restored == cache
