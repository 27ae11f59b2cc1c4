"""MaxText's `MLA`: latent attention; see `raptax.nn.mla`."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from ..._core.errors import Unsupported
from ...kv_cache.positioned import KVSegment
from ...nn import mla
from . import kvcache, positions
from .attention import Attention, LayerOptions
from .dense import DenseGeneral, RMSNorm
from .options import AttentionType, Number, signature_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAOptions(LayerOptions):
    """What latent attention takes beyond `LayerOptions`.

    Attributes:
        attention_type: "mla" alone.
        q_lora_rank: Width of the queries' own latent; 0 for none.
        kv_lora_rank: Width of the latent of keys and values.
        qk_nope_head_dim: Lanes of a head without positions.
        qk_rope_head_dim: Lanes of a head that are rotated.
        v_head_dim: Head size of values.
        max_position_embeddings: Above the original length, YaRN scales scores.
        original_max_position_embeddings: The length of pretraining.
        mscale: YaRN's multiplier.
        rope_factor: By how much positions are stretched.
    """

    attention_type: Any = AttentionType.MLA
    q_lora_rank: int = 0
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    max_position_embeddings: int = 4096 * 4
    original_max_position_embeddings: int = 4096
    mscale: Number = 1.0
    rope_factor: Number = 40.0

    __hash__ = LayerOptions.__hash__
    is_latent = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_query_heads != self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must equal num_query_heads="
                f"{self.num_query_heads}: latent attention has no groups."
            )
        if self.settings.fused_qkv or self.share_kv_projections:
            raise ValueError(
                "config.fused_qkv and share_kv_projections speak of projections that "
                "latent attention does not have."
            )
        if self.use_qk_norm or self.use_v_norm:
            raise ValueError(
                "use_qk_norm and use_v_norm are not for latent attention: it has norms "
                "of its own."
            )
        for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"{name}={size} must be at least 1.")

    @property
    def softmax_scale(self) -> float:
        """``(nope + rope) ** -0.5``, times YaRN's factor squared for long contexts."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        if self.max_position_embeddings > self.original_max_position_embeddings:
            scale *= (0.1 * self.mscale * math.log(self.rope_factor) + 1.0) ** 2
        return scale


