"""Masks and score changes as small frozen values.

A mod is a dataclass with a ``__call__``, not a closure. It prints, compares and hashes
by what it says (``SlidingWindow(size=128)``), so building the same mod twice does not
retrace a jitted function, a kernel can recognise it by type, and the arrays it carries
are ordinary pytree leaves that jit, vmap and sharding can see. Plain functions of the
same signature are accepted everywhere too.

Masks combine with ``&``, ``|`` and ``~`` (`and_masks`, `or_masks` when all of them are
plain functions), score changes with `compose_score_mods`.
"""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ._pytree import pytree, static
from ._types import MaskMod, ScoreMod, position_indices, query_positions


class Mask:
    """What every mask value shares: the operators."""

    def __and__(self, other: MaskMod) -> "And":
        return And(as_mod(self), as_mod(other))

    def __rand__(self, other: MaskMod) -> "And":
        return And(as_mod(other), as_mod(self))

    def __or__(self, other: MaskMod) -> "Or":
        return Or(as_mod(self), as_mod(other))

    def __ror__(self, other: MaskMod) -> "Or":
        return Or(as_mod(other), as_mod(self))

    def __invert__(self) -> "Not":
        return Not(as_mod(self))


@pytree
class FunctionMod(Mask):
    """A plain function as a value; equal when it is the same function."""

    function: Any = static()

    def __call__(self, *args: jax.Array) -> jax.Array:
        return self.function(*args)


def as_mod(mod: Any) -> Any:
    """``mod`` itself if JAX can look inside it or it is None; else a `FunctionMod`."""
    if mod is None or not jax.tree_util.all_leaves([mod]):
        return mod
    if not callable(mod):
        raise ValueError(f"a mask_mod or score_mod must be callable; got {mod!r}.")
    return FunctionMod(mod)


def apply_mask(mask_mod: MaskMod, *at: jax.Array) -> jax.Array:
    """``mask_mod(*at)``, after a check that it says yes or no."""
    allowed = mask_mod(*at)
    if allowed.dtype != bool:
        raise ValueError(
            f"mask_mod={mask_mod} must return booleans, True where a query may attend; "
            f"it returned {allowed.dtype}."
        )
    return allowed


def apply_score(score_mod: ScoreMod, scores: jax.Array, *at: jax.Array) -> jax.Array:
    """``score_mod(scores, *at)``, after a check that scores came back."""
    changed = score_mod(scores, *at)
    if (changed.shape, changed.dtype) != (scores.shape, scores.dtype):
        raise ValueError(
            f"score_mod={score_mod} must return scores as they came, {scores.dtype} "
            f"{scores.shape}; it returned {changed.dtype} {changed.shape}."
        )
    return changed


# ------------------------------------------------------------------------------- masks


@pytree
class And(Mask):
    """Allowed by both; written ``first & second``."""

    first: Any
    second: Any

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        at = b_idx, h_idx, q_idx, kv_idx
        return self.first(*at) & self.second(*at)


@pytree
class Or(Mask):
    """Allowed by either; written ``first | second``."""

    first: Any
    second: Any

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        at = b_idx, h_idx, q_idx, kv_idx
        return self.first(*at) | self.second(*at)


@pytree
class Not(Mask):
    """Allowed where ``mask`` is not; written ``~mask``."""

    mask: Any

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        return ~self.mask(b_idx, h_idx, q_idx, kv_idx)


def and_masks(*masks: MaskMod) -> MaskMod:
    """Allowed by every one of ``masks``; at least one is needed."""
    return functools.reduce(operator.and_, map(as_mod, masks))


def or_masks(*masks: MaskMod) -> MaskMod:
    """Allowed by any one of ``masks``; at least one is needed."""
    return functools.reduce(operator.or_, map(as_mod, masks))


@pytree
class Causal(Mask):
    """A query sees the keys up to its own position."""

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        return kv_idx <= q_idx


@pytree
class SlidingWindow(Mask):
    """A query sees the last ``size`` keys, its own position included."""

    size: int = static()

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < self.size)


