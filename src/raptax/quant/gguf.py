"""GGUF's block formats: bytes to numbers.

A weight of shape ``(rows, cols)`` is stored row by row, each row as ``blocks`` of a
fixed number of values, and each block as a few numbers shared by its values followed
by small integers, the *codes*. A block's values fall into *groups* of 16 or 32, and

    value = scale * code + offset          one scale (and offset) per group

`dequantize` goes all the way to float32. `unpack` stops at codes, scales and offsets,
one byte per code: the form to multiply by.

All of it is exact. A float16 scale has 11 significant bits, a group's own scale at most
7 and a code at most 7, never more than 23 together, so every product fits float32's
24: the one rounding is the addition of the offset, and a fused multiply-add gives the
same bits.

Source: the block structs in ggml's ``ggml-common.h`` and ``docs/gguf.md``.
"""

import dataclasses
from collections.abc import Sequence
from enum import Enum
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8, UInt8


class Encoding(Enum):
    """How a tensor's numbers are packed, under ggml's names.

    Attributes:
        number: What a file writes for it.
        values: Numbers per block.
        bytes: Bytes per block.
    """

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    BF16 = 30, 1, 2

    def __init__(self, number: int, values: int, bytes: int):
        self.number, self.values, self.bytes = number, values, bytes

    @classmethod
    def from_name(cls, name: str) -> "Encoding":
        """The encoding ggml calls ``name``, in either case: ``"Q4_K"``, ``"q4_k"``."""
        if name.upper() not in cls.__members__:
            raise ValueError(
                f"{name!r} is not an encoding raptax reads; it reads "
                f"{', '.join(cls.__members__)}. (A name like Q4_K_M is a mix: each "
                "tensor of such a file has an encoding of its own.)"
            )
        return cls[name.upper()]

    @property
    def is_plain(self) -> bool:
        """Whether each value stands alone as a float, with no codes."""
        return self.values == 1


@no_type_check  # JAX maps over trees: specs and shapes may stand where arrays stood
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """A weight as ``scale * codes + offset``, one byte per number and a bit more.

    Written as `dequantize` does it, ``x @ weight.dequantize().T`` of a single row is one
    pass over the codes: XLA fuses it on a CPU and reads 1.06 to 1.25 bytes per number
    where float32 reads 4. Unpacking the blocks inside the product as well took 9 to 30
    times as long.

    Attributes:
        scale: float16 where the format stores that very number, else float32.
        offset: Like scale; None for formats that are symmetric about zero.
        group: Columns that share a scale.
    """

    codes: Int8[Array, "rows cols"]
    scale: Float[Array, "rows groups"]
    offset: Float[Array, "rows groups"] | None
    group: int = dataclasses.field(metadata={"static": True})

    def dequantize(self) -> Float32[Array, "rows cols"]:
        rows, cols = self.codes.shape
        numbers = self.codes.reshape(rows, cols // self.group, self.group)
        numbers = numbers.astype(jnp.float32)
        numbers = numbers * self.scale[..., None].astype(jnp.float32)
        if self.offset is not None:
            numbers = numbers + self.offset[..., None].astype(jnp.float32)
        return numbers.reshape(rows, cols)


def dequantize(
    blocks: UInt8[Array, "rows blocks bytes"], encoding: Encoding
) -> Float32[Array, "rows cols"]:
    """Every number of a weight, ``cols = blocks * encoding.values``.

    Raises:
        ValueError: The last axis is not one block of this encoding.
    """
    if not encoding.is_plain:
        return unpack(blocks, encoding).dequantize()
    _check_blocks(blocks, encoding)
    # One value per block: its bytes, little-endian, are the float.
    dtype = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
    numbers = jax.lax.bitcast_convert_type(blocks, dtype[encoding.name])
    return numbers.astype(jnp.float32)


def unpack(blocks: UInt8[Array, "rows blocks bytes"], encoding: Encoding) -> Codes:
    """The same weight one step earlier: codes as int8, scales and offsets as floats.

    ``unpack(...).dequantize()`` is `dequantize`.

    Raises:
        ValueError: The last axis is not one block of this encoding, or the encoding
            (F32, F16, BF16) has no codes.
    """
    if encoding.is_plain:
        raise ValueError(
            f"{encoding.name} holds plain numbers, which have no codes; use dequantize."
        )
    _check_blocks(blocks, encoding)
    codes, scale, offset = _UNPACK[encoding](blocks)
    # (rows, blocks, n) -> (rows, blocks * n)
    flat = lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2])
    return Codes(
        codes=flat(codes),
        scale=flat(scale),
        offset=None if offset is None else flat(offset),
        group=encoding.values // scale.shape[-1],
    )


