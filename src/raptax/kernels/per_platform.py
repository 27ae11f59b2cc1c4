"""One computation in two forms, of which the platform that is lowered for takes one.

Where a program will run is not known while it is traced: `jax.export` lowers for other
platforms than the machine's own. So a call into C++ is one equation that carries a form
in plain JAX beside it, and the choice is made when the equation is lowered.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import batching, mlir

Form = Callable[..., Any]


def per_platform(cpu: Form, otherwise: Form, *args: Any) -> Any:
    """``cpu(*args)`` on CPUs and ``otherwise(*args)`` elsewhere.

    Both take trees of arrays and return arrays of the same shapes and dtypes in the same
    structure; neither may capture a traced value. Only ``cpu`` is traced beforehand. It
    has no derivative: callers define theirs.
    """
    flat, tree = jax.tree.flatten(args)
    out_tree = jax.tree.structure(jax.eval_shape(cpu, *args))

    def of_leaves(form: Form) -> Form:
        return lambda *leaves: jax.tree.leaves(form(*jax.tree.unflatten(tree, leaves)))

    forms = _Forms(of_leaves(cpu), of_leaves(otherwise))
    return jax.tree.unflatten(out_tree, _bind(forms, flat))


@dataclasses.dataclass(frozen=True, eq=False)
class _Forms:
    """Functions of a flat list of arrays."""

    cpu: Form
    otherwise: Form

    def mapped(self, dims: Sequence[int | None]) -> "_Forms":
        over = lambda form: jax.vmap(form, in_axes=tuple(dims))
        return _Forms(over(self.cpu), over(self.otherwise))


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
