"""Head layout: how heads are shared out among devices.

A head is never cut. `head_layout` says which heads each of ``n`` devices holds;
`with_heads` gives a layer those heads in that order, with zero heads where a device has
fewer than its neighbours and copies of a kv head that several devices read. What comes
out computes the same as before and can be cut into ``n`` equal parts, so that the same
code runs on one device, on all of them under ``jax.jit``, and inside ``shard_map``.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from ..._core.errors import check_groups
from ..linear import SeparateQKV, StackedQKV
from .slice_linear import Index, slice_outputs, take, take_inputs

DATA, HEADS = "data", "heads"
"""Axes of a mesh: replicas with sequences of their own, and devices that share heads."""

Heads = Index


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
    kv_slots = max(map(len, held))
    q_slots = max(len(part) for device in held for _, part in device)
    q = np.full((devices, kv_slots, q_slots), -1)
    kv = np.full((devices, kv_slots), -1)
    for device, mine in enumerate(held):
        for slot, (k, part) in enumerate(mine):
            kv[device, slot] = k
            q[device, slot, : len(part)] = k * group + np.asarray(part, int)
    return HeadLayout(q.reshape(devices, -1), kv)


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
    new.qkv = _take_qkv(layer.qkv, lanes_of(q, D), lanes_of(kv, D), lanes_of(kv, E))
    new.out = take_inputs(layer.out, lanes_of(q, E))
    if layer.sinks is not None:
        new.sinks = nnx.Param(take(layer.sinks, q, 0))
    return new


def lanes_of(heads: Heads, size: int) -> Heads:
    """Numbers of the lanes of these heads: (parts, n) -> (parts, n * size)."""
    lanes = heads[..., None] * size + np.arange(size)
    return np.where(heads[..., None] < 0, -1, lanes).reshape(*heads.shape[:-1], -1)


def _take_qkv(qkv: Any, q: Heads, k: Heads, v: Heads) -> Any:
    if isinstance(qkv, SeparateQKV):
        return SeparateQKV(
            *(
                slice_outputs(p, rows)
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
    return StackedQKV(slice_outputs(qkv.qkv, rows), sizes)
