"""How heads and weights are shared out among devices.

A head is never cut. `head_layout` says which heads each of ``n`` devices holds;
`with_heads` gives a layer those heads in that order, with zero heads where a device has
fewer than its neighbours and copies of a kv head that several devices read. What comes
out computes the same as before and can be cut into ``n`` equal parts, so that the same
code runs on one device, on all of them under ``jax.jit``, and inside ``shard_map``.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .._errors import check_groups, choices
from .cutting import Index, take, take_inputs, take_rows
from .linear import SeparateQKV, StackedQKV

DATA, HEADS = "data", "heads"
"""Axes of a mesh: replicas with sequences of their own, and devices that share heads."""

Heads = Index


# ------------------------------------------------------------------------ which heads


def split_range(size: int, parts: int) -> list[range]:
    """``size`` things over ``parts``: the first ``size % parts`` get one more."""
    base, more = divmod(size, parts)
    starts = [base * i + min(i, more) for i in range(parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


class HeadLayout(NamedTuple):
    """The heads of each device, ``-1`` where it has fewer than others.

    Attributes:
        q: (devices, query heads per device). Those of one kv head stand together.
        kv: (devices, kv heads per device).
    """

    q: Heads
    kv: Heads


def head_layout(query_heads: int, kv_heads: int, devices: int) -> HeadLayout:
    """Shares heads out: whole kv heads first, then the queries of each.

    With at most as many devices as kv heads, a device takes a range of kv heads and
    all queries of each. With more, a kv head takes a range of devices, each with a copy
    of it and a range of its queries. Ranges are those of `split_range`.

    Raises:
        ValueError: More devices than query heads, or heads that do not form groups.
    """
    check_groups(query_heads, kv_heads)
    if not 1 <= devices <= query_heads:
        raise ValueError(
            f"{query_heads} query heads cannot be shared out among {devices} devices: "
            "a head is never cut."
        )
    group = query_heads // kv_heads
    held: list[list[tuple[int, range]]] = []  # per device: kv head, its query heads
    if devices <= kv_heads:
        whole = range(group)
        held += [[(k, whole) for k in r] for r in split_range(kv_heads, devices)]
    else:
        for k, owners in enumerate(split_range(devices, kv_heads)):
            held += [[(k, part)] for part in split_range(group, len(owners))]
    kv_room = max(map(len, held))
    q_room = max(len(part) for device in held for _, part in device)
    q = np.full((devices, kv_room, q_room), -1)
    kv = np.full((devices, kv_room), -1)
    for device, mine in enumerate(held):
        for slot, (k, part) in enumerate(mine):
            kv[device, slot] = k
            q[device, slot, : len(part)] = k * group + np.asarray(part, int)
    return HeadLayout(q.reshape(devices, -1), kv)


# ---------------------------------------------------------- the same layer, other heads


def with_heads(layer: Any, q: Heads, kv: Heads) -> Any:
    """A copy of an attention layer with these heads, in parts that can be cut apart.

    Args:
        layer: Any build of `AbstractAttention`.
        q: Query heads ``(parts, n)``; -1 makes one of zeros.
        kv: Kv heads ``(parts, m)``; those of a part serve its queries in order.
    """
    D = layer.head_size
    _, k_width, v_width = layer.qkv.widths
    E = v_width * D // k_width
    new = nnx.clone(layer)
    new.qkv = _take_qkv(layer.qkv, _lanes(q, D), _lanes(kv, D), _lanes(kv, E))
    new.out = take_inputs(layer.out, _lanes(q, E))
    if layer.sinks is not None:
        new.sinks = nnx.Param(take(layer.sinks, q, 0))
    return new


def on_device(layer: Any, device: Any) -> Any:
    """A copy of a layer whose arrays are on this device."""
    graph, state = nnx.split(layer)
    return nnx.merge(graph, jax.device_put(state, device))


def _lanes(heads: Heads, size: int) -> Heads:
    """Numbers of the lanes of these heads: (parts, n) -> (parts, n * size)."""
    lanes = heads[..., None] * size + np.arange(size)
    return np.where(heads[..., None] < 0, -1, lanes).reshape(*heads.shape[:-1], -1)


def _take_qkv(qkv: Any, q: Heads, k: Heads, v: Heads) -> Any:
    if isinstance(qkv, SeparateQKV):
        return SeparateQKV(
            *(
                take_rows(p, rows)
                for p, rows in zip((qkv.q, qkv.k, qkv.v), (q, k, v), strict=True)
            )
        )
    whole, first = sum(qkv.sizes), np.cumsum([0, *qkv.sizes])
    moved = [  # lane r of q, say, is in part r // size; see StackedQKV
        np.where(rows < 0, -1, rows // size * whole + at + rows % size)
        for rows, size, at in zip((q, k, v), qkv.sizes, first, strict=False)
    ]
    rows = np.concatenate(moved, axis=-1)
    sizes = q.shape[-1], k.shape[-1], v.shape[-1]
    return StackedQKV(take_rows(qkv.qkv, rows), sizes)


# ------------------------------------------------------------------- where arrays live

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


# ----------------------------------------------------------------- strategies, by name

Kind = Literal[
    "rowwise",
    "columnwise",
    "axiswise",
    "replicate",
    "stacked_qkv",
    "head_aware_columnwise",
    "tensor_parallel",
]


@dataclasses.dataclass(frozen=True)
class ShardingStrategy:
    """How one weight is cut, or with `tensor_parallel` a whole layer.

    Build it with the class methods of those names. Weights are (out, in); uneven
    lengths follow `split_range`. `shard` cuts, `spec` is the same for a mesh axis.

    Attributes:
        num_devices: Parts.
        kind: Which of them.
        axis: The axis that is cut, for the kinds that cut one.
        heads: (query heads, kv heads, head size), for the kinds that know of heads.
    """

    num_devices: int
    kind: Kind
    axis: int | None = None
    heads: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"kind={self.kind!r} is not one of {choices(get_args(Kind))}."
            )
        if self.num_devices < 1:
            raise ValueError(f"num_devices={self.num_devices} must be at least 1.")
        if self.heads is not None:
            head_layout(*self.heads[:2], self.num_devices)  # raises what does not fit

    @classmethod
    def rowwise(cls, num_devices: int) -> "ShardingStrategy":
        """Axis 0: outputs of a projection."""
        return cls(num_devices, "rowwise", 0)

    @classmethod
    def columnwise(cls, num_devices: int) -> "ShardingStrategy":
        """Axis 1: inputs of a projection."""
        return cls(num_devices, "columnwise", 1)

    @classmethod
    def axiswise(cls, axis: int, num_devices: int) -> "ShardingStrategy":
        """Any axis."""
        return cls(num_devices, "axiswise", axis)

    @classmethod
    def replicate(cls, num_devices: int) -> "ShardingStrategy":
        """A whole copy for every device."""
        return cls(num_devices, "replicate")

    @classmethod
    def stacked_qkv(
        cls,
        num_devices: int,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
    ) -> "ShardingStrategy":
        """Rows q, k, v one after another, cut by head; any number of kv heads."""
        heads = num_heads, num_kv_heads or num_heads, head_dim
        return cls(num_devices, "stacked_qkv", 0, heads)

    @classmethod
    def head_aware_columnwise(
        cls,
        num_devices: int,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
    ) -> "ShardingStrategy":
        """Axis 1, cut by query head: the output projection.

        ``num_kv_heads`` keeps queries with their kv heads, as `stacked_qkv` does.
        """
        heads = num_heads, num_kv_heads or num_heads, head_dim
        return cls(num_devices, "head_aware_columnwise", 1, heads)

    @classmethod
    def tensor_parallel(cls, num_devices: int) -> "ShardingStrategy":
        """Of a layer, not of a weight: its projections are cut by head."""
        return cls(num_devices, "tensor_parallel")

    @property
    def is_rowwise(self) -> bool:
        return self.kind == "rowwise"

    @property
    def is_columnwise(self) -> bool:
        return self.kind == "columnwise"

    @property
    def is_axiswise(self) -> bool:
        return self.kind == "axiswise"

    @property
    def is_replicate(self) -> bool:
        return self.kind == "replicate"

    @property
    def is_stacked_qkv(self) -> bool:
        return self.kind == "stacked_qkv"

    @property
    def is_head_aware_columnwise(self) -> bool:
        return self.kind == "head_aware_columnwise"

    @property
    def is_tensor_parallel(self) -> bool:
        return self.kind == "tensor_parallel"

    def shard(self, weight: Any, index: int) -> Any:
        """Device ``index``'s part of a weight.

        Raises:
            ValueError: An index, axis or width that does not fit.
            NotImplementedError: `tensor_parallel` says nothing about a single weight.
        """
        if not 0 <= index < self.num_devices:
            raise ValueError(f"index={index} must lie in [0, {self.num_devices}).")
        if self.is_tensor_parallel:
            raise NotImplementedError(
                "tensor_parallel is a strategy of a layer; cut a weight by rowwise, "
                "columnwise, stacked_qkv or head_aware_columnwise."
            )
        if self.is_replicate:
            return weight
        axis = self._axis(weight.ndim)
        if self.heads is None:
            part = split_range(weight.shape[axis], self.num_devices)[index]
            return weight[(slice(None),) * axis + (slice(part.start, part.stop),)]
        lanes = self._lanes(weight.shape[axis], index)
        return jnp.take(weight, lanes, axis=axis)

    def spec(self, ndim: int, axis_name: str = HEADS) -> P:
        """The `PartitionSpec` of a weight whose axis comes out even."""
        if self.is_replicate or self.is_tensor_parallel:
            return P()
        return P(*[None] * self._axis(ndim), axis_name)

    def _axis(self, ndim: int) -> int:
        if self.axis is None or not -ndim <= self.axis < ndim:
            raise ValueError(f"axis={self.axis} is not an axis of {ndim}.")
        return self.axis % ndim

    def _lanes(self, width: int, index: int) -> Heads:
        assert self.heads is not None
        H, K, D = self.heads
        parts = (H, K, K) if self.is_stacked_qkv else (H,)
        if width != sum(parts) * D:
            raise ValueError(
                f"{self.kind} of heads {parts} x {D} cuts {sum(parts) * D} places; the "
                f"weight has {width}."
            )
        layout = head_layout(H, K, self.num_devices)
        mine = [layout.q[index], layout.kv[index], layout.kv[index]][: len(parts)]
        firsts = np.cumsum([0, *parts])
        heads = [m[m >= 0] + at for m, at in zip(mine, firsts, strict=False)]
        return _lanes(np.concatenate(heads), D)
