"""Caches as module state, under MaxText's names."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ...kv_cache.contiguous import ContiguousKVCache, Partition
from ...kv_cache.quantization import KVQuantization
from ...kv_cache.sliding_window import RingKVCache
from .options import Settings

NAMES = "cache_batch", "cache_sequence", "cache_heads", "cache_kv"
SCALE_NAMES = (
    "cache_scale_batch",
    "cache_scale_sequence",
    "cache_heads",
    "cache_scale_kv",
)


class KVQuant:
    """How a cache stores numbers, read of a config; see `raptax.kv_cache.quantization`.

    Attributes:
        dtype: What codes are stored as.
        axis_cfg: "dkv" or "heads_and_dkv": what shares a scale.
        quantization: The two as a value.

    Raises:
        ValueError: config.quantize_kvcache is off, or a name is unknown.
    """

    def __init__(self, config: Any):
        settings = Settings.read(config)
        if not settings.quantize_kvcache:
            raise ValueError("KVQuant(config) needs config.quantize_kvcache=True.")
        self.quantization = KVQuantization(
            settings.kv_quant_dtype, settings.kv_quant_axis
        )
        self.dtype = self.quantization.dtype
        self.axis_cfg = settings.kv_quant_axis

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KVQuant) and self.quantization == other.quantization

    def __hash__(self) -> int:
        return hash(self.quantization)

    def quantize(
        self, kv: jax.Array, axis_names: tuple[str, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """Codes and scales of an array whose axes are named as those of a cache."""
        shared = ["cache_kv"]
        if self.axis_cfg == "heads_and_dkv":
            shared.append("cache_heads")
        axes = tuple(n for n, name in enumerate(axis_names) if name in shared)
        return self.quantization.quantize(kv, axes)


def _names(partition: Partition, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(names[axis] for axis in partition.axis_order)


def _variable(x: jax.Array, names: tuple[str | None, ...]) -> nnx.Cache[jax.Array]:
    return nnx.Cache(x, out_sharding=names, eager_sharding=False)


class _Stored(nnx.Module):
    """A partition as variables ``cached_<which>_key`` and so on."""

    def _keep(self, which: str, partition: Partition) -> None:
        names = _names(partition, NAMES)
        scales = _names(partition, SCALE_NAMES)
        setattr(self, f"cached_{which}_key", _variable(partition.key, names))
        setattr(self, f"cached_{which}_value", _variable(partition.value, names))
        ids = _variable(partition.segment_ids, NAMES[:2])
        setattr(self, f"cache_{which}_segment_id", ids)
        for name in ("key", "value"):
            scale = getattr(partition, f"{name}_scale")
            kept = None if scale is None else _variable(scale, scales)
            setattr(self, f"cached_{which}_{name}_scale", nnx.data(kept))

    def _partition(self, which: str, like: tuple[Any, Any]) -> Partition:
        def read(name: str) -> Any:
            variable = getattr(self, name)
            return None if variable is None else variable[...]

        return Partition(
            read(f"cached_{which}_key"),
            read(f"cached_{which}_value"),
            read(f"cache_{which}_segment_id"),
            read(f"cached_{which}_key_scale"),
            read(f"cached_{which}_value_scale"),
            *like,
        )

    def _write(self, which: str, partition: Partition) -> None:
        for name, value in (
            (f"cached_{which}_key", partition.key),
            (f"cached_{which}_value", partition.value),
            (f"cache_{which}_segment_id", partition.segment_ids),
            (f"cached_{which}_key_scale", partition.key_scale),
            (f"cached_{which}_value_scale", partition.value_scale),
        ):
            if value is not None:
                getattr(self, name)[...] = value


class KVCache(_Stored):
    """A `ContiguousKVCache` in variables: prompts ("prefill"), then generated ("ar").

    ``cache_ar_index`` counts the tokens appended; it does not wrap around.
    """

    def __init__(self, cache: ContiguousKVCache):
        self._keep("prefill", cache.prefill)
        self._keep("ar", cache.generated)
        self.cached_ar_lengths = _variable(cache.lengths, NAMES[:1])
        self.cache_ar_index = _variable(cache.index, (None,))
        self.like = tuple(
            (part.axis_order, part.quantization)
            for part in (cache.prefill, cache.generated)
        )

    @property
    def value(self) -> ContiguousKVCache:
        return ContiguousKVCache(
            self._partition("prefill", self.like[0]),
            self._partition("ar", self.like[1]),
            self.cache_ar_index[...],
            self.cached_ar_lengths[...],
        )

    def store(self, cache: ContiguousKVCache) -> None:
        self._write("prefill", cache.prefill)
        self._write("ar", cache.generated)
        self.cached_ar_lengths[...] = cache.lengths
        self.cache_ar_index[...] = cache.index


class RingCache(_Stored):
    """A `RingKVCache` in variables, for layers with a window or chunks."""

    def __init__(self, cache: RingKVCache):
        self._keep("ring", cache.ring)
        self.cached_ring_lengths = _variable(cache.lengths, NAMES[:1])
        self.like = cache.ring.axis_order, cache.ring.quantization

    @property
    def value(self) -> RingKVCache:
        ring = self._partition("ring", self.like)
        return RingKVCache(ring, self.cached_ring_lengths[...])

    def store(self, cache: RingKVCache) -> None:
        self._write("ring", cache.ring)
        self.cached_ring_lengths[...] = cache.lengths


def create(
    o: Any, batch: int, heads: int, sizes: tuple[int, int]
) -> KVCache | RingCache:
    """An empty cache for keys and values of these sizes, as the options ``o`` ask."""

    def partition(slots: int, order: tuple[int, ...]) -> Partition:
        return Partition.create(
            (batch, slots, heads, sizes[0]),
            o.dtype,
            value_size=sizes[1],
            axis_order=order,
            quantization=o.quantization,
        )

    if o.settings.ring_kv_cache:
        slots = min(o.window, o.max_target_length)
        return RingCache(RingKVCache.create(partition(slots, o.ar_cache_axis_order)))
    P = o.max_prefill_predict_length
    return KVCache(
        ContiguousKVCache.create(
            partition(P, o.prefill_cache_axis_order),
            partition(o.max_target_length - P, o.ar_cache_axis_order),
        )
    )


def logical(part: Partition, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values in the order (batch, length, heads, size), and the segment ids."""
    key, value = (x.swapaxes(1, 2) for x in part.read(dtype))
    return key, value, jnp.asarray(part.segment_ids)
