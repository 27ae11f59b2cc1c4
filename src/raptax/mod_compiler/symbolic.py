"""Symbolic arrays: the values of a mod while it is lowered.

A `Constant` array is one of numbers, a `SymbolicArray` one of instructions. The latter
keeps track of which index runs along which axis, so that nothing passes that would mix
the scores of different positions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._core.interpret import bind
from .._core.manual_axes import VARY, same_manual_axes
from .ir import ANY, YES_OR_NO, Range
from .lowering import ELEMENTWISE, NotLowerable, small


class Constant(NamedTuple):
    """An array that no position or score has a part in.

    ``spread`` says of each axis that its entries are equal for certain, as after a
    broadcast. ``written`` means that the mod's text says all of it: no array came in.
    ``made`` is the operation that it came from, and what that was given.
    """

    value: Any
    spread: tuple[bool, ...]
    written: bool
    made: tuple[Any, ...] = ()


class SymbolicArray(NamedTuple):
    """An array that is worked out from positions and scores.

    ``values`` are numbers of instructions. An axis along which there is but one formula
    has length 1 there, whatever its length in ``shape``. ``axes`` names the index that
    runs along each axis, "" for none.
    """

    values: np.ndarray
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype


def constant(value: Any, written: bool) -> Constant:
    """An array of which nothing else is known."""
    return Constant(value, tuple(n == 1 for n in np.shape(value)), written)


def merged(eqn: Any, formulas: list[SymbolicArray], ndim: int) -> tuple[str, ...]:
    """The indices that run along the axes of a result."""
    axes = []
    for d in range(ndim):
        names = {f.axes[d] for f in formulas} - {""}
        several = any(f.values.shape[d] > 1 for f in formulas)
        if len(names) > 1 or (names and several):
            raise NotLowerable(
                f"has {eqn.primitive.name} of arrays whose axes do not match"
            )
        axes.append(names.pop() if names else "")
    if len(set(axes) - {""}) < sum(map(bool, axes)):
        raise NotLowerable("lays out the positions of one axis along two")
    return tuple(axes)


def outside(eqn: Any, ins: list[Constant]) -> list[Constant]:
    """An operation on arrays alone, done at once and not by the program."""
    name, avals = eqn.primitive.name, [v.aval for v in eqn.outvars]
    if name in VARY:
        return ins
    written = all(x.written for x in ins) and name != "dim_as_value"
    if written:
        values = _written(eqn, [x.value for x in ins])
    else:
        values = bind(eqn, same_manual_axes([jnp.asarray(x.value) for x in ins]))
    spread = [tuple(n == 1 for n in aval.shape) for aval in avals]
    if name == "broadcast_in_dim":
        same = [True] * len(avals[0].shape)
        for d, to in enumerate(eqn.params["broadcast_dimensions"]):
            same[to] = ins[0].spread[d] or ins[0].value.shape[d] == 1
        spread = [tuple(same)]
    elif name in ELEMENTWISE:
        arrays = [x.spread for x in ins if x.spread]
        spread = [tuple(map(all, zip(*arrays, strict=True)))]
    shapes = ("shape", "sharding")
    params = str([(k, v) for k, v in sorted(eqn.params.items()) if k not in shapes])
    return [
        Constant(x, same, written, ((name, params, n), *ins))
        for n, (x, same) in enumerate(zip(values, spread, strict=True))
    ]


def _written(eqn: Any, values: list[Any]) -> list[Any]:
    """An operation on numbers of the mod's text, the commonest ones without JAX."""
    name, aval = eqn.primitive.name, eqn.outvars[0].aval
    if name == "convert_element_type":
        return [np.asarray(values[0]).astype(aval.dtype)]
    if name == "broadcast_in_dim" and values[0].ndim == 0:
        return [np.broadcast_to(values[0], aval.shape)]
    nowhere = jax.sharding.AbstractMesh((), ())  # as programs of a shard_map only trace
    with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(nowhere):
        outs = bind(eqn, [jnp.asarray(x) for x in values])
    keys = any(jnp.issubdtype(x.dtype, jax.dtypes.extended) for x in outs)
    return outs if keys else [np.asarray(x) for x in outs]


# ------------------------------------------------------------------------------- arrays

READ_AS_THEY_ARE = ("float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool")


def readable(array: Any) -> jax.Array:
    """An array of one of the types that programs read, with the same numbers in it."""
    array = jnp.asarray(array)
    if array.size == 0:
        raise NotLowerable("reads an empty array")
    name = array.dtype.name
    if name in READ_AS_THEY_ARE:
        return array
    if name == "uint32":
        return lax.bitcast_convert_type(array, jnp.int32)
    if small(array.dtype):
        return array.astype(jnp.int32)
    if name.startswith(("float8", "float4")):
        return array.astype(jnp.float32)
    raise NotLowerable(f"reads an array of {name}, which a mod program cannot")


