"""Dropout on attention weights that depends on the place, not on the order of work.

Whether weight ``(b, h, q, k)`` is kept is a hash of the key and these four numbers, so
forward and backward, every kernel and every tile size drop the same weights. Positions
are absolute, so decode drops what one pass over the whole sequence would.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from .._core.errors import check_dropout
from .._core.pytree import pytree
from .._core.types import DropoutKey, Indices


@pytree
class Dropout:
    """Drops each weight with probability ``rate``, by a hash that ``words`` begin."""

    words: UInt32[Array, " words"]
    rate: float | Float[Array, ""]

    @classmethod
    def create(
        cls,
        rng: DropoutKey | None,
        rate: float | Float[Array, ""],
        deterministic: bool,
    ) -> "Dropout | None":
        """None when nothing is to be dropped.

        Raises:
            ValueError: A rate outside ``[0, 1)``, or a key that is missing.
        """
        check_dropout(rng, rate, deterministic)
        if (
            rng is None
            or deterministic
            or (isinstance(rate, (int, float)) and not rate)
        ):
            return None
        if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
            rng = jax.random.key_data(rng)
        return cls(jnp.asarray(rng, jnp.uint32).reshape(-1), rate)

    def __call__(self, weights: jax.Array, indices: Indices) -> jax.Array:
        """``weights / (1 - rate)`` where they are kept, else 0."""
        state = jnp.uint32(0)
        for word in (*self.words, *indices):
            state = _mix(state ^ word.astype(jnp.uint32)) + jnp.uint32(0x9E3779B9)
        uniform = (state >> jnp.uint32(8)).astype(jnp.float32) * jnp.float32(2.0**-24)
        rate = jnp.asarray(self.rate, jnp.float32)
        factor = jnp.where(uniform >= rate, 1 / (1 - rate), 0)
        return weights * factor.astype(weights.dtype)


def _mix(word: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """MurmurHash3's 32-bit finaliser (Appleby 2011): every bit reaches every bit."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = (word ^ (word >> jnp.uint32(shift))) * jnp.uint32(factor)
    return word ^ (word >> jnp.uint32(16))
