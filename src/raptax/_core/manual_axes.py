"""Arrays inside `jax.shard_map`, whose types say over which mesh axes they vary."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from .interpret import bind, interpret

# Operations that change the type of an array in a shard_map, and none of its numbers.
VARY = ("pvary", "pcast")


def same_manual_axes(tree: Any) -> Any:
    """``tree`` with every array varying over the mesh axes that any of them does.

    Loops start from zeros made like these arrays, and must end with the same type. A
    gradient of what varied over fewer axes is summed over the others, once, here, in
    float32 at least.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    zeros = (jnp.zeros_like(x, jnp.int32, shape=()) for x in jax.tree.leaves(tree))
    zero = functools.reduce(jnp.add, zeros, jnp.int32(0))

    def vary(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        if x.dtype == bool:
            return x | zero.astype(bool)
        narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
        wide = x.astype(jnp.float32) if narrow else x
        return (wide + zero.astype(wide.dtype)).astype(x.dtype)

    return jax.tree.map(vary, tree)


def varying_like(x: jax.Array, tree: Any) -> Any:
    """``tree`` with every array varying over the axes that ``x`` does, and its own."""
    return same_manual_axes((x, tree))[1]


def eval_jaxpr(
    jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]
) -> list[Any]:
    """What ``jaxpr`` returns where its arrays may vary over more axes than it says.

    Operands that come to vary by one path alone are made to match at each operation,
    which `jax.core.eval_jaxpr` leaves to whoever traced the jaxpr. Calls of `jax.jit`
    are looked into; other inner jaxprs keep their types.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return list(jax.core.eval_jaxpr(jaxpr, consts, *args))
    return interpret(jaxpr, [*consts, *args], _step)


def _step(eqn: Any, ins: list[Any]) -> list[Any]:
    inner = eqn.params.get("jaxpr")
    if eqn.primitive.name in VARY:
        return ins
    if eqn.primitive.name in ("jit", "pjit") and inner is not None:
        return eval_jaxpr(inner.jaxpr, inner.consts, ins)
    if any(True for _ in core.jaxprs_in_params(eqn.params)):
        return bind(eqn, ins)
    return bind(eqn, same_manual_axes(ins))
