"""Gradients of 16-bit arrays that mods read, summed in float32.

The gradient of an array that many scores read is a sum of as many numbers, and in
bfloat16 a sum stops growing after 256 equal ones. A mod says how its values are rounded,
not how its derivative is summed up. So the arrays it reads come in float32 where a
derivative is wanted, its values are rounded where the mod would round them, and the sums
that transposition makes of gathers and broadcasts are of float32 numbers.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from .._core.interpret import bind, interpret

# Operations that move values about. A conversion before one or after it is the same.
MOVES = {"gather", "slice", "dynamic_slice", "concatenate", "pad", "rev", "select_n"}
MOVES |= {"broadcast_in_dim", "reshape", "squeeze", "transpose", "expand_dims", "copy"}
MOVES |= {"copy_p", "stop_gradient", "pvary", "pcast"}
# Arithmetic, correctly rounded to 16 bits by way of 32.
ARITHMETIC = {"add", "sub", "mul", "div", "neg", "abs", "max", "min", "sign", "square"}


def is_narrow(dtype: Any) -> bool:
    """Whether these are floats of fewer than 32 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def widened(x: jax.Array) -> jax.Array:
    """``x`` with at least 32 bits to a float."""
    return x.astype(jnp.float32) if is_narrow(x.dtype) else x


def eval_wide(jaxpr: core.Jaxpr, args: Sequence[Any]) -> list[Any]:
    """What ``jaxpr``, without constants, returns for arguments that may be `widened`.

    The same values that it returns for those as they were, but for subnormal ones, in
    the dtypes that it says. Where a value is wide and an operation has no wide form
    here, it is narrowed for that operation.
    """
    avals: list[Any] = [v.aval for v in jaxpr.invars]
    if all(x.dtype == aval.dtype for x, aval in zip(args, avals, strict=True)):
        return list(jax.core.eval_jaxpr(jaxpr, (), *args))
    outs = interpret(jaxpr, args, _step)
    return [_narrowed(x, v.aval) for x, v in zip(outs, jaxpr.outvars, strict=True)]


def _step(eqn: Any, ins: list[Any]) -> list[Any]:
    """The results of one operation, wide if an operand is and there is a form for it."""
    avals, name = [atom.aval for atom in eqn.invars], eqn.primitive.name
    if all(x.dtype == aval.dtype for x, aval in zip(ins, avals, strict=True)):
        return bind(eqn, ins)
    inner = eqn.params.get("jaxpr")
    if name in ("jit", "pjit") and inner is not None:
        return interpret(inner.jaxpr, [*inner.consts, *ins], _step)
    if name == "convert_element_type":
        return [_converted(eqn, *ins)]
    if name in MOVES | ARITHMETIC:
        outs = bind(eqn, [widened(x) for x in ins])
        if name in MOVES:
            return outs
        return [_rounded(x, v.aval) for x, v in zip(outs, eqn.outvars, strict=True)]
    return bind(eqn, [_narrowed(x, v) for x, v in zip(ins, avals, strict=True)])


def _narrowed(x: Any, aval: Any) -> Any:
    return x if x.dtype == aval.dtype else x.astype(aval.dtype)


def _rounded(x: Any, aval: Any) -> Any:
    """``x`` as wide as it is, with the values that it would have in ``aval.dtype``."""
    if x.dtype == aval.dtype or not is_narrow(aval.dtype):
        return x
    return _round_to(x, jnp.dtype(aval.dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _round_to(x: jax.Array, dtype: Any) -> jax.Array:
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


@_round_to.defjvp
def _round_to_jvp(dtype, primals, tangents):
    return _round_to(*primals, dtype), tangents[0]  # derivatives are not rounded


def _converted(eqn: Any, x: Any) -> Any:
    """A conversion of a wide value: a narrow one stays wide, and is rounded."""
    dtype = eqn.params["new_dtype"]
    if is_narrow(dtype) and is_narrow(eqn.invars[0].aval.dtype):
        return _rounded(x, eqn.outvars[0].aval)
    return x.astype(dtype)
