"""Mods as programs for the native kernels: small codes that C++ runs on rows of scores.

`translate` traces a mod once, on indices of made-up lengths, and writes down what it does
to one score. That is only right if the mod treats every score by itself, so whatever
looks along an axis of positions, or at its length, is declined. What is declined is said
in a sentence, and the plain-JAX kernels take the mod.

Arrays that a mod carries or captures stay arrays: operands of the call, which may be
traced. What a mod computes from arrays alone is computed outside the program, once.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jaxtyping import Array

from .._core.errors import Unsupported
from .._core.pytree import pytree, static
from .._core.types import MaskMod, ScoreMod
from ..mods import apply_mask, apply_score
from .ir import MOST_INSTRUCTIONS, NUMBER, ONE, Code, Range
from .lowering import ELEMENTWISE, IDIOMS, REDUCTIONS, NotLowerable, kind_of
from .passes import tidy
from .symbolic import (
    MOST_ENTRIES,
    MOVES,
    Constant,
    SymbolicArray,
    constant,
    constant_bits,
    entries,
    merged,
    outside,
    readable,
)


@pytree
class ModProgram:
    """A mod, ready to be passed to a native kernel.

    ``code`` has four words to an instruction (``csrc/api/mod_program.h``) and is what
    a kernel is compiled for; ``arrays`` are operands. Two mods that do the same with
    arrays of the same kind have the same code.
    """

    code: tuple[int, ...] = static()
    arrays: list[Array]

    @property
    def words(self) -> np.ndarray:
        """The code as the attribute of an FFI call."""
        return np.array(self.code, np.int32)


NOTHING = ModProgram((), [])
"""No program; kernels take its code as "there is no such mod"."""


def mask_program(mask_mod: MaskMod) -> ModProgram:
    """The program that says which scores count.

    Raises:
        Unsupported: It does what a program cannot say; the sentence names it.
    """
    return _translate(functools.partial(apply_mask, mask_mod), "mask_mod")


def score_program(score_mod: ScoreMod, *, scale: Any = None) -> ModProgram:
    """The program of ``score_mod(scale * x)``. Raises as `mask_program` does.

    A kernel that leaves the scale to the program saves a pass over the scores.
    """

    def change(scores, *at):
        return apply_score(score_mod, scores if scale is None else scale * scores, *at)

    return _translate(change, "score_mod")


def slope_program(score_mod: ScoreMod) -> ModProgram | None:
    """The program of ``d score_mod(x) / dx``; None where that is 1 whatever x is.

    Raises as `mask_program` does.
    """

    def slope(scores, *at):
        change = lambda x: apply_score(score_mod, x, *at)
        return jax.jvp(change, (scores,), (jnp.ones_like(scores),))[1]

    program = _translate(slope, "score_mod")
    return None if program.code == (NUMBER["Constant"], ONE, 0, 0) else program


# ---------------------------------------------------------------------------- translation

# Lengths of b, h, q and k in the two traces: different enough that whatever depends on
# one of them comes out differently.
LENGTHS = ((2, 3, 5, 7), (3, 2, 11, 13))


def _translate(function: Callable[..., Any], kind: str) -> ModProgram:
    try:
        first, second = (_trace(function, kind, lengths) for lengths in LENGTHS)
    except NotLowerable as reason:
        raise Unsupported(f"its {kind} {reason}") from None
    same = first[0] == second[0] and len(first[1]) == len(second[1])
    if not same or not all(map(_alike, first[1], second[1])):
        raise Unsupported(
            f"its {kind} depends on how many positions it is given, which a mod program "
            "cannot say"
        )
    return ModProgram(first[0], [array.value for array in first[1]])


def _alike(a: Constant, b: Constant) -> bool:
    """Do two traces mean the same array?"""
    if a.value is b.value:
        return True
    if a.made and b.made:
        (what, *ins), (like, *others) = a.made, b.made
        return what == like and all(map(_alike, ins, others))
    if any(isinstance(x.value, jax.core.Tracer) for x in (a, b)):
        return False
    return np.array_equal(np.asarray(a.value), np.asarray(b.value))


def _trace(
    function: Callable[..., Any], kind: str, lengths: tuple[int, ...]
) -> tuple[tuple[int, ...], list[Constant]]:
    """The words of a function of indices of these lengths, and its arrays."""
    shapes = [
        tuple(n if i == j else 1 for j, n in enumerate(lengths)) for i in range(4)
    ]
    args = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    if kind == "score_mod":
        args.insert(0, jax.ShapeDtypeStruct(lengths, jnp.float32))
    try:
        closed = jax.make_jaxpr(function)(*args)
    except (TypeError, ValueError, IndexError) as error:  # shapes that do not fit
        raise NotLowerable(
            f"could not be traced on positions of other lengths "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        ) from error
    code = Code()
    positions = map(code.position, ("Sequence", "Head", "Query", "Key"))
    inputs = [
        _input(value, tuple(name * (name == axis) for axis in "bhqk"), shape, jnp.int32)
        for value, name, shape in zip(positions, "bhqk", shapes, strict=True)
    ]
    if kind == "score_mod":
        inputs.insert(
            0, _input(code.position("Score"), tuple("bhqk"), lengths, jnp.float32)
        )
    lowered = JaxprLowering(code)
    (out,) = lowered.run(closed.jaxpr, closed.consts, inputs)
    code, answer = tidy(code, lowered.answer(out, lengths))
    words, arrays = code.words(answer)
    if len(words) > 4 * MOST_INSTRUCTIONS:
        raise NotLowerable(f"takes more than {MOST_INSTRUCTIONS} instructions")
    return words, arrays


def _input(value: int, axes: tuple[str, ...], shape: Any, dtype: Any) -> SymbolicArray:
    return SymbolicArray(
        np.full((1, 1, 1, 1), value, object), axes, shape, np.dtype(dtype)
    )


class JaxprLowering:
    """A jaxpr's equations, written into a `Code` one by one."""

    def __init__(self, code: Code) -> None:
        self.code = code
        # By the identity of an array, which is kept so that it stays the only one.
        self.few: dict[int, tuple[Any, Any]] = {}
        self.ready: dict[int, tuple[Any, Constant, Range]] = {}

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        held = [constant(x, not isinstance(x, jax.Array)) for x in consts]
        values = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], [*held, *args], strict=True)
        )

        def read(atom: Any) -> Any:
            if isinstance(atom, core.Literal):
                aval: Any = atom.aval
                return constant(np.asarray(atom.val, aval.dtype), True)
            return values[atom]

        for eqn in jaxpr.eqns:
            outs = self.step(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def step(self, eqn: Any, ins: list[Any]) -> list[Any]:
        """The results of one operation."""
        name = eqn.primitive.name
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        if name in CALLS and inner is not None:
            fixed = all(isinstance(x, Constant) for x in ins)
            if not fixed and (rule := idiom(eqn, inner)) is not None:
                return [self.elementwise(eqn, ins, rule)]
            jaxpr = getattr(inner, "jaxpr", inner)
            return self.run(jaxpr, getattr(inner, "consts", ()), ins)
        if all(isinstance(x, Constant) for x in ins):
            return outside(eqn, ins)
        if name in ELEMENTWISE:
            return [self.elementwise(eqn, ins, ELEMENTWISE[name])]
        if name in MOVES:
            formulas = [self.symbolic(x) for x in ins]
            return [MOVES[name](eqn, *formulas)]
        if name in REDUCTIONS:
            return [self.reduce(eqn, ins[0], REDUCTIONS[name])]
        if name == "gather":
            return [self.gather(eqn, *ins)]
        raise NotLowerable(f"uses {name}, which a mod program cannot say")

    # ---------------------------------------------------------------- one score each

    def elementwise(
        self, eqn: Any, ins: list[Any], rule: Callable[..., Any]
    ) -> SymbolicArray:
        """Arrays of one shape, and scalars, entry by entry."""
        aval = eqn.outvars[0].aval
        formulas = [self.symbolic(x) for x in ins]
        axes = merged(eqn, [f for f in formulas if f.shape], len(aval.shape))
        grids = np.broadcast_arrays(*(f.values for f in formulas))
        dtypes = [f.dtype for f in formulas]
        values = np.empty(grids[0].shape, object)
        for place in np.ndindex(values.shape):
            operands = [int(grid[place]) for grid in grids]
            values[place] = rule(self.code, eqn, dtypes, *operands)
        return SymbolicArray(values, axes, aval.shape, np.dtype(aval.dtype))

    def reduce(
        self, eqn: Any, x: SymbolicArray, rule: Callable[..., Any]
    ) -> SymbolicArray:
        """All entries along axes that no position runs along, taken together."""
        along = tuple(eqn.params["axes"])
        if any(x.axes[d] or x.values.shape[d] != x.shape[d] for d in along):
            raise NotLowerable(
                f"uses {eqn.primitive.name} along an axis of positions, which a mod "
                "program cannot say"
            )
        kept = [d for d in range(len(x.shape)) if d not in along]
        rows = x.values.transpose([*kept, *along])
        rows = rows.reshape(*(rows.shape[: len(kept)]), -1)
        values = np.empty(rows.shape[:-1], object)
        for place in np.ndindex(values.shape):
            if not rows.shape[-1]:
                raise NotLowerable(f"uses {eqn.primitive.name} of nothing")
            step = lambda a, b: rule(self.code, eqn, [x.dtype] * 2, a, b)
            values[place] = functools.reduce(step, rows[place])
        aval = eqn.outvars[0].aval
        axes = tuple(x.axes[d] for d in kept)
        return SymbolicArray(values, axes, aval.shape, np.dtype(aval.dtype))

    def symbolic(self, x: Any) -> SymbolicArray:
        """A known array as formulas: a constant, or entries of an array."""
        if isinstance(x, SymbolicArray):
            return x
        shape, dtype = np.shape(x.value), np.dtype(x.value.dtype)
        few = self.compact(x)
        if few.size > MOST_ENTRIES:
            raise NotLowerable(
                f"combines an array of shape {shape} with positions otherwise than by "
                "indexing"
            )
        kind, values = kind_of(dtype), np.empty(few.shape, object)
        if x.written:
            for place in np.ndindex(few.shape):
                bits = constant_bits(np.asarray(few[place]), kind)
                values[place] = self.code.constant(bits)
            return SymbolicArray(values, ("",) * len(shape), shape, dtype)
        x = x._replace(value=few)
        for n, place in enumerate(np.ndindex(few.shape)):
            values[place] = self.entry_of(x, self.code.constant(n))
        return SymbolicArray(values, ("",) * len(shape), shape, dtype)

    def compact(self, x: Constant) -> Any:
        """The entries that are not equal for certain."""
        corner = tuple(slice(0, 1) if same else slice(None) for same in x.spread)
        if all(n == 1 for n, same in zip(x.value.shape, x.spread, strict=True) if same):
            return x.value
        if id(x.value) not in self.few:
            self.few[id(x.value)] = x.value, x.value[corner]
        return self.few[id(x.value)][1]

    def entry_of(self, x: Constant, index: int) -> int:
        """An entry of an array, counted through all its axes."""
        if id(x.value) not in self.ready:
            ready = x._replace(value=readable(x.value), made=("read", x))
            self.ready[id(x.value)] = x.value, ready, entries(x.value)
        _, ready, bounds = self.ready[id(x.value)]
        return self.code.gather(ready, index, bounds)

    def gather(self, eqn: Any, array: Any, index: Any) -> SymbolicArray:
        """``array[i, j, ...]``, an entry or a few for each index."""
        if not isinstance(array, Constant):
            raise NotLowerable("indexes what it computed from positions")
        dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        if dims.operand_batching_dims or index.axes[-1]:
            raise NotLowerable("uses a batched gather, which a mod program cannot say")
        shape = np.shape(array.value)
        if not all(isinstance(n, int) for n in shape):
            raise NotLowerable(f"indexes an array of symbolic shape {shape}")
        inner = [d for d in range(len(shape)) if d not in dims.collapsed_slice_dims]
        extra = tuple(sizes[d] for d in inner)
        if math.prod(extra) > MOST_ENTRIES or math.prod(shape) > 2**31 - 1:
            raise NotLowerable("gathers more than single entries of an array")
        columns = np.broadcast_to(
            index.values, (*index.values.shape[:-1], len(dims.start_index_map))
        )
        values = np.empty((*columns.shape[:-1], *extra), object)
        for place in np.ndindex(columns.shape[:-1]):
            starts = dict(zip(dims.start_index_map, columns[place], strict=True))
            for offset in np.ndindex(extra):
                at = dict(zip(inner, offset, strict=True))
                values[place + offset] = self.entry(eqn, array, shape, starts, at)
        batch = [d for d in range(values.ndim) if d not in dims.offset_dims]
        order = np.argsort([*batch, *dims.offset_dims])
        axes = (*index.axes[:-1], *[""] * len(extra))
        aval = eqn.outvars[0].aval
        return SymbolicArray(
            values.transpose(order),
            tuple(axes[d] for d in order),
            aval.shape,
            np.dtype(aval.dtype),
        )

    def entry(
        self, eqn: Any, array: Constant, shape: Any, starts: Any, offsets: Any
    ) -> int:
        """One entry: where it lies in the array, and what stands for one that is not."""
        code, sizes = self.code, eqn.params["slice_sizes"]
        at, inside = code.constant(0), code.constant(-1)
        for d, length in enumerate(shape):
            stride = math.prod(shape[d + 1 :])
            place = code.constant(offsets.get(d, 0))
            if d in starts:
                zero, last = code.constant(0), code.constant(length - sizes[d])
                start = code.do("IntMin", code.do("IntMax", starts[d], zero), last)
                inside = code.do("And", inside, code.do("IntEqual", start, starts[d]))
                place = code.do("IntAdd", place, start)
            step = code.do("IntMul", place, code.constant(stride))
            at = code.do("IntAdd", at, step)
        found = self.entry_of(array, at)
        if eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
            return found
        dtype = np.dtype(eqn.outvars[0].aval.dtype)
        fill = np.asarray(eqn.params["fill_value"], dtype)
        filled = code.constant(constant_bits(fill, kind_of(dtype)))
        return code.do("Select", inside, found, filled)

    def answer(self, out: Any, lengths: tuple[int, ...]) -> int:
        """The one value that stands for every score."""
        out = self.symbolic(out)
        names = "bhqk"[4 - len(out.axes) :]
        sound = len(out.axes) <= 4 and out.values.size == 1
        if not sound or any(
            a not in ("", n) for a, n in zip(out.axes, names, strict=True)
        ):
            raise NotLowerable("moves scores or positions from one axis to another")
        return int(out.values.reshape(()).item())


# Operations that run an inner jaxpr, which their parameters hold under one of two names.
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
CALLS |= {"custom_jvp_call", "custom_vjp_call"}


def idiom(eqn: Any, inner: Any) -> Callable[..., Any] | None:
    """The rule of a function of jax.numpy that is simpler as a whole."""
    if (name := eqn.params.get("name")) not in IDIOMS:
        return None
    function, rule = IDIOMS[name]
    avals = [atom.aval for atom in eqn.invars]
    if any(aval.dtype != jnp.int32 for aval in avals):
        return None
    like = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in avals
    ]
    # Word for word that function's, and not a namesake's.
    theirs = jax.make_jaxpr(function)(*like).eqns[0].params.get("jaxpr")
    return rule if str(theirs) == str(inner) else None
