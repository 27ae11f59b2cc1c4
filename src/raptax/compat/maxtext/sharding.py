"""Logical axis names, and what they mean on a mesh.

A rule maps a name to one mesh axis or several: ``("activation_kv_heads", "tensor")``. For
one array rules are read in order, and a rule serves a name if it names axes that the mesh
has and no other dimension took. An axis that does not divide its dimension is left out,
so that a batch of one decodes on the mesh that trained it.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

AnyMesh = Mesh | AbstractMesh
Rules = Sequence[Any]


def mesh_axes(
    name: str | None, rules: Rules, mesh: AnyMesh, taken: Iterable[str] = ()
) -> tuple[str, ...]:
    """The mesh axes that a name stands for; none if no rule serves it."""
    for known, axes in rules:
        if known != name or axes is None:
            continue
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        there = tuple(axis for axis in axes if axis in mesh.shape)
        if there and not set(there) & set(taken):
            return there
    return ()


def partition_spec(
    names: Sequence[str | None], shape: Sequence[int], rules: Rules, mesh: AnyMesh
) -> PartitionSpec:
    """How an array of this shape, with these names for its dimensions, is cut."""
    taken: list[str] = []
    spec: list[Any] = []
    for name, size in zip(names, shape, strict=True):
        axes = mesh_axes(name, rules, mesh, taken)
        if size % math.prod(mesh.shape[axis] for axis in axes):
            axes = ()
        taken += axes
        spec.append(axes or None)
    return PartitionSpec(*spec)


def constrain(
    x: jax.Array, names: Sequence[str | None], rules: Rules, mesh: Mesh | None
) -> jax.Array:
    """``x``, laid out over the mesh as its names say; as it is where there is no mesh."""
    if mesh is None or mesh.size == 1 or not rules or len(names) != x.ndim:
        return x
    spec = partition_spec(names, x.shape, rules, mesh)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
