"""Attention over pages, under the names that TPU kernels and vLLM's engine use.

Pages hold keys and values together: ``(pages, page size, 2 K, D)``, where head ``2 k`` is
the key of kv head ``k`` and head ``2 k + 1`` its value.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..._core.pytree import pytree, static
from ...api.paged import paged_attention
from ...kernels.paged import places
from ...mods import Causal, Mask, SlidingWindow, SoftCap


def ragged_paged_attention(
    q: Float[Array, "R H D"],
    kv_pages: Array,
    kv_lens: Int[Array, " B"],
    page_indices: Int[Array, "B M"],
    cu_q_lens: Int[Array, " B+1"],
    num_seqs: Int[Array, "1"],
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    attention_sink: Float[Array, " H"] | None = None,
) -> Float[Array, "R H D"]:
    """Prompts in chunks and single tokens of many sequences, in one call.

    Args:
        q: Packed (ragged) tokens. The last row of a sequence stands at
            its last key, and each sees the keys up to its own position.
        kv_pages: See the module; any dtype.
        kv_lens: Keys of each sequence, the rows' own included.
        page_indices: The pages of each sequence, in order; entries that are not needed
            may hold anything. One that is needed and names no page is refused; see
            `paged_attention`.
        cu_q_lens: Where each sequence's rows begin; later rows are padding.
        num_seqs: How many sequences there are; those behind are not looked at.
        sm_scale: Of the scores.
        sliding_window: How many keys a row sees, its own included.
        soft_cap: Bends scores to ``cap * tanh(score / cap)``.
        k_scale: What keys are multiplied by.
        v_scale: What values are multiplied by.
        attention_sink: For each head the score of one more key, whose value is zero.

    Returns:
        The query's dtype; zeros in padding rows.

    Raises:
        ValueError: Shapes do not fit.
    """
    if kv_pages.ndim != 4 or kv_pages.shape[2] % 2 or kv_pages.shape[3] != q.shape[2]:
        raise ValueError(
            f"kv_pages {kv_pages.shape} must be (pages, page size, 2 * kv heads, "
            f"{q.shape[2]}), keys and values in turn."
        )
    B, M = page_indices.shape
    real = jnp.arange(B, dtype=jnp.int32) < num_seqs[0]
    ends = jnp.arange(B + 1, dtype=jnp.int32)
    offsets = cu_q_lens[jnp.minimum(ends, num_seqs[0])]
    lengths = jnp.where(real, kv_lens, 0)
    # Only pages of these sequences are brought together, not the whole pool. One more
    # page of zeros stands before each sequence: it holds the sink.
    flat = jnp.clip(page_indices.reshape(-1), 0, kv_pages.shape[0] - 1)
    few = jnp.pad(kv_pages[flat], ((0, 1), (0, 0), (0, 0), (0, 0)))
    k, v = (
        _pages(few[:, :, n::2], q.dtype, s) for n, s in ((0, k_scale), (1, v_scale))
    )
    table = jnp.arange(B * M, dtype=jnp.int32)
    table = jnp.where(page_indices.reshape(-1) == flat, table, -1).reshape(B, M)
    mask_mod = Causal() if sliding_window is None else SlidingWindow(sliding_window)
    score_mod = SoftCap(float(soft_cap)) if soft_cap else None
    options: dict[str, Any] = dict(mask_mod=mask_mod, score_mod=score_mod)
    if attention_sink is not None:
        P = kv_pages.shape[1]
        table = jnp.concatenate([jnp.full((B, 1), B * M, jnp.int32), table], axis=1)
        lengths = jnp.where(real, lengths + P, 0)
        options = dict(
            mask_mod=_BehindSink(mask_mod, P),
            score_mod=_Sink(attention_sink, score_mod, P),
        )
    return paged_attention(
        q,
        k,
        v,
        table=table,
        lengths=lengths,
        row_offsets=offsets,
        scale=sm_scale,
        **options,
    )


def _pages(x: jax.Array, dtype: Any, scale: float | None) -> jax.Array:
    """``(N, P, K, D) -> (N, K, P, D)`` in the query's dtype."""
    x = x.swapaxes(1, 2).astype(dtype)
    return x if scale is None else x * jnp.asarray(scale, dtype)


