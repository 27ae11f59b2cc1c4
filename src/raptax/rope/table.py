"""Rotary tables: cosines and sines that are given."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.pytree import pytree, static
from .embedding import Layout, rotate
from .turns import Positions, wide_dtype


@pytree
class RotaryTable:
    """Rotates by a table of ``(cos, sin)`` pairs, as MAX's ``freqs_cis`` holds them.

    Attributes:
        freqs_cis: ``cos0, sin0, cos1, sin1, ...`` for each position. A position beyond
            the table makes NaN.
        layout: Which lanes form a pair: "half" or "interleaved".
    """

    freqs_cis: Float[Array, "positions lanes"]
    layout: Layout = static(default="half")

    def __call__(
        self, x: Float[Array, "*rows heads D"], positions: Positions
    ) -> jax.Array:
        """Rotates every head of each row by its position; see `rotate`."""
        table = self.freqs_cis.astype(wide_dtype(self.freqs_cis))
        pairs = table.at[positions].get(mode="fill", fill_value=jnp.nan)
        return rotate(x, pairs[..., 0::2], pairs[..., 1::2], self.layout)
