"""Where the arrays of layers and caches lie on a mesh of devices."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .heads import DATA, HEADS


def on_device(layer: Any, device: Any) -> Any:
    """A copy of a layer whose arrays are on this device."""
    graph, state = nnx.split(layer)
    return nnx.merge(graph, jax.device_put(state, device))


# The axis of its outputs and the axis of its inputs, for each array of a projection.
AXES: dict[str, tuple[int | None, int | None]] = {
    "weight": (0, 1),
    "bias": (0, None),
    "blocks": (0, 1),
    "codes": (0, 1),
    "scale": (0, 1),
    "offset": (0, 1),
    "qweight": (1, 0),
    "qzeros": (1, None),
    "scales": (1, None),
    "g_idx": (None, 0),
    "weight_scale": (0, 1),
    "real": (None, 0),
}


def weight_specs(state: Any, divide: bool = True) -> Any:
    """The `PartitionSpec` of each array of a layer's state.

    q, k and v are cut by output, out by input; everything else is held whole. An axis of
    length 1 serves all and is not cut.
    """

    def spec(path: Any, leaf: Any) -> P:
        names = [name for entry in path if (name := _name(entry)) != "value"]
        if divide and names == ["sinks"]:
            return P(HEADS)
        if not divide or names[0] not in ("qkv", "out") or names[-1] not in AXES:
            return P()
        axis = AXES[names[-1]][0 if names[0] == "qkv" else 1]
        if axis is None or axis >= leaf.ndim or leaf.shape[axis] == 1:
            return P()
        return P(*[None] * axis, HEADS)

    return jax.tree_util.tree_map_with_path(spec, state)


def _name(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", entry)))


def cache_specs(cache: Any) -> Any:
    """The `PartitionSpec` of each array of a cache.

    Arrays of four axes and more are ``(layers, pages or sequences, kv heads, ...)``;
    the others count sequences.
    """
    whole = P(None, DATA, HEADS)
    return jax.tree.map(lambda leaf: whole if leaf.ndim >= 4 else P(DATA), cache)


def make_mesh(devices: Sequence[Any], data_parallel_degree: int = 1) -> Mesh:
    """Devices as ``(data, heads)``: neighbours share the heads of one replica."""
    if len(devices) < 1 or len(devices) % data_parallel_degree:
        raise ValueError(
            f"{len(devices)} devices do not divide into data_parallel_degree="
            f"{data_parallel_degree} replicas of equal size."
        )
    return Mesh(np.asarray(devices).reshape(data_parallel_degree, -1), (DATA, HEADS))


def place(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """``tree`` with its arrays on the mesh, each process giving what its devices hold."""

    def put(leaf: Any, spec: P) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            leaf = np.asarray(leaf)
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree, specs)


def shard_cache(cache: Any, mesh: Mesh) -> Any:
    """A cache with its arrays on the mesh: replicas own pages, devices own heads."""
    return place(cache, cache_specs(cache), mesh)