@pytree
class _BehindSink(Mask):
    """``mod`` for sequences behind a page of ``size``, whose last slot all see."""

    mod: Any
    size: int = static()

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        allowed = self.mod(b_idx, h_idx, q_idx - self.size, kv_idx - self.size)
        return ((kv_idx >= self.size) & allowed) | (kv_idx == self.size - 1)


@pytree
class _Sink:
    """Scores of the page before a sequence are the sinks; the others change as ever."""

    sinks: Float[Array, " H"]
    score_mod: Any
    size: int = static()

    def __call__(self, scores, b_idx, h_idx, q_idx, kv_idx):
        changed = scores
        if self.score_mod is not None:
            changed = self.score_mod(scores, b_idx, h_idx, q_idx, kv_idx)
        sink = self.sinks.astype(scores.dtype)[h_idx]
        return jnp.where(kv_idx < self.size, sink, changed)


def write_pages(
    kv_pages: Array,
    key: Float[Array, "R K D"],
    value: Float[Array, "R K D"],
    *,
    kv_lens: Int[Array, " B"],
    page_indices: Int[Array, "B M"],
    cu_q_lens: Int[Array, " B+1"],
) -> Array:
    """Writes each row at its place; rows that have none, and padding, are dropped."""
    P, M = kv_pages.shape[1], page_indices.shape[1]
    before = kv_lens - (cu_q_lens[1:] - cu_q_lens[:-1])
    sequence, position, real = places(key.shape[0], before, cu_q_lens)
    page = page_indices[sequence, jnp.clip(position // P, 0, M - 1)]
    real &= (position >= 0) & (position < M * P) & (page >= 0)
    page = jnp.where(real, page, kv_pages.shape[0])
    rows = jnp.stack([key, value], axis=2).reshape(key.shape[0], -1, key.shape[2])
    at = kv_pages.at[page, position % P]
    return at.set(rows.astype(kv_pages.dtype), mode="drop")


def _entry(metadata: Any, name: str) -> Any:
    if isinstance(metadata, Mapping):
        return metadata[name]
    return getattr(metadata, name)


def serve(
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    cache: jax.Array,
    metadata: Any,
    *,
    sinks: jax.Array | None,
    window: int | None,
    soft_cap: float | None,
    update: bool,
) -> tuple[jax.Array, jax.Array]:
    """Writes the new rows into the pages, then attends.

    Args:
        qkv: Packed (ragged) tokens, ``(R, H, D)`` and twice ``(R, K, D)``.
        cache: One layer's pages ``(N, P, 2 K, D')``, or ``(N, P, 2 K / c, c, D')`` as
            TPU kernels pack them; lanes from D on are padding.
        metadata: ``seq_lens`` (B,), which count the new rows; ``block_tables`` (B, M) or
            flat; ``query_start_loc`` (B + 1,); ``request_distribution``, whose last
            entry says how many sequences there are.
        sinks: See `ragged_paged_attention`.
        window: Likewise.
        soft_cap: Likewise.
        update: False leaves the pages as they are: another layer has written them.
    """
    q, k, v = qkv
    pages = cache.reshape(*cache.shape[:2], -1, cache.shape[-1])
    D, wide = q.shape[2], cache.shape[-1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, wide - D))) for x in (q, k, v))
    lengths = _entry(metadata, "seq_lens").astype(jnp.int32)
    starts = _entry(metadata, "query_start_loc").astype(jnp.int32)
    table = _entry(metadata, "block_tables").astype(jnp.int32)
    table = table.reshape(lengths.shape[0], -1)
    count = _entry(metadata, "request_distribution").astype(jnp.int32)[-1:]
    real = jnp.arange(lengths.shape[0], dtype=jnp.int32) < count[0]
    lengths = jnp.where(real, lengths, 0)
    starts = starts[jnp.minimum(jnp.arange(starts.shape[0], dtype=jnp.int32), count[0])]
    at = dict(kv_lens=lengths, page_indices=table, cu_q_lens=starts)
    if update:
        pages = write_pages(pages, k, v, **at)
    y = ragged_paged_attention(
        q,
        pages,
        **at,
        num_seqs=count,
        sliding_window=window,
        soft_cap=soft_cap,
        attention_sink=sinks,
    )
    return y[..., :D], pages.reshape(cache.shape)