def alike(weights: Sequence[Codes]) -> list[Codes]:
    """The same weights with one group size, one float type, and offsets if any has one.

    So that weights of different encodings can be stacked on a new axis. Scales are
    repeated and widened, never rounded.
    """
    group = min(weight.group for weight in weights)
    half = all(weight.scale.dtype == jnp.float16 for weight in weights)
    dtype = jnp.float16 if half else jnp.float32
    offsets = any(weight.offset is not None for weight in weights)

    def widen(x: jax.Array, times: int) -> jax.Array:
        return jnp.repeat(x.astype(dtype), times, axis=1)

    def convert(weight: Codes) -> Codes:
        times = weight.group // group
        scale = widen(weight.scale, times)
        offset = weight.offset
        if offsets:
            offset = jnp.zeros_like(scale) if offset is None else widen(offset, times)
        return Codes(weight.codes, scale, offset, group)

    return [convert(weight) for weight in weights]


def _check_blocks(blocks, encoding):
    wanted = f"(rows, blocks, {encoding.bytes})"
    if blocks.ndim != 3 or blocks.dtype != jnp.uint8:
        raise ValueError(
            f"{encoding.name} blocks are uint8 {wanted}; got {blocks.dtype} "
            f"{blocks.shape}. Whole rows of bytes? Then reshape them to "
            f"(rows, -1, {encoding.bytes})."
        )
    if blocks.shape[-1] != encoding.bytes:
        raise ValueError(
            f"{encoding.name} blocks are {encoding.bytes} bytes, {wanted}; got "
            f"{blocks.shape}. Is the tensor another encoding?"
        )


# The formats. Each function takes (rows, blocks, bytes) and returns codes
# (rows, blocks, values), then scale and offset (rows, blocks, groups), or None for an
# offset of zero. Above it stand the block's bytes, in order, and their arithmetic.


# float16 d, 16 bytes of nibbles:  d * (nibble - 8)
def _q4_0(blocks):
    d, nibbles = _cut(blocks, 2, 16)
    return _fields(nibbles, 4, run=16) - 8, _float16(d), None


# float16 d, float16 m, 16 bytes of nibbles:  d * nibble + m
def _q4_1(blocks):
    d, m, nibbles = _cut(blocks, 2, 2, 16)
    return _fields(nibbles, 4, run=16), _float16(d), _float16(m)


# float16 d, 32 fifth bits, 16 bytes of nibbles:  d * (five bits - 16)
def _q5_0(blocks):
    d, fifth, nibbles = _cut(blocks, 2, 4, 16)
    fives = _fields(nibbles, 4, run=16) | _fields(fifth, 1, run=1) << 4
    return fives - 16, _float16(d), None


# float16 d, float16 m, 32 fifth bits, 16 bytes of nibbles:  d * five bits + m
def _q5_1(blocks):
    d, m, fifth, nibbles = _cut(blocks, 2, 2, 4, 16)
    fives = _fields(nibbles, 4, run=16) | _fields(fifth, 1, run=1) << 4
    return fives, _float16(d), _float16(m)


# float16 d, int8 q[32]:  d * q
def _q8_0(blocks):
    d, q = _cut(blocks, 2, 32)
    return jax.lax.bitcast_convert_type(q, jnp.int8), _float16(d), None


# 16 bytes of group scale s (low nibble) and minimum m (high), 64 bytes of two-bit codes,
# float16 d, float16 dmin:  (d * s) * code - dmin * m
def _q2_k(blocks):
    _, codes, _, _ = _cut(blocks, 16, 64, 2, 2)
    return _fields(codes, 2, run=32), *_scale_and_offset(*_q2_k_levels(blocks))


def _q2_k_levels(blocks):
    pairs, _, d, dmin = _cut(blocks, 16, 64, 2, 2)
    return _float16(d), (pairs & 15).astype(jnp.int8), _float16(dmin), pairs >> 4


# 256 third bits, 64 bytes of two-bit codes, 12 bytes of 16 six-bit group scales s (8 of
# low nibbles, then 4 of top two bits), float16 d:  (d * (s - 32)) * (three bits - 4)
def _q3_k(blocks):
    third, codes, *_ = _cut(blocks, 32, 64, 8, 4, 2)
    threes = _fields(codes, 2, run=32) + (_fields(third, 1, run=32) << 2)
    return threes - 4, *_scale_and_offset(*_q3_k_levels(blocks))


def _q3_k_levels(blocks):
    _, _, low, top, d = _cut(blocks, 32, 64, 8, 4, 2)
    s = _fields(low, 4, run=8) | _fields(top, 2, run=4) << 4
    return _float16(d), s - 32, None, None