class MLA(Attention):
    """Multi-head latent attention under MaxText's names. Takes `MLAOptions`.

    Parameters are ``query/kernel`` (E, N, nope + rope), or with a q_lora_rank
    ``wq_a/kernel``, ``q_norm/scale`` and ``wq_b/kernel``; ``wkv_a/kernel``
    (E, kv_lora_rank + rope), ``kv_norm/scale``, ``wkv_b/kernel``
    (kv_lora_rank, N, nope + v); ``out/kernel`` (N, v, E).

    The cache holds latents, and decoding asks these themselves. config.mla_naive_kvcache
    stores keys and values of every head instead; with ``quant`` they are expanded at each
    step, as quantized weights cannot be absorbed.
    """

    Options = MLAOptions

    def _init_projections(self) -> None:
        o = self.options
        width, N = o.inputs_q_shape[-1], o.num_query_heads
        head = o.qk_nope_head_dim + o.qk_rope_head_dim
        if o.q_lora_rank:
            rank = o.q_lora_rank
            self.wq_a = self._dense((width,), (rank,), ("embed", "q_lora"))
            self.q_norm = self._latent_norm(rank)
            self.wq_b = self._dense((rank,), (N, head), ("q_lora", "q_heads", "kv"))
        else:
            self.query = self._dense((width,), (N, head), ("embed", "q_heads", "kv"))
        rank, rope = o.kv_lora_rank, o.qk_rope_head_dim
        both = (N, o.qk_nope_head_dim + o.v_head_dim)
        width = o.inputs_kv_shape[-1]
        self.wkv_a = self._dense((width,), (rank + rope,), ("embed", "kv_lora"))
        self.kv_norm = self._latent_norm(rank)
        self.wkv_b: DenseGeneral = self._dense(
            (rank,), both, ("kv_lora", "kv_heads", "kv_head_dim")
        )

    def _latent_norm(self, size: int) -> RMSNorm:
        o = self.options
        return RMSNorm(
            size,
            eps=o.settings.normalization_layer_epsilon,
            dtype=o.dtype,
            weight_dtype=o.weight_dtype,
        )

    @property
    def out_head_dim(self) -> int:
        """Head size of values."""
        return self.options.v_head_dim

    def init_rotary_embedding(self) -> Any:
        """For the rotated lanes alone."""
        o = self.options
        return positions.choose(
            o,
            o.qk_rope_head_dim,
            theta=o.rope_max_timescale,
            factor=o.partial_rotary_factor,
            factors=(float(o.rope_factor), o.original_max_position_embeddings),
        )

    def _heads(self, inputs_q, inputs_kv, inputs_positions, rope_kwargs):
        o = self.options
        if o.q_lora_rank:
            q = self.wq_b(self.q_norm(self.wq_a(inputs_q)))
        else:
            q = self.query(inputs_q)
        both = self.wkv_a(inputs_kv)
        latent = self.kv_norm(both[..., : o.kv_lora_rank])[:, :, None]
        rope = both[..., None, o.kv_lora_rank :]
        if not o.is_nope_layer:
            turn = self.apply_rotary_embedding
            turned = turn(q[..., o.qk_nope_head_dim :], inputs_positions, rope_kwargs)
            q = q.at[..., o.qk_nope_head_dim :].set(turned)
            rope = turn(rope, inputs_positions, rope_kwargs)
        q = self._scaled(q * jnp.asarray(o.softmax_scale, q.dtype), inputs_positions)
        if o.settings.mla_naive_kvcache:
            return q, *self._all_heads(latent, rope)
        return q, latent, rope

    def _all_heads(self, latent, rope):
        nope = self.options.qk_nope_head_dim
        return mla.expand(self.wkv_b(latent[:, :, 0]), rope, nope)

    def _expanded(self, key, value):
        if self.options.settings.mla_naive_kvcache:
            return key, value
        return self._all_heads(key, value)

    def _absorbed(self, query, held: list[KVSegment]):
        o = self.options
        if o.settings.mla_naive_kvcache:
            return query, held, lambda y: y
        if o.quant is not None:
            heads = []
            for part in held:
                k, v = self._all_heads(*(x.swapaxes(1, 2) for x in part[:2]))
                heads.append(
                    KVSegment(k.swapaxes(1, 2), v.swapaxes(1, 2), part.positions)
                )
            return query, heads, lambda y: y
        w_k, w_v = jnp.split(self.wkv_b.kernel[...], [o.qk_nope_head_dim], axis=-1)
        query = mla.absorb_query(query, w_k)
        held = [KVSegment(*mla.latent_keys(*part[:2]), part.positions) for part in held]
        return query, held, lambda y: mla.project_values(y, w_v)

    @property
    def _cache_name(self) -> str:  # type: ignore[override]
        naive = self.options.settings.mla_naive_kvcache
        return "KVCache_0" if naive else "MlaKVCache_0"

    def init_kv_caches(self, inputs_kv_shape: tuple[int, ...]) -> Any:
        """An empty cache, of latents unless config.mla_naive_kvcache."""
        o = self.options
        heads, sizes = 1, (o.kv_lora_rank, o.qk_rope_head_dim)
        if o.settings.mla_naive_kvcache:
            head = o.qk_nope_head_dim + o.qk_rope_head_dim
            heads, sizes = o.num_kv_heads, (head, o.v_head_dim)
        return kvcache.create(o, inputs_kv_shape[0], heads, sizes)

    def forward_serve_vllm(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `Unsupported`: pages hold heads, not latents."""
        raise Unsupported("pages hold keys and values of heads, not latents.")


MLA.__signature__ = signature_of(MLAOptions, rngs=None)  # type: ignore[attr-defined]
