"""Attention on many devices: the same forward pass inside one `shard_map`.

A mesh has two axes, `DATA` and `HEADS`. Devices along `HEADS` share the heads of one
replica: each projects, attends and projects back with the heads it holds, and one sum
over them makes the output. Along `DATA` every replica has sequences and a cache of its
own, and nothing is exchanged. Either axis may have length 1.

Arrays keep their ordinary shapes. What replicas hold stands side by side:

    x             rows or batch      (data * R, C) or (data * B, T, C)
    row_offsets   (data * (B + 1),)  each replica's begin at 0
    cache pages   (L, data * N, heads * K, P, D), page ids counted in each replica alone
    table, lengths                   (data * B, ...)

`split_batch` brings a ragged batch into this form.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ..._core.pytree import pytree
from ..._core.types import MaskMod, ScoreMod
from ...block_mask import BlockMask
from ...kv_cache import KVCache
from ...mods import Causal, Chunked, SlidingWindow, SoftCap, Temperature, Window
from ...mods.combine import as_mod
from ..attention import AbstractAttention, Rows
from ..quantized_linear import Float8Linear
from .heads import DATA, HEADS, head_layout, with_heads
from .placement import cache_specs, place, shard_cache, weight_specs
from .slice_linear import MaskedInputs

# Mods that read only where query and key stand, so that they mean the same on a device
# that holds some of the heads and sequences. Others are told whose they are.
EVERYWHERE = Causal, SlidingWindow, Window, Chunked, SoftCap, Temperature


class DistributedAttention(nnx.Module):
    """Any attention layer on a mesh; called as the layer itself is.

    Attributes:
        base: The layer, its heads in equal parts, its arrays on the mesh. It is a layer
            like any other: under ``jax.jit`` XLA divides its work as well.
        mesh: Devices, by `make_mesh`.
    """

    def __init__(self, layer: AbstractAttention, mesh: Mesh):
        """Shares ``layer`` out. Raises ValueError for more devices than heads."""
        if set(mesh.axis_names) != {DATA, HEADS}:
            raise ValueError(
                f"the mesh has axes {mesh.axis_names}; it must be one of make_mesh, "
                f"with {DATA!r} and {HEADS!r}."
            )
        if layer.dropout_rate:
            raise ValueError(
                f"dropout_rate={layer.dropout_rate} on a mesh: every device would drop "
                "the same places; use the layer itself under jax.jit, on sharded arrays."
            )
        parts = mesh.shape[HEADS]
        self._layout: tuple[tuple[tuple[int, ...], ...], ...] | None = None
        if parts > 1:
            D = layer.head_size
            q_width, k_width, _ = layer.qkv.widths
            layout = head_layout(q_width // D, k_width // D, parts)
            layer = with_heads(layer, *layout)
            self._layout = tuple(tuple(map(tuple, h.tolist())) for h in layout)
        graph, state = nnx.split(layer)
        state = place(state, weight_specs(state, parts > 1), mesh)
        self.base, self.mesh = nnx.merge(graph, state), mesh

    @property
    def kv_heads(self) -> int:
        """Kv heads of a cache for this layer, zeros and copies included."""
        return self.base.qkv.widths[1] // self.base.head_size

    def gather(self) -> AbstractAttention:
        """A layer of this process alone, with the heads that the mesh's layer has.

        Blocks that had to be cut stay cut; the numbers are the same. The process must
        see the whole mesh.
        """
        base = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), self.base)
        if self._layout is None:
            return base
        parts = (np.asarray(heads) for heads in self._layout)
        # Where each head stands; that of copies, one of them.
        places = [np.unique(h, return_index=True) for h in parts]
        q, kv = (at[heads >= 0][None] for heads, at in places)
        return with_heads(base, q, kv)

    def shard_cache(self, cache: Any) -> Any:
        """A cache with its arrays on the mesh.

        Make it with `kv_heads` heads, and with pages and sequences for all replicas.
        """
        return shard_cache(cache, self.mesh)

    def __call__(
        self,
        x: Float[Array, "*rows C"],
        cache: KVCache | None = None,
        *,
        row_offsets: Rows | None = None,
        layer: int | Int[Array, ""] = 0,
        positions: Rows | None = None,
        mask_mod: MaskMod | None = Causal(),
        score_mod: ScoreMod | None = None,
    ) -> tuple[Float[Array, "*rows C"], KVCache | None]:
        """See `AbstractAttention.__call__`, and this module for shapes.

        Raises ValueError where what replicas hold is not of equal size, or the cache
        has another number of heads than `kv_heads`.
        """
        self._check_shares(x, cache, row_offsets)
        graph, state = nnx.split(self.base)
        layout = self._layout
        args = dict(
            x=x,
            cache=cache,
            row_offsets=row_offsets,
            layer=jnp.asarray(layer, jnp.int32),
            positions=positions,
            mods=(as_mod(mask_mod), as_mod(score_mod)),
            first_sequence=self._first_sequences(x, cache),
            heads=None if layout is None else jnp.asarray(layout[0], jnp.int32),
        )
        caches = cache_specs(cache)
        specs = dict(
            x=P(DATA),
            cache=caches,
            row_offsets=P(DATA),
            layer=P(),
            positions=P(DATA),
            mods=P(),
            first_sequence=P(DATA),
            heads=P(HEADS),
        )
        run = jax.shard_map(
            lambda state, args: _local(graph, state, **args),
            mesh=self.mesh,
            in_specs=(weight_specs(state, layout is not None), specs),
            out_specs=(P(DATA), caches),
            check_vma=False,  # loops over pages start from zeros that do not vary
        )
        y, cache = run(state, args)
        return y, cache

    def _check_shares(self, x: Any, cache: Any, row_offsets: Any) -> None:
        replicas = self.mesh.shape[DATA]
        shares = {"x": x.shape[0]}
        if cache is not None:
            shares["the cache's sequences"] = cache.lengths.shape[0]
        if row_offsets is not None:
            shares["row_offsets"] = row_offsets.shape[0]
        for name, size in shares.items():
            if size % replicas:
                raise ValueError(
                    f"{name} ({size}) must be of equal size in each of {replicas} "
                    "replicas; split_batch fills up with padding rows."
                )
        for leaf in jax.tree.leaves(cache):
            if leaf.ndim >= 4 and leaf.shape[2] != self.kv_heads:
                raise ValueError(
                    f"the cache has {leaf.shape[2]} kv heads; on this mesh it must have "
                    f"kv_heads={self.kv_heads}, zeros and copies included."
                )

    def _first_sequences(self, x: Any, cache: Any) -> Any:
        """The number of each replica's first sequence."""
        count = x.shape[0] if cache is None else cache.lengths.shape[0]
        replicas = self.mesh.shape[DATA]
        return jnp.arange(replicas, dtype=jnp.int32) * (count // replicas)


def _local(graph, state, *, x, cache, mods, first_sequence, heads, **options):
    """What one device does."""
    layer = nnx.merge(graph, state)
    mask_mod, score_mod = (_global(mod, first_sequence, heads) for mod in mods)
    if cache is None:
        options.pop("layer")
    if heads is not None:
        out = layer.out.inner if isinstance(layer.out, MaskedInputs) else layer.out
        if getattr(out, "bias", None) is not None:  # added once, by the first
            first = jax.lax.axis_index(HEADS) == 0
            out.bias[...] = jnp.where(first, out.bias[...], 0)
        if isinstance(out, Float8Linear):
            out.input_axis = HEADS
    y, cache = layer(x, cache, mask_mod=mask_mod, score_mod=score_mod, **options)
    return y if heads is None else jax.lax.psum(y, HEADS), cache


def _global(mod: Any, first_sequence: Any, heads: Any) -> Any:
    """The mod as it is for this device's heads and sequences."""
    inner = mod.mask_mod if isinstance(mod, BlockMask) else mod
    if mod is None or (isinstance(inner, EVERYWHERE) and _serves_all(mod)):
        return mod
    return _GlobalIndexMod(mod, first_sequence, heads)


def _serves_all(mod: Any) -> bool:
    """Whether tiles, if there are any, are those of every head and sequence."""
    return not isinstance(mod, BlockMask) or mod.batch is mod.heads is None


@pytree
class _GlobalIndexMod:
    """A mod that is given the global indices of heads and sequences."""

    mod: Any
    first_sequence: Int[Array, "1"]
    heads: Int[Array, "1 H"] | None

    def __call__(self, *at):
        *scores, b_idx, h_idx, q_idx, kv_idx = at
        b_idx = b_idx + self.first_sequence[0]
        if self.heads is not None:
            h_idx = jnp.maximum(self.heads[0], 0)[h_idx]
        return self.mod(*scores, b_idx, h_idx, q_idx, kv_idx)


def split_batch(
    x: Float[Array, "R C"],
    row_offsets: Int[Array, " offsets"],
    splits: Sequence[int],
) -> tuple[Float[Array, "rows C"], Int[Array, " all_offsets"], np.ndarray]:
    """A ragged batch shared out among replicas. Host side: sizes must be known.

    Args:
        x: Packed (ragged) tokens of all sequences.
        row_offsets: Where each sequence's rows begin.
        splits: Sequences ``splits[i]`` to ``splits[i + 1] - 1`` go to replica ``i``. As
            many for each; a replica may have no rows.

    Returns:
        Rows with padding behind those of each replica, offsets that begin at 0 in each,
        and for every row of ``x`` its place, so that ``y[places]`` undoes it.

    Raises:
        ValueError: Splits that do not cover the sequences in equal numbers.
    """
    offsets, cuts = np.asarray(row_offsets), np.asarray(splits)
    counts = np.diff(cuts)
    if (
        cuts[0] != 0
        or cuts[-1] != len(offsets) - 1
        or len(counts) < 1
        or (counts != counts[0]).any()
    ):
        raise ValueError(
            f"splits={list(splits)} must cut {len(offsets) - 1} sequences into parts "
            "of equal number, from 0 to the last."
        )
    bounds = offsets[cuts]
    longest = max(1, int(np.diff(bounds).max()))
    rebased = [offsets[a : b + 1] - offsets[a] for a, b in itertools.pairwise(cuts)]
    row = np.arange(bounds[-1])
    replica = np.searchsorted(bounds[1:], row, side="right")
    places = replica * longest + row - bounds[replica]
    out = jnp.zeros((longest * len(counts), x.shape[1]), x.dtype)
    out = out.at[places].set(x[: bounds[-1]])
    return out, jnp.asarray(np.concatenate(rebased), jnp.int32), places
