"""MAX's attention classes around weights of plain numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ...kv_cache import KVCacheParams
from ...nn.attention import (
    AbstractAttention,
    AttentionWithRope,
    head_sizes,
    to_first_device,
)
from ...nn.linear import Linear, Projection, StackedQKV, held
from ...nn.sharding.distributed import DistributedAttention
from ...nn.sharding.placement import make_mesh
from ...rope import RotaryEmbedding


class AttentionWithRopeNoOpaque(AbstractAttention):
    """Attention with rotary positions, and nothing hidden: one stacked projection.

    No biases, no clipping, no quantized weights. Its cache is any whose arrays are in
    the open, as all of ours are; see `AttentionWithRope` for the arguments.
    """

    def __init__(
        self,
        *,
        rope: RotaryEmbedding | None,
        num_attention_heads: int,
        num_key_value_heads: int,
        hidden_size: int,
        kv_params: KVCacheParams,
        devices: Sequence[Any] | None = None,
        dtype: DTypeLike = jnp.float32,
        linear_cls: Callable[..., Projection] = Linear,
        scale: float | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        H, K, C = num_attention_heads, num_key_value_heads, hidden_size
        D, E = head_sizes(H, K, kv_params)
        rngs = nnx.Rngs(0) if rngs is None else rngs
        make = lambda size_in, size_out: linear_cls(
            size_in, size_out, has_bias=False, dtype=dtype, rngs=rngs
        )
        sizes = H * D, K * D, K * E
        self.qkv = StackedQKV(make(C, sum(sizes)), sizes)
        self.out = make(H * E, C)
        self.rope = held(rope)
        self.q_norm, self.k_norm = nnx.data(None), nnx.data(None)
        self.scale, self.clip_qkv, self.head_size = scale, None, D
        to_first_device(self, devices)


class TensorParallelAttentionWithRope(DistributedAttention):
    """`AttentionWithRope` with its heads shared out among devices.

    With ``kv_params.data_parallel_degree`` above 1 the devices form that many replicas,
    and heads are shared out within each. See `AttentionWithRope` for the arguments.

    Args:
        devices: Those of ``kv_params``, or all of JAX's, unless given.
    """

    def __init__(
        self,
        *,
        rope: RotaryEmbedding | None,
        num_attention_heads: int,
        num_key_value_heads: int,
        hidden_size: int,
        kv_params: KVCacheParams,
        devices: Sequence[Any] | None = None,
        dtype: DTypeLike = jnp.float32,
        linear_cls: Any = Linear,
        stacked_qkv: bool = False,
        scale: float | None = None,
        has_bias: bool = False,
        float8_config: Any = None,
        clip_qkv: float | None = None,
        use_qk_norm: bool = False,
        rms_norm_eps: float = 1e-06,
        rngs: nnx.Rngs | None = None,
    ):
        options = {k: v for k, v in locals().items() if k in _ARGUMENTS}
        mesh = make_mesh(_devices(devices, kv_params), kv_params.data_parallel_degree)
        super().__init__(AttentionWithRope(**options), mesh)


class DataParallelAttentionWithRope(DistributedAttention):
    """`AttentionWithRope`, whole on every device, each with sequences of its own.

    See `AttentionWithRope` for the arguments.

    Args:
        devices: Those of ``kv_params``, or all of JAX's, unless given.
    """

    def __init__(
        self,
        *,
        rope: RotaryEmbedding | None,
        num_attention_heads: int,
        num_key_value_heads: int,
        hidden_size: int,
        kv_params: KVCacheParams,
        devices: Sequence[Any] | None = None,
        dtype: DTypeLike = jnp.float32,
        linear_cls: Any = Linear,
        stacked_qkv: bool = False,
        scale: float | None = None,
        has_bias: bool = False,
        float8_config: Any = None,
        clip_qkv: float | None = None,
        use_qk_norm: bool = False,
        rms_norm_eps: float = 1e-06,
        rngs: nnx.Rngs | None = None,
    ):
        options = {k: v for k, v in locals().items() if k in _ARGUMENTS}
        mesh = make_mesh(found := _devices(devices, kv_params), len(found))
        if kv_params.data_parallel_degree not in (1, len(found)):
            raise ValueError(
                f"kv_params.data_parallel_degree={kv_params.data_parallel_degree} must "
                f"be the number of devices, {len(found)}, or 1, which says nothing."
            )
        super().__init__(AttentionWithRope(**options), mesh)


def _devices(devices: Sequence[Any] | None, kv_params: KVCacheParams) -> Sequence[Any]:
    """Those of the layer, which are those of its cache."""
    theirs = kv_params.devices
    if devices is None:
        return jax.devices() if theirs is None else theirs
    if theirs is not None and list(devices) != list(theirs):
        raise ValueError(
            f"devices={list(devices)} must be kv_params.devices={list(theirs)}."
        )
    return devices


# What both hand on to `AttentionWithRope`: all but the devices.
_ARGUMENTS = (
    *("rope", "num_attention_heads", "num_key_value_heads", "hidden_size", "kv_params"),
    *("dtype", "linear_cls", "stacked_qkv", "scale", "has_bias", "float8_config"),
    *("clip_qkv", "use_qk_norm", "rms_norm_eps", "rngs"),
)
