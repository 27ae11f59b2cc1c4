"""The door: one call that picks a kernel, and one that says how it picked."""

from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from ._errors import (
    Unsupported,
    check_dropout,
    check_groups,
    check_mask,
    check_qkv,
    choices,
)
from ._types import DropoutKey, MaskMod, ScoreMod
from .kernels import KERNELS, Kernel, paged
from .mods import Causal


def attention(
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S E"],
    *,
    mask: Bool[Array, "#B #H #T #S"] | None = None,
    mask_mod: MaskMod | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | Float[Array, ""] | None = None,
    query_start: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    dropout_rng: DropoutKey | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    kernel: str | None = None,
) -> Float[Array, "B H T E"]:
    """Attends with the first kernel in `KERNELS` that can, or with the one named.

    See `AttentionFn` for the arguments and for what is computed. The choice changes how
    fast, never what. `explain` says what each kernel answers.

    Args:
        kernel: A name from `KERNELS`. Naming one turns "cannot" into an error.

    Raises:
        ValueError: Shapes or dtypes do not fit, or no kernel has this name.
        Unsupported: The kernel named cannot do what is asked.
    """
    check_qkv(query, key, value)
    B, H, T, _ = query.shape
    check_mask(mask, (B, H, T, key.shape[2]))
    check_dropout(dropout_rng, dropout_rate, deterministic)
    problem: dict[str, Any] = dict(
        mask=mask,
        mask_mod=mask_mod,
        score_mod=score_mod,
        scale=scale,
        query_start=query_start,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
    )
    chosen = _choose(kernel, query, key, value, problem)
    return chosen.run(query, key, value, **problem)


def _candidates(name: str | None) -> tuple[Kernel, ...]:
    """Every kernel, or the one of this name."""
    named = tuple(kernel for kernel in KERNELS if name in (None, kernel.name))
    if not named:
        names = choices(kernel.name for kernel in KERNELS)
        raise ValueError(f"kernel={name!r} is not one of {names}.")
    return named


def _choose(name: str | None, query, key, value, problem: dict[str, Any]) -> Kernel:
    """The kernel that runs; see `attention`."""
    for kernel in _candidates(name):
        reason = kernel.why_not(query, key, value, **problem)
        if name is not None and reason is not None:
            raise Unsupported(f"kernel={name!r} cannot run this: {reason}.")
        later = name is None and kernel.why_later(query, key, value, **problem)
        if reason is None and not later:
            return kernel
    raise Unsupported(
        f"no kernel can run this:\n{explain(query, key, value, **problem)}"
    )


def explain(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    kernel: str | None = None,
    **problem: Any,
) -> str:
    """What each kernel says to this problem, in the order they are tried.

    Takes the arguments of `attention`. One line for each kernel; at most one of them
    says "runs".
    """
    candidates, lines, taken = _candidates(kernel), [], False
    for candidate in KERNELS:
        reason = candidate.why_not(query, key, value, **problem)
        later = candidate.why_later(query, key, value, **problem)
        runs = candidate in candidates and not taken and reason is None
        if reason is not None:
            verdict = f"cannot: {reason}"
        elif runs and (kernel is not None or later is None):
            verdict, taken = "runs", True
        else:
            verdict = "can run" if later is None else f"only when named: {later}"
        lines.append(f"{candidate.name:10} {verdict}")
    return "\n".join(lines)


def paged_attention(
    query: Float[Array, "R H D"],
    k_pages: Float[Array, "N K P D"],
    v_pages: Float[Array, "N K P E"],
    *,
    table: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    row_offsets: Int[Array, " B+1"],
    mask_mod: MaskMod | None = Causal(),
    score_mod: ScoreMod | None = None,
    scale: float | Float[Array, ""] | None = None,
) -> Float[Array, "R H E"]:
    """Attends to keys and values that lie in pages; appends nothing.

    Args:
        query: Rows of all sequences, ``row_offsets`` apart. The last row of a sequence
            stands at its last key.
        k_pages: Keys of a pool of pages of ``P`` tokens.
        v_pages: Values of the same pages.
        table: ``table[b, m]`` is the page with tokens ``m * P`` and on of sequence b.
        lengths: Keys of each sequence. What lies beyond in its last page is not read.
        row_offsets: Where each sequence's rows begin; later rows are padding.
        mask_mod: Which of its sequence's keys a query may see.
        score_mod: A change of the scaled scores.
        scale: Defaults to ``D ** -0.5``.

    Returns:
        The query's dtype; zeros in padding rows, and in rows that see no key.

    Raises:
        ValueError: Shapes do not fit.
    """
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
    return paged.attend(
        query,
        k_pages[None],
        v_pages[None],
        table=table,
        lengths=lengths,
        row_offsets=row_offsets,
        layer=0,
        mask_mod=mask_mod,
        score_mod=score_mod,
        scale=scale,
    )
