"""Attention in C++ on CPUs, for every mask, score_mod and derivative.

The forward pass is csrc/attention/forward.h, called through XLA's FFI. What `Causal`,
`SlidingWindow` and `Window` say becomes a band: two numbers, and no work for each score.

Tangents are those of `blockwise`, so every derivative that it has is here as well.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..._core.errors import Unsupported
from ..._core.manual_axes import same_manual_axes, varying_like
from ..._core.transposable import linear_with_transpose
from ..._core.types import Attended, DropoutKey, MaskMod, ScoreMod
from ...block_mask import BlockMask, Grid, block_kinds
from ...mod_compiler.compile import (
    NOTHING,
    ModProgram,
    mask_program,
    score_program,
    slope_program,
)
from ...mod_compiler.ir import NUMBER
from ...mods import Causal, SlidingWindow, Window
from ...mods.combine import And
from .. import blockwise
from ..partition import partitioned
from ..per_platform import per_platform
from ..problem import AttentionParams, named, traced_mods, unfolded, with_lengths
from ..tiles import DiffInputs, NonDiffArrays, Tile, TiledProblem
from .backward import native_backward
from .library import missing_reason

UNLIMITED = 2**31 - 1  # as an operand; csrc/api/attention_params.h has Band::kUnlimited
TILE = (128, 128)  # rows and columns of a mask whose kind is told to C++; any will do
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def native_unsupported_reason(
    query: jax.Array, key: jax.Array, value: jax.Array, **problem: Any
) -> str | None:
    """One sentence on what of ``problem`` this kernel cannot do, or None."""
    if (reason := missing_reason()) is not None:
        return reason
    if (platform := _platform(query)) != "cpu":
        return f"it runs on CPUs; these arrays are on a {platform}"
    if query.dtype not in DTYPES:
        return f"it computes in float32; {query.dtype} asks for more"
    mods = problem.get("mask_mod"), problem.get("score_mod")
    (B, H, T, _), S = query.shape, key.shape[2]
    start = problem.get("query_start")
    return mods_unsupported_reason(
        *traced_mods(*mods, (B, H, T, S), jnp.float32, start)
    )


def mods_unsupported_reason(mask_mod: Any, score_mod: Any) -> str | None:
    """Why the mods cannot be written as programs, in one sentence; None if they can.

    Decided once for all mods of the same structure, with arrays of the same shapes. A
    plain function is decided where it is traced; see `mods.functions`.
    """
    if mask_mod is None and score_mod is None:
        return None
    leaves, structure = jax.tree.flatten((mask_mod, score_mod))
    avals = tuple(jax.typeof(x) for x in leaves)
    like = tuple((x.shape, x.dtype, x.weak_type) for x in avals)
    x64 = jnp.dtype(float) == jax.dtypes.canonicalize_dtype(float)
    return _not_lowerable_reason(structure, like, x64)


@functools.lru_cache(maxsize=4096)
def _not_lowerable_reason(structure: Any, like: Any, x64: bool) -> str | None:
    def write(leaves: Any) -> Any:
        return programs_of(*jax.tree.unflatten(structure, leaves))

    avals = [jax.ShapeDtypeStruct(s, d, weak_type=weak) for s, d, weak in like]
    try:
        jax.eval_shape(write, avals)
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
    """See `AttentionFn`; `native_unsupported_reason` says what this one cannot do.

    Weights are float32; those of bfloat16 inputs are rounded to bfloat16 where the
    machine multiplies matrices of those (AMX), as FlashAttention does. There float32
    numbers go in three bfloat16 parts, and those below 1e-30 lose digits. Two runs agree
    to the bit, whatever the number of threads and whatever else is in the batch.
    """
    params = AttentionParams.create(
        query,
        key,
        value,
        mask=mask,
        mask_mod=mask_mod,
        score_mod=score_mod,
        bias=bias,
        sinks=sinks,
        scale=scale,
        query_start=query_start,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
    )
    mods = dict(mask_mod=params.mask_mod, score_mod=params.score_mod)
    if (reason := native_unsupported_reason(query, key, value, **mods)) is not None:
        raise Unsupported(f"native cannot run this: {reason}.")
    if blockwise.nothing_to_see(query, key, value):
        out, lse = blockwise.empty_result(query, value, sinks)
    else:
        out, lse = _native(query, key, value, params)
    return (out, lse) if return_lse else out


# ----------------------------------------------------------------------- what C++ is told


Limit = int | Int[Array, ""]
"""A number of keys, known to Python or not."""


def split_band(mask_mod: Any) -> tuple[Limit, Limit, Any]:
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
        left, right = map(_nearer, first, second)
        if rest is None or other is None:
            return left, right, other if rest is None else rest
        return left, right, And(rest, other)
    return UNLIMITED, UNLIMITED, mask_mod


def _nearer(a: Limit, b: Limit) -> Limit:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return jnp.minimum(jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32))


def band_operand(left: Limit, right: Limit) -> Int[Array, "2"]:
    """Both limits as C++ reads them; a constant where they are known."""
    if isinstance(left, int) and isinstance(right, int):
        return jnp.asarray(np.array([left, right], np.int32))
    return jnp.stack([jnp.asarray(n, jnp.int32).reshape(()) for n in (left, right)])


def programs_of(mask_mod: Any, score_mod: Any) -> tuple[ModProgram, ModProgram]:
    """What is left of the mask beside the band, and the score_mod, as programs.

    Raises:
        Unsupported: One of them cannot be written as a program.
    """
    _, _, rest = split_band(mask_mod)
    mask = NOTHING if rest is None else mask_program(rest)
    return mask, NOTHING if score_mod is None else score_program(score_mod)


def _scaled(score_mod: Any, scale: Any, bias: Any) -> ModProgram | None:
    """The program of ``score_mod(scale * x)``, which saves C++ a pass over the scores.

    None where there is no scale, or a bias comes between the two.
    """
    if score_mod is None or scale is None or bias is not None:
        return None
    return score_program(score_mod, scale=scale)


def _slope(score_mod: Any) -> ModProgram | None:
    """The derivative of a score_mod; None if it cannot be written as a program."""
    if score_mod is None:
        return NOTHING
    try:
        return slope_program(score_mod) or NOTHING
    except Unsupported:
        return None


class Call(NamedTuple):
    """The static half of a call into C++; see csrc/ffi/attention.h for the names.

    Code and how many arrays it reads, of the mask, the score_mod, its slope, and the
    score_mod after the scale. ``slope`` is None where gradients are left to blockwise,
    ``scaled`` where the scale is not left to a program.
    """

    tile: tuple[int, int]
    mask: tuple[tuple[int, ...], int]
    score: tuple[tuple[int, ...], int]
    slope: tuple[tuple[int, ...], int] | None
    scaled: tuple[tuple[int, ...], int] | None

    def attributes(self, **programs: tuple[tuple[int, ...], int]) -> dict[str, Any]:
        """Those of a call that runs these programs."""
        out: dict[str, Any] = dict(
            tile_queries=np.int64(self.tile[0]), tile_keys=np.int64(self.tile[1])
        )
        for name, (code, arrays) in programs.items():
            out[f"{name}_code"] = np.array(code, np.int32)
            out[f"{name}_arrays"] = np.int64(arrays)
        return out


class Operands(NamedTuple):
    """The arrays of a call into C++, beside query, key and value. None: there is none."""

    start: Int[Array, " #B"]
    band: Int[Array, "2"]
    factors: Float[Array, " n"]  # the scale before the bias; dropout's rate, if any
    kinds: Int[Array, "#B #H QT KT"] | None
    mask: Bool[Array, "#B #H #T #S"] | None
    bias: Float[Array, "#B #H #T #S"] | None
    sinks: Float[Array, " H"] | None
    words: Int[Array, " words"] | None

    def filled(self, like: jax.Array) -> list[jax.Array]:
        """Each in the dtype that C++ reads, and without elements where there is none."""
        int32, float32 = jnp.int32, jnp.float32
        dtypes = int32, int32, float32, jnp.int8, bool, float32, float32, jnp.uint32
        ranks = 1, 1, 1, 4, 4, 4, 1, 1
        return [
            jnp.zeros_like(like, dtype, shape=(0,) * rank)
            if x is None
            else x.astype(dtype)
            for x, dtype, rank in zip(self, dtypes, ranks, strict=True)
        ]


class Lookup(NamedTuple):
    """Arrays that C++ reads and blockwise does not: those of `Call`'s programs, too."""

    band: Int[Array, "2"]
    kinds: Int[Array, "#B #H QT KT"] | None
    mask: list[jax.Array]
    score: list[jax.Array]
    slope: list[jax.Array]
    scaled: list[jax.Array]


