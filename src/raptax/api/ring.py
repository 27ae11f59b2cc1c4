"""Attention over a sequence that is spread over the devices of a mesh axis."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._core.errors import check_bias, check_mask, check_qkv, with_four_axes
from .._core.manual_axes import same_manual_axes
from .._core.pytree import pytree
from .._core.types import Attended, DropoutKey, MaskMod, ScoreMod, as_array
from ..block_mask import BlockMask, first_position
from ..kernels.dropout import Dropout
from ..kernels.softmax import accumulator, merge
from ..mods import Mask, Offset, and_masks
from .attention import SegmentIds, _check_options, _with_masks, attention


def ring_attention(
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S E"],
    *,
    axis_name: str,
    mask: Bool[Array, "..."] | None = None,
    mask_mod: MaskMod | None = None,
    score_mod: ScoreMod | None = None,
    bias: Float[Array, "..."] | None = None,
    sinks: Float[Array, " H"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    segment_ids: SegmentIds | None = None,
    query_lengths: Int[Array, " B"] | None = None,
    key_lengths: Int[Array, " B"] | None = None,
    query_start: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    dropout_rng: DropoutKey | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    return_lse: bool = False,
    kernel: str | None = None,
) -> Attended:
    """`attention` of this device's queries to the keys of every device on an axis.

    Call it inside `jax.shard_map`, with the lengths split over ``axis_name`` in order.
    Keys and values go round the devices, and each meets the queries once; `merge` puts
    the partial results together. Positions are those of the whole sequence, so mods
    mean what they mean without a mesh. A shard that the mask empties costs its visit,
    not its products. Liu et al. 2023, arXiv:2310.01889.

    Going backward JAX keeps the keys and values of every device: O(S) memory each.

    Dropout drops the weights that one device would. Kernels count keys from 0 in each
    part, so the weights that are kept are a mask of this function here, and a second
    pass over all of them finds what these are a share of: twice the work.

    Args:
        mask: Of this device's queries and the keys of all devices: it broadcasts to
            (B, H, T, devices * S).
        bias: Likewise.
        segment_ids: Ids of this device's queries and keys, split as these are: (B, S),
            or a pair (B, T) and (B, S). Those of keys travel with them.
        query_lengths: Lengths of whole sequences, the same on every device.
        key_lengths: Likewise.
        query_start: Position of the first query of all devices.

    Returns:
        This device's rows of what `attention` returns for the whole sequence.

    Raises:
        ValueError: No mesh axis of this name is in reach, or `attention` raises it.
        Unsupported: The kernel named cannot do what is asked.
    """
    devices = _axis_size(axis_name)
    query, key, value = (as_array(x) for x in (query, key, value))
    check_qkv(query, key, value)
    (B, H, T, _), S = query.shape, key.shape[2]
    asked = dict(
        mask_mod=mask_mod,
        score_mod=score_mod,
        sinks=as_array(sinks),
        scale=as_array(scale),
        query_lengths=as_array(query_lengths),
        key_lengths=as_array(key_lengths),
        query_start=as_array(query_start),
        dropout_rng=as_array(dropout_rng),
        dropout_rate=dropout_rate,
        deterministic=deterministic,
    )
    whole = _of_whole(asked, (B, H, devices * T, devices * S))
    mask, bias = (
        with_four_axes(name, as_array(x), (B, H, T, devices * S))
        for name, x in (("mask", mask), ("bias", bias))
    )
    check_mask(mask, (B, H, T, devices * S))
    check_bias(bias, (B, H, T, devices * S))
    ring = _Ring(
        axis_name, devices, whole["mask_mod"], whole["score_mod"], mask, bias, scale
    )
    start = whole["query_start"] + lax.axis_index(axis_name) * T
    ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,) * 2
    arrays = query, key, value, *map(as_array, ids)
    out, lse = ring.attend(arrays, start, kernel)
    if whole["sinks"] is not None:
        sink = whole["sinks"].astype(lse.dtype)[None, :, None]
        out, lse = merge((out, lse), (jnp.zeros_like(out), jnp.zeros_like(lse) + sink))
    dropout = Dropout.create(whole["dropout_rng"], dropout_rate, deterministic)
    if dropout is not None:
        out = ring.dropped(dropout, lse, arrays, start, kernel)
    out = out.astype(query.dtype)
    return (out, lse) if return_lse else out


def _axis_size(axis_name: str) -> int:
    try:
        return lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name={axis_name!r} is no mesh axis here: call ring_attention inside "
            "jax.shard_map over one."
        ) from None


def _of_whole(
    asked: dict[str, Any], shape: tuple[int, int, int, int]
) -> dict[str, Any]:
    """Options of the whole sequence: checked, lengths in the mask, and a query_start."""
    _check_options(asked, shape)
    B, _, T, S = shape
    asked = _with_masks(asked, (B, T, S))
    mask_mod = asked["mask_mod"]
    start = first_position(mask_mod, asked["query_start"], shape)
    if isinstance(mask_mod, BlockMask):  # its tiles are those of the whole sequence
        mask_mod = mask_mod.mask_mod
    start = jnp.asarray(start).astype(jnp.int32)
    start = start.reshape(()) if start.size == 1 else start
    return asked | dict(mask_mod=mask_mod, query_start=start)


class _Ring(NamedTuple):
    """What is asked for, in positions of the whole sequence."""

    axis_name: str
    devices: int
    mask_mod: Any
    score_mod: Any
    mask: jax.Array | None
    bias: jax.Array | None
    scale: Any

    def attend(
        self, arrays: Any, start: jax.Array, kernel: str | None
    ) -> tuple[jax.Array, jax.Array]:
        """``(out, log-sum-exp)`` over the keys of all devices, in float32 at least."""
        query, *columns, query_ids, key_ids = arrays
        here = lax.axis_index(self.axis_name)
        onward = [(d, (d + 1) % self.devices) for d in range(self.devices)]
        (query, *columns), _ = same_manual_axes(((query, *columns), here))
        if key_ids is not None:
            columns.append(same_manual_axes((key_ids, here))[0])

        def part(turn, columns):
            key, value, *ids = columns
            first = (here - turn) % self.devices * key.shape[2]
            out, lse = attention(
                query,
                key,
                value,
                mask=_cut(self.mask, first, key.shape[2]),
                mask_mod=_moved(self.mask_mod, first),
                score_mod=_moved(self.score_mod, first),
                bias=_cut(self.bias, first, key.shape[2]),
                scale=self.scale,
                segment_ids=(query_ids, *ids) if ids else None,
                query_start=start,
                return_lse=True,
                kernel=kernel,
            )
            return out.astype(accumulator(out.dtype)), lse

        def step(state, turn):
            found, columns = state
            columns = [lax.ppermute(x, self.axis_name, onward) for x in columns]
            return (merge(found, part(turn, columns)), columns), None

        own = part(jnp.int32(0), columns), columns
        turns = jnp.arange(1, self.devices, dtype=jnp.int32)
        return lax.scan(step, own, turns)[0][0]

    def dropped(
        self,
        dropout: Dropout,
        lse: jax.Array,
        arrays: Any,
        start: jax.Array,
        kernel: str | None,
    ) -> jax.Array:
        """The output after dropout, where ``lse`` is that of all weights.

        With ``out'`` and ``lse'`` over the keys that are kept alone:
        ``exp(lse' - lse) / (1 - rate) * out'``.
        """
        kept: Any = _Kept(dropout)
        if self.mask_mod is not None:
            kept = and_masks(self.mask_mod, kept)
        out, kept_lse = self._replace(mask_mod=kept).attend(arrays, start, kernel)
        share = jnp.exp(kept_lse - jnp.where(jnp.isneginf(lse), 0, lse))
        share = share / (1 - jnp.asarray(dropout.rate).astype(share.dtype))
        return share[..., None] * out


def _cut(x: jax.Array | None, first: jax.Array, size: int) -> jax.Array | None:
    """The columns of one part, unless one column serves all."""
    if x is None or x.shape[3] == 1:
        return x
    return lax.dynamic_slice_in_dim(x, first, size, 3)


def _moved(mod: Any, first: jax.Array) -> Any:
    """``mod`` for keys that are counted from ``first`` on."""
    return None if mod is None else Offset(mod, kv=first)


@pytree
class _Kept(Mask):
    """The weights that dropout keeps, as a mask."""

    dropout: Dropout

    def __call__(self, *at):
        return self.dropout(jnp.float32(1), at) > 0
