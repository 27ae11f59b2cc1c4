"""Positions along several axes: images and videos among the text."""

from collections.abc import Sequence
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .._core.errors import choices
from .._core.pytree import pytree, static
from .embedding import Layout, RotaryEmbedding
from .scaling import Frequencies
from .turns import Positions

Arrangement = Literal["contiguous", "interleaved"]


@pytree
class MultiAxisRotaryEmbedding(RotaryEmbedding):
    """Positions along several axes, as (time, height, width): mRoPE.

    Each pair of lanes turns by the position along one of the axes, ``sections[a]`` pairs
    by axis ``a``. "contiguous": the first pairs by the first axis and so on (Qwen2-VL,
    Wang et al. 2024, arXiv:2409.12191). "interleaved": pair ``i`` by axis ``i % A``, and
    by the first one where the others have no pairs left (Qwen3-VL).

    Positions are ``(*rows, A)``, or ``(*rows)`` for text, whose axes all agree: then this
    is `RotaryEmbedding`.

    Attributes:
        sections: Pairs of each axis; together all pairs.
        arrangement: "contiguous" or "interleaved".
    """

    sections: tuple[int, ...] = static(kw_only=True)
    arrangement: Arrangement = static(kw_only=True, default="contiguous")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arrangement not in get_args(Arrangement):
            raise ValueError(
                f"arrangement={self.arrangement!r} is not one of "
                f"{choices(get_args(Arrangement))}."
            )

    @classmethod
    def create(  # type: ignore[override]
        cls,
        rotary_size: int,
        theta: float = 10000.0,
        *,
        sections: Sequence[int],
        arrangement: Arrangement = "contiguous",
        layout: Layout = "half",
        inv_freq: Frequencies | None = None,
        attention_scale: float = 1.0,
    ) -> "MultiAxisRotaryEmbedding":
        """As `RotaryEmbedding.create`, with what each axis turns."""
        plain = RotaryEmbedding.create(
            rotary_size,
            theta,
            layout=layout,
            inv_freq=inv_freq,
            attention_scale=attention_scale,
        )
        made = cls(
            plain.inv_freq,
            layout,
            attention_scale,
            sections=tuple(sections),
            arrangement=arrangement,
        )
        made.axes()  # raises what is wrong with the sections
        return made

    def axes(self) -> Int[np.ndarray, " F"]:
        """The axis by which each pair of lanes turns.

        Raises:
            ValueError: The sections do not add up to the pairs, or cannot be interleaved
                among them.
        """
        pairs, A = self.inv_freq.shape[0], len(self.sections)
        if sum(self.sections) != pairs or min(self.sections) < 0:
            raise ValueError(
                f"sections={self.sections} must add up to {pairs} pairs of lanes."
            )
        if self.arrangement == "contiguous":
            return np.repeat(np.arange(A), self.sections)
        axes = np.zeros(pairs, np.int64)
        for axis in range(1, A):
            axes[axis : A * self.sections[axis] : A] = axis
        if np.bincount(axes, minlength=A).tolist() != list(self.sections):
            raise ValueError(
                f"sections={self.sections} cannot be interleaved: axis a takes pairs a, "
                f"a + {A}, ... of {pairs}, and the first one what the others leave."
            )
        return axes

    def cos_sin(
        self, positions: Positions, dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "*rows F"], Float[Array, "*rows F"]]:
        """Cosines and sines of each pair's angle along its own axis.

        Raises:
            ValueError: The last axis of ``positions`` is not one entry an axis.
        """
        A = len(self.sections)
        if positions.shape[-1:] != (A,):
            raise ValueError(
                f"positions {positions.shape} must end with {A}, one for each axis."
            )
        own = positions[..., self.axes()]
        return self._cos_sin(own, self._turns(own), dtype)

    def __call__(
        self, x: Float[Array, "*rows heads D"], positions: Positions
    ) -> Float[Array, "*rows heads D"]:
        """Rotates every head of each row; see the class for ``positions``."""
        if positions.shape == x.shape[:-2]:
            axes = len(self.sections)
            positions = jnp.broadcast_to(positions[..., None], (*positions.shape, axes))
        return super().__call__(x, positions)
