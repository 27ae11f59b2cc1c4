"""Masks and score_mods as small frozen values.

A mod is a dataclass with a ``__call__``, not a closure. It prints, compares and hashes
by what it says (``SlidingWindow(size=128)``), so building the same mod twice does not
retrace a jitted function, a kernel can recognise it by type, and the arrays and numbers
it carries are ordinary pytree leaves that jit, vmap and sharding can see: a new window
compiles nothing anew. Plain functions of the same signature are accepted everywhere too.

Sizes are checked when a mod is used (`check_mods`): an axis of sequences or heads has
their number, or 1 where the annotation of the array says ``#``.

Masks combine with ``&``, ``|``, ``^`` and ``~`` (`and_masks`, `or_masks` when all of
them are plain functions), score_mods with `compose_score_mods`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from .._core.types import MaskMod, position_indices, query_positions
from .checks import Mod as Mod
from .checks import check_mods as check_mods
from .combine import And as And
from .combine import FunctionMod as FunctionMod
from .combine import Mask as Mask
from .combine import Not as Not
from .combine import Offset as Offset
from .combine import Or as Or
from .combine import PerHead as PerHead
from .combine import Xor as Xor
from .combine import and_masks as and_masks
from .combine import apply_mask as apply_mask
from .combine import as_mod as as_mod
from .combine import or_masks as or_masks
from .masks import BidirectionalSpans as BidirectionalSpans
from .masks import BlockCausal as BlockCausal
from .masks import Causal as Causal
from .masks import Chunked as Chunked
from .masks import Dense as Dense
from .masks import Documents as Documents
from .masks import KeyLengths as KeyLengths
from .masks import KeyRanges as KeyRanges
from .masks import Natten2D as Natten2D
from .masks import PrefixLM as PrefixLM
from .masks import QueryLengths as QueryLengths
from .masks import Segments as Segments
from .masks import SinkWindow as SinkWindow
from .masks import SlidingWindow as SlidingWindow
from .masks import Strided as Strided
from .masks import Tree as Tree
from .masks import Window as Window
from .masks import documents_from_lengths as documents_from_lengths
from .masks import tree_from_parents as tree_from_parents
from .scores import ALiBi as ALiBi
from .scores import Composed as Composed
from .scores import DenseBias as DenseBias
from .scores import LogN as LogN
from .scores import MaskedScore as MaskedScore
from .scores import RelativeBias as RelativeBias
from .scores import SoftCap as SoftCap
from .scores import T5Bias as T5Bias
from .scores import Temperature as Temperature
from .scores import alibi_slopes as alibi_slopes
from .scores import apply_score as apply_score
from .scores import compose_score_mods as compose_score_mods
from .scores import split_mask as split_mask
from .scores import t5_buckets as t5_buckets
from .scores import with_scale as with_scale


def mask_mod_to_boolean_mask(
    mask_mod: MaskMod, *, batch: int, num_heads: int, seq_q: int, seq_kv: int
) -> Bool[Array, "{batch} {num_heads} {seq_q} {seq_kv}"]:
    """The whole mask as an array, for small sizes and for looking at.

    The last query stands at the last key, as it does in `attention`.
    """
    check_mods([mask_mod], batch, num_heads)
    q_idx = query_positions(None, seq_q, seq_kv)
    kv_idx = jnp.arange(seq_kv, dtype=jnp.int32)
    allowed = apply_mask(mask_mod, *position_indices(batch, num_heads, q_idx, kv_idx))
    return jnp.broadcast_to(allowed, (batch, num_heads, seq_q, seq_kv))
