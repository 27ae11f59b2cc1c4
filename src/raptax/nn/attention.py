"""The one attention forward pass, and its builds."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from .._core.errors import Unsupported, check_dropout, check_groups
from .._core.types import DropoutKey, MaskMod, ScoreMod
from ..api.attention import SegmentIds, attention
from ..kv_cache import KVCache, KVCacheParams
from ..mods import Causal
from ..quant.float8 import Float8Config
from ..rope import RotaryEmbedding
from ..rope.turns import wide_dtype
from .linear import Linear, Projection, SeparateQKV, StackedQKV, held
from .norm import RMSNorm
from .quantized_linear import Float8Linear
from .sharding.heads import head_layout, with_heads
from .sharding.placement import on_device
from .sharding.strategy import ShardingStrategy

CAUSAL = Causal()
Rows = Int[Array, "..."] | Int[np.ndarray, "..."]


class AbstractAttention(nnx.Module):
    """The forward pass. Subclasses say what the parts are, never what happens.

    Every subclass is final and defines ``__init__`` and documented properties: it fills
    these slots and overrides nothing, so the code below is all there is to read about
    any of them.

        qkv       x (..., C) -> q (..., H*D), k (..., K*D), v (..., K*E)
        out       (..., H*E) -> (..., C)
        rope      rotates (..., heads, D) by positions (...), or None
        q_norm, k_norm    applied per head before rope, or None
        scale, clip_qkv   numbers, or None for ``D ** -0.5`` and for no clipping
        head_size         D
        sinks     one learned number a query head, or None; see `AttentionFn`
        dropout_rate, rngs    of the attention weights, and what it draws keys with

    ``deterministic`` turns dropout off, as ``layer.eval()`` does, and ``layer.train()``
    turns it on.

    Head counts are read off the projections' widths, so a shard that holds some of the
    heads runs this same code.
    """

    qkv: Any  # called; `SeparateQKV` and `StackedQKV` also know their widths
    out: Projection
    rope: RotaryEmbedding | None
    q_norm: Callable[..., Any] | None
    k_norm: Callable[..., Any] | None
    scale: float | None
    clip_qkv: float | None
    head_size: int
    sinks: Any = None
    dropout_rate: float = 0.0
    rngs: nnx.Rngs | None = None
    deterministic: bool = False

    def __call__(
        self,
        x: Float[Array, "*rows C"],
        cache: KVCache | None = None,
        *,
        row_offsets: Rows | None = None,
        layer: int | Int[Array, ""] = 0,
        positions: Rows | None = None,
        mask_mod: MaskMod | None = CAUSAL,
        score_mod: ScoreMod | None = None,
        inputs_kv: Float[Array, "B S C"] | None = None,
        mask: Bool[Array, "..."] | None = None,
        segment_ids: SegmentIds | None = None,
        key_lengths: Rows | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | DropoutKey | None = None,
    ) -> tuple[Float[Array, "*rows C"], KVCache | None]:
        """Attends among the rows of ``x``, and to what a cache holds.

        With a cache, what follows ``score_mod`` is not for it: a cache knows its lengths,
        and otherwise takes ``mask_mod`` and ``score_mod``.

        Args:
            x: A batch ``(B, T, C)``, or with a cache also ragged rows ``(R, C)``.
            cache: None means training or a whole pass. Its ``lengths`` are not
                advanced: every layer of a model writes to the same places.
            row_offsets: Where each sequence's rows begin; see `raptax._core.types`.
                A batch ``(B, T, C)`` has ``T`` rows each and needs none.
            layer: Which layer of the cache to use.
            positions: Absolute positions for the rotary embedding, one for each row, or
                ``(*rows, A)`` if it turns along ``A`` axes. Without them, rows count on
                from what the cache holds, or from 0.
            mask_mod: Which query may see which key; True means "may attend". With
                ``inputs_kv`` every key, unless another mask is given.
            score_mod: A change of the scaled scores.
            inputs_kv: Cross attention: keys and values are made of these rows, ``(B, S,
                C)``. For layers without rotary positions.
            mask: As in `raptax.attention`; combined with ``mask_mod`` by "and".
            segment_ids: As in `raptax.attention`.
            key_lengths: Sequence ``b`` has so many keys, and as many rows of ``x`` unless
                there are ``inputs_kv``; later ones are padding.
            deterministic: True turns dropout off; what the layer says unless given.
            rngs: What dropout draws its key with, or a key; the layer's own unless given.

        Returns:
            The output and the cache with this layer's keys and values, None if none
            came.

        Raises:
            ValueError: Arguments that do not go together, or shapes that do not fit.
            Unsupported: Sinks or dropout with a cache.
        """
        lead = x.shape[:-1]
        extra: dict[str, Any] = dict(
            mask=mask, segment_ids=segment_ids, key_lengths=key_lengths
        )
        dropout = self._dropout(deterministic, rngs)
        self._check(cache, inputs_kv, extra, dropout)
        if cache is None:
            counted = _batch_positions(x, row_offsets)
        else:
            x, offsets = _ragged(x, row_offsets, cache)
            counted = cache.positions(x.shape[0], offsets)
        if positions is None:
            positions = counted
        else:
            positions = positions.reshape(*counted.shape, *positions.shape[len(lead) :])
        q, k, v = self._heads(x, positions, inputs_kv)
        options: dict[str, Any] = dict(
            mask_mod=mask_mod, score_mod=score_mod, scale=self.scale
        )
        if cache is None:
            options |= _whole(inputs_kv is not None, mask_mod, **extra) | dropout
            sinks = (
                None if self.sinks is None else self.sinks[...].astype(wide_dtype(q))
            )
            q, k, v = (
                a.swapaxes(1, 2) for a in (q, k, v)
            )  # (B, T, H, D) -> (B, H, T, D)
            y = attention(q, k, v, sinks=sinks, **options).swapaxes(1, 2)
        else:
            y, cache = cache.append_and_attend(
                q, k, v, row_offsets=offsets, layer=layer, **options
            )
        return self.out(y.reshape(*lead, y.shape[-2] * y.shape[-1])), cache

    def _dropout(self, deterministic: Any, rngs: Any) -> dict[str, Any]:
        """What `attention` is told of dropout; nothing where there is none."""
        off = self.deterministic if deterministic is None else deterministic
        if not self.dropout_rate or off:
            return {}
        rngs = self.rngs if rngs is None else rngs
        key = rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs
        return dict(
            dropout_rng=key, dropout_rate=self.dropout_rate, deterministic=False
        )

    def _check(self, cache, inputs_kv, extra, dropout) -> None:
        """That the arguments of a call go together."""
        if inputs_kv is not None and self.rope is not None:
            raise ValueError(
                "inputs_kv have no positions in common with x, and this layer rotates by "
                "positions: build it with rope=None for cross attention."
            )
        if cache is None:
            return
        given = [name for name, x in extra.items() if x is not None]
        given += ["inputs_kv"] * (inputs_kv is not None)
        if given:
            raise ValueError(
                f"{', '.join(given)} with a cache: it holds the keys and knows their "
                "lengths; say who sees whom by mask_mod."
            )
        for name, there in (("sinks", self.sinks is not None), ("dropout", dropout)):
            if there:
                raise Unsupported(
                    f"caches attend without {name}: this layer serves whole passes, "
                    "without a cache."
                )

    def _heads(self, x, positions, inputs_kv=None):
        """Projected, clipped, normed and rotated: each ``(..., heads, size)``."""
        q, k, v = self.qkv(x) if inputs_kv is None else self.qkv(x, inputs_kv)
        if self.clip_qkv is not None:
            q, k, v = (jnp.clip(a, -self.clip_qkv, self.clip_qkv) for a in (q, k, v))
        D, kv_heads = self.head_size, k.shape[-1] // self.head_size
        q, k = (a.reshape(*a.shape[:-1], a.shape[-1] // D, D) for a in (q, k))
        v = v.reshape(*v.shape[:-1], kv_heads, v.shape[-1] // kv_heads)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, positions), self.rope(k, positions)
        return q, k, v


def _whole(cross: bool, mask_mod: Any, *, key_lengths: Any, **extra: Any) -> Any:
    """The options of `attention` for a call without a cache."""
    if key_lengths is not None:
        extra["key_lengths"] = key_lengths = jnp.asarray(key_lengths, jnp.int32)
        if not cross:
            extra["query_lengths"] = key_lengths
    if cross and mask_mod is CAUSAL:
        extra["mask_mod"] = None
    return extra


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
    return x, jnp.asarray(row_offsets, jnp.int32)


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

    ``clip_qkv`` clamps the projected q, k and v (MAX clamps the weights; checkpoints of
    OLMo, DBRX and MPT mean the projections). The output projection has no bias.

    Args:
        rope: Rotary positions, or None.
        sharding_strategy: `ShardingStrategy.tensor_parallel` or `replicate`: what
            `shard` does.
        num_attention_heads: H.
        num_key_value_heads: K.
        hidden_size: C. ``H * D`` need not equal it.
        kv_params: The cache's sizes; head size and kv heads must agree with it.
        devices: Weights are put on the first one.
        dtype: Of the weights.
        linear_cls: Makes a projection from ``(in_features, out_features)`` and
            ``has_bias``, ``dtype`` and ``rngs``.
        stacked_qkv: One projection for q, k and v.
        scale: Of the scores; ``D ** -0.5`` unless given.
        has_bias: Whether q, k and v have biases.
        float8_config: How weights and inputs are brought to float8. ``linear_cls`` is
            then called with it as ``config`` too, and `Float8Linear` stands for
            `Linear`. ``dtype`` is that of biases and norms; float32 if it says float8.
        clip_qkv: Clamps the projected q, k and v to ``[-clip_qkv, clip_qkv]``.
        use_qk_norm: RMS norms of q and k per head, before rope.
        rms_norm_eps: Of both norms.
        use_sinks: A learned sink for each query head, as in gpt-oss, zeros at first.
        dropout_rate: Probability that an attention weight is dropped in training.
        rngs: What random weights are drawn with. Without it they are drawn from seed
            0, to be replaced by a checkpoint's (`raptax.nn.checkpoint`).

    Raises:
        ValueError: Head counts that do not fit each other or ``kv_params``, or another
            argument that has no sense.
    """

    def __init__(
        self,
        *,
        rope: RotaryEmbedding | None,
        sharding_strategy: ShardingStrategy | None = None,
        num_attention_heads: int,
        num_key_value_heads: int,
        hidden_size: int,
        kv_params: KVCacheParams,
        devices: Sequence[Any] | None = None,
        dtype: DTypeLike = jnp.float32,
        linear_cls: Callable[..., Projection] = Linear,
        stacked_qkv: bool = False,
        scale: float | None = None,
        has_bias: bool = False,
        float8_config: Float8Config | None = None,
        clip_qkv: float | None = None,
        use_qk_norm: bool = False,
        rms_norm_eps: float = 1e-6,
        use_sinks: bool = False,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs | None = None,
    ):
        H, K, C = num_attention_heads, num_key_value_heads, hidden_size
        D, E = head_sizes(H, K, kv_params)
        if float8_config is not None:
            linear_cls = Float8Linear.create if linear_cls is Linear else linear_cls
            linear_cls = partial(linear_cls, config=float8_config)
            dtype = jnp.float32 if jnp.dtype(dtype).itemsize == 1 else dtype
        rngs = nnx.Rngs(0) if rngs is None else rngs
        options = dict(dtype=dtype, rngs=rngs)
        self.qkv = _qkv(
            lambda size: linear_cls(C, size, has_bias=has_bias, **options),
            (H * D, K * D, K * E),
            stacked=stacked_qkv,
        )
        self.out = linear_cls(H * E, C, has_bias=False, **options)
        norm = lambda: (
            RMSNorm(D, eps=rms_norm_eps, dtype=dtype) if use_qk_norm else None
        )
        self.q_norm, self.k_norm = nnx.data(norm()), nnx.data(norm())
        self.rope = held(rope)
        self.scale, self.clip_qkv, self.head_size = scale, checked_clip(clip_qkv), D
        self.sinks = nnx.Param(jnp.zeros(H, dtype)) if use_sinks else None
        check_dropout(None, dropout_rate, deterministic=True)
        self.dropout_rate = dropout_rate
        self.rngs = nnx.data(rngs.fork() if dropout_rate else None)
        self._sharding_strategy = _layer_strategy(sharding_strategy)
        to_first_device(self, devices)

    @property
    def wqkv(self) -> Any:
        """The weights of q, k and v one after another, ``((H + 2 * K) * D, C)``.

        float8 weights as they are stored: nothing is brought to a common scale.
        """
        return jnp.concatenate([p.weight[...] for p in projections(self)])

    @property
    def wqkv_bias(self) -> Any:
        """Their biases one after another, or None."""
        return biases_of(self)

    @property
    def qkv_input_scale(self) -> Any:
        """The largest of the static input scales of q, k and v; None if there are none.

        Every projection uses its own.
        """
        return _largest_scale(self, "input_scale")

    @property
    def qkv_weight_scale(self) -> Any:
        """The weight scales of q, k and v: the largest, if each has a single one.

        Scales of rows or blocks come one after another, as the rows of `wqkv` do. Every
        projection uses its own. Raises ValueError for weights without scales.
        """
        scales = [getattr(p, "weight_scale", None) for p in projections(self)]
        if any(scale is None for scale in scales):
            raise ValueError("qkv_weight_scale is of float8 weights: no float8_config.")
        arrays = [scale[...] for scale in scales if scale is not None]
        if arrays[0].ndim == 0:
            return jnp.max(jnp.stack(arrays))
        return jnp.concatenate(arrays)

    @property
    def qkv_weight_scale_2(self) -> Any:
        """The largest of NVFP4's second weight scales of q, k and v, or None."""
        return _largest_scale(self, "weight_scale_2")

    @property
    def sharding_strategy(self) -> ShardingStrategy | None:
        """What `shard` does. Only `tensor_parallel` and `replicate` may be set."""
        return self._sharding_strategy

    @sharding_strategy.setter
    def sharding_strategy(self, strategy: ShardingStrategy | None) -> None:
        self._sharding_strategy = _layer_strategy(strategy)

    def shard(self, devices: Sequence[Any]) -> "list[AttentionWithRope]":
        """One layer for each device, as ``sharding_strategy`` says.

        `tensor_parallel`: each with the heads of `head_layout`; on the same rows their
        outputs add up to this layer's. `replicate`: whole copies.
        `TensorParallelAttentionWithRope` is the same inside one program.

        Raises:
            ValueError: No strategy is set, it is for another number of devices, or
                heads cannot be shared out so.
        """
        strategy = self.sharding_strategy
        if strategy is None:
            raise ValueError(
                "AttentionWithRope cannot be sharded without a sharding_strategy; set "
                "ShardingStrategy.tensor_parallel(n) or replicate(n) first."
            )
        if len(devices) != strategy.num_devices:
            raise ValueError(
                f"sharding_strategy is for {strategy.num_devices} devices; got "
                f"{len(devices)}."
            )
        if strategy.is_replicate:
            return [on_device(self, device) for device in devices]
        q_width, k_width, _ = self.qkv.widths
        D = self.head_size
        layout = head_layout(q_width // D, k_width // D, len(devices))
        parts = (
            with_heads(self, q[q >= 0][None], kv[kv >= 0][None])
            for q, kv in zip(*layout, strict=True)
        )
        return [on_device(part, d) for part, d in zip(parts, devices, strict=True)]


class AttentionAround(AbstractAttention):
    """The forward pass around projections that are given.

    Args:
        qkv: What `AbstractAttention` has in the slot of this name.
        out: The output projection.
        head_size: D.
        scale: Of the scores; ``D ** -0.5`` if None.
        rope: Rotary positions, or None.
    """

    def __init__(self, qkv: Any, out: Any, head_size: int, scale: Any, rope: Any):
        self.qkv, self.out = qkv, out
        self.rope = held(rope)
        self.q_norm, self.k_norm = nnx.data(None), nnx.data(None)
        self.scale, self.clip_qkv, self.head_size = scale, None, head_size


# ------------------------------------------------------------------ what builds share


def head_sizes(H: int, K: int, kv_params: KVCacheParams) -> tuple[int, int]:
    """Head sizes of keys and values, if the head counts agree."""
    check_groups(H, K)
    if kv_params.n_kv_heads != K:
        raise ValueError(
            f"num_key_value_heads={K} must equal kv_params.n_kv_heads="
            f"{kv_params.n_kv_heads}."
        )
    if kv_params.is_mla:
        raise ValueError(
            "kv_params.is_mla=True is for latent attention; these layers store values."
        )
    return kv_params.head_dim, kv_params.value_size


def _qkv(make: Callable[[int], Any], sizes: tuple[int, int, int], *, stacked: bool):
    if stacked:
        return StackedQKV(make(sum(sizes)), sizes)
    return SeparateQKV(*map(make, sizes))


def projections(layer: AbstractAttention) -> list[Any]:
    """Those of q, k and v, or the stacked one."""
    qkv: Any = layer.qkv
    return [qkv.qkv] if isinstance(qkv, StackedQKV) else [qkv.q, qkv.k, qkv.v]


def biases_of(layer: AbstractAttention) -> Any:
    """The biases of q, k and v one after another, or None."""
    biases = [p.bias for p in projections(layer)]
    if any(bias is None for bias in biases):
        return None
    return jnp.concatenate([bias[...] for bias in biases])


def _largest_scale(layer: AbstractAttention, name: str) -> Any:
    scales = [getattr(p, name, None) for p in projections(layer)]
    if any(scale is None for scale in scales):
        return None
    return jnp.max(jnp.stack([scale[...] for scale in scales if scale is not None]))


def checked_clip(clip_qkv: float | None) -> float | None:
    """``clip_qkv``, if it makes sense."""
    if clip_qkv is not None and not clip_qkv > 0:
        raise ValueError(
            f"clip_qkv={clip_qkv} must be above 0, or None for no clipping."
        )
    return clip_qkv


def _layer_strategy(strategy: ShardingStrategy | None) -> ShardingStrategy | None:
    if strategy is None or strategy.is_tensor_parallel or strategy.is_replicate:
        return strategy
    raise ValueError(
        f"sharding_strategy {strategy.kind!r} is of a weight; a layer takes "
        "tensor_parallel or replicate."
    )


def to_first_device(layer: AbstractAttention, devices: Sequence[Any] | None) -> None:
    """Moves a layer's arrays to the first device, if any are named."""
    if devices is None:
        return
    if not len(devices):
        raise ValueError("devices=() must name a device, or be None.")
    for name in ("qkv", "out", "q_norm", "k_norm", "sinks"):
        if (part := getattr(layer, name)) is not None:
            nnx.update(part, jax.device_put(nnx.state(part), devices[0]))
    layer.rope = nnx.data(jax.device_put(layer.rope, devices[0]))
