"""Angles of positions, reduced to one turn exactly.

``position * frequency`` in float32 is a multiple of 2 ** -24 of itself: at position
131,072 that is 0.008 rad. Here a frequency is a fixed-point fraction of a turn with 64
bits. Its product with a position wraps around at whole turns, as unsigned integers do;
the fraction that is left is right to 2 ** -30 turns for every 32-bit position, negative
ones too. Cosines and sines of it are right to 5e-7 in float32.

Only integers are multiplied, so no compiler can reassociate the reduction away. In
float64 all 64 bits of the product are used.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer, UInt32

# 1 / (2 pi) in units of 2 ** -256.
_INVERSE_TURN = 0x28BE60DB9391054A7F09D5F47D4D377036D8A5664F10E4107F9458EAF7AEF158

Positions = Integer[Array, "*rows"] | Integer[np.ndarray, "*rows"]


class Turns(NamedTuple):
    """Frequencies in turns a position, modulo one turn: ``high / 2**32 + low / 2**64``.

    Attributes:
        high: The upper 32 bits.
        low: The lower 32 bits.
        radians: The frequencies in radians a position; derivatives go by them.
    """

    high: UInt32[Array, "*frequencies"]
    low: UInt32[Array, "*frequencies"]
    radians: Float[Array, "*frequencies"]

    def map(self, function: Any) -> "Turns":
        return Turns(*map(function, self))


def turns(radians: Any) -> Turns:
    """Frequencies ``(F,)`` in radians a position as turns; NumPy's are converted exactly.

    Those of JAX, or a variable of Flax that holds some, may be traced, and are rounded to
    53 bits on the way.
    """
    if isinstance(radians, np.ndarray):
        words = _words(np.asarray(radians, np.float64).tobytes())
        pair = words >> np.uint64(32), words & np.uint64(0xFFFFFFFF)
        high, low = (jnp.asarray(word.astype(np.uint32)) for word in pair)
        return Turns(high, low, jnp.asarray(radians, jnp.result_type(float)))
    radians = jnp.asarray(radians)
    with jax.enable_x64(True):
        wide = jax.lax.stop_gradient(radians).astype(jnp.float64)
        return Turns(*wide_turns(wide), radians)


def wide_turns(radians: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both words of float64 frequencies; call it under ``jax.enable_x64(True)``."""
    part = radians * (0.5 / math.pi)
    part = part - jnp.round(part)
    word = (part * 2.0**64).astype(jnp.int64).astype(jnp.uint64)
    return (word >> 32).astype(jnp.uint32), word.astype(jnp.uint32)


def wide_dtype(x: jax.Array | np.ndarray) -> DTypeLike:
    """What ``x`` is rotated in: float64 if it is that, else float32."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


@functools.lru_cache
def _words(radians: bytes) -> np.ndarray:
    """float64 frequencies as integers of 2 ** -64 turns, rounded to the nearest."""
    words = []
    for value in np.frombuffer(radians):
        above, below = float(value).as_integer_ratio()
        below <<= 256 - 64
        words.append((above * _INVERSE_TURN + below // 2) // below % (1 << 64))
    return np.array(words, np.uint64)


def cos_sin(
    positions: Positions, by: Turns, dtype: DTypeLike = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of ``positions * frequencies``, each ``(*rows, F)``.

    Args:
        positions: Integers of any kind, negative ones too: ``(*rows, 1)``, or
            ``(*rows, F)`` where each pair has a position of its own.
        by: The frequencies, ``(F,)`` or ``(*rows, F)``.
        dtype: float32, or float64 under ``jax_enable_x64``.

    Raises:
        ValueError: Positions that are not integers.
    """
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(
            f"positions must be integers; got {positions.dtype}. Positions between two "
            "tokens are whole ones with frequencies divided by linear_scaling."
        )
    missing = positions.ndim - by.high.ndim
    if missing > 0:
        by = by.map(lambda x: x.reshape((1,) * missing + x.shape))
    dtype = jnp.dtype(dtype)
    # Split while they are NumPy's: JAX would cut 64 bits down to 32.
    words = tuple(jnp.asarray(word) for word in _split(positions))
    angle = _angles(words, jnp.asarray(positions.astype(dtype)), by, dtype)
    return jnp.cos(angle), jnp.sin(angle)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _angles(words: Any, slope: jax.Array, by: Turns, dtype: np.dtype) -> jax.Array:
    """In [-pi, pi), for both words of the positions; ``slope`` are these as floats."""
    low, high = words
    if dtype == jnp.float64:
        position, fraction = (_joined(high, low), _joined(by.high, by.low))
        part = (position * fraction).astype(jnp.int64)
        return part.astype(dtype) * (2 * math.pi / 2**64)
    part = low * by.high + high * by.low + _upper(low, by.low)
    return part.astype(jnp.int32).astype(dtype) * dtype.type(2 * math.pi / 2**32)


@_angles.defjvp
def _(dtype: np.dtype, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    _, slope, _ = primals
    return _angles(*primals, dtype), slope * tangents[2].radians.astype(dtype)


def _split(positions: Any) -> tuple[Any, Any]:
    """The lower 32 bits, and those above: the sign repeated if there are none."""
    if positions.dtype.itemsize == 8:
        high = positions >> 32
    elif jnp.issubdtype(positions.dtype, jnp.unsignedinteger):
        high = positions * 0
    else:
        high = positions >> (positions.dtype.itemsize * 8 - 1)
    return positions.astype(np.uint32), high.astype(np.uint32)


def _joined(high: jax.Array, low: jax.Array) -> jax.Array:
    return high.astype(jnp.uint64) << 32 | low.astype(jnp.uint64)


def _upper(a: jax.Array, b: jax.Array) -> jax.Array:
    """The upper 32 bits of ``a * b``, or up to 2 less."""
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    return a_high * b_high + (a_high * b_low >> 16) + (a_low * b_high >> 16)
