"""`linear_with_transpose`: a linear function that brings its transpose.

A custom gradient (`jax.custom_vjp`) shuts out forward mode and second order, and a
custom tangent (`jax.custom_jvp`) leaves the transpose to JAX, which would store what
the tangent's loops compute. A tangent built with `linear_with_transpose` brings its own
transpose, and so gives both.

    jvp         run on the tangents
    reverse     transpose on the cotangents
    again       plain JAX through ``run`` or ``transpose``, whichever it was
    vmap        both functions under vmap
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir

Function = Callable[..., Any]


def linear_with_transpose(
    run: Function,
    transpose: Function,
    residuals: Any,
    tangents: Any,
    *,
    plain: tuple[Function, Function] | None = None,
) -> Any:
    """``run(residuals, tangents)``, which is linear in ``tangents``.

    Args:
        transpose: ``transpose(residuals, cotangents)``, of the structure of
            ``tangents``.
        residuals: A tree of arrays. It holds every array that the functions need: they
            must not capture traced values.
        plain: ``run`` and ``transpose`` in a form that JAX can differentiate, forward
            and in reverse, where these cannot be.
    """
    fixed, fixed_tree = jax.tree.flatten(residuals)
    moved, moved_tree = jax.tree.flatten(tangents)
    known = len(fixed)  # the functions outlive the arrays, and must not hold them
    out_tree = jax.tree.structure(jax.eval_shape(run, residuals, tangents))

    def flat(function: Function, tree: Any) -> Function:
        def call(*args: jax.Array) -> list[jax.Array]:
            first, second = args[:known], args[known:]
            outs = function(
                jax.tree.unflatten(fixed_tree, first), jax.tree.unflatten(tree, second)
            )
            return list(jax.tree.leaves(outs))

        return call

    pairs = [(run, transpose), plain or (run, transpose)]
    (run, transpose), (plain_run, plain_transpose) = (
        (flat(there, moved_tree), flat(back, out_tree)) for there, back in pairs
    )
    call = _Call(known, run, transpose, plain_run, plain_transpose)
    return jax.tree.unflatten(out_tree, _bind(call, [*fixed, *moved]))


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """Functions of flat lists: ``residuals`` arrays, then those they are linear in."""

    residuals: int
    run: Function
    transpose: Function
    plain_run: Function
    plain_transpose: Function

    def turned(self) -> "_Call":
        return _Call(
            self.residuals,
            self.transpose,
            self.run,
            self.plain_transpose,
            self.plain_run,
        )

    def mapped(self, dims: Sequence[int | None]) -> "_Call":
        """The same under vmap; the arrays they are linear in are mapped along axis 0."""

        def over(function: Function) -> Function:
            def call(*args: jax.Array) -> list[jax.Array]:
                axes = [*dims, *[0] * (len(args) - len(dims))]
                return jax.vmap(function, in_axes=axes)(*args)

            return call

        functions = self.run, self.transpose, self.plain_run, self.plain_transpose
        return _Call(self.residuals, *map(over, functions))


_linear_p = core.Primitive("raptax_linear")
_linear_p.multiple_results = True


def _bind(call: _Call, args: Sequence[jax.Array]) -> list[jax.Array]:
    jaxpr = jax.make_jaxpr(call.run)(*args)
    outs: list[jax.Array] = _linear_p.bind(*args, call=call, jaxpr=jaxpr)
    return outs


def _run(*args: jax.Array, call: _Call, jaxpr: core.ClosedJaxpr) -> list[jax.Array]:
    outs: list[jax.Array] = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *args)
    return outs


def _jvp(primals: Any, tangents: Any, *, call: _Call, jaxpr: core.ClosedJaxpr) -> Any:
    n = call.residuals
    outs = _linear_p.bind(*primals, call=call, jaxpr=jaxpr)
    moved = map(ad.instantiate_zeros, tangents[n:])
    d_outs = _linear_p.bind(*primals[:n], *moved, call=call, jaxpr=jaxpr)
    live = [i for i in range(n) if not isinstance(tangents[i], ad.Zero)]
    if live:

        def along(*chosen: jax.Array) -> list[jax.Array]:
            args = list(primals)
            for i, x in zip(live, chosen, strict=True):
                args[i] = x
            out: list[jax.Array] = call.plain_run(*args)
            return out

        _, more = jax.jvp(
            along, [primals[i] for i in live], [tangents[i] for i in live]
        )
        d_outs = [a + b for a, b in zip(d_outs, more, strict=True)]
    return outs, d_outs


def _transpose(
    cotangents: Any, *args: Any, call: _Call, jaxpr: core.ClosedJaxpr
) -> Any:
    n = call.residuals
    cotangents = map(ad.instantiate_zeros, cotangents)
    outs = _bind(call.turned(), [*args[:n], *cotangents])
    wanted = map(ad.is_undefined_primal, args[n:])
    return [
        *[None] * n,
        *(x if want else None for x, want in zip(outs, wanted, strict=True)),
    ]


def _batch(args: Any, dims: Any, *, call: _Call, jaxpr: core.ClosedJaxpr) -> Any:
    n = call.residuals
    (size,) = {np.shape(x)[d] for x, d in zip(args, dims, strict=True) if d is not None}

    def to_front(x: jax.Array, dim: int | None) -> jax.Array:
        if dim is None:
            return jnp.broadcast_to(x, (size, *np.shape(x)))
        return jnp.moveaxis(x, dim, 0)

    moved = map(to_front, args[n:], dims[n:])
    outs = _bind(call.mapped(dims[:n]), [*args[:n], *moved])
    return outs, [0] * len(outs)


_linear_p.def_impl(_run)
_linear_p.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
mlir.register_lowering(_linear_p, mlir.lower_fun(_run, multiple_results=True))
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
