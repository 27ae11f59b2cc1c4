"""The one attention forward pass, and its builds."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .._errors import check_groups
from .._types import MaskMod, ScoreMod
from ..caches import KVCacheParams, PagedKVCache
from ..dispatch import attention
from ..mods import Causal
from ..quant.gguf import Encoding
from ..rope import RotaryEmbedding
from .linear import GGUFLinear, Linear, Projection, SeparateQKV, StackedQKV
from .norm import RMSNorm


class AbstractAttention(nnx.Module):
    """The forward pass. Subclasses say what the parts are, never what happens.

    Every subclass is final and defines ``__init__`` alone: it fills these slots and
    overrides nothing, so the code below is all there is to read about any of them.

        qkv       x (..., C) -> q (..., H*D), k (..., K*D), v (..., K*E)
        out       (..., H*E) -> (..., C)
        rope      rotates (..., heads, D) by positions (...), or None
        q_norm, k_norm    applied per head before rope, or None
        scale, clip_qkv   numbers, or None for ``D ** -0.5`` and for no clipping
        head_size         D

    Head counts are read off the projections' widths, so a shard that holds some of the
    heads runs this same code.
    """

    qkv: Callable[..., Any]
    out: Projection
    rope: RotaryEmbedding | None
    q_norm: Callable[..., Any] | None
    k_norm: Callable[..., Any] | None
    scale: float | None
    clip_qkv: float | None
    head_size: int

    def __call__(
        self,
        x: Float[Array, "*rows C"],
        cache: PagedKVCache | None = None,
        *,
        row_offsets: Int[Array, " offsets"] | None = None,
        layer: int | Int[Array, ""] = 0,
        positions: Int[Array, "..."] | None = None,
        mask_mod: MaskMod | None = Causal(),
        score_mod: ScoreMod | None = None,
    ) -> tuple[Float[Array, "*rows C"], PagedKVCache | None]:
        """Attends among the rows of ``x``, and to what a cache holds.

        Args:
            x: A batch ``(B, T, C)``, or with a cache also ragged rows ``(R, C)``.
            cache: None means training or a whole pass. Its ``lengths`` are not
                advanced: every layer of a model writes to the same places.
            row_offsets: Where each sequence's rows begin; see `raptax._types`.
                A batch ``(B, T, C)`` has ``T`` rows each and needs none.
            layer: Which layer of the cache to use.
            positions: Absolute positions for the rotary embedding, one for each row, or
                ``(*rows, A)`` if it turns along ``A`` axes. Without them, rows count on
                from what the cache holds, or from 0.
            mask_mod: Which query may see which key; True means "may attend".
            score_mod: A change of the scaled scores.

        Returns:
            The output and the cache with this layer's keys and values, None if none
            came.
        """
        lead = x.shape[:-1]
        if cache is None:
            counted = _batch_positions(x, row_offsets)
        else:
            x, offsets = _ragged(x, row_offsets, cache)
            counted = cache.positions(x.shape[0], offsets)
        if positions is None:
            positions = counted
        else:
            positions = positions.reshape(*counted.shape, *positions.shape[len(lead) :])
        q, k, v = self._heads(x, positions)
        options: dict[str, Any] = dict(
            mask_mod=mask_mod, score_mod=score_mod, scale=self.scale
        )
        if cache is None:
            q, k, v = (
                a.swapaxes(1, 2) for a in (q, k, v)
            )  # (B, T, H, D) -> (B, H, T, D)
            y = attention(q, k, v, **options).swapaxes(1, 2)
        else:
            y, cache = cache.append_and_attend(
                q, k, v, row_offsets=offsets, layer=layer, **options
            )
        return self.out(y.reshape(*lead, -1)), cache

    def _heads(self, x, positions):
        """Projected, clipped, normed and rotated: each ``(..., heads, size)``."""
        q, k, v = self.qkv(x)
        if self.clip_qkv is not None:
            q, k, v = (jnp.clip(a, -self.clip_qkv, self.clip_qkv) for a in (q, k, v))
        rows, kv_heads = x.shape[:-1], k.shape[-1] // self.head_size
        q = q.reshape(*rows, -1, self.head_size)
        k, v = (a.reshape(*rows, kv_heads, -1) for a in (k, v))
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, positions), self.rope(k, positions)
        return q, k, v


def _ragged(x, row_offsets, cache) -> Any:
    """``x`` as rows ``(R, C)``, and where each sequence's rows begin."""
    if x.ndim == 3:
        B, T, C = x.shape
        if row_offsets is not None:
            raise ValueError("row_offsets go with rows (R, C), not with (B, T, C).")
        x, row_offsets = x.reshape(B * T, C), jnp.arange(B + 1, dtype=jnp.int32) * T
    if x.ndim != 2 or row_offsets is None:
        raise ValueError(
            f"with a cache x must be (batch, length, width), or rows (R, width) with "
            f"row_offsets; got {x.shape}."
        )
    if row_offsets.shape != (cache.lengths.shape[0] + 1,):
        raise ValueError(
            f"row_offsets {row_offsets.shape} must have one entry more than the cache's "
            f"{cache.lengths.shape[0]} sequences."
        )
    return x, row_offsets.astype(jnp.int32)


