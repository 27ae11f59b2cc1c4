"""An attention problem, checked and brought into one form for the kernels."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from .._core.errors import check_bias, check_mask, check_qkv, check_sinks
from .._core.pytree import pytree, static
from .._core.types import ScoreMod
from ..block_mask import first_position
from ..mods import KeyLengths, as_mod, with_scale
from ..mods.functions import has_functions, trace_functions
from .dropout import Dropout
from .softmax import accumulator
from .tiles import TILE


@pytree
class AttentionParams:
    """What `AttentionFn` is asked for beside query, key and value.

    Plain functions are traced; see `mods.functions`. ``scale`` is None where it is 1 or
    an array, which then is the first part of ``score_mod``. ``numbers`` says which
    leaves of ``score_mod`` are Python's numbers: operands of the compiled program, like
    arrays, but without a derivative.
    """

    start: int | Int[Array, " #B"] | Int[Array, ""]
    mask: Bool[Array, "#B #H #T #S"] | None
    mask_mod: Any
    score_mod: Any
    bias: Float[Array, "#B #H #T #S"] | None
    sinks: Float[Array, " H"] | None
    dropout: Dropout | None
    scale: float | None
    numbers: tuple[bool, ...] = static()

    @classmethod
    def create(
        cls,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        mask: jax.Array | None,
        mask_mod: Any,
        score_mod: Any,
        bias: jax.Array | None,
        sinks: jax.Array | None,
        scale: Any,
        query_start: Any,
        dropout_rng: Any,
        dropout_rate: Any,
        deterministic: bool,
    ) -> "AttentionParams":
        """Raises ValueError where shapes, dtypes or numbers do not fit."""
        check_qkv(query, key, value)
        (B, H, T, D), S = query.shape, key.shape[2]
        check_mask(mask, (B, H, T, S))
        check_bias(bias, (B, H, T, S))
        check_sinks(sinks, H)
        start = first_position(mask_mod, query_start, (B, H, T, S))
        mask_mod, score_mod = traced_mods(
            mask_mod, score_mod, (B, H, T, S), accumulator(query.dtype), start
        )
        scale, score_mod = with_scale(D**-0.5 if scale is None else scale, score_mod)
        leaves = jax.tree.leaves(score_mod)
        return cls(
            start if isinstance(start, int) else jnp.asarray(start),
            mask,
            mask_mod,
            score_mod,
            bias,
            sinks,
            Dropout.create(dropout_rng, dropout_rate, deterministic),
            scale,
            tuple(isinstance(x, (int, float)) for x in leaves),
        )


def named(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both under the names that policies of `jax.checkpoint` know them by.

    Derivatives need nothing else of the forward pass, so a policy that saves
    ``"raptax_out"`` and ``"raptax_lse"`` keeps it from running twice.
    """
    return checkpoint_name(out, "raptax_out"), checkpoint_name(lse, "raptax_lse")


def traced_mods(
    mask_mod: Any,
    score_mod: Any,
    shape: tuple[int, int, int, int],
    dtype: Any,
    start: Any = None,
) -> tuple[Any, ScoreMod | None]:
    """Both mods as values, their functions traced for scores of this shape and dtype.

    ``start`` is the position of the first query, one or one for each sequence.
    """
    if mask_mod is None and score_mod is None:
        return None, None
    mask_mod, score_mod = as_mod(mask_mod), as_mod(score_mod)
    if not (has_functions(mask_mod) or has_functions(score_mod)):
        return mask_mod, score_mod
    B, H, T, S = shape
    indices = lambda *n: jax.ShapeDtypeStruct(n, jnp.int32)
    rows = 1 if start is None or jnp.size(start) == 1 else B
    q_idx, kv_idx = indices(rows, 1, T, 1), indices(1, 1, 1, S)
    at = indices(B, 1, 1, 1), indices(1, H, 1, 1), q_idx, kv_idx
    scores = jax.ShapeDtypeStruct(shape, dtype)
    return (
        trace_functions(mask_mod, *at),
        trace_functions(score_mod, scores, *at),
    )


Attend = Callable[..., tuple[jax.Array, jax.Array]]


def with_lengths(attend: Attend) -> Attend:
    """``attend``, of `AttentionParams`, for lengths that `jax.export` leaves symbolic.

    Queries and keys are padded to whole tiles, whose size is known then, and the padding
    is masked and cut off again.
    """

    @functools.wraps(attend)
    def padded(query, key, value, params):
        T, S = query.shape[2], key.shape[2]
        if isinstance(T, int) and isinstance(S, int):
            return attend(query, key, value, params)
        rows, columns = (((n - 1) // TILE + 1) * TILE - n for n in (T, S))
        key_lengths = KeyLengths(jnp.asarray(S, jnp.int32))
        mask_mod = params.mask_mod
        params = dataclasses.replace(
            params,
            mask=_pad(params.mask, rows, columns),
            bias=_pad(params.bias, rows, columns),
            mask_mod=key_lengths if mask_mod is None else key_lengths & mask_mod,
        )
        keys = (_pad(x, columns) for x in (key, value))
        out, lse = attend(_pad(query, rows), *keys, params)
        return out[:, :, :T], lse[:, :, :T]

    return padded


def unfolded(params: AttentionParams) -> AttentionParams:
    """``params`` with a mask whose arrays XLA takes for unknown.

    Ids that a caller's jit closes over are constants, and XLA would run the search for
    empty tiles while it compiles: 65 s for 131,072 ids, and 5 s without.
    """
    if not jax.tree.leaves(params.mask_mod):
        return params
    mask_mod = lax.optimization_barrier(lax.stop_gradient(params.mask_mod))
    return dataclasses.replace(params, mask_mod=mask_mod)


def _pad(x: jax.Array | None, rows: int, columns: int = 0) -> jax.Array | None:
    """Zeros after the last entries of the last two axes, where these are not 1."""
    if x is None:
        return None
    after = [
        (0, 0 if n == 1 else more)
        for n, more in zip(x.shape[2:], (rows, columns), strict=True)
    ]
    return jnp.pad(x, [(0, 0), (0, 0), *after])
