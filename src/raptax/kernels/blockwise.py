"""Attention in O(S) memory, in plain JAX: runs everywhere, takes every mod.

FlashAttention-2's two loops (Dao 2023, arXiv:2307.08691): queries tile by tile, and for
each the keys tile by tile with a running softmax. Derivatives keep only the output and
the log-sum-exp of each row, and work the weights out again. The loops are rolled, so
compile time does not depend on the lengths.

Where there are many tiles, those that the mask leaves empty are known beforehand
(`block_mask`) and never visited, so that a window costs O(S); where there are few, each
is visited, and skipped once its mask turns out to allow nothing.

The last tile of an axis is moved back until it fits, so nothing is padded or copied.
Keys that it shares with the tile before are masked, and so are query rows, which keep
what the tile before found.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._core.manual_axes import same_manual_axes
from .._core.transposable import linear_with_transpose
from .._core.types import Attended, DropoutKey, Indices, MaskMod, ScoreMod
from ..block_mask import BlockMask, Grid, block_kinds
from ..mods import apply_mask, apply_score
from .partition import partitioned
from .problem import AttentionParams, named, unfolded, with_lengths
from .softmax import OnlineSoftmax, accumulator, finite, poison
from .tiles import (
    DiffInputs,
    NonDiffArrays,
    Plan,
    Tile,
    TiledProblem,
    cut,
    cut_short,
    gather_rows,
    lift,
    put,
    tile_sizes,
    times_keys,
    times_values,
)
from .wide import widened


def blockwise_attention(
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
    """See `AttentionFn`.

    Weights are rounded to the value's dtype before they meet the values, and summed in
    float32, as FlashAttention does. Derivatives of first order, in either direction,
    take O(S) memory. A gradient of a gradient stores the weights of every tile.
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
    if nothing_to_see(query, key, value):
        out, lse = empty_result(query, value, sinks)
    else:
        out, lse = _blockwise(query, key, value, params)
    return (out, lse) if return_lse else out


def nothing_to_see(query: jax.Array, key: jax.Array, value: jax.Array) -> bool:
    """Whether no array has an entry to attend to."""
    return 0 in (*query.shape, *key.shape, *value.shape)