def _prepare(
    query: jax.Array, key: jax.Array, value: jax.Array, params: AttentionParams
) -> tuple[Call, Lookup]:
    """The static half of a call, and the arrays that go with it."""
    (B, H, T, _), S = query.shape, key.shape[2]
    mask_mod, score_mod = params.mask_mod, params.score_mod
    start = jnp.asarray(params.start, jnp.int32).reshape(-1)
    left, right, rest = split_band(mask_mod)
    tile, kinds = TILE, None
    if isinstance(mask_mod, BlockMask):
        tile, kinds = mask_mod.block, mask_mod.kinds
    elif rest is not None and TiledProblem(Tile(*tile), (B, H, T, S)).many_tiles:
        kinds = block_kinds(mask_mod, start, Grid(tile, (T, S)), B, H)
    programs = [
        *programs_of(mask_mod, score_mod),
        _slope(score_mod),
        _scaled(score_mod, params.scale, params.bias),
    ]
    code: list[Any] = [None if p is None else (p.code, len(p.arrays)) for p in programs]
    # Derivatives reach these arrays through blockwise's view of the same mods.
    arrays = [lax.stop_gradient([] if p is None else p.arrays) for p in programs]
    return Call(tile, *code), Lookup(band_operand(left, right), kinds, *arrays)


