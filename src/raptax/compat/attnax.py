"""Names that attnax and its users know for what is here under another.

Kernels keep to `AttentionFn`: ``(query, key, value, *, mask, score_mod, dropout_rng,
dropout_rate, deterministic)``, and take the other options of `attention` too. What
attnax does otherwise is said where it matters: queries stand at the end of the keys
(with as many queries as keys it is the same), a row that sees nothing is zero, dropout
drops weights in every kernel, and `linear_attention` is causal only when asked.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._core.types import Attended, MaskMod, ScoreMod
from ..api.attention import attention, attention_in_tiles
from ..mods import (
    ALiBi,
    Causal,
    DenseBias,
    Documents,
    MaskedScore,
    PrefixLM,
    SlidingWindow,
    Window,
    alibi_slopes,
    as_mod,
    mask_mod_to_boolean_mask,
)

# ------------------------------------------------------------------------------ kernels


def standard_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
) -> Attended:
    """`attention` with ``kernel="reference"``, which stores all scores."""
    return attention(query, key, value, kernel="reference", **options)


def memory_efficient_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    block_size: int | tuple[int, int] | None = None,
    **options: Any,
) -> Attended:
    """`attention` with ``kernel="blockwise"``, in O(S) memory.

    ``block_size`` queries and keys, or (queries, keys), make a tile of its loops. It
    changes how fast, never what, and is chosen by the kernel unless given.
    """
    if block_size is not None:
        return attention_in_tiles(query, key, value, block_size, **options)
    return attention(query, key, value, kernel="blockwise", **options)


def flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    block_size: int | tuple[int, int] | None = None,
    **options: Any,
) -> Attended:
    """`attention` with the best kernel for this machine.

    With ``block_size`` that is ``blockwise``, the only one whose tiles can be chosen;
    see `memory_efficient_attention`. Leave it out where speed matters: the other
    kernels know the best sizes for themselves.
    """
    if block_size is not None:
        return attention_in_tiles(query, key, value, block_size, **options)
    return attention(query, key, value, **options)


# -------------------------------------------------------------------------- score_mods


def mask_mod_to_score_mod(mask_mod: MaskMod) -> ScoreMod:
    """`MaskedScore`. Prefer the mask as ``mask_mod``: kernels skip what it empties."""
    return MaskedScore(as_mod(mask_mod))


def alibi_mod(num_heads: int) -> ScoreMod:
    """`ALiBi` with the slopes of its paper."""
    return ALiBi(alibi_slopes(num_heads))


def causal_mod() -> ScoreMod:
    """`Causal` as a score_mod."""
    return MaskedScore(Causal())


def sliding_window_mod(window_size: int, *, causal: bool = True) -> ScoreMod:
    """`_window` as a score_mod."""
    return MaskedScore(_window(window_size, causal))


def prefix_lm_mod(prefix_lengths: Int[Array, " B"]) -> ScoreMod:
    """`PrefixLM` as a score_mod."""
    return MaskedScore(PrefixLM(prefix_lengths))


def document_mask_mod(document_ids: Int[Array, "#B S"]) -> ScoreMod:
    """`Documents` as a score_mod."""
    return MaskedScore(Documents(document_ids))


def additive_bias_mod(bias: Float[Array, "..."]) -> ScoreMod:
    """`DenseBias` of any rank that broadcasts to (B, H, T, S).

    Prefer ``bias`` of `attention`, whose gradient costs less.
    """
    return DenseBias(bias.reshape((1,) * (4 - bias.ndim) + bias.shape))


def _window(size: int, causal: bool) -> MaskMod:
    """The last ``size`` keys, or those less than ``size`` away on both sides."""
    if size < 1:
        raise ValueError(f"window_size={size} must be at least 1.")
    return SlidingWindow(size) if causal else Window(size - 1, size - 1)


# ------------------------------------------------------------------------ boolean masks


def make_causal_mask(seq_len: int) -> Bool[Array, "1 1 {seq_len} {seq_len}"]:
    """`Causal` as an array."""
    return mask_mod_to_boolean_mask(
        Causal(), batch=1, num_heads=1, seq_q=seq_len, seq_kv=seq_len
    )


def make_sliding_window_mask(
    seq_q: int, seq_kv: int | None = None, *, window_size: int, causal: bool = True
) -> Bool[Array, "1 1 T S"]:
    """`SlidingWindow` as an array, or `Window` on both sides without ``causal``."""
    seq_kv = seq_q if seq_kv is None else seq_kv
    mask_mod = _window(window_size, causal)
    return mask_mod_to_boolean_mask(
        mask_mod, batch=1, num_heads=1, seq_q=seq_q, seq_kv=seq_kv
    )


def make_document_mask(document_ids: Int[Array, "B S"]) -> Bool[Array, "B 1 S S"]:
    """`Documents` as an array."""
    B, S = document_ids.shape
    return mask_mod_to_boolean_mask(
        Documents(document_ids), batch=B, num_heads=1, seq_q=S, seq_kv=S
    )


def make_padding_mask(
    input_ids: Int[Array, "B S"], pad_token_id: int = 0
) -> Bool[Array, "B 1 1 S"]:
    """True for the keys that are no padding."""
    return (input_ids != pad_token_id)[:, None, None]


def combine_masks(
    *masks: Bool[Array, "..."] | None,
) -> Bool[Array, "..."] | None:
    """Allowed by every one of ``masks``; None among them is skipped."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    return jnp.stack(jnp.broadcast_arrays(*given)).all(0)
