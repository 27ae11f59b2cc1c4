"""Online softmax, merging by log-sum-exp, and how NaN is propagated.

Milakov & Gimelshein 2018, arXiv:1805.02867: with the maximum and the sum so far at
hand, taking in more keys never needs the earlier scores again.

A NaN in a key or value must not reach a query that may not see it, yet ``0 * NaN`` is
NaN. Hence products, forward and backward, run on `finite` numbers, and `poison` carries
the NaN to exactly the queries that do see it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class OnlineSoftmax(NamedTuple):
    """The softmax over the keys seen so far.

    ``out`` is the sum of ``exp(score - row_max) * value``, ``row_sum`` that of
    ``exp(score - row_max)``, ``row_max`` the largest score.
    """

    out: Float[Array, "*rows E"]
    row_max: Float[Array, "*rows"]
    row_sum: Float[Array, "*rows"]

    @classmethod
    def empty(
        cls,
        zeros: Float[Array, "B H T"],
        size: int,
        sinks: Float[Array, " H"] | None = None,
    ) -> "OnlineSoftmax":
        """No key seen yet, but each head's sink: a score whose value is zero."""
        row_max = jnp.full_like(zeros, -jnp.inf)
        if sinks is not None:
            row_max = zeros + sinks.astype(zeros.dtype)[None, :, None]
        row_sum = jnp.where(jnp.isneginf(row_max), zeros, 1)
        return cls(jnp.zeros_like(zeros, shape=(*zeros.shape, size)), row_max, row_sum)

    def add(
        self,
        scores: Float[Array, "*rows S"],
        weigh_values: Callable[[jax.Array], jax.Array],
    ) -> "OnlineSoftmax":
        """Takes in more keys: their scores, -inf where masked, and ``weights @ v``."""
        row_max = jnp.maximum(self.row_max, scores.max(-1))
        shift = jnp.where(jnp.isneginf(row_max), 0, row_max)  # -inf - -inf would be NaN
        rescale = jnp.exp(self.row_max - shift)
        weights = jnp.exp(scores - shift[..., None])
        return OnlineSoftmax(
            self.out * rescale[..., None] + weigh_values(weights),
            row_max,
            self.row_sum * rescale + weights.sum(-1),
        )

    def finish(self) -> tuple[Float[Array, "*rows E"], Float[Array, "*rows"]]:
        """``(out, log-sum-exp)``: exactly 0 and -inf for a row that saw no key."""
        row_sum = jnp.where(self.row_sum == 0, 1, self.row_sum)
        return self.out / row_sum[..., None], self.row_max + jnp.log(self.row_sum)


def merge(
    *partials: tuple[Float[Array, "*rows E"], Float[Array, "*rows"]],
) -> tuple[Float[Array, "*rows E"], Float[Array, "*rows"]]:
    """Attention over all keys, from ``(out, lse)`` over parts of them.

    ``lse = log(sum_i exp(lse_i))``, ``out = sum_i exp(lse_i - lse) * out_i``. The order
    does not matter, and ``(0, -inf)``, what an empty row gives, changes nothing. Sinks
    belong to one of the parts alone. Rabe & Staats 2021, arXiv:2112.05682.

    Args:
        partials: What `attention` returns with ``return_lse``; at least one.

    Returns:
        The output in the first part's dtype, and the log-sum-exp of all parts.

    Raises:
        ValueError: There is nothing to merge.
    """
    if not partials:
        raise ValueError("merge() needs at least one (out, lse) pair.")
    dtype = partials[0][1].dtype
    high = functools.reduce(jnp.maximum, (lse for _, lse in partials))
    high = lax.stop_gradient(jnp.where(jnp.isneginf(high), 0, high))
    weights = [jnp.exp(lse - high) for _, lse in partials]
    total = functools.reduce(jnp.add, weights)
    something = jnp.where(total == 0, 1, total)  # or the logarithm's slope is NaN
    out = functools.reduce(
        jnp.add,
        (
            (weight / something)[..., None] * out.astype(dtype)
            for weight, (out, _) in zip(weights, partials, strict=True)
        ),
    )
    lse = jnp.where(total == 0, -jnp.inf, high + jnp.log(something))
    return out.astype(partials[0][0].dtype), lse


def accumulator(dtype: DTypeLike) -> jnp.dtype:
    """float32, or float64 for float64."""
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    return jnp.dtype(wide)


def finite(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x`` with zeros in place of NaN and Inf."""
    return jnp.where(jnp.isfinite(x), x, 0)


def poison(x: Float[Array, "*B S D"], dtype: DTypeLike) -> Float[Array, "*B S"]:
    """What to add to the scores of each row of ``x``: NaN if not finite, else 0."""
    return jnp.where(jnp.isfinite(x).all(-1), 0, jnp.nan).astype(dtype)
