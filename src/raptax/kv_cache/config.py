"""The sizes of a cache, and what follows from them."""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from enum import Enum
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from .._core.errors import choices
from ..quant.rows import CODES, is_code

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


class KVCacheStrategy(Enum):
    """How a cache lays out its tokens.

    PAGED is `PagedKVCache`, CONTINUOUS is `SlotKVCache`, NAIVE is `TensorKVCache`.
    """

    PAGED = "paged"
    CONTINUOUS = "continuous"
    NAIVE = "naive"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCacheParams:
    """The sizes of a cache, checked once.

    Devices are split into ``data_parallel_degree`` replicas of
    ``tensor_parallel_degree`` devices. Each replica holds caches of its own sequences;
    the devices of a replica share the kv heads out among themselves, the first ones
    taking one more where they do not come out even. More devices than kv heads hold
    copies: a device always has a whole head.

    Attributes:
        dtype: What keys and values are stored as. int8, float8_e4m3fn and float8_e5m2
            are codes, with a float32 scale for each token and kv head.
        n_kv_heads: Key/value heads, K.
        head_dim: Head size of keys, D.
        num_layers: Layers that share the page table, L.
        devices: Devices that the model runs on; None for one.
        enable_prefix_caching: Whether sequences may share pages of a common prefix. It
            is the allocator of pages that does it; the cache's arrays are the same.
        enable_kvcache_swapping_to_host: Whether pages may move to the host's memory.
        host_kvcache_swap_space_gb: Space for them there, in units of 2**30 bytes.
        cache_strategy: A `KVCacheStrategy` or its value.
        page_size: Tokens per page, P.
        is_mla: Latent attention: one row a token that is key and value at once, so that
            nothing is stored for values.
        data_parallel_degree: Replicas.
        value_head_dim: Head size of values, E; that of the keys unless given.

    Raises:
        ValueError: Sizes below 1, or settings that contradict each other.
    """

    dtype: DTypeLike
    n_kv_heads: int
    head_dim: int
    num_layers: int = 1
    devices: Sequence[Any] | None = None
    enable_prefix_caching: bool = False
    enable_kvcache_swapping_to_host: bool = False
    host_kvcache_swap_space_gb: float | None = None
    cache_strategy: KVCacheStrategy | str = KVCacheStrategy.PAGED
    page_size: int = 128
    is_mla: bool = False
    data_parallel_degree: int = 1
    value_head_dim: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache_strategy", _strategy(self.cache_strategy))
        if self.devices is not None:  # a tuple, so that equal params hash alike
            object.__setattr__(self, "devices", tuple(self.devices))
        if self.page_size is None:
            raise ValueError("page_size=None must be a number of tokens per page.")
        sizes = ["n_kv_heads", "head_dim", "num_layers", "page_size"]
        sizes += ["data_parallel_degree"]
        if self.value_head_dim is not None:
            sizes += ["value_head_dim"]
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if jnp.dtype(self.dtype) not in (known := [*map(jnp.dtype, FLOATS + CODES)]):
            names = ", ".join(dtype.name for dtype in known)
            raise ValueError(
                f"dtype={self.dtype} must be a float type: one of {names}."
            )
        if self.is_mla and self.value_head_dim is not None:
            raise ValueError(
                f"value_head_dim={self.value_head_dim} has no meaning with is_mla=True: "
                "values are part of the keys."
            )
        self._check_devices()
        self._check_host()

    def _check_devices(self) -> None:
        if self.data_parallel_degree > self.n_devices:
            raise ValueError(
                f"data_parallel_degree={self.data_parallel_degree} exceeds the number "
                f"of devices, {self.n_devices}."
            )
        if self.n_devices % self.data_parallel_degree:
            raise ValueError(
                f"{self.n_devices} devices do not divide into data_parallel_degree="
                f"{self.data_parallel_degree} replicas of equal size."
            )

    def _check_host(self) -> None:
        paged = self.cache_strategy is KVCacheStrategy.PAGED
        for name in ("enable_prefix_caching", "enable_kvcache_swapping_to_host"):
            if getattr(self, name) and not paged:
                raise ValueError(
                    f"{name}=True needs pages to share or move: cache_strategy must be "
                    f"'paged', not {self.strategy.value!r}."
                )
        swap, space = (
            self.enable_kvcache_swapping_to_host,
            self.host_kvcache_swap_space_gb,
        )
        if swap and not self.enable_prefix_caching:
            raise ValueError(
                "enable_kvcache_swapping_to_host=True needs enable_prefix_caching=True: "
                "pages that no sequence shares are not kept."
            )
        if swap and (space is None or not space > 0):
            raise ValueError(
                "enable_kvcache_swapping_to_host=True needs host_kvcache_swap_space_gb "
                f"above 0; got {space}."
            )
        if space is not None and not swap:
            raise ValueError(
                f"host_kvcache_swap_space_gb={space} is for "
                "enable_kvcache_swapping_to_host=True."
            )

    @property
    def strategy(self) -> KVCacheStrategy:
        """`cache_strategy` as what it was made into."""
        return _strategy(self.cache_strategy)

    @property
    def is_quantized(self) -> bool:
        """Whether keys and values are stored as codes with scales."""
        return is_code(self.dtype)

    @property
    def value_size(self) -> int:
        """Numbers stored for a value: E, or 0 with ``is_mla``."""
        return 0 if self.is_mla else self.value_head_dim or self.head_dim

    @property
    def n_devices(self) -> int:
        return 1 if self.devices is None else max(1, len(self.devices))

    @property
    def tensor_parallel_degree(self) -> int:
        """Devices that share one replica's heads."""
        return self.n_devices // self.data_parallel_degree

    @property
    def n_kv_heads_per_device(self) -> int:
        """The most kv heads that any device holds."""
        return max(1, -(-self.n_kv_heads // self.tensor_parallel_degree))

    @property
    def shape_per_block(self) -> tuple[int, int, int, int, int]:
        """One device's share of a page: (2 or 1, layers, tokens, heads, head size).

        1 with ``is_mla``. Where values have a size of their own the second half differs.
        """
        halves, heads = 1 if self.is_mla else 2, self.n_kv_heads_per_device
        return halves, self.num_layers, self.page_size, heads, self.head_dim

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page: all layers, on all devices of its replica."""
        heads = self.n_kv_heads_per_device * self.tensor_parallel_degree
        tokens = self.num_layers * heads * self.page_size
        return tokens * self._bytes_per_token_and_head

    @property
    def _bytes_per_token_and_head(self) -> int:
        lanes, halves = self.head_dim + self.value_size, self.shape_per_block[0]
        scales = halves * 4 if self.is_quantized else 0
        return lanes * jnp.dtype(self.dtype).itemsize + scales

    def compute_num_device_blocks(
        self, available_cache_memory: int, max_batch_size: int, max_seq_len: int
    ) -> int:
        """Pages of each replica that fit, and no more than a full batch can use.

        Args:
            available_cache_memory: Bytes, of all devices together.
            max_batch_size: Sequences of one replica.
            max_seq_len: Tokens of the longest one.

        Raises:
            MemoryError: Not even one page fits. Warns when the pages are fewer than
                the sequences, or than one longest sequence takes.
        """
        fits = (
            available_cache_memory // self.data_parallel_degree // self.bytes_per_page
        )
        if fits < 1:
            raise MemoryError(
                f"{available_cache_memory} bytes do not hold a single page of "
                f"{self.bytes_per_page} bytes in each of {self.data_parallel_degree} "
                "replicas."
            )
        longest = -(-max_seq_len // self.page_size)
        if fits < max_batch_size:
            _warn(f"{fits} pages cannot hold a token of each of {max_batch_size=}")
        if fits < longest:
            _warn(f"{fits} pages cannot hold one sequence of {max_seq_len=} tokens")
        return min(fits, longest * max_batch_size)

    def compute_max_seq_len_fitting_in_cache(self, available_cache_memory: int) -> int:
        """Tokens of the longest sequence that a replica can hold alone."""
        replica = available_cache_memory // self.data_parallel_degree
        return replica // self.bytes_per_page * self.page_size

    def estimated_memory_size(
        self, available_cache_memory: int, max_batch_size: int, max_seq_len: int
    ) -> int:
        """Bytes that the pages of `compute_num_device_blocks` take, all replicas."""
        pages = self.compute_num_device_blocks(
            available_cache_memory, max_batch_size, max_seq_len
        )
        return pages * self.bytes_per_page * self.data_parallel_degree

    def compute_num_host_blocks(self) -> int:
        """Pages that ``host_kvcache_swap_space_gb`` holds; 0 without swapping."""
        space = self.host_kvcache_swap_space_gb or 0
        return math.floor(space * 2**30) // self.bytes_per_page

    def copy_as_dp_1(self) -> "KVCacheParams":
        """The params of one replica, with the first replica's devices."""
        devices = self.devices
        if devices is not None:
            devices = devices[: self.tensor_parallel_degree]
        return dataclasses.replace(self, devices=devices, data_parallel_degree=1)


def _strategy(name: KVCacheStrategy | str) -> KVCacheStrategy:
    if isinstance(name, KVCacheStrategy):
        return name
    if name not in (known := [s.value for s in KVCacheStrategy]):
        raise ValueError(f"cache_strategy={name!r} is not one of {choices(known)}.")
    return KVCacheStrategy(name)


def _warn(sentence: str) -> None:
    warnings.warn(f"{sentence}.", stacklevel=3)


def check_strategy(params: KVCacheParams, wanted: KVCacheStrategy) -> None:
    """Raises ValueError when a cache is made from params that ask for another kind."""
    if params.strategy is not wanted:
        raise ValueError(
            f"cache_strategy={params.strategy.value!r} is not what this cache is: "
            f"{wanted.value!r}."
        )


def check_floats(params: KVCacheParams) -> None:
    """Raises ValueError when a cache that holds plain numbers is to hold codes."""
    if params.is_quantized:
        raise ValueError(f"dtype={params.dtype} are codes; this cache holds floats.")
