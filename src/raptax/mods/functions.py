"""Plain functions as mods: traced on every call, and compared by what they compute.

A function's identity says nothing of what it does: what it captures may have changed
since its last call. So `trace_functions` traces each function anew, outside every cache,
before a kernel is chosen. What it captures becomes arrays beside a `TracedFunction`, and
its jaxpr becomes the structure that `jax.jit` compiles for: two functions that compute
the same share one compiled program, and arrays with new values need no new one.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import Array

from .._core.manual_axes import eval_jaxpr, same_manual_axes
from .._core.pytree import is_value, pytree, static
from .combine import FunctionMod, Mask


@pytree
class TracedFunction(Mask):
    """A function of positions, and scores if it takes them, with its captured arrays.

    ``arrays`` stand for the constants of the function's jaxpr, in its order, wherever
    the function is called while the call that traced it lasts.
    """

    program: "Program" = static()
    arrays: tuple[Array, ...]

    def __call__(self, *args: jax.Array) -> Any:
        """The function's value, with ``arrays`` in place of what it captures.

        Raises:
            ValueError: It captures other arrays now than when it was traced, as happens
                where constants are made from the number of positions.
        """
        function, consts = self.program.source()
        given, args = same_manual_axes((self.arrays, args))
        closed, shape = _trace(function, *args)
        arrays = [
            _matching(const, n, consts, given, function)
            for n, const in enumerate(closed.consts)
        ]
        outs = map(jnp.asarray, eval_jaxpr(closed.jaxpr, arrays, args))
        return jax.tree.unflatten(jax.tree.structure(shape), outs)


def _trace(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """The jaxpr of ``function`` as it is now, and the structure of what it returns."""
    anew = lambda *args: function(*args)  # JAX remembers the jaxpr of a function object
    return jax.make_jaxpr(anew, return_shape=True)(*args)


class Program:
    """What a function computes, compared by its jaxpr, and where it can be traced anew.

    The function and the arrays it captures are held weakly: a compiled program outlives
    the call, and they should not have to. Constants of the host are kept, as the
    function may have made them itself.
    """

    def __init__(self, function: Callable[..., Any], closed: Any, out: Any) -> None:
        self.key = jaxpr_key(closed.jaxpr), jax.tree.structure(out)
        self.hash = hash(self.key)
        self._source = _weakly(function), [_weakly(x) for x in closed.consts]

    def source(self) -> tuple[Callable[..., Any], list[Any]]:
        """The function, and the constants of its first trace."""
        function, consts = self._source
        return function(), [const() for const in consts]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.key == other.key

    def __hash__(self) -> int:
        return self.hash

    def __repr__(self) -> str:
        function = self._source[0]()
        return getattr(function, "__qualname__", repr(function))


def _weakly(x: Any) -> Callable[[], Any]:
    """A reference that does not keep a function or a device's array alive.

    Other objects are kept, and so are callables of which Python has no weak reference.
    """
    if callable(x) or isinstance(x, jax.Array):
        try:
            return weakref.ref(x)
        except TypeError:
            pass
    return lambda: x


def _matching(
    const: Any, n: int, consts: list[Any], arrays: Sequence[Any], function: Any
) -> Any:
    """The array that stands for the ``n``-th constant of a new trace."""
    for first, array in zip(consts, arrays, strict=True):
        if const is first:
            return array
    if n < len(consts) and _equal(const, consts[n]):
        return arrays[n]
    raise ValueError(
        f"{function} captured other arrays on a second look: it makes a constant from "
        "the number of positions, or from something that changes while it is traced. "
        "Index an array by q_idx and kv_idx instead."
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return False
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and np.array_equal(a, b)


def trace_functions(mod: Any, *args: Any) -> Any:
    """``mod`` with a `TracedFunction` for every function in it.

    Args:
        mod: A mask_mod or score_mod, nested or not, or None. Whatever is not one of
            raptax's own values counts as a function, so that state which it holds out
            of JAX's sight is looked at on each call.
        args: What the mod takes: scores if it is a score_mod, and positions, as arrays
            or as shapes.
    """

    def traced(node: Any) -> Any:
        if not _is_function(node):
            return node
        function = node.function if isinstance(node, FunctionMod) else node
        closed, out = _trace(function, *args)
        arrays = tuple(jnp.asarray(const) for const in closed.consts)
        return TracedFunction(Program(function, closed, out), arrays)

    return jax.tree.map(traced, mod, is_leaf=_is_function)


def has_functions(mod: Any) -> bool:
    """Whether `trace_functions` would change anything."""
    return any(map(_is_function, jax.tree.leaves(mod, is_leaf=_is_function)))


def _is_function(node: Any) -> bool:
    return isinstance(node, FunctionMod) or (callable(node) and not is_value(node))


# -------------------------------------------------------------- what a jaxpr computes


def jaxpr_key(jaxpr: core.Jaxpr) -> tuple[Any, ...]:
    """A value that is equal for two jaxprs only if they compute the same.

    Variables are numbered in the order in which they are bound. Literals count with
    their bits, parameters by their own equality, inner jaxprs by their keys. A function
    among the parameters counts by identity, but for the rules of `jax.custom_jvp` and
    `jax.custom_vjp`, which JAX wraps anew at each trace: they count by where they and
    their function were defined.
    """
    number: dict[Any, int] = {}

    def bind(variables: Sequence[Any]) -> tuple[Any, ...]:
        for variable in variables:
            number[variable] = len(number)
        return tuple(variable.aval for variable in variables)

    def read(atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            return atom.aval, np.asarray(atom.val).tobytes()
        return number[atom]

    inputs = bind([*jaxpr.constvars, *jaxpr.invars])
    equations = []
    for eqn in jaxpr.eqns:
        operands = tuple(map(read, eqn.invars))
        equations.append((eqn.primitive, operands, _params_key(eqn), bind(eqn.outvars)))
    outputs = tuple(map(read, jaxpr.outvars))
    return len(jaxpr.constvars), inputs, tuple(equations), outputs


def _params_key(eqn: Any) -> tuple[Any, ...]:
    params = eqn.params.items()
    if not eqn.primitive.name.startswith(("custom_jvp", "custom_vjp")):
        return tuple((name, _param_key(x)) for name, x in params)
    says = core.Jaxpr, core.ClosedJaxpr, int, str
    return tuple(
        (name, _place(x), _param_key(x) if isinstance(x, says) else None)
        for name, x in params
    )


def _place(x: Any) -> str | None:
    """Where a function, or that of a jaxpr, was defined."""
    debug_info = getattr(getattr(x, "jaxpr", x), "debug_info", None)
    return None if debug_info is None else debug_info.func_src_info


@functools.singledispatch
def _param_key(x: Any) -> Any:
    """An equation's parameter as a value that compares and hashes by what it says."""
    try:
        hash(x)
    except TypeError:
        return _Identity(x)
    return x


class _Identity:
    """Equal to itself alone; it keeps ``x``, so that no other takes its place."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.x is other.x

    def __hash__(self) -> int:
        return id(self.x)


@_param_key.register
def _(x: core.Jaxpr) -> Any:
    return jaxpr_key(x)


@_param_key.register
def _(x: core.ClosedJaxpr) -> Any:
    return jaxpr_key(x.jaxpr), tuple(map(_Identity, x.consts))


@_param_key.register(tuple)
@_param_key.register(list)
def _(x: Sequence[Any]) -> Any:
    return tuple(map(_param_key, x))


@_param_key.register
def _(x: np.ndarray) -> Any:
    return x.dtype, x.shape, x.tobytes()
