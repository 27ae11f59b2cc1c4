"""`@pytree`: a frozen dataclass that JAX can look inside.

Fields are array leaves unless declared with `static()`. Two values are equal when they
are of one type and say the same; a value without array leaves hashes, so that it can
travel as a static argument of ``jax.jit``. One that holds arrays does not hash, and
need not: it travels as an ordinary argument.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform, no_type_check

import jax
import numpy as np

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """A field that is part of the type's structure: jit compiles for each value of it."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


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
    # JAX maps over trees: shapes or specs may stand where a field's arrays stood.
    return no_type_check(jax.tree_util.register_dataclass(cls))
