"""Quantized weights in the order in which CPU kernels read them.

`pack` takes GGUF blocks apart and lays 16 rows side by side, so that one vector load
brings the same inputs of 16 rows. Nothing is rounded: `Packed.dequantize` gives the
numbers of `gguf.dequantize`, to the bit. For row ``o`` and input ``c``,

    W[o, c] = scale * factor * (code - zero) + offset * offset_factor

with one scale and offset for each ``block`` of inputs, and one integer factor of each
for each ``group`` of them. Encodings without a second level have no factors.

Layout, with ``o = 16 t + r``, ``t`` the tile and ``r`` the row in it:

===============  =======================  ============================================
``codes``        ``(n, t, words, r, 4)``  bytes; a word is 8 codes of 4 bits, of which
                                          byte ``j`` holds inputs ``j`` (low) and
                                          ``4 + j``, or 4 signed codes of 8 bits
``scales``       ``(n, t, blocks, r)``    float16, ``offsets`` alike
``factors``      ``(n, t, groups, r)``    int8; ``offset_factors`` uint8
===============  =======================  ============================================

The first axis is a stack of weights of one shape, such as those of a decoder's layers.
Rows beyond the last are zeros. The idea of rows side by side is XNNPACK's and ggml's.
"""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float16, Float32, Int, Int8, UInt8

from . import gguf
from .gguf import Encoding

TILE_ROWS = 16  # csrc/api/packed_linear_params.h has it as kTileRows


@no_type_check  # JAX maps over trees: specs and shapes may stand where arrays stood
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A stack of weights ``(O, C)``; see the module.

    Attributes:
        out_features: O.
        bits: Of a code, 4 or 8.
        zero: The 4-bit code that stands for zero; 8-bit codes are signed.
        group: Inputs that share factors, 16 or 32.
        block: Inputs that share a scale, ``group`` or a multiple.
    """

    codes: UInt8[Array, "n tiles words 16 4"]
    scales: Float16[Array, "n tiles blocks 16"]
    factors: Int8[Array, "n tiles groups 16"] | None
    offsets: Float16[Array, "n tiles blocks 16"] | None
    offset_factors: UInt8[Array, "n tiles groups 16"] | None
    out_features: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    zero: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})

    @property
    def in_features(self) -> int:
        return self.scales.shape[2] * self.block

    def dequantize(self, index: int | Int[Array, ""] = 0) -> Float32[Array, "O C"]:
        """The numbers of one weight of the stack."""
        return self._numbers(lambda x: x[index])[: self.out_features]

    def rows(
        self, ids: Int[Array, " ids"], index: int | Int[Array, ""] = 0
    ) -> Float32[Array, "ids C"]:
        """Some rows of one weight of the stack."""
        tile, row = ids // TILE_ROWS, ids % TILE_ROWS
        # (n, tiles, words, 16, ...) -> (ids, words, 1, ...): tiles of a single row
        chosen = self._numbers(lambda x: x[index, tile, :, row][:, :, None])
        return chosen.reshape(ids.size, -1)

    def _numbers(self, take) -> Float32[Array, "rows C"]:
        """Of the arrays (tiles, n, rows, ...) that ``take`` makes of the stacked ones."""
        codes = take(self.codes)
        tiles, words, rows, _ = codes.shape
        if self.bits == 4:
            halves = jnp.stack([codes & 15, codes >> 4], axis=3)  # inputs j, then 4 + j
            codes = halves.reshape(tiles, words, rows, 8).astype(jnp.int8) - self.zero
        else:
            codes = jax.lax.bitcast_convert_type(codes, jnp.int8)
        # (tiles, words, rows, inputs) -> (tiles, rows, groups, inputs of a group)
        numbers = codes.swapaxes(1, 2).reshape(tiles, rows, -1, self.group)
        numbers = numbers.astype(jnp.float32) * self._level(
            take, self.scales, self.factors
        )
        if self.offsets is not None:
            numbers += self._level(take, self.offsets, self.offset_factors)
        return numbers.reshape(tiles * rows, -1)

    def _level(self, take, scales, factors) -> jax.Array:
        """What each group is scaled by: (tiles, rows, groups, 1)."""
        outer = take(scales).astype(jnp.float32)
        outer = jnp.repeat(outer, self.block // self.group, axis=1)
        if factors is not None:
            outer = outer * take(factors).astype(jnp.float32)
        return outer.swapaxes(1, 2)[..., None]


def pack(blocks: UInt8[Array, "rows blocks bytes"], encoding: Encoding) -> Packed:
    """GGUF blocks as a stack of one weight.

    Raises:
        ValueError: ``encoding`` has no codes (F32, F16, BF16), or the last axis is not
            one of its blocks.
    """
    codes = gguf.unpack(blocks, encoding)
    rows, cols = codes.codes.shape
    bits, zero = _BITS.get(encoding, (8, 0))
    levels: Any = _levels(blocks, encoding, codes)
    block = cols // levels[0].shape[1]
    numbers = codes.codes + zero
    tiles = -(-rows // TILE_ROWS)
    padded = jnp.pad(numbers, [(0, tiles * TILE_ROWS - rows), (0, 0)])
    words = padded.reshape(tiles, TILE_ROWS, -1, 32 // bits).swapaxes(1, 2)
    if bits == 4:
        low, high = jnp.split(words.astype(jnp.uint8), 2, axis=-1)
        words = low | high << 4
    else:
        words = jax.lax.bitcast_convert_type(words, jnp.uint8)

    def tiled(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, tiles * TILE_ROWS - rows), (0, 0)])
        return x.reshape(1, tiles, TILE_ROWS, -1).swapaxes(2, 3)

    scales, factors, offsets, offset_factors = jax.tree.map(tiled, levels)
    return Packed(
        words[None],
        scales,
        factors,
        offsets,
        offset_factors,
        out_features=rows,
        bits=bits,
        zero=zero,
        group=codes.group,
        block=block,
    )


# Encodings whose codes fit 4 bits, and what is added to make them so.
_BITS = {
    Encoding.Q4_0: (4, 8),
    Encoding.Q4_1: (4, 0),
    Encoding.Q2_K: (4, 0),
    Encoding.Q3_K: (4, 4),
    Encoding.Q4_K: (4, 0),
}


@no_type_check
def _levels(blocks, encoding, codes):
    """Scales, their factors, offsets and their factors: (rows, blocks or groups)."""
    if encoding not in gguf.TWO_LEVELS:
        return codes.scale, None, codes.offset, None
    flat = lambda x: None if x is None else x.reshape(x.shape[0], -1)
    d, factors, dmin, minima = gguf.TWO_LEVELS[encoding](blocks)
    offset = None if dmin is None else -flat(dmin)
    return flat(d), flat(factors), offset, flat(minima)


def stacked(weights: list[Packed]) -> Packed:
    """One stack of weights of one shape and form, in order."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *weights)
