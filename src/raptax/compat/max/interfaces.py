"""The general interfaces of MAX's page: a layer around weights that are there already.

`AttentionImpl` takes q, k and v as one weight, `AttentionImplQKV` as three. Each variant
is an adapter: it turns what its callers pass by name into a mask_mod or score_mod, and
calls the one forward pass. A variant of your own derives from either, says in `__call__`
what it needs, and ends in `attend`.
"""

import abc
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer

from ..._core.errors import check_groups
from ..._core.types import MaskMod, ScoreMod
from ...kv_cache import KVCache, KVCacheParams
from ...mods import ALiBi, Causal, Dense, DenseBias, Offset, alibi_slopes
from ...nn.attention import AttentionAround
from ...nn.linear import Linear, Projection, SeparateQKV, StackedQKV, held
from ...nn.sharding.distributed import DistributedAttention
from ...rope import RotaryEmbedding


class _Interface(nnx.Module, abc.ABC):
    """What both interfaces share: the checks, and the call of the forward pass."""

    n_heads: int
    kv_params: KVCacheParams
    scale: float
    attention: AttentionAround

    @abc.abstractmethod
    def __call__(
        self, x: Any, kv_collection: Any, valid_lengths: Any = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Attends, and returns the output and the collection with the new keys in it.

        Args:
            x: A padded batch ``(B, T, C)``, or ragged rows ``(R, C)``.
            kv_collection: A cache; its lengths are not advanced.
            valid_lengths: ``(B,)``: the rows of each sequence that are real. For a
                padded batch; all rows unless given.
            **kwargs: ``input_row_offsets`` for ragged rows, ``layer_idx``, and what the
                variant needs.
        """

    def _fill(self, qkv: Any, wo: Any, rope: Any) -> None:
        name = type(self).__name__
        H, params = self.n_heads, self.kv_params
        if self.scale is None:
            raise ValueError(f"scale must be provided to {name}.")
        check_groups(H, params.n_kv_heads)
        D, E, K = params.head_dim, params.value_size, params.n_kv_heads
        if qkv.widths != (wanted := (H * D, K * D, K * E)):
            raise ValueError(
                f"q, k and v of {name} must be {wanted} wide; got {qkv.widths}."
            )
        self.attention = AttentionAround(qkv, _projection(wo), D, self.scale, rope)

    def attend(
        self,
        x: Float[Array, "*rows C"],
        kv_collection: KVCache,
        valid_lengths: Integer[Array, " B"] | np.ndarray | None = None,
        *,
        input_row_offsets: Integer[Array, " offsets"] | np.ndarray | None = None,
        layer_idx: int | Int[Array, ""] = 0,
        mask_mod: MaskMod | None = Causal(),
        score_mod: ScoreMod | None = None,
    ) -> tuple[Any, Any]:
        """The forward pass, for variants to end in. Padding rows come out as zeros."""
        options: dict[str, Any] = dict(
            layer=layer_idx, mask_mod=mask_mod, score_mod=score_mod
        )
        if x.ndim == 2:
            if input_row_offsets is None or valid_lengths is not None:
                raise ValueError(
                    "ragged rows (R, C) come with input_row_offsets, and without "
                    "valid_lengths."
                )
            offsets = jnp.asarray(input_row_offsets, jnp.int32)
            return self.attention(x, kv_collection, row_offsets=offsets, **options)
        if input_row_offsets is not None:
            raise ValueError(
                "input_row_offsets go with rows (R, C), not with (B, T, C)."
            )
        if valid_lengths is None:
            return self.attention(x, kv_collection, **options)
        (B, T, C), lengths = x.shape, jnp.asarray(valid_lengths, jnp.int32)
        ends = jnp.cumsum(lengths)
        offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
        row = jnp.arange(T, dtype=jnp.int32)[None]
        real = row < lengths[:, None]
        place = jnp.where(
            real, offsets[:-1, None] + row, B * T
        )  # past the end: dropped
        rows = jnp.zeros((B * T, C), x.dtype).at[place].set(x, mode="drop")
        y, cache = self.attention(rows, kv_collection, row_offsets=offsets, **options)
        y = jnp.where(real[..., None], y[jnp.minimum(place, B * T - 1)], 0)
        return y, cache


class AttentionImpl(_Interface):
    """A layer around one weight for q, k and v. Abstract: see its variants.

    Args:
        n_heads: H.
        kv_params: The cache's sizes; K, D and the dtype.
        wqkv: q, k and v one after another, ``((H + 2 * K) * D, C)``, or a projection.
        wo: The output's weight ``(C, H * D)``, or a projection.
        scale: Of the scores.

    Raises:
        ValueError: Shapes that do not fit, or no scale.
    """

    def __init__(
        self,
        n_heads: int,
        kv_params: KVCacheParams,
        wqkv: Any,
        wo: Any,
        scale: float,
    ):
        self.n_heads, self.kv_params, self.scale = n_heads, kv_params, scale
        D, E, K = kv_params.head_dim, kv_params.value_size, kv_params.n_kv_heads
        qkv = StackedQKV(_projection(wqkv), (n_heads * D, K * D, K * E))
        self._fill(qkv, wo, getattr(self, "rope", None))

    @property
    def wqkv(self) -> Any:
        """The concatenation of q, k and v."""
        return self.attention.qkv.qkv.weight

    @property
    def wo(self) -> Any:
        """The output projection."""
        return self.attention.out


class AttentionImplQKV(_Interface):
    """A layer around three weights for q, k and v. Abstract: see its variants.

    Args:
        n_heads: H.
        kv_params: The cache's sizes; K, D and the dtype.
        wq: ``(H * D, C)``, or a projection.
        wk: ``(K * D, C)``, or a projection.
        wv: ``(K * E, C)``, or a projection.
        wo: The output's weight ``(C, H * E)``, or a projection.
        scale: Of the scores.

    Raises:
        ValueError: Shapes that do not fit, or no scale.
    """

    def __init__(
        self,
        n_heads: int,
        kv_params: KVCacheParams,
        wq: Any,
        wk: Any,
        wv: Any,
        wo: Any,
        scale: float,
    ):
        self.n_heads, self.kv_params, self.scale = n_heads, kv_params, scale
        qkv = SeparateQKV(*map(_projection, (wq, wk, wv)))
        self._fill(qkv, wo, getattr(self, "rope", None))

    @property
    def wq(self) -> Any:
        """The q weight."""
        return self.attention.qkv.q.weight

    @property
    def wk(self) -> Any:
        """The k weight."""
        return self.attention.qkv.k.weight

    @property
    def wv(self) -> Any:
        """The v weight."""
        return self.attention.qkv.v.weight

    @property
    def wo(self) -> Any:
        """The output projection."""
        return self.attention.out


def _projection(weight: Any) -> Projection:
    if isinstance(weight, Projection):
        return weight
    return Linear.from_weight(jnp.asarray(weight))


# What a variant does with the arguments of its call; one for each, whichever way the
# weights come.


class _Rope(_Interface):
    rope: RotaryEmbedding

    def __call__(self, x, kv_collection, valid_lengths=None, **kwargs):
        return self.attend(x, kv_collection, valid_lengths, **kwargs)


class _Alibi(_Interface):
    n_heads: int

    def __call__(self, x, kv_collection, valid_lengths=None, **kwargs):
        biases = ALiBi(alibi_slopes(self.n_heads))
        return self.attend(x, kv_collection, valid_lengths, score_mod=biases, **kwargs)


class _Vanilla(_Interface):
    def __call__(self, x, kv_collection, valid_lengths=None, **kwargs):
        if "attn_mask" not in kwargs:
            raise ValueError(f"attn_mask not provided to {type(self).__name__}")
        mods = _array_mods(kwargs.pop("attn_mask"), kv_collection.lengths)
        return self.attend(x, kv_collection, valid_lengths, **mods, **kwargs)


def _array_mods(
    mask: Bool[Array, "..."] | Float[Array, "..."], lengths: Any
) -> dict[str, Any]:
    """A mask of a chunk's rows ``(B, H, T, S)``, booleans or numbers to add."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.dtype == bool:
        return dict(mask_mod=Offset(Dense(mask), q=-lengths), score_mod=None)
    return dict(mask_mod=None, score_mod=Offset(DenseBias(mask), q=-lengths))


class AttentionWithRope(_Rope, AttentionImpl):
    """Causal attention with rotary positions, around one weight; see `AttentionImpl`.

    The layer that makes its own weights is `raptax.AttentionWithRope`.
    """

    def __init__(
        self,
        n_heads: int,
        kv_params: KVCacheParams,
        wqkv: Any,
        wo: Any,
        scale: float,
        rope: RotaryEmbedding,
    ):
        self.rope = held(rope)
        super().__init__(n_heads, kv_params, wqkv, wo, scale)


class AttentionWithRopeQKV(_Rope, AttentionImplQKV):
    """The same around three weights; see `AttentionImplQKV`."""

    def __init__(
        self,
        n_heads: int,
        kv_params: KVCacheParams,
        wq: Any,
        wk: Any,
        wv: Any,
        wo: Any,
        scale: float,
        *,
        rope: RotaryEmbedding,
    ):
        self.rope = held(rope)
        super().__init__(n_heads, kv_params, wq, wk, wv, wo, scale)


class AttentionWithAlibi(_Alibi, AttentionImpl):
    """Causal attention with ALiBi's biases, around one weight; see `AttentionImpl`."""


class AttentionWithAlibiQKV(_Alibi, AttentionImplQKV):
    """The same around three weights; see `AttentionImplQKV`."""


class VanillaAttentionWithCausalMask(_Vanilla, AttentionImpl):
    """Attention under a mask that every call brings as ``attn_mask``.

    It broadcasts to ``(B, H, T, S)``: ``T`` rows of this call, ``S`` keys from the first
    in the cache on. Booleans say who may attend; numbers are added to the scores. Without
    it the call raises ValueError. See `AttentionImpl`.
    """


class VanillaAttentionWithCausalMaskQKV(_Vanilla, AttentionImplQKV):
    """The same around three weights; see `AttentionImplQKV`."""


class DistributedAttentionImpl(nnx.Module, abc.ABC):
    """An attention layer on several devices; `DistributedAttention` is one."""

    @abc.abstractmethod
    def __call__(self, *args: Any, **options: Any) -> tuple[Any, Any]:
        """See `AbstractAttention.__call__`; arrays lie on a mesh of devices."""


DistributedAttentionImpl.register(DistributedAttention)
