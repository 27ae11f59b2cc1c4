"""Attention in C++ on CPUs, for every mask, score change and derivative.

The forward pass is csrc/forward.inl, called through XLA's FFI. What `Causal`,
`SlidingWindow` and `Window` say becomes a band, which costs nothing.

Tangents are those of `blockwise`, so every derivative that it has is here as well.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._errors import Unsupported, check_bias, check_mask, check_qkv, check_sinks
from .._linear import linear
from .._types import Attended, DropoutKey, MaskMod, ScoreMod
from ..block_mask import BlockMask, Grid, first_position, tile_kinds
from ..mods import Causal, SlidingWindow, Window, as_mod, with_scale
from ..mods.combine import And
from . import blockwise
from .dropout import Dropout
from .mod_program import (
    NOTHING,
    ModProgram,
    mask_program,
    score_program,
    slope_program,
)
from .native import why_missing
from .native_backward import native_backward
from .tiles import MANY_TILES, Fixed, Inputs, Problem

UNLIMITED = 2**40
TILE = (128, 128)  # kQueries and kKeys of csrc/forward.inl
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def why_not_native(
    query: jax.Array, key: jax.Array, value: jax.Array, **problem: Any
) -> str | None:
    """One sentence on what of ``problem`` this kernel cannot do, or None."""
    if (reason := why_missing()) is not None:
        return reason
    if (platform := _platform(query)) != "cpu":
        return f"it runs on CPUs; these arrays are on a {platform}"
    if query.dtype not in DTYPES:
        return f"it computes in float32; {query.dtype} asks for more"
    try:
        _programs(as_mod(problem.get("mask_mod")), as_mod(problem.get("score_mod")))
    except Unsupported as reason:
        return str(reason)
    return None


def _platform(x: jax.Array) -> str:
    """Where ``x`` is, or where what is being traced will run as far as one can tell."""
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        return next(iter(x.devices())).platform
    device = getattr(jax.config, "jax_default_device", None)
    return (
        jax.default_backend() if device is None else getattr(device, "platform", device)
    )


def native_attention(
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S E"],
    *,
    mask: Bool[Array, "#B #H #T #S"] | None = None,
    mask_mod: MaskMod | None = None,
    score_mod: ScoreMod | None = None,
    bias: Float[Array, "#B #H #T #S"] | None = None,
    sinks: Float[Array, " H"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    query_start: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    dropout_rng: DropoutKey | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Attended:
    """See `AttentionFn`; `why_not_native` says what this one cannot do.

    Weights are float32; those of bfloat16 inputs are rounded to bfloat16 where the
    machine multiplies matrices of those (AMX), as FlashAttention does. There float32
    numbers go in three bfloat16 parts, and those below 1e-30 lose digits. Two runs agree
    to the bit, whatever the number of threads and whatever else is in the batch.
    """
    check_qkv(query, key, value)
    B, H, T, D = query.shape
    S, E = value.shape[2:]
    check_mask(mask, (B, H, T, S))
    check_bias(bias, (B, H, T, S))
    check_sinks(sinks, H)
    dropout = Dropout.create(dropout_rng, dropout_rate, deterministic)
    query_start = first_position(mask_mod, query_start, (B, H, T, S))
    if (reason := why_not_native(query, key, value)) is not None:
        raise Unsupported(f"native cannot run this: {reason}.")
    if 0 in (B, H, T, S, D, E):
        return blockwise._nothing_to_see(query, E, sinks, return_lse)
    scale, score_mod = with_scale(D**-0.5 if scale is None else scale, score_mod)
    try:
        out, lse = _native(
            query,
            key,
            value,
            query_start,
            mask=mask,
            mask_mod=as_mod(mask_mod),
            score_mod=score_mod,
            bias=bias,
            sinks=sinks,
            dropout=dropout,
            scale=scale,
        )
    except Unsupported as reason:  # of the programs, which are written while tracing
        raise Unsupported(f"native cannot run this: {reason}.") from None
    return (out, lse) if return_lse else out


# ----------------------------------------------------------------------- what C++ is told


def split_band(mask_mod: Any) -> tuple[int, int, Any]:
    """``(left, right, rest)``: keys q - left .. q + right, of which ``rest`` is left.

    A rest of None leaves all of them.
    """
    if isinstance(mask_mod, BlockMask):
        return split_band(mask_mod.mask_mod)
    if mask_mod is None:
        return UNLIMITED, UNLIMITED, None
    if isinstance(mask_mod, Causal):
        return UNLIMITED, 0, None
    if isinstance(mask_mod, SlidingWindow):
        return mask_mod.size - 1, 0, None
    if isinstance(mask_mod, Window) and mask_mod.dilation == 1:
        left, right = (
            UNLIMITED if n is None else n for n in (mask_mod.left, mask_mod.right)
        )
        return left, right, None
    if isinstance(mask_mod, And):
        *first, rest = split_band(mask_mod.first)
        *second, other = split_band(mask_mod.second)
        left, right = map(min, first, second)
        if rest is None or other is None:
            return left, right, other if rest is None else rest
        return left, right, And(rest, other)
    return UNLIMITED, UNLIMITED, mask_mod


def _programs(mask_mod: Any, score_mod: Any) -> tuple[ModProgram, ModProgram]:
    """What is left of the mask beside the band, and the score change, as programs.

    Raises:
        Unsupported: One of them cannot be written as a program.
    """
    _, _, rest = split_band(mask_mod)
    mask = NOTHING if rest is None else mask_program(rest)
    return mask, NOTHING if score_mod is None else score_program(score_mod)


def _scaled(score_mod: Any, scale: float, bias: Any) -> tuple[int, ...] | None:
    """The code of ``score_mod(scale * x)``, which saves C++ a pass over the scores.

    None where a bias comes between the two. The arrays are those of `_programs`.
    """
    if score_mod is None or bias is not None:
        return None
    return score_program(score_mod, scale=scale).code


def _slope(score_mod: Any) -> ModProgram | None:
    """The derivative of a score change; None if it cannot be written as a program."""
    if score_mod is None:
        return NOTHING
    try:
        return slope_program(score_mod) or NOTHING
    except Unsupported:
        return None


class Call(NamedTuple):
    """The static half of a call into C++; see ffi_attention.h for the names."""

    scale: float
    left: int
    right: int
    tile: tuple[int, int]
    rate: float
    mask_code: tuple[int, ...]
    mask_arrays: int
    score_code: tuple[int, ...]
    score_arrays: int
    slope_code: tuple[int, ...] | None  # None: gradients are left to blockwise
    scaled_code: tuple[int, ...] | None  # see _scaled

    def attributes(self) -> dict[str, Any]:
        return dict(
            scale=np.float32(self.scale),
            rate=np.float32(self.rate),
            left=np.int64(self.left),
            right=np.int64(self.right),
            tile_queries=np.int64(self.tile[0]),
            tile_keys=np.int64(self.tile[1]),
            mask_code=np.array(self.mask_code, np.int32),
            mask_arrays=np.int64(self.mask_arrays),
            score_code=np.array(self.score_code, np.int32),
            score_arrays=np.int64(self.score_arrays),
        )

    def forward_attributes(self) -> dict[str, Any]:
        """What the forward call is told."""
        if self.scaled_code is None:
            return self.attributes()
        code = np.array(self.scaled_code, np.int32)
        return self.attributes() | dict(scale=np.float32(1), score_code=code)

    def slope_attributes(self, slope_arrays: int) -> dict[str, Any]:
        """What the backward call needs to know beside."""
        code = np.array(self.slope_code, np.int32)
        return dict(slope_code=code, slope_arrays=np.int64(slope_arrays))


class Operands(NamedTuple):
    """The arrays of a call into C++, beside query, key and value. None: there is none."""

    start: Int[Array, " #B"]
    kinds: Int[Array, "#B #H QT KT"] | None
    mask: Bool[Array, "#B #H #T #S"] | None
    bias: Float[Array, "#B #H #T #S"] | None
    sinks: Float[Array, " H"] | None
    words: Int[Array, " words"] | None
    captured: list[
        jax.Array
    ]  # arrays of the mask's program, then of the score change's

    def filled(self, like: jax.Array) -> list[jax.Array]:
        """Each in the dtype that C++ reads, and without elements where there is none."""
        dtypes = jnp.int32, jnp.int8, bool, jnp.float32, jnp.float32, jnp.uint32
        ranks = 1, 4, 4, 4, 1, 1
        return [
            jnp.zeros_like(like, dtype, shape=(0,) * rank)
            if x is None
            else x.astype(dtype)
            for x, dtype, rank in zip(self[:-1], dtypes, ranks, strict=True)
        ] + self.captured


class Lookup(NamedTuple):
    """Arrays that C++ reads and blockwise does not."""

    kinds: Int[Array, "#B #H QT KT"] | None
    captured: list[jax.Array]
    slope_arrays: list[jax.Array]


def _prepare(scale, query, key, value, start, problem) -> tuple[Call, Lookup]:
    """The static half of a call, and the arrays that go with it."""
    (B, H, T, _), S = query.shape, key.shape[2]
    mask_mod, dropout = problem["mask_mod"], problem["dropout"]
    left, right, rest = split_band(mask_mod)
    tile, kinds = TILE, None
    if isinstance(mask_mod, BlockMask):
        tile, kinds = mask_mod.block, mask_mod.kinds
    elif rest is not None:
        grid = Grid(tile, (T, S))
        if grid.shape[0] * grid.shape[1] >= MANY_TILES:
            kinds = tile_kinds(mask_mod, start, grid, B, H)
    rate = 0.0 if dropout is None else dropout.rate
    mask, score = _programs(mask_mod, problem["score_mod"])
    slope = _slope(problem["score_mod"])
    call = Call(
        scale,
        left,
        right,
        tile,
        rate,
        mask.code,
        len(mask.arrays),
        score.code,
        len(score.arrays),
        None if slope is None else slope.code,
        _scaled(problem["score_mod"], scale, problem["bias"]),
    )
    # Derivatives reach these arrays through blockwise's view of the same mods.
    captured = lax.stop_gradient([*mask.arrays, *score.arrays])
    slope_arrays = lax.stop_gradient([] if slope is None else slope.arrays)
    return call, Lookup(kinds, captured, slope_arrays)


def forward(
    call: Call, operands: Operands, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[Float[Array, "B H T E"], Float[Array, "B H T"]]:
    """``(out, log-sum-exp)``, by C++."""
    shape = query.shape[:3]
    results = (
        jax.ShapeDtypeStruct((*shape, value.shape[3]), query.dtype),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    run = jax.ffi.ffi_call("raptax_forward", results, vmap_method="sequential")
    arrays = blockwise._same_manual_axes([query, key, value, *operands.filled(query)])
    out, lse = run(*arrays, **call.forward_attributes())
    return out, lse


# ---------------------------------------------------------------------------- derivatives


@functools.partial(jax.jit, static_argnames="scale")
def _native(query, key, value, start, *, scale, **problem):
    start = jnp.asarray(start, jnp.int32).reshape(-1)
    arrays = blockwise._same_manual_axes((query, key, value, start, problem))
    call, lookup = _prepare(scale, *arrays)
    rules, fixed, inputs = blockwise._prepare(scale, *arrays)
    return _attend((call, rules), (fixed, lookup), inputs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(static: tuple[Call, Problem], arrays: tuple[Fixed, Lookup], inputs: Inputs):
    (call, _), (fixed, lookup) = static, arrays
    operands = _operands(fixed, lookup, inputs)
    return forward(call, operands, inputs.query, inputs.key, inputs.value)


def _operands(fixed: Fixed, lookup: Lookup, inputs: Inputs) -> Operands:
    return Operands(
        fixed.start,
        lookup.kinds,
        fixed.mask,
        inputs.bias,
        inputs.sinks,
        None if fixed.dropout is None else fixed.dropout.words,
        lookup.captured,
    )


def _tangent(
    problem: Problem, residuals: tuple[blockwise.Known, Lookup], moved: Inputs
):
    return blockwise._tangent(problem, residuals[0], moved)


def _plain_backward(problem: Problem, residuals, cotangents) -> Inputs:
    return blockwise._backward(problem, residuals[0], cotangents)


def _backward(call: Call, problem: Problem, residuals, cotangents) -> Inputs:
    known, lookup = residuals
    if call.slope_code is None:
        return blockwise._backward(problem, known, cotangents)
    operands = _operands(known.fixed, lookup, known.inputs)
    arrays = operands.filled(known.inputs.query) + lookup.slope_arrays
    attributes = call.attributes() | call.slope_attributes(len(lookup.slope_arrays))
    return native_backward(attributes, arrays, problem, known, cotangents)


@_attend.defjvp
def _attend_jvp(static, primals, tangents):
    (call, rules), ((fixed, lookup), inputs) = static, primals
    out, lse = _attend(static, *primals)
    plain = rules._replace(reversible=True)
    moved = linear(
        functools.partial(_tangent, rules),
        functools.partial(_backward, call, rules),
        (blockwise.Known(fixed, inputs, out, lse), lookup),
        tangents[1],
        plain=(
            functools.partial(_tangent, plain),
            functools.partial(_plain_backward, plain),
        ),
    )
    return (out, lse), moved
