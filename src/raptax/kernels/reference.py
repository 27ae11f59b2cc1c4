"""Reference attention: the definition, which stores all scores."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._core.errors import check_bias, check_mask, check_qkv, check_sinks
from .._core.types import (
    Attended,
    DropoutKey,
    MaskMod,
    ScoreMod,
    position_indices,
    query_positions,
)
from ..block_mask import first_position
from ..mods import apply_mask, apply_score, as_mod
from .dropout import Dropout
from .softmax import accumulator, finite, poison


def reference_attention(
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S E"],
    *,
    mask: Bool[Array, "#B #H #T #S"] | None = None,
    mask_mod: MaskMod | None = None,
    score_mod: ScoreMod | None = None,
    bias: Float[Array, "#B #H #T #S"] | None = None,
    sinks: Float[Array, " H"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    query_start: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    dropout_rng: DropoutKey | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Attended:
    """See `AttentionFn`. Every other kernel is tested against this one.

    Stores all B * H * T * S scores. JAX differentiates it as it stands.
    """
    check_qkv(query, key, value)
    B, H, T, D = query.shape
    _, K, S, E = value.shape
    check_mask(mask, (B, H, T, S))
    check_bias(bias, (B, H, T, S))
    check_sinks(sinks, H)
    query_start = first_position(mask_mod, query_start, (B, H, T, S))
    dropout = Dropout.create(dropout_rng, dropout_rate, deterministic)
    dtype = accumulator(query.dtype)
    scale = jnp.asarray(D**-0.5 if scale is None else scale, dtype)

    # Head-major scores (B, K, G, T, S), where head h = k * G + g; see softmax.py for
    # why products run on finite numbers and NaN is carried apart.
    grouped = finite(query).reshape(B, K, H // K, T, D).astype(dtype)
    scores = jnp.einsum("bkgtd,bksd->bkgts", grouped, finite(key).astype(dtype))
    seen = poison(key, dtype) + poison(value, dtype)
    scores = scores * scale + seen[:, :, None, None]
    scores = scores.reshape(B, H, T, S) + poison(query, dtype)[..., None]

    if bias is not None:
        scores = scores + bias.astype(dtype)
    kv_idx = jnp.arange(S, dtype=jnp.int32)
    indices = position_indices(B, H, query_positions(query_start, T, S), kv_idx)
    allowed = jnp.ones((B, H, T, S), bool)
    if mask is not None:
        allowed &= mask
    if mask_mod is not None:
        allowed &= apply_mask(as_mod(mask_mod), *indices)
    if score_mod is not None:  # which learns nothing from what is masked, NaN or not
        scores = jnp.where(allowed, scores, 0)
        scores = apply_score(as_mod(score_mod), scores, *indices)

    scores = jnp.where(allowed, scores, -jnp.inf)
    high = jax.lax.stop_gradient(scores.max(-1, keepdims=True, initial=-jnp.inf))
    sink = jnp.full((1, H, 1, 1), -jnp.inf, dtype)
    if sinks is not None:
        sink = sinks.astype(dtype).reshape(sink.shape)
        high = jnp.maximum(high, jax.lax.stop_gradient(sink))
    # A finite stand-in, so that a row with no allowed key does not become inf - inf.
    high = jnp.where(jnp.isneginf(high), 0, high)
    weights = jnp.exp(scores - high)
    total = weights.sum(-1, keepdims=True) + jnp.exp(sink - high)
    something = jnp.where(total == 0, 1, total)  # or the logarithm's slope is NaN
    lse = jnp.where(total == 0, -jnp.inf, high + jnp.log(something)).squeeze(-1)
    weights = weights / something
    if dropout is not None:
        weights = dropout(weights, indices)

    weights = weights.reshape(B, K, H // K, T, S)
    out = jnp.einsum("bkgts,bkse->bkgte", weights, finite(value).astype(dtype))
    out = out.reshape(B, H, T, E).astype(query.dtype)
    return (out, lse) if return_lse else out
