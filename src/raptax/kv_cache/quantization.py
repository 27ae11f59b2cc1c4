"""Keys and values stored as small numbers with a scale.

A scale is the largest magnitude of what it serves, in float32, and a number is stored as
``code = round(x * top / scale)``, so it reads back as ``code * scale / top``.

    int8   top 127.5, codes -128 to 127     rounded half to even, then clipped
    int4   top 7.5, codes -8 to 7
    fp8    top 448, float8_e4m3fn           rounded by the cast

Where every number is zero the scale is zero, and so is what is read back.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .._core.errors import choices


class Format(NamedTuple):
    """How codes are stored, and the code of the largest magnitude."""

    dtype: DTypeLike
    top: float


FORMATS = {
    "int8": Format(jnp.int8, 127.5),
    "int4": Format(jnp.int4, 7.5),
    "fp8": Format(jnp.float8_e4m3fn, 448.0),
}
AXES = {"dkv": (-1,), "heads_and_dkv": (-2, -1)}


@dataclasses.dataclass(frozen=True)
class KVQuantization:
    """A format, and what shares a scale.

    Attributes:
        format: "int8", "int4" or "fp8".
        axes: "dkv", a scale for each sequence, token and head; or "heads_and_dkv", one
            for each sequence and token.

    Raises:
        ValueError: There is no such format, or no such choice of axes.
    """

    format: str = "int8"
    axes: str = "dkv"

    def __post_init__(self) -> None:
        for name, known in (("format", FORMATS), ("axes", AXES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r} is not one of {choices(known)}.")

    @property
    def dtype(self) -> DTypeLike:
        return FORMATS[self.format].dtype

    @property
    def top(self) -> float:
        return FORMATS[self.format].top

    def quantize(
        self, x: jax.Array, axes: tuple[int, ...] | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Codes, and scales with length 1 along the axes that share one.

        ``axes`` names these where heads and head size are not the last two.
        """
        wide = x.astype(jnp.float32)
        scale = jnp.abs(wide).max(
            AXES[self.axes] if axes is None else axes, keepdims=True
        )
        codes = wide * (self.top / jnp.where(scale == 0, 1, scale))
        if self.format != "fp8":
            low = -(self.top + 0.5)
            codes = jnp.clip(jnp.round(codes), low, -low - 1)
        return codes.astype(self.dtype), scale

    def dequantize(
        self, codes: jax.Array, scale: jax.Array, dtype: DTypeLike
    ) -> jax.Array:
        return (codes.astype(jnp.float32) * (scale / self.top)).astype(dtype)
