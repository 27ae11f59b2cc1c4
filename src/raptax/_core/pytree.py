"""`@pytree`: a frozen dataclass that JAX can look inside.

Fields are array leaves unless declared with `static()`. Two values are equal when they
are of one type and say the same; a value without array leaves hashes, so that it can
travel as a static argument of ``jax.jit``. One that holds arrays does not hash, and
need not: it travels as an ordinary argument. A `Constant` is an array that is part of
the structure.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform, no_type_check

import jax
import numpy as np

T = TypeVar("T")
_TYPES: set[type] = set()


def static(**kwargs: Any) -> Any:
    """A field that is part of the type's structure: jit compiles for each value of it."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def is_value(x: Any) -> bool:
    """Whether the type of ``x`` is one that `pytree` made."""
    return type(x) in _TYPES


class Constant(np.ndarray):
    """A NumPy array that is part of a tree's structure, and none of its leaves.

    ``jit`` compiles it into the program, checkpoints and optimizers do not see it.
    Structures are equal if shape, dtype and all bits are. Make one by `constant`.
    """


def constant(values: np.ndarray) -> Constant:
    """A copy of ``values`` that cannot be written to."""
    return _unflatten_constant(_flatten_constant(values)[1], ())


def _flatten_constant(x: np.ndarray) -> tuple[tuple[()], tuple[Any, ...]]:
    return (), (x.shape, x.dtype.str, x.tobytes())


def _unflatten_constant(known: tuple[Any, ...], _: Any) -> Constant:
    shape, dtype, data = known
    return np.frombuffer(data, dtype).reshape(shape).view(Constant)


jax.tree_util.register_pytree_node(Constant, _flatten_constant, _unflatten_constant)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return False
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())


def _equal(self: Any, other: Any) -> Any:
    if type(self) is not type(other):
        return NotImplemented
    mine, my_structure = jax.tree_util.tree_flatten(self)
    theirs, their_structure = jax.tree_util.tree_flatten(other)
    alike: bool = my_structure == their_structure  # type: ignore[operator]
    return alike and all(map(_same, mine, theirs))


def _hash(self: Any) -> int:
    leaves, structure = jax.tree_util.tree_flatten(self)
    return hash((structure, *leaves))  # an array leaf raises TypeError, as it should


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def pytree(cls: type[T]) -> type[T]:
    """Makes ``cls`` a frozen dataclass, compared by value and registered with JAX."""
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    cls.__eq__ = _equal  # type: ignore[method-assign]
    cls.__hash__ = _hash  # type: ignore[method-assign]
    _register(cls)
    _TYPES.add(cls)
    return no_type_check(cls)  # shapes or specs may stand where arrays stood


def _register(cls: type) -> None:
    """Makes ``cls`` a tree node whose structure names its type.

    `jax.tree_util.register_dataclass` leaves that out of the comparison (jaxlib 0.10):
    two types with fields alike have equal structures, and jit may run the program of
    the one for the other.
    """
    fields = dataclasses.fields(cls)
    fixed = [f.name for f in fields if f.metadata.get("static")]
    leaves = [f.name for f in fields if not f.metadata.get("static")]

    def structure(x: Any) -> tuple[Any, ...]:
        return (cls, *(getattr(x, name) for name in fixed))

    def flatten(x: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(x, name) for name in leaves], structure(x)

    def flatten_with_keys(x: Any) -> tuple[list[Any], tuple[Any, ...]]:
        keys = map(jax.tree_util.GetAttrKey, leaves)
        children, known = flatten(x)
        return list(zip(keys, children, strict=True)), known

    def unflatten(known: tuple[Any, ...], children: Any) -> Any:
        x: Any = object.__new__(
            cls
        )  # checked when it was made; now it may hold anything
        named = [*zip(fixed, known[1:], strict=True)]
        for name, value in (*named, *zip(leaves, children, strict=True)):
            object.__setattr__(x, name, value)
        return x

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