def empty_result(
    query: jax.Array, value: jax.Array, sinks: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """``(out, log-sum-exp)`` where there is `nothing_to_see`."""
    shape, dtype = query.shape[:3], accumulator(query.dtype)
    out = jnp.zeros((*shape, value.shape[3]), query.dtype)
    sink = (
        jnp.array(-jnp.inf, dtype)
        if sinks is None
        else sinks.astype(dtype)[None, :, None]
    )
    return out, jnp.broadcast_to(sink, shape)


@jax.jit
@partitioned
@with_lengths
def _blockwise(query, key, value, params):
    arrays = same_manual_axes((query, key, value, unfolded(params)))
    return _attend(*prepare(*arrays))


def prepare(
    query: jax.Array, key: jax.Array, value: jax.Array, params: AttentionParams
) -> tuple[TiledProblem, NonDiffArrays, DiffInputs]:
    """The arguments of `_attend`, whose arrays are those of this trace."""
    (B, H, T, _), S, dtype = query.shape, key.shape[2], accumulator(query.dtype)
    start = jnp.asarray(params.start, jnp.int32).reshape(-1)
    tile, kinds = tile_sizes(B, H, T, S), None
    mask_mod, score_mod = params.mask_mod, params.score_mod
    if isinstance(mask_mod, BlockMask):
        tile = Tile(min(mask_mod.block[0], T), min(mask_mod.block[1], S))
        mask_mod, kinds = mask_mod.mask_mod, mask_mod.kinds
    problem = TiledProblem(tile, (B, H, T, S))
    if kinds is None and mask_mod is not None and problem.many_tiles:
        kinds = block_kinds(mask_mod, start, Grid(tile, (T, S)), B, H)
    at = problem.indices(start, 0, 0)
    allow_arrays: list[jax.Array] = []
    change_arrays: list[jax.Array] = []
    if mask_mod is not None:
        allow, allow_arrays = lift(functools.partial(apply_mask, mask_mod), *at)
        problem = problem._replace(allow=allow)
    if score_mod is not None:
        scores = jnp.zeros_like(query, dtype, shape=(B, H, *tile))
        apply = functools.partial(apply_score, score_mod)
        change, change_arrays = lift(apply, scores, *at)
        leaves = zip(jax.tree.leaves(score_mod), params.numbers, strict=True)
        numbers = [x for x, is_number in leaves if is_number]
        learned = tuple(
            jnp.issubdtype(x.dtype, jnp.inexact) and not any(x is n for n in numbers)
            for x in change_arrays
        )
        problem = problem._replace(change=change, learned=learned)
    apart: dict[bool, list[jax.Array]] = {True: [], False: []}
    for x, is_learned in zip(change_arrays, problem.learned, strict=True):
        apart[is_learned].append(x)
    plan = None if kinds is None else Plan.create(kinds)
    scale = None if params.scale is None else jnp.asarray(params.scale).astype(dtype)
    fixed = NonDiffArrays(
        start, params.mask, allow_arrays, apart[False], params.dropout, plan, scale
    )
    inputs = DiffInputs(query, key, value, params.bias, params.sinks, apart[True])
    return problem, fixed, inputs


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(problem: TiledProblem, fixed: NonDiffArrays, inputs: DiffInputs):
    return forward(problem, fixed, inputs)


def forward(
    problem: TiledProblem, fixed: NonDiffArrays, inputs: DiffInputs
) -> tuple[Float[Array, "B H T E"], Float[Array, "B H T"]]:
    """``(out, log-sum-exp)``, without a derivative."""
    query, learned = inputs.query, inputs.learned
    B, H, T, _ = query.shape
    E, dtype = inputs.value.shape[3], accumulator(query.dtype)
    tile, columns = problem.tile, Columns.of(inputs)

    def query_tile(i, outputs):
        t = problem.rows(i)
        q = cut(query, t, tile.queries)

        def visit(j, allowed, state):
            at = problem.indices(fixed.start, i, j)
            k, v, nan = columns.cut(problem, j)
            base = fixed.scaled(times_keys(q, k)) + nan[:, :, None]
            if inputs.bias is not None:
                base += problem.of_tile(inputs.bias, i, j).astype(dtype)
            scores = problem.scores(fixed, learned, base, at)
            if allowed is not None:
                scores = jnp.where(allowed, scores, -jnp.inf)
            return state.add(scores, lambda w: times_values(fixed.drop(w, at), v))

        zeros = jnp.zeros_like(query, dtype, shape=(B, H, tile.queries))
        state = OnlineSoftmax.empty(zeros, E, inputs.sinks)
        out, lse = problem.over_keys(fixed, i, visit, state).finish()
        if cut_short(T, tile.queries):
            first = problem.first_time(i)
            out = out.astype(query.dtype)
            out = jnp.where(first, out, cut(outputs[0], t, tile.queries))
            lse = jnp.where(first[..., 0], lse, cut(outputs[1], t, tile.queries))
        return put(outputs[0], out, t), put(outputs[1], lse, t)

    outputs = (
        jnp.zeros_like(query, shape=(B, H, T, E)),
        jnp.zeros_like(query, dtype, shape=(B, H, T)),
    )
    return lax.fori_loop(0, problem.grid[0], query_tile, outputs)


@_attend.defjvp
def _attend_jvp(problem: TiledProblem, primals, tangents):
    fixed, inputs = primals
    out, lse = named(*_attend(problem, fixed, inputs))
    plain = problem._replace(reversible=True)
    moved = linear_with_transpose(
        functools.partial(_tangent, problem),
        functools.partial(_backward, problem),
        Residuals(fixed, inputs, out, lse),
        tangents[1],
        plain=(functools.partial(_tangent, plain), functools.partial(_backward, plain)),
    )
    return (out, lse), moved


class Residuals(NamedTuple):
    """What derivatives start from."""

    fixed: NonDiffArrays
    inputs: DiffInputs
    out: Float[Array, "B H T E"]
    lse: Float[Array, "B H T"]


class Columns(NamedTuple):
    """Keys and values without NaN, and what `poison` adds to scores: (B, H, S)."""

    keys: jax.Array
    values: jax.Array
    nan: jax.Array

    @classmethod
    def of(cls, inputs: DiffInputs) -> "Columns":
        nan = poison(inputs.key, jnp.float32) + poison(inputs.value, jnp.float32)
        nan = jnp.repeat(nan, inputs.query.shape[1] // nan.shape[1], axis=1)
        nan = nan.astype(accumulator(inputs.key.dtype))
        return cls(finite(inputs.key), finite(inputs.value), nan)

    def cut(self, problem: TiledProblem, j: jax.Array) -> "Columns":
        """Those of one tile of keys."""
        return Columns(*(cut(x, problem.keys(j), problem.tile.keys) for x in self))


class Weights(NamedTuple):
    """The weights of one tile, and how they follow from its scaled and biased scores."""

    weights: Float[Array, "B H q k"]
    scores: Callable[..., jax.Array]  # of (learned, base)
    base: Float[Array, "B H q k"]
    at: Indices

    @classmethod
    def again(cls, problem, residuals, i, j, allowed, columns) -> "Weights":
        fixed, inputs, _, lse = residuals
        t, at = problem.rows(i), problem.indices(fixed.start, i, j)
        q = cut(inputs.query, t, problem.tile.queries)
        base = fixed.scaled(times_keys(q, columns.keys)) + columns.nan[:, :, None]
        if inputs.bias is not None:
            base += problem.of_tile(inputs.bias, i, j).astype(base.dtype)
        if allowed is not None:  # or a masked NaN reaches what a score_mod learns
            base = jnp.where(allowed, base, 0)

        def scores(learned: list[jax.Array], base: jax.Array) -> jax.Array:
            changed = problem.scores(fixed, learned, base, at)
            return changed if allowed is None else jnp.where(allowed, changed, -jnp.inf)

        shift = cut(jnp.where(jnp.isneginf(lse), 0, lse), t, problem.tile.queries)
        weights = jnp.exp(scores(inputs.learned, base) - shift[..., None])
        return cls(weights, scores, base, at)


def _sink_weights(residuals: Residuals) -> Float[Array, "B H T"]:
    """The share of each row's softmax that its sink takes."""
    lse = residuals.lse
    sinks: Any = residuals.inputs.sinks
    sinks = sinks.astype(lse.dtype)[None, :, None]
    return jnp.exp(sinks - jnp.where(jnp.isneginf(lse), 0, lse))


def _tangent(problem: TiledProblem, residuals: Residuals, moved: DiffInputs):
    """With W the weights, S the scores and L the log-sum-exp:

    dL = sum(W * dS),  dO = (W * dS) V + W dV - dL * O.
    """
    fixed, inputs, out, lse = residuals
    dtype, tile = lse.dtype, problem.tile
    columns, d_value = Columns.of(inputs), finite(moved.value)

    def query_tile(i, outputs):
        t = problem.rows(i)
        q, d_q = (cut(x, t, tile.queries) for x in (inputs.query, moved.query))

        def visit(j, allowed, sums):
            near = columns.cut(problem, j)
            d_k, d_v = (
                cut(x, problem.keys(j), tile.keys) for x in (moved.key, d_value)
            )
            found = Weights.again(problem, residuals, i, j, allowed, near)
            d_base = times_keys(d_q, near.keys) + times_keys(finite(q), d_k)
            d_base = fixed.scaled(d_base)
            if moved.bias is not None:
                d_base += problem.of_tile(moved.bias, i, j).astype(dtype)
            _, d_scores = jax.jvp(
                found.scores, (inputs.learned, found.base), (moved.learned, d_base)
            )
            if allowed is not None:
                d_scores = jnp.where(allowed, d_scores, 0)
            weighed = found.weights * d_scores
            d_out = times_values(fixed.drop(weighed, found.at), near.values)
            d_out += times_values(fixed.drop(found.weights, found.at), d_v)
            return sums[0] + d_out, sums[1] + weighed.sum(-1)

        rows = *out.shape[:2], tile.queries
        zeros = (
            jnp.zeros_like(out, dtype, shape=(*rows, out.shape[3])),
            jnp.zeros_like(lse, shape=rows),
        )
        sums = problem.over_keys(fixed, i, visit, zeros)
        # Rows that the tile before has done are masked here, and add nothing.
        before = (cut(x, t, tile.queries) for x in outputs)
        return tuple(
            put(x, old + new, t)
            for x, old, new in zip(outputs, before, sums, strict=True)
        )

    outputs = jnp.zeros_like(out, dtype), jnp.zeros_like(lse)
    d_out, d_lse = lax.fori_loop(0, problem.grid[0], query_tile, outputs)
    if moved.sinks is not None:
        d_lse += _sink_weights(residuals) * moved.sinks.astype(dtype)[None, :, None]
    return (d_out - d_lse[..., None] * out.astype(dtype)).astype(out.dtype), d_lse


def _backward(problem: TiledProblem, residuals: Residuals, cotangents) -> DiffInputs:
    """With W the weights, S the scores and delta = sum(dO * O) - dL for each row:

    dV = W^T dO,  dW = dO V^T,  dS = W * (dW - delta),  dQ = dS K,  dK = dS^T Q.
    """
    fixed, inputs, out, lse = residuals
    d_out, d_lse = cotangents
    dtype, tile, kv_heads = lse.dtype, problem.tile, inputs.key.shape[1]
    delta = jnp.einsum("bhte,bhte->bht", d_out.astype(dtype), out.astype(dtype)) - d_lse
    d_out, query, columns = finite(d_out), finite(inputs.query), Columns.of(inputs)
    learned = [widened(x) for x in inputs.learned]  # their gradients are sums of many

    def query_tile(i, sums):
        t = problem.rows(i)
        q, d_o, d_row = (cut(x, t, tile.queries) for x in (query, d_out, delta))

        def visit(j, allowed, sums):
            s, near = problem.keys(j), columns.cut(problem, j)
            found = Weights.again(problem, residuals, i, j, allowed, near)
            d_weights = fixed.drop(times_keys(d_o, near.values), found.at)
            d_v = gather_rows(fixed.drop(found.weights, found.at), d_o, kv_heads)
            _, pull = jax.vjp(found.scores, learned, found.base)
            d_learned, d_base = pull(found.weights * (d_weights - d_row[..., None]))
            if allowed is not None:  # a steep change may make 0 * inf of what is masked
                d_base = jnp.where(allowed, d_base, 0)
            d_raw = fixed.scaled(d_base)
            d_bias = sums.bias
            if d_bias is not None:
                d_bias = add_to_bias(problem, d_bias, d_base, i, j)
            return DiffInputs(
                add(sums.query, times_values(d_raw, near.keys), t),
                add(sums.key, gather_rows(d_raw, q, kv_heads), s),
                add(sums.value, d_v, s),
                d_bias,
                sums.sinks,
                jax.tree.map(jnp.add, sums.learned, d_learned),
            )

        return problem.over_keys(fixed, i, visit, sums)

    zeros = inputs._replace(learned=[])
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, dtype), zeros)
    zeros = zeros._replace(learned=[jnp.zeros_like(x) for x in learned])
    sums = lax.fori_loop(0, problem.grid[0], query_tile, zeros)
    if inputs.sinks is not None:
        sums = sums._replace(sinks=-(_sink_weights(residuals) * delta).sum((0, 2)))
    return jax.tree.map(lambda x, like: x.astype(like.dtype), sums, inputs)


def add(x: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """``x[:, :, start : start + size] += part``, in place inside a loop."""
    return put(x, cut(x, start, part.shape[2]) + part, start)


def add_to_bias(
    problem: TiledProblem,
    d_bias: jax.Array,
    d_base: jax.Array,
    i: jax.Array,
    j: jax.Array,
) -> jax.Array:
    """Adds a tile's gradient to that of a bias, summed over axes that serve all."""
    broadcast = tuple(axis for axis in range(4) if d_bias.shape[axis] == 1)
    part = problem.of_tile(d_bias, i, j) + d_base.sum(broadcast, keepdims=True)
    t = problem.rows(i) if d_bias.shape[2] != 1 else 0
    s = problem.keys(j) if d_bias.shape[3] != 1 else 0
    start = tuple(jnp.asarray(n, jnp.int32) for n in (0, 0, t, s))
    return lax.dynamic_update_slice(d_bias, part, start)
