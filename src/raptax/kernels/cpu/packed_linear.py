"""``x W^T`` for packed weights: C++ on CPUs, plain JAX elsewhere. See `quant.packed`."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..._core.manual_axes import same_manual_axes, varying_like
from ..._core.transposable import linear_with_transpose
from ...quant.packed import Packed
from ..per_platform import per_platform
from ..softmax import accumulator
from . import library

Precision = Literal["float32", "int8"]
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
MOST_PARTS = 8  # kMaxParts of csrc/api/packed_linear_params.h
ROUNDED_INPUTS = 32  # that share a scale; kRoundInputs of csrc/gemm/packed_dot.h

Weights = tuple[Packed, ...]


def packed_linear(
    x: Float[Array, "*rows C"],
    weights: Sequence[Packed],
    *,
    index: int | Int[Array, ""] = 0,
    precision: Precision = "float32",
) -> Float[Array, "*rows O"]:
    """``x @ W.T`` for each of some weights, their outputs one after another.

    Sums are float32 (float64 for such ``x``), rounded to the dtype of ``x`` at the end.
    Gradients reach ``x`` alone, and are those of the product without rounding.

    Args:
        x: float32, bfloat16 or float16; other floats go through plain JAX.
        weights: Up to 8, with as many inputs as ``x`` has.
        index: Which weight of each stack.
        precision: ``"float32"`` multiplies ``x`` as it is. ``"int8"`` rounds it first:
            32 neighbours share the scale ``max |x| / 127``, so that a product of two
            integers is exact and four of them are one instruction. A row with a number
            that is not finite gives NaN.

    Raises:
        ValueError: Inputs do not fit, there are more weights, or an unknown precision.
    """
    weights = tuple(weights)
    if precision not in ("float32", "int8"):
        raise ValueError(f"precision={precision!r} must be 'float32' or 'int8'.")
    if not 1 <= len(weights) <= MOST_PARTS:
        raise ValueError(f"packed_linear takes 1 to {MOST_PARTS} weights.")
    for weight in weights:
        if weight.in_features != x.shape[-1]:
            raise ValueError(
                f"a weight with {weight.in_features} inputs does not fit x of shape "
                f"{x.shape}."
            )
    rows = x.reshape(-1, x.shape[-1])
    index = jnp.asarray(index, jnp.int32)
    y = _product(precision == "int8", weights, index, rows)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(int8: bool, weights: Weights, index: jax.Array, x: jax.Array) -> jax.Array:
    return _run(int8, weights, index, x)


@_product.defjvp
def _product_jvp(int8, primals, tangents):
    weights, index, x = primals
    *_, moved = tangents
    run = lambda held, x: _run(False, held[0], held[1], x)
    plain = lambda held, x: _plain(False, held[0], held[1], x)
    back = lambda held, y: _transposed(held[0], held[1], y)
    y_moved = linear_with_transpose(
        run, back, (weights, index), moved, plain=(plain, back)
    )
    return _product(int8, weights, index, x), y_moved


def _run(int8: bool, weights: Weights, index: jax.Array, x: jax.Array) -> jax.Array:
    plain = functools.partial(_plain, int8)
    if x.dtype not in DTYPES or not library.available():
        return plain(weights, index, x)
    args = weights, index, x
    folds = (*jax.tree.map(lambda _: False, (weights, index)), True)
    return per_platform(functools.partial(_call, int8), plain, *args, folds=folds)


def _call(int8: bool, weights: Weights, index: jax.Array, x: jax.Array) -> jax.Array:
    parts = [word for weight in weights for word in _words(weight)]
    shape = x.shape[0], sum(weight.out_features for weight in weights)
    arrays = [leaf for weight in weights for leaf in jax.tree.leaves(_arrays(weight))]
    given: list[Any] = same_manual_axes([x, index, *arrays])
    call = jax.ffi.ffi_call(
        "raptax_packed_linear",
        jax.ShapeDtypeStruct(shape, x.dtype),
        vmap_method="sequential",
    )
    y = call(*given, parts=np.array(parts, np.int32), int8=int8)
    return varying_like(given[0], y)


def _arrays(weight: Packed) -> list[Any]:
    """In the order of csrc/ffi/packed_linear.cc."""
    offsets = weight.offsets, weight.offset_factors
    return [weight.codes, weight.scales, weight.factors, *offsets]


def _words(weight: Packed) -> tuple[int, ...]:
    offsets = 0 if weight.offsets is None else 1 if weight.offset_factors is None else 2
    return (
        weight.out_features,
        weight.bits,
        weight.zero,
        weight.group,
        weight.block,
        int(weight.factors is not None),
        offsets,
    )


def _plain(int8: bool, weights: Weights, index: jax.Array, x: jax.Array) -> jax.Array:
    wide = _rounded(x) if int8 else x.astype(accumulator(x.dtype))
    parts = [wide @ w.dequantize(index).T.astype(wide.dtype) for w in weights]
    return jnp.concatenate(parts, axis=1).astype(x.dtype)


def _rounded(x: jax.Array) -> jax.Array:
    """What the products of int8 numbers see of ``x``."""
    groups = x.astype(jnp.float32).reshape(x.shape[0], -1, ROUNDED_INPUTS)
    most = jnp.abs(groups).max(-1, keepdims=True)
    inverse = jnp.where(most > 0, 127 / jnp.where(most > 0, most, 1), 0)
    whole = jnp.round(groups * inverse) * (most / 127)
    return jnp.where(jnp.isfinite(most), whole, jnp.nan).reshape(x.shape)


def _transposed(weights: Weights, index: jax.Array, y: jax.Array) -> jax.Array:
    """``y W``, the transpose of the product."""
    wide = y.astype(accumulator(y.dtype))
    W = jnp.concatenate([w.dequantize(index) for w in weights])
    return (wide @ W.astype(wide.dtype)).astype(y.dtype)
