"""Gradients of attention in C++ (csrc/attention/backward.h), called through XLA's FFI."""

from collections.abc import Sequence
from typing import Any

import jax

from ..._core.manual_axes import same_manual_axes, varying_like
from ..blockwise import Residuals, _backward
from ..tiles import DiffInputs, TiledProblem


def native_backward(
    attributes: dict[str, Any],
    operands: Sequence[jax.Array],
    captured: Sequence[jax.Array],
    problem: TiledProblem,
    residuals: Residuals,
    cotangents: tuple[jax.Array, jax.Array],
) -> DiffInputs:
    """The gradients that `blockwise._backward` returns, by C++.

    With W the weights, S the scores and delta = sum(dO * O) - dL for each row:
    dV = W^T dO,  dW = dO V^T,  dS = W * (dW - delta),  dQ = dS K,  dK = dS^T Q.

    Gradients of the arrays that a score_mod carries come from `blockwise._backward`, run
    beside. Nothing else reads that run, so under jit XLA leaves it out unless somebody
    asks for those gradients. Under vmap, one problem runs after the other.

    Args:
        attributes: Those of a call; see ``native_attention.Call``.
        operands: ``native_attention.Operands``, filled.
        captured: Arrays of the programs of the mask, the score_mod and its slope.
        problem: The same problem in `blockwise`'s terms.
        residuals: Inputs, output and log-sum-exp.
        cotangents: Gradients of the output and of the log-sum-exp.

    Returns:
        A gradient for each array of ``residuals.inputs``, in its shape and dtype.
    """
    _, inputs, out, lse = residuals
    query, key, value, bias, sinks, learned = inputs
    d_out, d_lse = cotangents
    found = [out, lse, d_out.astype(out.dtype), d_lse.astype(lse.dtype)]
    arrays = same_manual_axes([query, key, value, *operands, *found, *captured])
    results = [
        jax.ShapeDtypeStruct(x.shape, x.dtype)
        for x in (query, key, value, operands[5], operands[6])  # bias, sinks, if any
    ]
    run = jax.ffi.ffi_call("raptax_backward", results, vmap_method="sequential")
    d_query, d_key, d_value, d_bias, d_sinks = varying_like(
        arrays[0], run(*arrays, **attributes)
    )
    return DiffInputs(
        d_query,
        d_key,
        d_value,
        None if bias is None else d_bias.astype(bias.dtype),
        None if sinks is None else d_sinks.astype(sinks.dtype),
        _backward(problem, residuals, cotangents).learned if learned else [],
    )