def _batch_positions(x, row_offsets):
    """Positions from 0 in each sequence of a batch without a cache."""
    if row_offsets is not None or x.ndim != 3:
        raise ValueError(
            "without a cache x must be (batch, length, width), and there are no "
            f"row_offsets; got {x.shape}."
        )
    B, T, _ = x.shape
    return jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))


class AttentionWithRope(AbstractAttention):
    """Attention with rotary positions, grouped heads, and weights of plain numbers.

    Takes the arguments of MAX's class of this name that concern one device and float
    weights. Head size and kv heads come from ``kv_params``, so ``H * D`` need not equal
    ``hidden_size``. ``clip_qkv`` clamps the projected q, k and v (MAX clamps the
    weights; checkpoints of OLMo, DBRX and MPT mean the projections).

    Raises:
        ValueError: Head counts that do not fit each other or ``kv_params``.
    """

    def __init__(
        self,
        *,
        rope: RotaryEmbedding | None,
        num_attention_heads: int,
        num_key_value_heads: int,
        hidden_size: int,
        kv_params: KVCacheParams,
        dtype: DTypeLike = jnp.float32,
        linear_cls: Callable[..., Projection] = Linear,
        stacked_qkv: bool = False,
        scale: float | None = None,
        has_bias: bool = False,
        clip_qkv: float | None = None,
        use_qk_norm: bool = False,
        rms_norm_eps: float = 1e-6,
        rngs: nnx.Rngs,
    ):
        _check_heads(num_attention_heads, num_key_value_heads, kv_params)
        D, E = kv_params.head_dim, kv_params.value_head_dim or kv_params.head_dim
        H, K = num_attention_heads, num_key_value_heads
        sizes = H * D, K * D, K * E

        def project(size: int) -> Projection:
            return linear_cls(
                hidden_size, size, has_bias=has_bias, dtype=dtype, rngs=rngs
            )

        if stacked_qkv:
            self.qkv = StackedQKV(project(sum(sizes)), sizes)
        else:
            self.qkv = SeparateQKV(*map(project, sizes))
        self.out = linear_cls(H * E, hidden_size, dtype=dtype, rngs=rngs)
        self.rope = nnx.data(rope)
        norm = lambda: (
            RMSNorm(D, eps=rms_norm_eps, dtype=dtype) if use_qk_norm else None
        )
        self.q_norm, self.k_norm = nnx.data(norm()), nnx.data(norm())
        self.scale, self.clip_qkv, self.head_size = scale, clip_qkv, D


class GGUFQAttentionWithRope(AbstractAttention):
    """Attention with rotary positions around quantised weights.

    Args:
        rope: Interleaved for Llama files: they store q and k permuted that way.
        num_attention_heads: H.
        num_key_value_heads: K.
        kv_params: The cache's sizes; head size and kv heads must agree with it.
        weights: ``q``, ``k``, ``v`` and ``o``, each a projection of its own encoding, or
            raw blocks of ``quantization_encoding``, uint8 ``(rows, blocks, bytes)``.
        quantization_encoding: What raw blocks are encoded as.
        scale: Of the scores; ``D ** -0.5`` unless given.
        clip_qkv: Clamps the projected q, k and v to ``[-clip_qkv, clip_qkv]``.
    """

    def __init__(
        self,
        *,
        rope: RotaryEmbedding | None,
        num_attention_heads: int,
        num_key_value_heads: int,
        kv_params: KVCacheParams,
        weights: dict[str, Any],
        quantization_encoding: Encoding | None = None,
        scale: float | None = None,
        clip_qkv: float | None = None,
    ):
        _check_heads(num_attention_heads, num_key_value_heads, kv_params)
        if missing := {"q", "k", "v", "o"} - weights.keys():
            raise ValueError(f"weights lack {sorted(missing)}; got {sorted(weights)}.")
        q, k, v, o = (_projection(weights[n], quantization_encoding) for n in "qkvo")
        D, E = kv_params.head_dim, kv_params.value_head_dim or kv_params.head_dim
        wanted = (
            num_attention_heads * D,
            num_key_value_heads * D,
            num_key_value_heads * E,
        )
        if (got := (q.out_features, k.out_features, v.out_features)) != wanted:
            raise ValueError(f"q, k and v must be {wanted} wide; got {got}.")
        self.qkv, self.out = SeparateQKV(q, k, v), o
        self.rope = nnx.data(rope)
        self.q_norm, self.k_norm = nnx.data(None), nnx.data(None)
        self.scale, self.clip_qkv, self.head_size = scale, clip_qkv, D


def _projection(weight: Any, encoding: Encoding | None) -> Projection:
    if isinstance(weight, Projection):
        return weight
    if encoding is None:
        raise ValueError("raw blocks need a quantization_encoding.")
    return GGUFLinear(weight, encoding)


def _check_heads(H: int, K: int, kv_params: KVCacheParams) -> None:
    check_groups(H, K)
    if kv_params.n_kv_heads != K:
        raise ValueError(
            f"num_key_value_heads={K} must equal kv_params.n_kv_heads="
            f"{kv_params.n_kv_heads}."
        )
