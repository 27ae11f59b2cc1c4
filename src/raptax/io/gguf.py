"""GGUF files: a model's settings, tokenizer and weights in one file.

    4 bytes       "GGUF"
    uint32        version: 2 or 3
    uint64        number of tensors
    uint64        number of fields
    fields        string key, uint32 type, value
    tensors       string name, uint32 axes, uint64 size of each (the contiguous axis
                  first), uint32 encoding, uint64 offset into the data
    padding       up to a multiple of the field ``general.alignment``, else of 32
    data          the tensors, each at a multiple of the same alignment

Everything is little-endian. A string is a uint64 length and as many bytes of UTF-8; an
array is a uint32 type of its elements, a uint64 count, and the elements.

The reader is our own because the gguf package takes 14 s to read the 262,144 tokens of
a Gemma tokenizer; this one takes a quarter of one. Source: ggml's ``docs/gguf.md``.
"""

import dataclasses
import math
import os
import struct
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from ..quant.gguf import Encoding

_ENCODINGS = {encoding.number: encoding for encoding in Encoding}
# The rest of ggml's list, for their names.
_UNREADABLE = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

# Field types with a fixed size, as struct and numpy spell them.
_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclasses.dataclass(frozen=True, repr=False)
class Tensor:
    """One tensor of a file. Its bytes stay in the file until they are used.

    Attributes:
        shape: As numpy says it, ``(rows, cols)``: the last axis is contiguous.
        raw: Its bytes, a view of the mapped file.
    """

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    raw: UInt8[np.ndarray, "size"]

    @property
    def blocks(self) -> UInt8[np.ndarray, "*rows blocks bytes"]:
        """What `raptax.quant.gguf.dequantize` takes."""
        return self.raw.reshape(*self.shape[:-1], -1, self.encoding.bytes)

    @property
    def floats(self) -> Float[np.ndarray, "..."]:
        """An F32, F16 or BF16 tensor as an array of that dtype and of ``shape``.

        Raises:
            ValueError: The tensor is made of blocks.
        """
        dtypes = {"F32": "<f4", "F16": "<f2", "BF16": jnp.bfloat16}
        if self.encoding.name not in dtypes:
            raise ValueError(
                f"{self.name} is stored as {self.encoding.name}, which is blocks, not "
                "floats; take its blocks and dequantize them."
            )
        return self.raw.view(dtypes[self.encoding.name]).reshape(self.shape)

    def __repr__(self) -> str:
        return f"Tensor({self.name}, {self.shape}, {self.encoding.name})"


