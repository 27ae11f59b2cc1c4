"""Score mods: what is added to a score, or how it is bent, before the softmax."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._core.errors import check_scale
from .._core.pytree import pytree, static
from .._core.types import MaskMod, ScoreMod
from .checks import Mod, check_callable, set_positive, set_whole
from .combine import apply_mask, as_mod, entries, within


def apply_score(score_mod: ScoreMod, scores: jax.Array, *at: jax.Array) -> jax.Array:
    """``score_mod(scores, *at)``, after a check that scores came back."""
    changed: Any = score_mod(scores, *at)
    if not isinstance(changed, jax.Array):
        got = type(changed).__name__
    elif (changed.shape, changed.dtype) == (scores.shape, scores.dtype):
        return changed
    else:
        got = f"{changed.dtype} {changed.shape}"
    raise ValueError(
        f"score_mod={score_mod} must return scores as they came, {scores.dtype} "
        f"{scores.shape}; it returned {got}."
    )


@pytree
class SoftCap(Mod):
    """``cap * tanh(scores / cap)``: bounds scores smoothly. Gemma 2, arXiv:2408.00118."""

    cap: float | Float[Array, ""]

    def __post_init__(self) -> None:
        set_positive(self, "cap")

    def __call__(self, scores, b_idx, h_idx, q_idx, kv_idx):
        cap = self.cap
        if not isinstance(cap, float):
            cap = jnp.asarray(cap).astype(scores.dtype)
        return cap * jnp.tanh(scores / cap)


@pytree
class ALiBi(Mod):
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
class Composed(Mod):
    """Score mods applied left to right."""

    score_mods: tuple[Any, ...]

    def __call__(self, scores, b_idx, h_idx, q_idx, kv_idx):
        for score_mod in self.score_mods:
            scores = apply_score(score_mod, scores, b_idx, h_idx, q_idx, kv_idx)
        return scores


def compose_score_mods(*score_mods: ScoreMod | None) -> ScoreMod | None:
    """Applies score_mods left to right; None among them is skipped.

    Returns None when nothing is left, and the change itself when it is the only one.
    """
    active = tuple(as_mod(mod) for mod in score_mods if mod is not None)
    for mod in active:
        check_callable(mod)
    if len(active) > 1:
        return Composed(active)
    return active[0] if active else None


@pytree
class Temperature(Mod):
    """Multiplies scores by ``factor``, one number for all or one per head."""

    factor: Float[Array, "#H"] | Float[Array, ""]

    def __call__(self, scores, b_idx, h_idx, q_idx, kv_idx):
        factor = jnp.asarray(self.factor).astype(scores.dtype)
        return scores * (entries(factor, h_idx) if factor.ndim else factor)


def with_scale(
    scale: float | Float[Array, ""], score_mod: ScoreMod | None
) -> tuple[float | None, ScoreMod | None]:
    """``(scale, score_mod)`` where the scale is a number, or None for 1.

    An array scale, which may be traced and may want a gradient, becomes the first part of
    the score_mod, so that kernels know one kind of scale.
    """
    check_scale(scale)
    if isinstance(scale, int | float | np.generic):
        return float(scale), as_mod(score_mod)
    return None, compose_score_mods(Temperature(jnp.asarray(scale)), score_mod)


@pytree
class RelativeBias(Mod):
    """Adds ``table[h, clip(k - q, -R, R) + R]``, a learned number per distance.

    Shaw et al. 2018, arXiv:1803.02155, clip distances like this.
    """

    table: Float[Array, "H 2*R+1"]

    def __call__(self, scores, b_idx, h_idx, q_idx, kv_idx):
        reach = self.table.shape[1] // 2
        step = jnp.clip(kv_idx - q_idx, -reach, reach) + reach
        return scores + self.table[h_idx, step].astype(scores.dtype)


@pytree
class T5Bias(Mod):
    """Adds ``table[bucket(k - q), h]``: T5's learned bias. arXiv:1910.10683.

    Half of the buckets hold one distance each, the others grow with its logarithm, and
    all from ``max_distance`` on share the last (`t5_buckets`). ``bidirectional`` spends
    half of the buckets on keys after the query (an encoder); without it these share the
    bucket of distance 0 (a decoder).
    """

    table: Float[Array, "buckets H"]
    bidirectional: bool = static(default=True)
    max_distance: int = static(default=128)

    def __call__(self, scores, b_idx, h_idx, q_idx, kv_idx):
        ahead, total = kv_idx - q_idx, self.table.shape[0]
        per_side = total // 2 if self.bidirectional else total
        by_distance = jnp.asarray(t5_buckets(per_side, self.max_distance))
        distance = jnp.abs(ahead) if self.bidirectional else jnp.maximum(-ahead, 0)
        bucket = by_distance[jnp.minimum(distance, self.max_distance)]
        if self.bidirectional:
            bucket = bucket + jnp.where(ahead > 0, per_side, 0)
        return scores + self.table[bucket, h_idx].astype(scores.dtype)


def t5_buckets(buckets: int, max_distance: int) -> Int[np.ndarray, " distances"]:
    """T5's bucket of each distance from 0 to ``max_distance``.

    ``d`` below ``n = buckets // 2``, and from there on
    ``n + log(d / n) / log(max_distance / n) * (buckets - n)``, at most ``buckets - 1``.
    Worked out on the host in float32, as T5 does: at powers of two the logarithm of
    another device may fall into the bucket below.
    """
    exact = buckets // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"{buckets} buckets on a side must be at least 2, and half of them less "
            f"than max_distance={max_distance}."
        )
    distance = np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / exact)
    ratio = ratio / math.log(max_distance / exact) * (buckets - exact)
    far = np.minimum(exact + ratio.astype(np.int32), buckets - 1)
    return np.where(distance < exact, distance, far).astype(np.int32)


@pytree
class DenseBias(Mod):
    """Adds ``bias[b, h, q, k]``, by absolute positions; axes of length 1 serve all.

    Adds 0 at positions beyond an axis. Rows of queries that start at position ``s`` are
    moved there by ``Offset(DenseBias(bias), q=-s)``.
    """

    bias: Float[Array, "#B #H #T #S"]

    def __call__(self, scores, b_idx, h_idx, q_idx, kv_idx):
        bias: Any = entries(self.bias, b_idx, h_idx, q_idx, kv_idx)
        for index, length in zip((q_idx, kv_idx), self.bias.shape[2:], strict=True):
            if length != 1:
                bias = jnp.where(within(index, length), bias, 0)
        return scores + bias.astype(scores.dtype)


@pytree
class MaskedScore(Mod):
    """Sets scores to -inf where ``mask_mod`` says no: a mask that is a score_mod.

    `attention` hands it to the kernels as the mask that it is when nothing changes the
    scores after it, and so skips the tiles that it empties.
    """

    mask_mod: Any

    def __call__(self, scores, b_idx, h_idx, q_idx, kv_idx):
        allowed = apply_mask(self.mask_mod, b_idx, h_idx, q_idx, kv_idx)
        return jnp.where(allowed, scores, -jnp.inf)


def split_mask(score_mod: ScoreMod | None) -> tuple[ScoreMod | None, list[MaskMod]]:
    """``score_mod`` without the masks that are its last changes, and those masks."""
    if isinstance(score_mod, MaskedScore):
        return None, [score_mod.mask_mod]
    masks = []
    if isinstance(score_mod, Composed):
        changes = list(score_mod.score_mods)
        while changes and isinstance(changes[-1], MaskedScore):
            masks.append(changes.pop().mask_mod)
        score_mod = compose_score_mods(*changes)
    return score_mod, masks


@pytree
class LogN(Mod):
    """Multiplies by ``log(n) / log(train_length)`` where a query has more keys than that.

    ``n = q + 1`` is the number of keys up to the query. Keeps the softmax as sharp as it
    was at the lengths of training: Chiang and Cholak 2022, arXiv:2202.12172; with the
    lower bound of 1 as in Qwen, arXiv:2309.16609.
    """

    train_length: int | Int[Array, ""]

    def __post_init__(self) -> None:
        set_whole(self, 2, "train_length")

    def __call__(self, scores, b_idx, h_idx, q_idx, kv_idx):
        dtype = jnp.float64 if scores.dtype == jnp.float64 else jnp.float32
        least = jnp.asarray(self.train_length).astype(jnp.int32)
        keys = jnp.maximum(q_idx + 1, least).astype(dtype)
        factor = jnp.log(keys) / jnp.log(least.astype(dtype))
        return scores * factor.astype(scores.dtype)