def forward(
    call: Call, fixed: NonDiffArrays, lookup: Lookup, inputs: DiffInputs
) -> tuple[Float[Array, "B H T E"], Float[Array, "B H T"]]:
    """``(out, log-sum-exp)``, by C++."""
    query, key, value = inputs[:3]
    shape = query.shape[:3]
    results = (
        jax.ShapeDtypeStruct((*shape, value.shape[3]), query.dtype),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    operands = _operands(fixed, lookup, inputs)
    score, arrays = call.score, lookup.score
    if call.scaled is not None:
        score, arrays = call.scaled, lookup.scaled
        operands = operands._replace(factors=_factors(None, fixed.dropout))
    run = jax.ffi.ffi_call("raptax_forward", results, vmap_method="sequential")
    given = same_manual_axes(
        [query, key, value, *operands.filled(query), *lookup.mask, *arrays]
    )
    out, lse = run(*given, **call.attributes(mask=call.mask, score=score))
    return varying_like(given[0], (out, lse))


# ---------------------------------------------------------------------------- derivatives


@jax.jit
@partitioned
@with_lengths
def _native(query, key, value, params):
    arrays = same_manual_axes((query, key, value, unfolded(params)))
    call, lookup = _prepare(*arrays)
    problem, fixed, inputs = blockwise.prepare(*arrays)
    return _attend((call, problem), (fixed, lookup), inputs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(
    static: tuple[Call, TiledProblem],
    arrays: tuple[NonDiffArrays, Lookup],
    inputs: DiffInputs,
):
    call, problem = static
    return per_platform(
        functools.partial(forward, call),
        lambda fixed, lookup, inputs: blockwise.forward(problem, fixed, inputs),
        *arrays,
        inputs,
        folds=_folds(call, *arrays, inputs),
    )


def _folds(call: Call, fixed: NonDiffArrays, lookup: Lookup, inputs: DiffInputs) -> Any:
    """Which arrays have an axis of sequences, if the call treats sequences alike.

    Dropout and some mods do not: they depend on the number of a sequence.
    """
    programs = [p for p in (call.mask, call.score, call.slope, call.scaled) if p]
    numbered = any(NUMBER["Sequence"] in code[::4] for code, _ in programs)
    if numbered or fixed.dropout is not None:
        return None
    mark = lambda x: None if x is None else True
    marks: Any = jax.tree.map(lambda x: False, (fixed, lookup, inputs))
    return (
        marks[0]._replace(start=True, mask=mark(fixed.mask)),
        marks[1]._replace(kinds=mark(lookup.kinds)),
        marks[2]._replace(query=True, key=True, value=True, bias=mark(inputs.bias)),
    )


def _operands(fixed: NonDiffArrays, lookup: Lookup, inputs: DiffInputs) -> Operands:
    dropout = fixed.dropout
    return Operands(
        fixed.start,
        lookup.band,
        _factors(fixed.scale, dropout),
        lookup.kinds,
        fixed.mask,
        inputs.bias,
        inputs.sinks,
        None if dropout is None else dropout.words,
    )


def _factors(scale: jax.Array | None, dropout: Any) -> jax.Array:
    """The scale, and the rate of dropout if there is any.

    A small program for each operand is a large part of a call that decodes one token:
    what is one number stays one.
    """
    one = jnp.asarray(np.ones(1, np.float32)) if scale is None else scale.reshape(1)
    if dropout is None:
        return one.astype(jnp.float32)
    rate = jnp.asarray(dropout.rate, jnp.float32).reshape(1)
    return jnp.concatenate([one.astype(jnp.float32), rate])


def _tangent(
    problem: TiledProblem,
    residuals: tuple[blockwise.Residuals, Lookup],
    moved: DiffInputs,
):
    return blockwise._tangent(problem, residuals[0], moved)


def _plain_backward(problem: TiledProblem, residuals, cotangents) -> DiffInputs:
    return blockwise._backward(problem, residuals[0], cotangents)


def _backward(call: Call, problem: TiledProblem, residuals, cotangents) -> DiffInputs:
    if call.slope is None:
        return blockwise._backward(problem, residuals[0], cotangents)
    return per_platform(
        functools.partial(_native_backward, call, problem),
        functools.partial(_plain_backward, problem),
        residuals,
        cotangents,
        folds=_backward_folds(call, residuals),
    )


def _backward_folds(call: Call, residuals: tuple[blockwise.Residuals, Lookup]) -> Any:
    """As `_folds`, if no gradient is summed over sequences."""
    (fixed, inputs, _, _), lookup = residuals
    folds = _folds(call, fixed, lookup, inputs)
    if folds is None or inputs.bias is not None or inputs.sinks is not None:
        return None
    if inputs.learned:
        return None
    found: Any = (True, True)
    return (blockwise.Residuals(folds[0], folds[2], *found), folds[1]), found


def _native_backward(
    call: Call, problem: TiledProblem, residuals, cotangents
) -> DiffInputs:
    known, lookup = residuals
    assert call.slope is not None
    operands = _operands(known.fixed, lookup, known.inputs)
    programs = dict(mask=call.mask, score=call.score, slope=call.slope)
    attributes = call.attributes(**programs)
    arrays = [*lookup.mask, *lookup.score, *lookup.slope]
    filled = operands.filled(known.inputs.query)
    return native_backward(attributes, filled, arrays, problem, known, cotangents)


@_attend.defjvp
def _attend_jvp(static, primals, tangents):
    (call, problem), ((fixed, lookup), inputs) = static, primals
    out, lse = named(*_attend(static, *primals))
    plain = problem._replace(reversible=True)
    moved = linear_with_transpose(
        functools.partial(_tangent, problem),
        functools.partial(_backward, call, problem),
        (blockwise.Residuals(fixed, inputs, out, lse), lookup),
        tangents[1],
        plain=(
            functools.partial(_tangent, plain),
            functools.partial(_plain_backward, plain),
        ),
    )
    return (out, lse), moved
