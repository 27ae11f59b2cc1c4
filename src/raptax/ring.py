"""Attention over a sequence that is spread over the devices of a mesh axis."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._types import Attended, MaskMod, ScoreMod
from .dispatch import attention
from .kernels.softmax import accumulator, merge
from .mods import Offset


def ring_attention(
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S E"],
    *,
    axis_name: str,
    mask_mod: MaskMod | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | Float[Array, ""] | None = None,
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

    Returns:
        This device's rows of what `attention` returns for the whole sequence.

    Raises:
        ValueError: No mesh axis of this name is in reach.
    """
    try:
        devices = lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name={axis_name!r} is no mesh axis here: call ring_attention inside "
            "jax.shard_map over one."
        ) from None
    (T, _), S, device = query.shape[2:], key.shape[2], lax.axis_index(axis_name)
    start = devices * (S - T) + device * T
    onward = [(d, (d + 1) % devices) for d in range(devices)]

    def step(state, turn):
        out, lse, keys, values = state
        first = (device - turn) % devices * S

        def moved(mod):
            return None if mod is None else Offset(mod, kv=first)

        part = attention(
            query,
            keys,
            values,
            mask_mod=moved(mask_mod),
            score_mod=moved(score_mod),
            scale=scale,
            query_start=start,
            return_lse=True,
            kernel=kernel,
        )
        keys, values = (lax.ppermute(x, axis_name, onward) for x in (keys, values))
        return (*merge((out, lse), part), keys, values), None

    dtype = accumulator(query.dtype)
    nothing = (
        jnp.zeros_like(query, dtype, shape=(*query.shape[:3], value.shape[3])),
        jnp.full_like(query, -jnp.inf, dtype, shape=query.shape[:3]),
    )
    (out, lse, _, _), _ = lax.scan(
        step, (*nothing, key, value), jnp.arange(devices, dtype=jnp.int32)
    )
    out = out.astype(query.dtype)
    return (out, lse) if return_lse else out
