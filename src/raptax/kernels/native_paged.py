"""Paged attention in C++: what it takes, and its call. See `kernels.paged`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._errors import Unsupported
from ..quant.rows import CODES, is_code
from . import native
from .native_attention import _programs as programs_of
from .native_attention import split_band

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


class Pool(NamedTuple):
    """Keys and values of all layers, in pages that sequences share out among them.

    Attributes:
        keys: ``(L, N, K, P, D)``: floats, or codes of one byte with scales.
        values: ``(L, N, K, P, E)``, of the same type.
        key_scales: What codes are to be multiplied with, for each token and kv head;
            None for floats.
        value_scales: Likewise.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: Float[Array, "L N K P"] | None = None
    value_scales: Float[Array, "L N K P"] | None = None


def why_not(
    query: jax.Array, pool: Pool, mask_mod: Any, score_mod: Any, new: Any = None
) -> str | None:
    """Why the C++ kernel cannot do this, in one sentence; None if it can."""
    if jax.default_backend() != "cpu":
        return f"it runs on CPUs, and the default backend is {jax.default_backend()}"
    for name, x in zip(
        ("query", "new keys", "new values"), (query, *(new or ())), strict=False
    ):
        if x.dtype not in FLOATS:
            return (
                f"it takes float32, bfloat16 and float16, and the {name} are {x.dtype}"
            )
    if new is not None and new[0].dtype != new[1].dtype:
        return "new keys and new values are of two dtypes"
    if (dtype := pool.keys.dtype) not in (*FLOATS, *CODES):
        return f"it knows no pages of {dtype}"
    if pool.values.dtype != dtype or (pool.key_scales is not None) != is_code(dtype):
        return "keys and values must be alike, and have scales just if they are codes"
    try:
        programs_of(mask_mod, score_mod)
    except Unsupported as reason:
        return str(reason)
    return native.why_missing()


def run(batch: Any, rules: Any) -> tuple[jax.Array, Pool]:
    """The output and the pool, which is updated in place if it was donated."""
    left, right, _ = split_band(rules.mask_mod)
    mask, score = programs_of(rules.mask_mod, rules.score_mod)
    pool = [x for x in batch.pool if x is not None]
    new = [] if batch.new is None else list(batch.new)
    whole = (batch.table, batch.lengths, batch.row_offsets, batch.layer)
    operands = [
        batch.query,
        *new,
        *pool,
        *(jnp.asarray(x, jnp.int32) for x in whole),
        jnp.asarray(rules.scale, jnp.float32),
        *mask.arrays,
        *score.arrays,
    ]
    shape = (*batch.query.shape[:2], batch.pool.values.shape[4])
    results = [jax.ShapeDtypeStruct(shape, batch.query.dtype)]
    aliases = {}
    if new:
        results += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pool]
        aliases = {1 + len(new) + i: 1 + i for i in range(len(pool))}
    out, *after = jax.ffi.ffi_call(
        "raptax_paged",
        results,
        vmap_method="sequential",
        input_output_aliases=aliases,
    )(
        *operands,
        append=bool(new),
        left=np.int64(left),
        right=np.int64(right),
        mask_code=np.array(mask.code, np.int32),
        mask_arrays=np.int64(len(mask.arrays)),
        score_code=np.array(score.code, np.int32),
        score_arrays=np.int64(len(score.arrays)),
    )
    return out, Pool(*after) if new else batch.pool
