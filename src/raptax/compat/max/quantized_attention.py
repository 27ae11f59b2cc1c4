"""Builds of attention around weights that stay packed: GGUF and GPTQ."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ...kv_cache import KVCacheParams
from ...nn.attention import (
    AbstractAttention,
    biases_of,
    checked_clip,
    head_sizes,
    projections,
    to_first_device,
)
from ...nn.linear import GGUFLinear, Projection, SeparateQKV, held
from ...nn.quantized_linear import GPTQLinear
from ...quant.gguf import Encoding
from ...quant.gptq import QuantizationConfig
from ...rope import RotaryEmbedding


class GGUFQAttentionWithRope(AbstractAttention):
    """Attention with rotary positions around quantized weights.

    Args:
        rope: Interleaved for Llama files: they store q and k permuted that way.
        num_attention_heads: H.
        num_key_value_heads: K.
        hidden_size: C; needed only without ``weights``.
        kv_params: The cache's sizes; head size and kv heads must agree with it.
        dtype: uint8: weights are blocks of bytes.
        quantization_encoding: What raw blocks are encoded as, an `Encoding` or its name.
        devices: Weights are put on the first one.
        linear_cls: Makes a projection from ``(blocks, encoding, bias)``.
        scale: Of the scores; ``D ** -0.5`` unless given.
        has_bias: Whether q, k and v have biases; for layers made without ``weights``.
        clip_qkv: Clamps the projected q, k and v to ``[-clip_qkv, clip_qkv]``.
        weights: ``q``, ``k``, ``v`` and ``o``, each a projection of its own encoding, or
            raw blocks of ``quantization_encoding``, uint8 ``(rows, blocks, bytes)``.
            Without them all blocks are zeros, to be replaced by a checkpoint's.
    """

    def __init__(
        self,
        *,
        rope: RotaryEmbedding | None,
        num_attention_heads: int,
        num_key_value_heads: int,
        hidden_size: int | None = None,
        kv_params: KVCacheParams,
        dtype: DTypeLike = jnp.uint8,
        quantization_encoding: Encoding | str | None = None,
        devices: Sequence[Any] | None = None,
        linear_cls: Callable[..., Projection] = GGUFLinear,
        scale: float | None = None,
        has_bias: bool = False,
        clip_qkv: float | None = None,
        weights: dict[str, Any] | None = None,
    ):
        H, K = num_attention_heads, num_key_value_heads
        D, E = head_sizes(H, K, kv_params)
        if jnp.dtype(dtype) != jnp.uint8:
            raise ValueError(f"dtype={dtype} must be uint8: GGUF weights are bytes.")
        sizes = H * D, K * D, K * E
        blocks = _Blocks(linear_cls, quantization_encoding)
        if weights is None:
            q, k, v, o = blocks.zeros(hidden_size, sizes, H * E, has_bias)
        else:
            if has_bias:
                raise ValueError(
                    "has_bias=True is for a layer without weights; projections that are "
                    "given bring their own biases."
                )
            q, k, v, o = blocks.around(weights, sizes, hidden_size)
        self.qkv, self.out = SeparateQKV(q, k, v), o
        self.rope = held(rope)
        self.q_norm, self.k_norm = nnx.data(None), nnx.data(None)
        self.scale, self.clip_qkv, self.head_size = scale, checked_clip(clip_qkv), D
        to_first_device(self, devices)

    @property
    def wqkv(self) -> Any:
        """q, k and v as float32 numbers, one after another: encodings may differ."""
        return jnp.concatenate([p.weight[...] for p in projections(self)])

    @property
    def wqkv_bias(self) -> Any:
        """Their biases one after another, or None."""
        return biases_of(self)


class GPTQAttentionWithRope(AbstractAttention):
    """Attention with rotary positions around GPTQ's packed weights.

    Every bit width, group size and order that `QuantizationConfig` knows; each projection
    has its own ``g_idx``.

    Args:
        quantization_config: How weights are packed.
        rope: Rotary positions, or None.
        num_attention_heads: H.
        num_key_value_heads: K.
        hidden_size: C. ``H * D`` need not equal it.
        kv_params: The cache's sizes; head size and kv heads must agree with it.
        devices: Weights are put on the first one.
        dtype: Of the scales.
        scale: Of the scores; ``D ** -0.5`` unless given.
        linear_cls: Makes a projection as `GPTQLinear.create` does.
        rngs: As in `AttentionWithRope`.
    """

    def __init__(
        self,
        quantization_config: QuantizationConfig,
        rope: RotaryEmbedding | None,
        num_attention_heads: int,
        num_key_value_heads: int,
        hidden_size: int,
        kv_params: KVCacheParams,
        devices: Sequence[Any] | None = None,
        *,
        dtype: DTypeLike = jnp.float32,
        scale: float | None = None,
        linear_cls: Callable[..., Projection] = GPTQLinear.create,
        rngs: nnx.Rngs | None = None,
    ):
        H, K, C = num_attention_heads, num_key_value_heads, hidden_size
        D, E = head_sizes(H, K, kv_params)
        make = partial(
            linear_cls,
            config=quantization_config,
            dtype=dtype,
            rngs=nnx.Rngs(0) if rngs is None else rngs,
        )
        self.qkv = SeparateQKV(make(C, H * D), make(C, K * D), make(C, K * E))
        self.out = make(H * E, C)
        self.rope = held(rope)
        self.q_norm, self.k_norm = nnx.data(None), nnx.data(None)
        self.scale, self.clip_qkv, self.head_size = scale, None, D
        to_first_device(self, devices)

    @property
    def wqkv(self) -> Any:
        """The packed codes of q, k and v side by side, and below them their scales.

        Bytes: uint8 ``(4 * words + itemsize * groups, (H + 2 * K) * D)``.
        """
        codes, scales = (
            jnp.concatenate([getattr(p, name)[...] for p in projections(self)], axis=1)
            for name in ("qweight", "scales")
        )
        return jnp.concatenate([_bytes(codes), _bytes(scales)])


class _Blocks:
    """Makes projections of GGUF blocks."""

    def __init__(self, linear_cls: Any, encoding: Encoding | str | None):
        self.linear_cls = linear_cls
        if isinstance(encoding, str):
            encoding = Encoding.from_name(encoding)
        self.encoding: Encoding | None = encoding

    def zeros(self, C: int | None, sizes: Any, width: int, has_bias: bool) -> Any:
        """q, k, v and o of zeros."""
        if C is None or self.encoding is None:
            raise ValueError(
                "without weights a layer needs hidden_size and quantization_encoding; "
                f"got {C} and {self.encoding}."
            )
        encoding, values = self.encoding, self.encoding.values
        for name, size in (
            ("hidden_size", C),
            ("num_attention_heads * head size", width),
        ):
            if size % values:
                raise ValueError(
                    f"{name} = {size} must be whole {encoding.name} blocks of {values}."
                )

        def make(size_in: int, size_out: int, bias: bool) -> Projection:
            shape = size_out, size_in // values, encoding.bytes
            zeros = jnp.zeros(size_out, jnp.float32) if bias else None
            blocks = jnp.zeros(shape, jnp.uint8)
            made: Projection = self.linear_cls(blocks, encoding, zeros)
            return made

        return [*(make(C, s, has_bias) for s in sizes), make(width, C, False)]

    def around(self, weights: dict[str, Any], sizes: Any, C: int | None) -> Any:
        """q, k, v and o as they are given."""
        if missing := {"q", "k", "v", "o"} - weights.keys():
            raise ValueError(f"weights lack {sorted(missing)}; got {sorted(weights)}.")
        q, k, v, o = (self._projection(weights[name]) for name in "qkvo")
        if (got := (q.out_features, k.out_features, v.out_features)) != sizes:
            raise ValueError(f"q, k and v must be {sizes} wide; got {got}.")
        if C is not None and o.out_features != C:
            raise ValueError(f"o must be hidden_size={C} wide; got {o.out_features}.")
        return q, k, v, o

    def _projection(self, weight: Any) -> Projection:
        if isinstance(weight, Projection):
            return weight
        if self.encoding is None:
            raise ValueError("raw blocks need a quantization_encoding.")
        made: Projection = self.linear_cls(weight, self.encoding, None)
        return made


def _bytes(x: Any) -> Any:
    """Each number's bytes, one below another: (R, N) -> uint8 (R * itemsize, N)."""
    split = jax.lax.bitcast_convert_type(x, jnp.uint8)  # (R, N, itemsize)
    return split.swapaxes(1, 2).reshape(-1, x.shape[1])
