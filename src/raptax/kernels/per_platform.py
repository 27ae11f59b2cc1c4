"""Platform-dependent lowering: one equation, C++ or plain JAX by platform.

Where a program will run is not known while it is traced: `jax.export` lowers for other
platforms than the machine's own. So a call into C++ is one equation that carries a form
in plain JAX beside it, and the choice is made when the equation is lowered.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import batching, mlir

Form = Callable[..., Any]


def per_platform(cpu: Form, otherwise: Form, *args: Any, folds: Any = None) -> Any:
    """``cpu(*args)`` on CPUs and ``otherwise(*args)`` elsewhere.

    Both take trees of arrays and return arrays of the same shapes and dtypes in the same
    structure; neither may capture a traced value. Only ``cpu`` is traced beforehand. It
    has no derivative: callers define theirs.

    Args:
        folds: For each array of ``args``, whether it has a leading axis of sequences, of
            length B or 1. Every result must have that axis, and ``cpu`` treat sequences
            alike. Then vmap over such arrays alone makes more sequences of them. None,
            and vmap over any other array, run ``cpu`` for one element after another.
    """
    flat, tree = jax.tree.flatten(args)
    out_tree = jax.tree.structure(jax.eval_shape(cpu, *args))

    def of_leaves(form: Form) -> Form:
        return lambda *leaves: jax.tree.leaves(form(*jax.tree.unflatten(tree, leaves)))

    marks = None if folds is None else tuple(jax.tree.leaves(folds))
    forms = _Forms(of_leaves(cpu), of_leaves(otherwise), marks)
    return jax.tree.unflatten(out_tree, _bind(forms, flat))


@dataclasses.dataclass(frozen=True, eq=False)
class _Forms:
    """Functions of a flat list of arrays."""

    cpu: Form
    otherwise: Form
    folds: tuple[bool, ...] | None = None

    def mapped(self, dims: Sequence[int | None]) -> "_Forms":
        """The same under vmap along ``dims``; results are mapped along axis 0."""
        over = lambda form: jax.vmap(form, in_axes=tuple(dims))
        more = over(self.otherwise)
        if self.folds is None or any(
            dim is not None and not fold
            for dim, fold in zip(dims, self.folds, strict=True)
        ):
            return _Forms(over(self.cpu), more)
        return _Forms(functools.partial(_folded, self.cpu, self.folds, dims), more)


def _folded(
    cpu: Form, folds: Sequence[bool], dims: Sequence[int | None], *args: jax.Array
) -> list[jax.Array]:
    """``cpu`` once, with the mapped axis folded into that of sequences."""
    given = list(zip(args, folds, dims, strict=True))
    (size,) = {x.shape[dim] for x, _, dim in given if dim is not None}
    first = [
        jnp.moveaxis(x, dim, 0) if dim is not None else x[None] if fold else x
        for x, fold, dim in given
    ]
    sequences = max(x.shape[1] for x, fold in zip(first, folds, strict=True) if fold)

    def fold_in(x: jax.Array) -> jax.Array:
        if x.shape[:2] == (1, 1) or not x.size:
            return x[0]  # serves all
        x = jnp.broadcast_to(x, (size, sequences, *x.shape[2:]))
        return x.reshape(-1, *x.shape[2:])

    outs = cpu(
        *(fold_in(x) if fold else x for x, fold in zip(first, folds, strict=True))
    )
    return [x.reshape(size, sequences, *x.shape[1:]) for x in outs]


_call_p = core.Primitive("raptax_call")
_call_p.multiple_results = True


def _bind(forms: _Forms, args: Sequence[jax.Array]) -> list[jax.Array]:
    jaxpr = jax.make_jaxpr(forms.cpu)(*args)
    outs: list[jax.Array] = _call_p.bind(*args, forms=forms, jaxpr=jaxpr)
    return outs


def _run_cpu(*args: jax.Array, forms: _Forms, jaxpr: core.ClosedJaxpr) -> Any:
    return jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *args)


def _run_otherwise(*args: jax.Array, forms: _Forms, jaxpr: core.ClosedJaxpr) -> Any:
    return forms.otherwise(*args)


def _run(*args: jax.Array, **params: Any) -> Any:
    form = _run_cpu if jax.default_backend() == "cpu" else _run_otherwise
    return form(*args, **params)


def _batch(args: Any, dims: Any, *, forms: _Forms, jaxpr: core.ClosedJaxpr) -> Any:
    outs = _bind(forms.mapped(dims), args)
    return outs, [0] * len(outs)


_call_p.def_impl(_run)
_call_p.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
mlir.register_lowering(_call_p, mlir.lower_fun(_run_otherwise, multiple_results=True))
mlir.register_lowering(
    _call_p, mlir.lower_fun(_run_cpu, multiple_results=True), platform="cpu"
)
batching.primitive_batchers[_call_p] = _batch
