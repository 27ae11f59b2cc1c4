"""Attention of arrays whose types say how they are sharded (meshes of explicit axes).

Sequences and heads do not look at each other, so where these axes are sharded every
device attends to its own, in a `jax.shard_map` without communication. What cannot be kept
is gathered beforehand: sharded lengths and head sizes, heads of which some device would
hold a part of a group only, and everything where weights are dropped, as dropout is a
function of the numbers that sequences and heads have in the whole, or where a plain
function captures an array of such a mesh, which JAX traces on that mesh alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Int

from .._core.pytree import pytree
from ..block_mask import BlockMask
from ..mods import Causal, SlidingWindow, Window
from ..mods.combine import And, Mask
from ..mods.functions import TracedFunction
from .problem import AttentionParams

Attend = Callable[..., tuple[jax.Array, jax.Array]]


class Split(NamedTuple):
    """Mesh axes along which sequences and heads are shared out."""

    sequences: tuple[str, ...]
    heads: tuple[str, ...]

    def spec(self, x: Any) -> PartitionSpec:
        """How an array of sequences, heads, ... is cut: axes of length 1 serve all."""
        axes = [a if n > 1 else () for a, n in zip(self, x.shape, strict=False)]
        return PartitionSpec(*axes)


def partitioned(attend: Attend) -> Attend:
    """``attend``, of `AttentionParams`, for arrays on meshes with explicit axes."""

    @functools.wraps(attend)
    def on_mesh(query, key, value, params):
        mesh = jax.typeof(query).sharding.mesh
        if AxisType.Explicit not in mesh.axis_types:
            return attend(query, key, value, params)
        split = _split(mesh, (query, key, value), params)
        if split == Split((), ()):
            whole = PartitionSpec()
            arrays = jax.tree.map(
                lambda x: jax.sharding.reshard(x, whole), (query, key, value, params)
            )
            return attend(*arrays)
        return _on_each_device(attend, mesh, split, (query, key, value), params)

    return on_mesh


def _split(mesh: Any, arrays: Any, params: AttentionParams) -> Split:
    """Axes of the mesh that query, key or value are cut along, as far as these divide."""
    mods = params.mask_mod, params.score_mod
    if params.dropout is not None or _captures_explicit(mods):
        return Split((), ())
    explicit = _explicit(mesh)

    def axes(d: int, *lengths: int) -> tuple[str, ...]:
        asked: list[str] = []
        for x in arrays:
            names = jax.typeof(x).sharding.spec[d] or ()
            names = (names,) if isinstance(names, str) else names
            asked += [name for name in names if name in explicit and name not in asked]
        count = math.prod(mesh.shape[name] for name in asked)
        fits = all(length % count == 0 for length in lengths)
        return tuple(asked) if fits else ()

    query, key, _ = arrays
    sequences = axes(0, query.shape[0])
    heads = axes(1, query.shape[1], key.shape[1])
    return Split(sequences, tuple(name for name in heads if name not in sequences))


def _explicit(mesh: Any) -> list[str]:
    """Names of the mesh's explicit axes."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in kinds if kind == AxisType.Explicit]


def _captures_explicit(mods: Any) -> bool:
    """Whether a plain function in ``mods`` captures an array of explicit axes."""
    traced = lambda node: isinstance(node, TracedFunction)
    captured = [
        jax.typeof(x).sharding.mesh
        for node in filter(traced, jax.tree.leaves(mods, is_leaf=traced))
        for x in node.program.source()[1]
    ]
    return any(AxisType.Explicit in mesh.axis_types for mesh in captured)


def _on_each_device(
    attend: Attend, mesh: Any, split: Split, arrays: Any, params: AttentionParams
) -> tuple[jax.Array, jax.Array]:
    specs = jax.tree.map(lambda x: PartitionSpec(), params)
    by_head = PartitionSpec(split.heads)
    specs = dataclasses.replace(
        specs,
        start=split.spec(jnp.reshape(params.start, -1)),
        mask=None if params.mask is None else split.spec(params.mask),
        bias=None if params.bias is None else split.spec(params.bias),
        sinks=None if params.sinks is None else by_head,
        mask_mod=_mod_specs(split, params.mask_mod),
    )
    params = dataclasses.replace(params, start=jnp.reshape(params.start, -1))
    in_specs = (*map(split.spec, arrays), specs)

    def local(query, key, value, params):
        size = query.shape[0], query.shape[1]
        first = [_device_number(a) * n for a, n in zip(split, size, strict=True)]
        params = dataclasses.replace(
            params,
            mask_mod=_counted_from(params.mask_mod, first, size),
            score_mod=_counted_from(params.score_mod, first, size),
            numbers=(*params.numbers, True, True),  # those of a CountedFrom
        )
        return attend(query, key, value, params)

    given = jax.tree.map(jax.sharding.reshard, (*arrays, params), in_specs)
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=PartitionSpec(*split),
        axis_names=set(_explicit(mesh)),  # the others' arrays are whole, and stay so
    )
    return run(*given)


def _device_number(axes: tuple[str, ...]) -> jax.Array:
    """Which part along ``axes`` this device holds."""
    return lax.axis_index(axes) if axes else jnp.int32(0)


def _mod_specs(split: Split, mask_mod: Any) -> Any:
    """Arrays of masks are whole on every device, but for the tiles of a block mask."""
    specs = jax.tree.map(lambda x: PartitionSpec(), mask_mod)
    if not isinstance(mask_mod, BlockMask):
        return specs
    start = split.spec(mask_mod.query_start)
    return dataclasses.replace(
        specs, kinds=split.spec(mask_mod.kinds), query_start=start
    )


@pytree
class CountedFrom(Mask):
    """A mask or score_mod of a part: sequence 0 and head 0 there have these numbers."""

    mod: Any
    sequence: Int[Array, ""]
    head: Int[Array, ""]

    def __call__(self, *at):
        *scores, b_idx, h_idx, q_idx, kv_idx = at
        return self.mod(
            *scores, b_idx + self.sequence, h_idx + self.head, q_idx, kv_idx
        )


def _counted_from(mod: Any, first: Sequence[jax.Array], size: Sequence[int]) -> Any:
    """``mod`` for a part of ``size`` sequences and heads, of which these are the first.

    Masks of positions alone stay as kernels know them.
    """
    count = functools.partial(_counted_from, first=first, size=size)
    if mod is None or isinstance(mod, Causal | SlidingWindow | Window):
        return mod
    if isinstance(mod, And):
        return And(count(mod.first), count(mod.second))
    if isinstance(mod, BlockMask):
        batch, heads = (
            n if whole is not None else None
            for n, whole in zip(size, (mod.batch, mod.heads), strict=True)
        )
        inner = count(mod.mask_mod)
        return dataclasses.replace(mod, mask_mod=inner, batch=batch, heads=heads)
    return CountedFrom(mod, *first)
