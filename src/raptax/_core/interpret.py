"""Running a jaxpr equation by equation, with another meaning for some."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core


def interpret(
    jaxpr: core.Jaxpr, args: Sequence[Any], step: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """What ``jaxpr`` returns where ``step(eqn, ins)`` says what each equation does.

    ``args`` are its constants and then its arguments.
    """
    values: dict[Any, Any] = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True)
    )

    def read(atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            aval: Any = atom.aval
            return jnp.asarray(atom.val, aval.dtype)
        return values[atom]

    for eqn in jaxpr.eqns:
        outs = step(eqn, [read(atom) for atom in eqn.invars])
        values.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def bind(eqn: Any, ins: Sequence[Any]) -> list[Any]:
    """The results of one equation of a jaxpr for these operands."""
    outs = eqn.primitive.bind(*ins, **eqn.primitive.get_bind_params(eqn.params))
    return list(outs) if eqn.primitive.multiple_results else [outs]
