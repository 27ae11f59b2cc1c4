"""MAX's order of arguments."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from ...nn.attention import AbstractAttention
from ...nn.sharding.distributed import DistributedAttention
from ...rope.table import RotaryTable


def call_as_max(
    layer: AbstractAttention | DistributedAttention,
    layer_idx: Any,
    x: Any,
    kv_collection: Any,
    freqs_cis: Any,
    input_row_offsets: Any,
) -> tuple[Any, Any]:
    """``layer(x, kv_collection, ...)`` for callers that have MAX's arguments.

    Args:
        layer: Any attention layer.
        layer_idx: Which layer of the cache to use.
        x: Ragged rows ``(R, C)``.
        kv_collection: A cache.
        freqs_cis: Cosines and sines to rotate by, ``(positions, lanes)`` or
            ``(positions, pairs, 2)``; None for the layer's own.
        input_row_offsets: Where each sequence's rows begin, ``(B + 1,)``.

    Returns:
        The output, and the collection with the new keys and values, which MAX writes
        into the one that it is given.

    Raises:
        ValueError: ``freqs_cis`` for a layer without rotary positions.
    """
    if freqs_cis is not None:
        layer = nnx.merge(*nnx.split(layer))  # the same arrays in a layer of its own
        base: Any = layer.base if isinstance(layer, DistributedAttention) else layer
        if base.rope is None:
            raise ValueError("freqs_cis is given, but the layer has rope=None.")
        table = freqs_cis.reshape(freqs_cis.shape[0], -1)
        base.rope = nnx.data(RotaryTable(table, base.rope.layout))
    offsets = jnp.asarray(input_row_offsets).astype(jnp.int32)
    return layer(x, kv_collection, row_offsets=offsets, layer=layer_idx)
