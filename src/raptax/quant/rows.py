"""Rows of numbers as codes of one byte, with a scale for each row.

``x ~ scale * codes``. A row of zeros has the scale 0. One that is not finite has the
scale NaN, so that it reads as NaN.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

CODES = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
TINY = 2.0**-126  # the smallest normal float32: a scale below it would be flushed to 0


def is_code(dtype: DTypeLike) -> bool:
    """Whether numbers of this type need a scale beside them."""
    return jnp.dtype(dtype) in map(jnp.dtype, CODES)


def largest_code(dtype: DTypeLike) -> float:
    """127, 448 or 57344: what the largest number of a row becomes."""
    if jnp.dtype(dtype) == jnp.int8:
        return 127.0
    return float(jnp.finfo(dtype).max)


def quantize(
    x: Float[Array, "*rows D"], dtype: DTypeLike
) -> tuple[jax.Array, Float[Array, "*rows"]]:
    """``(codes, scales)`` with ``scales = max|x| / largest_code`` and codes rounded."""
    x = x.astype(jnp.float32)
    high = jnp.abs(x).max(-1, initial=0)
    scales = high * jnp.float32(1 / largest_code(dtype))  # as XLA divides by constants
    none = ~jnp.isfinite(high) | (scales < TINY)
    # One division a row, as in csrc/simd/page_elements.h: both must agree to the bit.
    inverse = jnp.where(none, 0, 1 / jnp.where(none, 1, scales))
    codes = jnp.where(none[..., None], 0, x * inverse[..., None])
    if jnp.dtype(dtype) == jnp.int8:
        codes = jnp.round(codes)
    scales = jnp.where(jnp.isfinite(high), jnp.where(none, 0, scales), jnp.nan)
    return codes.astype(dtype), scales


def dequantize(
    codes: jax.Array, scales: Float[Array, "*rows"]
) -> Float[Array, "*rows D"]:
    """``scale * code`` of each row, in float32."""
    return codes.astype(jnp.float32) * scales[..., None]
