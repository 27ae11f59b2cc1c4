"""safetensors files: tensors by name, read in place.

A file is the length of a header (uint64, little-endian), the header (JSON: for each name
its dtype, its shape, and where its bytes begin and end after the header), and the bytes.
The ``safetensors`` package does not give NumPy float8; this does, and needs nothing.

Source: github.com/huggingface/safetensors, "Format".
"""

import json
import math
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._core.errors import choices

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": jnp.bfloat16,
        "F8_E4M3": jnp.float8_e4m3fn,
        "F8_E5M2": jnp.float8_e5m2,
        "F8_E8M0": jnp.float8_e8m0fnu,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
MAX_HEADER = 100_000_000  # bytes; what the format allows


def read(path: str | os.PathLike[str], prefix: str = "") -> dict[str, np.ndarray]:
    """The tensors whose names begin with ``prefix``, without it.

    Arrays are read-only views of the file: bytes are read when they are used.

    Raises:
        ValueError: Not such a file, or a header that does not fit it.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(f"{path} is no safetensors file: its header is cut off.")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: the header is no JSON: {error}.") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is no JSON object of names to tensors.")
    raw = np.memmap(path, np.uint8, "r", offset=8 + length, shape=(size - 8 - length,))
    return {
        name.removeprefix(prefix): _tensor(path, name, entry, raw)
        for name, entry in header.items()
        if name != "__metadata__" and name.startswith(prefix)
    }


def _tensor(path: Any, name: str, entry: Any, raw: Any) -> np.ndarray:
    try:
        kind, shape = entry["dtype"], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        known = isinstance(kind, str) and all(
            type(size) is int and size >= 0 for size in (*shape, start, end)
        )
    except (TypeError, KeyError, ValueError):
        known = False
    if not known:
        raise ValueError(
            f"{path}: {name} is described as {reprlib.repr(entry)}; wanted a dtype, a "
            "shape and two data_offsets."
        )
    if kind not in DTYPES:
        raise ValueError(f"{path}: {name} has dtype {kind!r}, not {choices(DTYPES)}.")
    dtype = DTYPES[kind]
    if not 0 <= start <= end <= len(raw) or end - start != (
        math.prod(shape) * dtype.itemsize
    ):
        raise ValueError(
            f"{path}: {name}, {kind} {shape}, does not fit its bytes {start} to {end} "
            f"of {len(raw)}."
        )
    return np.asarray(raw[start:end]).view(dtype).reshape(shape)


def write(path: str | os.PathLike[str], tensors: Mapping[str, Any]) -> None:
    """Writes tensors, in the order of their names.

    Raises:
        ValueError: A dtype that the format does not have.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, arrays, at = {}, [], 0
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        if array.dtype not in names:
            raise ValueError(f"{name} has dtype {array.dtype}, not {choices(DTYPES)}.")
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at := at + array.nbytes],
        }
        arrays.append(np.ascontiguousarray(array))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the bytes begin at a multiple of 8
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for array in arrays:
            file.write(array.tobytes())
