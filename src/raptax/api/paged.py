"""Attention over keys and values that lie in pages."""

from typing import Any

from jaxtyping import Array, Float, Int, Int8

from .._core.errors import check_groups, check_scale
from .._core.types import MaskMod, ScoreMod, as_array
from ..kernels import paged
from ..mods import Causal, check_mods


def paged_attention(
    query: Float[Array, "R H D"],
    k_pages: Float[Array, "N K P D"] | Int8[Array, "N K P D"],
    v_pages: Float[Array, "N K P E"] | Int8[Array, "N K P E"],
    *,
    table: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    row_offsets: Int[Array, " B+1"],
    k_scales: Float[Array, "N K P"] | None = None,
    v_scales: Float[Array, "N K P"] | None = None,
    mask_mod: MaskMod | None = Causal(),
    score_mod: ScoreMod | None = None,
    scale: float | Float[Array, ""] | None = None,
    sinks: Float[Array, " H"] | None = None,
    return_lse: bool = False,
    kernel: str | None = None,
) -> Any:
    """Attends to keys and values that lie in pages; appends nothing.

    Args:
        query: Packed (ragged) tokens, ``row_offsets`` apart. The last row of a sequence
            stands at its last key.
        k_pages: Keys of a pool of pages of ``P`` tokens.
        v_pages: Values of the same pages.
        table: ``table[b, m]`` is the page with tokens ``m * P`` and on of sequence b; -1
            where there is none, and the mask lets no row see one of these tokens.
        lengths: Keys of each sequence. What lies beyond in its last page is not read.
        row_offsets: Where each sequence's rows begin; later rows are padding.
        k_scales: What keys that are codes are to be multiplied with; None for floats.
        v_scales: Likewise for values.
        mask_mod: Which of its sequence's keys a query may see.
        score_mod: A change of the scaled scores.
        scale: Defaults to ``D ** -0.5``.
        sinks: For each query head, the score of one more key whose value is zero.
        return_lse: Also return the natural logarithm of each row's sum of exponentials,
            its sink's included; -inf for padding, and for a row that sees nothing.
        kernel: ``"native"`` or ``"jax"``; by default the first that can. Naming one
            turns "cannot" into an error.

    Returns:
        The output ``(R, H, E)`` in the query's dtype: zeros in padding rows, and in rows
        that see no key. With ``return_lse`` the pair of it and the log-sum-exp
        ``(R, H)``. Derivatives of every kind reach the query, pages of floats, an array
        scale, the sinks, and the arrays of floats that the score_mod carries or captures.

    Raises:
        ValueError: Shapes do not fit, or no kernel has this name.
        Unsupported: The kernel named cannot do what is asked.
        jax.errors.JaxRuntimeError, ValueError: A sequence is longer than its pages, or a
            page that is needed is not in the pool. Inside jit from the native kernel
            only; the other one reads nothing there (`kernels.paged`).
    """
    query, k_pages, v_pages = (as_array(x) for x in (query, k_pages, v_pages))
    table, lengths, row_offsets = (as_array(x) for x in (table, lengths, row_offsets))
    check_groups(query.shape[1], k_pages.shape[1])
    if query.shape[2] != k_pages.shape[3] or k_pages.shape[:3] != v_pages.shape[:3]:
        raise ValueError(
            f"query {query.shape} must share a head size with k_pages {k_pages.shape}, "
            f"and v_pages {v_pages.shape} all but the head size with k_pages."
        )
    if not table.shape[0] == lengths.shape[0] == row_offsets.shape[0] - 1:
        raise ValueError(
            f"table {table.shape}, lengths {lengths.shape} and row_offsets "
            f"{row_offsets.shape} must speak of the same sequences."
        )
    check_scale(scale)
    check_mods([mask_mod, score_mod], table.shape[0], query.shape[1])
    of_one_layer = (None if x is None else x[None] for x in (k_scales, v_scales))
    return paged.attend(
        query,
        paged.Pool(k_pages[None], v_pages[None], *of_one_layer),
        table=table,
        lengths=lengths,
        row_offsets=row_offsets,
        layer=0,
        mask_mod=mask_mod,
        score_mod=score_mod,
        scale=scale,
        sinks=sinks,
        return_lse=return_lse,
        kernel=kernel,
    )