@pytree
class Documents(Mask):
    """A query sees the keys of its own document, in sequences packed with several.

    ``ids[b, i]`` names the document that position ``i`` belongs to. A single row serves
    every sequence of the batch. Positions outside ``ids`` see nothing and are not seen.
    """

    ids: Int[Array, "#B S"]

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        row = b_idx if self.ids.shape[0] > 1 else jnp.zeros_like(b_idx)
        length = self.ids.shape[1]
        query_id, key_id = self.ids[row, q_idx], self.ids[row, kv_idx]
        inside = (q_idx >= 0) & (q_idx < length) & (kv_idx < length)
        return (query_id == key_id) & inside


@pytree
class KeyLengths(Mask):
    """Sequence ``b`` has ``lengths[b]`` keys; later ones are padding, seen by nobody."""

    lengths: Int[Array, " B"]

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        return kv_idx < self.lengths[b_idx]


# ----------------------------------------------------------------------- score changes


@pytree
class SoftCap:
    """``cap * tanh(scores / cap)``: bounds scores smoothly. Gemma 2, arXiv:2408.00118."""

    cap: float = static()

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise ValueError(f"cap={self.cap} must be positive.")

    def __call__(self, scores, b_idx, h_idx, q_idx, kv_idx):
        return self.cap * jnp.tanh(scores / self.cap)


@pytree
class ALiBi:
    """Adds ``-slope[h] * |q - k|``. Press et al. 2022, arXiv:2108.12409."""

    slopes: Float[Array, " H"]

    def __call__(self, scores, b_idx, h_idx, q_idx, kv_idx):
        distance = jnp.abs(q_idx - kv_idx).astype(scores.dtype)
        return scores - self.slopes[h_idx].astype(scores.dtype) * distance


def alibi_slopes(heads: int) -> Float[Array, " {heads}"]:
    """ALiBi's slopes: ``2^(-8 (h+1) / H)`` when ``H`` is a power of two.

    Otherwise the slopes of the power of two below, then every other slope of the one
    above, as the paper's own code does.
    """
    if heads < 1:
        raise ValueError(f"heads={heads} must be at least 1.")

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (h + 1) / n) for h in range(n)]

    below = 2 ** int(math.log2(heads))
    slopes = powers(below) + powers(2 * below)[::2][: heads - below]
    return jnp.asarray(np.array(slopes, np.float32))


@pytree
class Composed:
    """Score changes applied left to right."""

    score_mods: tuple[Any, ...]

    def __call__(self, scores, b_idx, h_idx, q_idx, kv_idx):
        for score_mod in self.score_mods:
            scores = score_mod(scores, b_idx, h_idx, q_idx, kv_idx)
        return scores


def compose_score_mods(*score_mods: ScoreMod | None) -> ScoreMod | None:
    """Applies score changes left to right; None among them is skipped.

    Returns None when nothing is left, and the change itself when it is the only one.
    """
    active = tuple(as_mod(mod) for mod in score_mods if mod is not None)
    if len(active) > 1:
        return Composed(active)
    return active[0] if active else None


@pytree
class Temperature:
    """Multiplies scores by ``factor``, one number for all or one per head."""

    factor: Float[Array, "#H"] | Float[Array, ""]

    def __call__(self, scores, b_idx, h_idx, q_idx, kv_idx):
        factor = jnp.asarray(self.factor).astype(scores.dtype)
        return scores * (factor[h_idx] if factor.ndim and factor.size > 1 else factor)


def with_scale(
    scale: float | Float[Array, ""], score_mod: ScoreMod | None
) -> tuple[float, ScoreMod | None]:
    """``(scale, score_mod)`` where the scale is a number.

    An array scale, which may be traced and may want a gradient, becomes the first score
    change, so that kernels know one kind of scale.
    """
    if isinstance(scale, (int, float)):
        return float(scale), as_mod(score_mod)
    return 1.0, compose_score_mods(Temperature(jnp.asarray(scale)), score_mod)


def mask_mod_to_boolean_mask(
    mask_mod: MaskMod, *, batch: int, num_heads: int, seq_q: int, seq_kv: int
) -> Bool[Array, "{batch} {num_heads} {seq_q} {seq_kv}"]:
    """The whole mask as an array, for small sizes and for looking at.

    The last query stands at the last key, as it does in `attention`.
    """
    q_idx = query_positions(None, seq_q, seq_kv)
    kv_idx = jnp.arange(seq_kv, dtype=jnp.int32)
    allowed = mask_mod(*position_indices(batch, num_heads, q_idx, kv_idx))
    return jnp.broadcast_to(allowed, (batch, num_heads, seq_q, seq_kv))
