"""Arrays inside `jax.shard_map`, whose types say over which mesh axes they vary."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


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

    def vary(x: jax.Array) -> jax.Array:
        if x.dtype == bool:
            return x | zero.astype(bool)
        narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
        wide = x.astype(jnp.float32) if narrow else x
        return (wide + zero.astype(wide.dtype)).astype(x.dtype)

    return jax.tree.map(vary, tree)


def varying_like(x: jax.Array, tree: Any) -> Any:
    """``tree`` with every array varying over the axes that ``x`` does, and its own."""
    return same_manual_axes((x, tree))[1]
