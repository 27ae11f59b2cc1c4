"""`RotaryEmbedding`, the value that layers hold, and the rotation itself."""

from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .._core.errors import choices
from .._core.pytree import constant, pytree, static
from .scaling import Frequencies, frequencies
from .turns import Positions, Turns, cos_sin, turns, wide_dtype

Layout = Literal["half", "interleaved"]


def rotate(
    x: Float[Array, "*rows heads D"],
    cos: Float[Array, "*rows F"],
    sin: Float[Array, "*rows F"],
    layout: Layout = "half",
) -> Float[Array, "*rows heads D"]:
    """Turns the pairs of lanes of every head, in float32, or float64 if ``x`` is that.

    ``(a, b)`` becomes ``(a cos - b sin, a sin + b cos)``. Lanes beyond ``2 F`` pass: the
    last ones in the half layout, the first ones in the interleaved layout.

    Raises:
        ValueError: ``2 F`` lanes are more than there are.
    """
    pairs, size = cos.shape[-1], x.shape[-1]
    if 2 * pairs > size:
        raise ValueError(f"{2 * pairs} rotary lanes do not fit a head size of {size}.")
    wide = wide_dtype(x)
    cos, sin = (table[..., None, :].astype(wide) for table in (cos, sin))
    rest = size - 2 * pairs
    if layout == "interleaved":
        kept, turned = x[..., :rest], x[..., rest:]
        turned = turned.reshape(*turned.shape[:-1], pairs, 2)
        first, second = turned[..., 0], turned[..., 1]
    else:
        turned, kept = x[..., : 2 * pairs], x[..., 2 * pairs :]
        first, second = turned[..., :pairs], turned[..., pairs:]
    first, second = first.astype(wide), second.astype(wide)
    new = first * cos - second * sin, first * sin + second * cos
    if layout == "interleaved":
        out = jnp.stack(new, axis=-1).reshape(*x.shape[:-1], 2 * pairs)
        return jnp.concatenate([kept, out.astype(x.dtype)], axis=-1)
    return jnp.concatenate([*(a.astype(x.dtype) for a in new), kept], axis=-1)


@pytree
class RotaryEmbedding:
    """Rotates queries and keys by their absolute positions.

    Build it with `RotaryEmbedding.create`, or hand it any frequencies. Head sizes above
    the rotary size are rotated in part: the first lanes in the half layout, the last
    ones in the interleaved layout (as DeepSeek's checkpoints need); the rest pass.

    Angles are reduced to one turn by integers (`raptax.rope.turns`), so cosines and
    sines are right to 5e-7 at every 32-bit position, negative ones too. Inputs of float64
    are rotated in float64, all others in float32.

    Attributes:
        inv_freq: Radians a position, for each pair of lanes. A NumPy array is part of
            the structure: a constant of the compiled program, in float64, that no
            checkpoint holds. An array of JAX is a leaf, which may be traced and has
            derivatives.
        layout: Which lanes form a pair: "half" or "interleaved".
        attention_scale: Multiplies cosines and sines; YaRN uses it.
    """

    inv_freq: Frequencies | Float[Array, " F"]
    layout: Layout = static(default="half")
    attention_scale: float = static(default=1.0)

    def __post_init__(self) -> None:
        _keep_constant(self, "inv_freq")
        if self.layout not in get_args(Layout):
            raise ValueError(
                f"layout={self.layout!r} is not one of {choices(get_args(Layout))}."
            )

    @classmethod
    def create(
        cls,
        rotary_size: int,
        theta: float = 10000.0,
        *,
        layout: Layout = "half",
        inv_freq: Frequencies | Float[Array, " F"] | None = None,
        attention_scale: float = 1.0,
    ) -> "RotaryEmbedding":
        """From a base ``theta``, or from ``inv_freq`` that a scaling has changed."""
        if inv_freq is None:
            inv_freq = frequencies(rotary_size, theta)
        if len(inv_freq) * 2 != rotary_size:
            raise ValueError(
                f"rotary_size={rotary_size} needs {rotary_size // 2} frequencies; got "
                f"{len(inv_freq)}."
            )
        return cls(inv_freq, layout, attention_scale)

    @property
    def interleaved(self) -> bool:
        return self.layout == "interleaved"

    def cos_sin(
        self, positions: Positions, dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, "*rows F"], Float[Array, "*rows F"]]:
        """Cosines and sines of ``positions * inv_freq``, times ``attention_scale``."""
        return self._cos_sin(positions[..., None], self._turns(positions), dtype)

    def _turns(self, positions: Positions) -> Turns:
        """How fast each pair turns at these positions."""
        return turns(self.inv_freq)

    def _cos_sin(self, positions: Positions, by: Turns, dtype: DTypeLike) -> Any:
        scale = jnp.asarray(self.attention_scale, dtype)
        return tuple(table * scale for table in cos_sin(positions, by, dtype))

    def __call__(
        self, x: Float[Array, "*rows heads D"], positions: Positions
    ) -> Float[Array, "*rows heads D"]:
        """Rotates every head of each row by the row's position; see `rotate`."""
        return rotate(x, *self.cos_sin(positions, wide_dtype(x)), self.layout)


def _keep_constant(embedding: Any, name: str) -> None:
    """Makes frequencies of NumPy part of the structure, in float64."""
    if isinstance(given := getattr(embedding, name), np.ndarray):
        object.__setattr__(embedding, name, constant(np.asarray(given, np.float64)))
