"""The softmax that kernels compute piece by piece, and the care it takes.

Milakov & Gimelshein 2018, arXiv:1805.02867: with the maximum and the sum so far at
hand, taking in more keys never needs the earlier scores again.

A NaN in a key or value must not reach a query that may not see it, yet ``0 * NaN`` is
NaN. Hence products, forward and backward, run on `finite` numbers, and `poison` carries
the NaN to exactly the queries that do see it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class Running(NamedTuple):
    """The softmax over the keys seen so far.

    ``out`` is the sum of ``exp(score - high) * value``, ``total`` that of
    ``exp(score - high)``, ``high`` the largest score.
    """

    out: Float[Array, "*rows E"]
    high: Float[Array, "*rows"]
    total: Float[Array, "*rows"]

    @classmethod
    def empty(cls, rows: tuple[int, ...], size: int, dtype: DTypeLike) -> "Running":
        """No key seen yet."""
        out = jnp.zeros((*rows, size), dtype)
        return cls(out, jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype))

    def add(
        self,
        scores: Float[Array, "*rows S"],
        weigh_values: Callable[[jax.Array], jax.Array],
    ) -> "Running":
        """Takes in more keys: their scores, -inf where masked, and ``weights @ v``."""
        high = jnp.maximum(self.high, scores.max(-1))
        shift = jnp.where(jnp.isneginf(high), 0, high)  # -inf - -inf would be NaN
        shrink = jnp.exp(self.high - shift)
        weights = jnp.exp(scores - shift[..., None])
        return Running(
            self.out * shrink[..., None] + weigh_values(weights),
            high,
            self.total * shrink + weights.sum(-1),
        )

    def finish(self) -> tuple[Float[Array, "*rows E"], Float[Array, "*rows"]]:
        """``(out, log-sum-exp)``: exactly 0 and -inf for a row that saw no key."""
        total = jnp.where(self.total == 0, 1, self.total)
        return self.out / total[..., None], self.high + jnp.log(self.total)


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
