"""Paged attention in C++: what it takes, and its call. See `kernels.paged`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ...quant.rows import CODES, is_code
from ..paged.problem import Batch, Pool, ScoreSettings
from . import library as native
from .forward import band_operand, mods_unsupported_reason, programs_of, split_band

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def unsupported_reason(
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
    return mods_unsupported_reason(mask_mod, score_mod) or native.missing_reason()


class Call(NamedTuple):
    """The static half of a call; see csrc/ffi/paged.cc for the names."""

    mask_code: tuple[int, ...]
    mask_arrays: int
    score_code: tuple[int, ...]
    score_arrays: int

    def attributes(self) -> dict[str, Any]:
        return dict(
            mask_code=np.array(self.mask_code, np.int32),
            mask_arrays=np.int64(self.mask_arrays),
            score_code=np.array(self.score_code, np.int32),
            score_arrays=np.int64(self.score_arrays),
        )


Captured = tuple[jax.Array, jax.Array, list[jax.Array]]
"""The scale, the band, and the arrays of the mask's program and the score_mod's."""


def prepare(settings: ScoreSettings) -> tuple[Call, Captured]:
    """The call, and the arrays that its programs read."""
    left, right, _ = split_band(settings.mask_mod)
    mask, score = programs_of(settings.mask_mod, settings.score_mod)
    call = Call(mask.code, len(mask.arrays), score.code, len(score.arrays))
    scale = jnp.asarray(1.0 if settings.scale is None else settings.scale, jnp.float32)
    return call, (scale, band_operand(left, right), [*mask.arrays, *score.arrays])


def run(
    call: Call, captured: Captured, batch: Batch, sinks: Float[Array, " H"] | None
) -> tuple[Float[Array, "R H E"], Float[Array, "R H"], Pool]:
    """The output, the log-sum-exp and the pool, updated in place if it was donated."""
    pool = [x for x in batch.pool if x is not None]
    new = [] if batch.new is None else list(batch.new)
    scale, band, arrays = captured
    operands = [
        batch.query,
        *new,
        *pool,
        *(jnp.asarray(x, jnp.int32) for x in batch.where),
        scale,
        band,
        jnp.zeros(0, jnp.float32) if sinks is None else sinks.astype(jnp.float32),
        *arrays,
    ]
    shape = (*batch.query.shape[:2], batch.pool.values.shape[4])
    results = [
        jax.ShapeDtypeStruct(shape, batch.query.dtype),
        jax.ShapeDtypeStruct(shape[:2], jnp.float32),
    ]
    aliases = {}
    if new:
        results += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pool]
        aliases = {1 + len(new) + i: 2 + i for i in range(len(pool))}
    out, lse, *after = jax.ffi.ffi_call(
        "raptax_paged",
        results,
        vmap_method="sequential",
        input_output_aliases=aliases,
    )(*operands, append=bool(new), **call.attributes())
    return out, lse, Pool(*after) if new else batch.pool