def entries(array: Any) -> Range:
    """Between which numbers the entries of an array lie."""
    dtype = np.dtype(array.dtype)
    if dtype.kind == "b":
        return YES_OR_NO
    if dtype != np.int32 and not small(dtype):
        return ANY
    if not isinstance(array, jax.core.Tracer) and array.size <= FEW:
        numbers = np.asarray(array)
        return int(numbers.min()), int(numbers.max())
    return int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max)


FEW = 4096  # entries that are looked at for their range
MOST_ENTRIES = 64  # of an array that is written down entry by entry


def constant_bits(value: np.ndarray, kind: str) -> int:
    """A number as the 32 bits that programs hold."""
    if kind == "float":
        return int(np.asarray(value, np.float32).view(np.int32))
    if kind == "bool":
        return -1 if value else 0
    if kind == "uint":
        return int(np.asarray(value).astype(np.uint32).view(np.int32))
    return int(value)


# ------------------------------------------------------------------- values moved about


def _broadcast(eqn: Any, x: SymbolicArray) -> SymbolicArray:
    shape = eqn.params["shape"]
    few, axes = [1] * len(shape), [""] * len(shape)
    for d, to in enumerate(eqn.params["broadcast_dimensions"]):
        few[to], axes[to] = x.values.shape[d], x.axes[d]
    return SymbolicArray(x.values.reshape(few), tuple(axes), tuple(shape), x.dtype)


def _reshape(eqn: Any, x: SymbolicArray) -> SymbolicArray:
    """Axes of length 1 come and go; anything else would mix positions."""
    shape = eqn.outvars[0].aval.shape
    long = [d for d, n in enumerate(x.shape) if n != 1]
    if [x.shape[d] for d in long] != [n for n in shape if n != 1]:
        raise NotLowerable("reshapes positions or scores")
    kept = iter(long)
    source = [next(kept) if n != 1 else None for n in shape]
    few = [1 if d is None else x.values.shape[d] for d in source]
    axes = tuple("" if d is None else x.axes[d] for d in source)
    return SymbolicArray(x.values.reshape(few), axes, tuple(shape), x.dtype)


def _transpose(eqn: Any, x: SymbolicArray) -> SymbolicArray:
    order = eqn.params["permutation"]
    axes = tuple(x.axes[d] for d in order)
    shape = tuple(x.shape[d] for d in order)
    return SymbolicArray(x.values.transpose(order), axes, shape, x.dtype)


def _concatenate(eqn: Any, *xs: SymbolicArray) -> SymbolicArray:
    return _joined(eqn, eqn.params["dimension"], list(xs))


def _joined(eqn: Any, d: int, xs: list[SymbolicArray]) -> SymbolicArray:
    if any(x.axes[d] for x in xs):
        raise NotLowerable("concatenates along an axis of positions")
    shape = eqn.outvars[0].aval.shape
    axes = merged(
        eqn, [x._replace(values=x.values.take([0], d)) for x in xs], len(shape)
    )
    grids = np.broadcast_shapes(
        *(x.values.shape[:d] + x.values.shape[d + 1 :] for x in xs)
    )
    parts = [
        np.broadcast_to(x.values, (*grids[:d], x.shape[d], *grids[d:])) for x in xs
    ]
    return SymbolicArray(np.concatenate(parts, d), axes, tuple(shape), xs[0].dtype)


def _slice(eqn: Any, x: SymbolicArray) -> SymbolicArray:
    shape = eqn.outvars[0].aval.shape
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(shape)
    places = []
    for d, bounds in enumerate(zip(start, limit, strides, strict=True)):
        if shape[d] == x.shape[d] or x.values.shape[d] == 1:
            if x.axes[d] and shape[d] != x.shape[d]:
                raise NotLowerable("slices along an axis of positions")
            places.append(slice(None))
        else:
            places.append(slice(*bounds))
    return SymbolicArray(x.values[tuple(places)], x.axes, tuple(shape), x.dtype)


def _stack(eqn: Any, *xs: SymbolicArray) -> SymbolicArray:
    d = eqn.params["axis"]
    apart = [
        SymbolicArray(
            np.expand_dims(x.values, d),
            (*x.axes[:d], "", *x.axes[d:]),
            (*x.shape[:d], 1, *x.shape[d:]),
            x.dtype,
        )
        for x in xs
    ]
    return _joined(eqn, d, apart)


MOVES: dict[str, Callable[..., SymbolicArray]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "slice": _slice,
    "stack": _stack,
    "copy": lambda eqn, x: x,
    "copy_p": lambda eqn, x: x,
    "optimization_barrier": lambda eqn, x: x,
    **dict.fromkeys(VARY, lambda eqn, x: x),
}