class GGUFFile:
    """The fields and tensors of a GGUF file, both by name and in the file's order.

    Attributes:
        fields: Numbers, bools, strings, and lists of them.
        tensors: Each a `Tensor`.
        unreadable: The other tensors: by name, the encoding that raptax does not read.

    Raises:
        ValueError: The file is not GGUF, is damaged or cut short, or is of a version
            that raptax does not read. The message names the file and what is wrong
            with it.
        OSError: The file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self.unreadable: dict[str, str] = {}
        if os.path.getsize(self.path) == 0:
            raise ValueError(f"{self.path} is empty. Was its download cut short?")
        data = np.memmap(self.path, np.uint8, mode="r").view(np.ndarray)
        try:
            self._read(_Cursor(data))
        except _Wrong as wrong:
            raise ValueError(f"{self.path} {wrong}") from None

    def __repr__(self) -> str:
        kind = self.fields.get("general.architecture", "no architecture")
        return f"GGUFFile({self.path!r}: {kind}, {len(self.tensors)} tensors)"

    def _read(self, cursor: "_Cursor") -> None:
        _check_header(cursor)
        tensors, fields = cursor.numbers("<QQ")
        for _ in range(fields):
            name = cursor.string("a field's name")
            if name in self.fields:
                raise _Wrong(f"is damaged: it has two fields named {name!r}.")
            self.fields[name] = cursor.value(name)

        table = [cursor.tensor() for _ in range(tensors)]
        alignment = self.fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise _Wrong(
                f"is damaged: general.alignment={alignment!r} must be a power of two."
            )
        start = -(-cursor.at // alignment) * alignment
        spans = []
        for name, shape, encoding, offset in table:
            if name in self.tensors or name in self.unreadable:
                raise _Wrong(f"is damaged: it has two tensors named {name!r}.")
            if isinstance(encoding, str):
                self.unreadable[name] = encoding
                continue
            if offset % alignment:
                raise _Wrong(
                    f"is damaged: {name} starts at byte {offset} of the data, which is "
                    f"not a multiple of the alignment {alignment}."
                )
            size = math.prod(shape) // encoding.values * encoding.bytes
            raw = cursor.window(start + offset, size, name)
            self.tensors[name] = Tensor(name, shape, encoding, raw)
            spans.append((offset, offset + size, name))
        for (_, end, first), (begin, _, second) in pairwise(sorted(spans)):
            if begin < end:
                raise _Wrong(f"is damaged: {first} and {second} overlap.")


class _Wrong(Exception):
    """What is wrong with a file: the rest of a sentence that starts with its path."""


class _Cursor:
    """A place in the mapped file, and what can be read there.

    Nothing is allocated for a length or a count before its bytes have been found, so a
    damaged one ends at the end of the file and not in a lack of memory.
    """

    def __init__(self, data: UInt8[np.ndarray, "size"]):
        self.data = data
        self.view = data.data
        self.at = 0

    def take(self, size: int, what: str) -> memoryview:
        """The next ``size`` bytes."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.view):
            raise self._short(what, self.at)
        return self.view[start : self.at]

    def window(self, start: int, size: int, what: str) -> UInt8[np.ndarray, "size"]:
        if start + size > len(self.view):
            raise self._short(what, start + size)
        return self.data[start : start + size]

    def _short(self, what: str, needed: int) -> _Wrong:
        # A length that no disk could hold was not cut short but overwritten.
        slip = "Was its download cut short?" if needed < 2**50 else "It is damaged."
        return _Wrong(
            f"ends inside {what}: needs {needed} bytes, has {len(self.view)}. {slip}"
        )

    def numbers(self, layout: str, what: str = "the header") -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        # One loop, without `take`: a tokenizer holds 10**5 of them.
        view, at, strings = self.view, self.at, []
        size_at = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                start = at + 8
                at = start + size_at(view, at)[0]
                if at > len(view):
                    raise self._short(what, at)
                strings.append(str(view[start:at], "utf-8"))
        except struct.error:
            raise self._short(what, at + 8) from None
        except UnicodeDecodeError as error:
            raise _Wrong(f"is damaged: {what} is not UTF-8 ({error.reason}).") from None
        self.at = at
        return strings

    def value(self, name: str) -> Any:
        """A field's type and its value."""
        what = f"the field {name!r}"
        (kind,) = self.numbers("<I", what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            return self._array(kind, 1, what)[0]
        kind, count = self.numbers("<IQ", what)
        if kind == _STRING:
            return self.strings(count, what)
        return self._array(kind, count, what)

    def _array(self, kind: int, count: int, what: str) -> list[Any]:
        if kind == _ARRAY:
            raise _Wrong(f"cannot be read: {what} is an array of arrays.")
        if kind not in _NUMBERS:
            raise _Wrong(f"is damaged: {what} has type {kind}, which GGUF lacks.")
        dtype = np.dtype(_NUMBERS[kind])
        values = np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        return (values.astype(bool) if kind == _BOOL else values).tolist()

    def tensor(self) -> tuple[str, tuple[int, ...], Encoding | str, int]:
        """A row of the tensor table: name, shape, encoding or its name, offset."""
        name = self.string("a tensor's name")
        (axes,) = self.numbers("<I", name)
        if not 1 <= axes <= 4:
            raise _Wrong(f"is damaged: {name} has {axes} axes; GGUF allows 1 to 4.")
        shape = self.numbers(f"<{axes}Q", name)[::-1]
        number, offset = self.numbers("<IQ", name)
        if number not in _ENCODINGS:
            return name, shape, _UNREADABLE.get(number, f"encoding {number}"), offset
        encoding = _ENCODINGS[number]
        if 0 in shape or shape[-1] % encoding.values:
            raise _Wrong(
                f"is damaged: {name} has shape {shape}, whose rows are not whole "
                f"{encoding.name} blocks of {encoding.values}."
            )
        return name, shape, encoding, offset


def _check_header(cursor: _Cursor) -> None:
    magic = bytes(cursor.take(4, "the header"))
    if magic != b"GGUF":
        raise _Wrong(f"is not a GGUF file: it starts with {magic!r}, not b'GGUF'.")
    (version,) = cursor.numbers("<I")
    if version and version % 65536 == 0:
        raise _Wrong("is big-endian GGUF; raptax reads little-endian files.")
    if version not in (2, 3):
        raise _Wrong(f"is GGUF version {version}; raptax reads versions 2 and 3.")