# float16 d, float16 dmin, 12 bytes of eight six-bit group scales s and minima m (see
# _sixes_levels), 128 bytes of nibbles:  (d * s) * nibble - dmin * m
def _q4_k(blocks):
    *_, nibbles = _cut(blocks, 2, 2, 12, 128)
    return _fields(nibbles, 4, run=32), *_scale_and_offset(*_sixes_levels(blocks))


# float16 d, float16 dmin, 12 bytes of scales and minima as in Q4_K, 256 fifth bits, 128
# bytes of nibbles:  (d * s) * five bits - dmin * m
def _q5_k(blocks):
    *_, fifth, nibbles = _cut(blocks, 2, 2, 12, 32, 128)
    fives = _fields(nibbles, 4, run=32) | _fields(fifth, 1, run=32) << 4
    return fives, *_scale_and_offset(*_sixes_levels(blocks))


# 128 bytes of nibbles, 64 bytes of top two bits, int8 group scale s[16], float16 d:
# (d * s) * (six bits - 32)
def _q6_k(blocks):
    nibbles, top, *_ = _cut(blocks, 128, 64, 16, 2)
    sixes = _fields(nibbles, 4, run=64) | _fields(top, 2, run=32) << 4
    return sixes - 32, *_scale_and_offset(*_q6_k_levels(blocks))


def _q6_k_levels(blocks):
    _, _, s, d = _cut(blocks, 128, 64, 16, 2)
    return _float16(d), jax.lax.bitcast_convert_type(s, jnp.int8), None, None


_UNPACK = {
    Encoding.Q4_0: _q4_0,
    Encoding.Q4_1: _q4_1,
    Encoding.Q5_0: _q5_0,
    Encoding.Q5_1: _q5_1,
    Encoding.Q8_0: _q8_0,
    Encoding.Q2_K: _q2_k,
    Encoding.Q3_K: _q3_k,
    Encoding.Q4_K: _q4_k,
    Encoding.Q5_K: _q5_k,
    Encoding.Q6_K: _q6_k,
}


def _cut(blocks, *sizes):
    """Each block's bytes in pieces of these sizes."""
    return jnp.split(blocks, np.cumsum(sizes)[:-1], axis=-1)


def _fields(packed, width, run):
    """Fields of ``width`` bits as int8, in ggml's order.

    The bytes are taken in runs; of each run come first the lowest fields of all its
    bytes, then the next higher fields of all of them, and so on.
    """
    rows, blocks, size = packed.shape
    shifts = jnp.arange(0, 8, width, dtype=jnp.uint8).reshape(1, 1, 1, -1, 1)
    runs = packed.reshape(rows, blocks, size // run, 1, run)
    fields = runs >> shifts & (1 << width) - 1
    return fields.reshape(rows, blocks, size * 8 // width).astype(jnp.int8)


def _float16(pair):
    return jax.lax.bitcast_convert_type(pair, jnp.float16)[..., None]


def _sixes_levels(blocks):
    """Q4_K's and Q5_K's first 16 bytes: d, eight scales, dmin, eight minima of six bits.

    Bytes 0-3 hold scales 0-3 and bytes 4-7 minima 0-3 in their low six bits. Bytes
    8-11 hold the low nibbles of scales 4-7 (low) and minima 4-7 (high), whose top two
    bits are what bytes 0-3 and 4-7 had left.
    """
    d, dmin, s, m, rest = _cut(blocks[..., :16], 2, 2, 4, 4, 4)
    scales = jnp.concatenate([s & 63, rest & 15 | s >> 6 << 4], axis=-1)
    minima = jnp.concatenate([m & 63, rest >> 4 | m >> 6 << 4], axis=-1)
    return _float16(d), scales.astype(jnp.int8), _float16(dmin), minima


def _scale_and_offset(d, factors, dmin, minima):
    """Both levels multiplied out: ``d * factors`` and ``-(dmin * minima)``."""
    scale = d.astype(jnp.float32) * factors.astype(jnp.float32)
    if dmin is None:
        return scale, None
    return scale, -(dmin.astype(jnp.float32) * minima.astype(jnp.float32))


# Encodings with two levels of scales: a function of (rows, blocks, bytes) that returns
# float16 d (rows, blocks, 1), integer factors (rows, blocks, groups), and dmin and its
# factors likewise, or None twice.
TWO_LEVELS = {
    Encoding.Q2_K: _q2_k_levels,
    Encoding.Q3_K: _q3_k_levels,
    Encoding.Q4_K: _sixes_levels,
    Encoding.Q5_K: _sixes_levels,
    Encoding.Q6_K: _q6_k_levels,
}
