"""Interval analysis: bounds of what a jaxpr returns for intervals of arguments.

`analyse` walks a jaxpr once, with an `Interval` of arrays in place of each array: every
operation becomes the pair of operations that bound it. Arrays of bounds have the shape
of the values they bound, so a caller that wants many ranges maps over them with
``jax.vmap``. Moore 1966, *Interval Analysis*.

The promise: a value always lies within its bounds. Bounds may be wider than needed,
because operands are taken to vary independently; comparisons of sums and differences of
the arguments, division and remainder by a number, and ``array[argument]`` come out
tight. An operation without a rule here gives `UNKNOWN`, never a guess, and what depends
on one says so in ``unsure``. Whole numbers that may overflow are bounded by their type,
and floats are rounded outwards, so that it does not matter how XLA fuses them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from .._core.pytree import pytree, static


@pytree
class Interval:
    """All values from ``lo`` to ``hi``; one known value where they are one object.

    For booleans ``lo`` says "is certainly true" and ``hi`` "may be true". ``unsure``
    bounds may be wide for want of a rule. ``parts`` are what a concatenation was made
    of, which are the columns when it is an index.
    """

    lo: Any
    hi: Any
    unsure: bool = static(default=False)
    parts: tuple[Any, ...] = ()

    @property
    def known(self) -> bool:
        return self.lo is not None and self.lo is self.hi


UNKNOWN = Interval(None, None, unsure=True)


def exactly(value: Any) -> Interval:
    """The interval of one value."""
    return Interval(value, value)


def analyse(
    closed: Any, args: Sequence[Interval], tiles: tuple[int, ...] = ()
) -> list[Interval]:
    """Bounds of what a closed jaxpr returns.

    ``tiles`` are lengths of ranges that arguments run over. A range of such a length
    reads tight bounds from an array, if it starts at a multiple of the length, crosses
    one, or ends with the array.
    """
    return _run(closed.jaxpr, closed.consts, args, tiles)


def _run(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Interval], tiles: tuple[int, ...]
) -> list[Interval]:
    known = [exactly(jnp.asarray(const)) for const in consts]
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*known, *args], strict=True))

    def read(atom: Any) -> Interval:
        if isinstance(atom, core.Literal):
            aval: Any = atom.aval
            return exactly(jnp.asarray(atom.val, aval.dtype))
        return values[atom]

    for eqn in jaxpr.eqns:
        ins = [read(atom) for atom in eqn.invars]
        values.update(zip(eqn.outvars, _step(eqn, ins, tiles), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _step(eqn: Any, ins: list[Interval], tiles: tuple[int, ...]) -> list[Interval]:
    """Bounds of one operation's results."""
    name, unknown = eqn.primitive.name, [UNKNOWN] * len(eqn.outvars)
    if name in CALLS:
        return _call(eqn, ins, tiles) or unknown
    if all(x.known for x in ins):
        out = eqn.primitive.bind(*(x.lo for x in ins), **eqn.params)
        return [exactly(x) for x in (out if eqn.primitive.multiple_results else [out])]
    unsure = any(x.unsure for x in ins)
    if name in LOGIC and eqn.outvars[0].aval.dtype == bool:  # one operand may decide
        ins = [
            _anything(atom.aval) if x.lo is None else x
            for atom, x in zip(eqn.invars, ins, strict=True)
        ]
    if any(x.lo is None for x in ins):
        return unknown
    if name == "gather":
        out = _gather(eqn, *ins, tiles=tiles)
    elif name in RULES:
        out = RULES[name](eqn, *ins)
    else:
        return unknown
    return [Interval(out.lo, out.hi, unsure or out.unsure, out.parts)]


# Operations that run an inner jaxpr, which their parameters hold under one of two names.
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
CALLS |= {"custom_jvp_call", "custom_vjp_call"}
LOGIC = {"and", "or", "select_n"}


def _call(eqn: Any, ins: list[Interval], tiles: tuple[int, ...]) -> Any:
    inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
    if (name := eqn.params.get("name")) in IDIOMS and not all(x.known for x in ins):
        function, rule = IDIOMS[name]
        dtype = eqn.outvars[0].aval.dtype  # a literal may come in another
        same = [exactly(x.lo.astype(dtype)) if x.known else x for x in ins]
        plain = all(x.lo is not None and x.lo.dtype == dtype for x in same)
        if plain and _reads_as(eqn, inner, function):
            out = rule(eqn, *same)
            return [Interval(out.lo, out.hi, out.unsure or any(x.unsure for x in ins))]
    jaxpr = getattr(inner, "jaxpr", inner)
    if jaxpr is None or len(jaxpr.invars) != len(ins):
        return None
    return _run(jaxpr, getattr(inner, "consts", ()), ins, tiles)


def _reads_as(eqn: Any, inner: Any, function: Callable[..., Any]) -> bool:
    """Is the inner jaxpr word for word that of ``function``, and not a namesake?"""
    like = [
        jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype, weak_type=a.aval.weak_type)
        for a in eqn.invars
    ]
    theirs = jax.make_jaxpr(function)(*like).eqns[0].params.get("jaxpr")
    return str(theirs) == str(inner)


def _anything(aval: Any) -> Interval:
    """Any value at all, for want of a rule."""
    lo, hi = _limits(aval.dtype)
    return Interval(jnp.full(aval.shape, lo), jnp.full(aval.shape, hi), unsure=True)


def _limits(dtype: Any) -> tuple[Any, Any]:
    """Bounds of any value. NaN for floats: nothing compares with it for certain."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return jnp.asarray(False), jnp.asarray(True)
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return jnp.asarray(info.min, dtype), jnp.asarray(info.max, dtype)
    return (jnp.asarray(jnp.nan, dtype),) * 2


# --------------------------------------------------------------------------- arithmetic


def _ends(function: Callable[..., Any], *xs: Interval) -> Interval:
    """Bounds of a function that grows with every argument, or moves values about."""
    if all(x.known for x in xs):
        return exactly(function(*(x.lo for x in xs)))
    return Interval(function(*(x.lo for x in xs)), function(*(x.hi for x in xs)))


def _where(sound: Any, lo: Any, hi: Any) -> Interval:
    """The bounds where they are ``sound``, and those of any value elsewhere."""
    least, most = _limits(lo.dtype)
    return Interval(jnp.where(sound, lo, least), jnp.where(sound, hi, most))


def _increasing(eqn: Any, *xs: Interval) -> Interval:
    return _ends(functools.partial(eqn.primitive.bind, **eqn.params), *xs)


def _for_bools(rule: Callable[..., Interval]) -> Callable[..., Interval]:
    def checked(eqn: Any, *xs: Interval) -> Interval:
        return rule(eqn, *xs) if eqn.invars[0].aval.dtype == bool else UNKNOWN

    return checked


def _corners(
    function: Callable[..., Any], pairs: list[tuple[Any, Any]], sound: Any = True
) -> Interval:
    """Bounds of ``function``, which is least and greatest at two of ``pairs``.

    Where ``sound`` is false, or a whole number might overflow, nothing is known.
    """
    dtype = pairs[0][0].dtype
    ends = [function(x, y) for x, y in pairs]
    lo, hi = functools.reduce(lax.min, ends), functools.reduce(lax.max, ends)
    if dtype in (jnp.float32, jnp.float64):
        # Half a unit covers rounding, one covers a fused operation that did not round.
        lo = jnp.nextafter(lo, jnp.asarray(-jnp.inf, dtype))
        hi = jnp.nextafter(hi, jnp.asarray(jnp.inf, dtype))
    elif jnp.issubdtype(dtype, jnp.signedinteger):
        # float32 errs by 2**-24 of an operand, of which there are two.
        safe = float(jnp.iinfo(dtype).max) * (1 - 2**-20)
        for x, y in pairs:
            guess = function(x.astype(jnp.float32), y.astype(jnp.float32))
            sound &= jnp.abs(guess) <= safe
    else:
        return UNKNOWN
    return _where(sound, lo, hi)


def _add(eqn: Any, a: Interval, b: Interval) -> Interval:
    return _corners(lax.add, [(a.lo, b.lo), (a.hi, b.hi)])


def _sub(eqn: Any, a: Interval, b: Interval) -> Interval:
    return _corners(lax.sub, [(a.lo, b.hi), (a.hi, b.lo)])


def _products(a: Interval, b: Interval) -> list[tuple[Any, Any]]:
    return [(x, y) for x in (a.lo, a.hi) for y in (b.lo, b.hi)]


def _mul(eqn: Any, a: Interval, b: Interval) -> Interval:
    if eqn.invars[0] is eqn.invars[1]:
        return _square(eqn, a)
    return _corners(lax.mul, _products(a, b))


def _square(eqn: Any, a: Interval) -> Interval:
    size = _abs(eqn, a)
    if size.lo is None:
        return UNKNOWN
    return _corners(lax.mul, [(size.lo, size.lo), (size.hi, size.hi)])


def _power(eqn: Any, a: Interval) -> Interval:
    return _square(eqn, a) if eqn.params["y"] == 2 else UNKNOWN


def _zero_less(eqn: Any, a: Interval) -> Interval:
    return _sub(eqn, exactly(jnp.zeros_like(a.lo)), a)


def _abs(eqn: Any, a: Interval) -> Interval:
    minus = _zero_less(eqn, a)
    if minus.lo is None:
        return UNKNOWN
    lo = lax.max(lax.max(a.lo, minus.lo), jnp.zeros_like(a.lo))
    hi = lax.max(a.hi, minus.hi)
    if jnp.issubdtype(lo.dtype, jnp.floating):
        return Interval(lo, hi)
    return _where(a.lo > jnp.iinfo(lo.dtype).min, lo, hi)  # abs(min) is min


def _div(eqn: Any, a: Interval, b: Interval) -> Interval:
    """Division, rounded towards zero if whole: monotone while the divisor has a sign."""
    return _corners(lax.div, _products(a, b), (b.lo > 0) | (b.hi < 0))


def _floor_divide(eqn: Any, a: Interval, b: Interval) -> Interval:
    if not jnp.issubdtype(a.lo.dtype, jnp.signedinteger):
        return UNKNOWN
    return _corners(jnp.floor_divide, _products(a, b), (b.lo > 0) | (b.hi < 0))


def _rem(eqn: Any, a: Interval, b: Interval) -> Interval:
    """What division towards zero leaves: it has the sign of ``a``."""
    if not jnp.issubdtype(a.lo.dtype, jnp.signedinteger):
        return UNKNOWN
    n = lax.max(b.lo, jnp.ones_like(b.lo))
    climbs = (lax.div(a.lo, n) == lax.div(a.hi, n)) & ((a.lo >= 0) | (a.hi <= 0))
    lo = jnp.where(climbs, lax.rem(a.lo, n), jnp.where(a.lo < 0, 1 - n, 0))
    hi = jnp.where(climbs, lax.rem(a.hi, n), jnp.where(a.hi > 0, n - 1, 0))
    return _where((b.lo > 0) & (b.lo == b.hi), lo, hi)


def _remainder(eqn: Any, a: Interval, b: Interval) -> Interval:
    """What division downwards leaves: it has the sign of ``b``."""
    if not jnp.issubdtype(a.lo.dtype, jnp.signedinteger):
        return UNKNOWN
    n = lax.max(b.lo, jnp.ones_like(b.lo))
    climbs = jnp.floor_divide(a.lo, n) == jnp.floor_divide(a.hi, n)
    lo = jnp.where(climbs, jnp.remainder(a.lo, n), 0)
    hi = jnp.where(climbs, jnp.remainder(a.hi, n), n - 1)
    return _where((b.lo > 0) & (b.lo == b.hi), lo, hi)


def _shift_left(eqn: Any, a: Interval, by: Interval) -> Interval:
    one = jnp.ones_like(by.lo)
    factors = Interval(lax.shift_left(one, by.lo), lax.shift_left(one, by.hi))
    bits = jnp.iinfo(a.lo.dtype).bits
    sound = (by.lo >= 0) & (by.hi < bits - 1)
    return _corners(lax.mul, _products(a, factors), sound)


def _shift_right(eqn: Any, a: Interval, by: Interval) -> Interval:
    if not jnp.issubdtype(a.lo.dtype, jnp.signedinteger):
        return UNKNOWN
    sound = (by.lo >= 0) & (by.hi < jnp.iinfo(a.lo.dtype).bits)
    if eqn.primitive.name == "shift_right_logical":  # the sign would become a large bit
        sound &= a.lo >= 0
    ends = [lax.shift_right_arithmetic(x, y) for x, y in _products(a, by)]
    lo, hi = functools.reduce(lax.min, ends), functools.reduce(lax.max, ends)
    return _where(sound, lo, hi)


def _convert(eqn: Any, a: Interval) -> Interval:
    old, new = eqn.invars[0].aval.dtype, eqn.params["new_dtype"]
    if jnp.issubdtype(new, jnp.bool_):
        return COMPARISONS["ne"](eqn, a, exactly(jnp.zeros_like(a.lo)))
    whole = not jnp.issubdtype(old, jnp.inexact)
    if old in (new, bool) or (whole and new in (jnp.float32, jnp.float64)):
        return _increasing(eqn, a)
    if not whole or not jnp.issubdtype(new, jnp.integer):
        return UNKNOWN
    lo, hi = a.lo.astype(new), a.hi.astype(new)
    fits = (lo.astype(old) == a.lo) & (hi.astype(old) == a.hi)
    fits &= ((lo < 0) == (a.lo < 0)) & ((hi < 0) == (a.hi < 0))
    return _where(fits, lo, hi)


# -------------------------------------------------------------------------------- logic


def _comparison(yes: Callable[..., Any], no: Callable[..., Any]) -> Any:
    """The rule of a comparison from when it is certainly true and certainly false."""

    def rule(eqn: Any, a: Interval, b: Interval) -> Interval:
        return Interval(yes(a, b), ~no(a, b))

    return rule


def _same(a: Interval, b: Interval) -> Any:
    return (a.lo == a.hi) & (b.lo == b.hi) & (a.lo == b.lo)


def _apart(a: Interval, b: Interval) -> Any:
    return (a.hi < b.lo) | (b.hi < a.lo)


COMPARISONS = {
    "lt": _comparison(lambda a, b: a.hi < b.lo, lambda a, b: a.lo >= b.hi),
    "le": _comparison(lambda a, b: a.hi <= b.lo, lambda a, b: a.lo > b.hi),
    "gt": _comparison(lambda a, b: a.lo > b.hi, lambda a, b: a.hi <= b.lo),
    "ge": _comparison(lambda a, b: a.lo >= b.hi, lambda a, b: a.hi < b.lo),
    "eq": _comparison(_same, _apart),
    "ne": _comparison(_apart, _same),
}


def _not(eqn: Any, a: Interval) -> Interval:
    return Interval(~a.hi, ~a.lo)


def _select(eqn: Any, which: Interval, *cases: Interval) -> Interval:
    if which.known:
        return _ends(functools.partial(lax.select_n, which.lo), *cases)
    if which.lo.dtype != bool:
        return UNKNOWN
    no, yes = cases
    either = which.hi & ~which.lo
    pick = functools.partial(lax.select_n, which.lo)
    return Interval(
        lax.select_n(either, pick(no.lo, yes.lo), lax.min(no.lo, yes.lo)),
        lax.select_n(either, pick(no.hi, yes.hi), lax.max(no.hi, yes.hi)),
    )


# ------------------------------------------------------------------------------- arrays


def _concatenate(eqn: Any, *xs: Interval) -> Interval:
    out, axis = _increasing(eqn, *xs), eqn.params["dimension"]
    last = axis == eqn.outvars[0].aval.ndim - 1
    if last and all(atom.aval.shape[axis] == 1 for atom in eqn.invars):
        return Interval(out.lo, out.hi, parts=xs)
    return out


def _gather(eqn: Any, x: Interval, index: Interval, *, tiles: tuple[int, ...]) -> Any:
    """``x[i, j, ...]`` of a known array, with at most one index that ranges."""
    dims, axes = eqn.params["dimension_numbers"], tuple(range(x.lo.ndim))
    one_by_one = (
        dims.collapsed_slice_dims == axes == tuple(sorted(dims.start_index_map))
    )
    columns = index.parts or ((index,) if index.lo.shape[-1] == 1 else ())
    ranging = [axis for axis in axes[: len(columns)] if not columns[axis].known]
    if not (
        x.known
        and x.lo.size
        and one_by_one
        and len(columns) == len(axes)
        and len(ranging) == 1
    ):
        return UNKNOWN
    by_axis = dict(zip(dims.start_index_map, columns, strict=True))
    moving = dims.start_index_map[ranging[0]]
    rest = [axis for axis in axes if axis != moving]
    inside, at = jnp.asarray(True), []
    for axis in (*rest, moving):
        ends, size = by_axis[axis], x.lo.shape[axis]
        lo, hi = ends.lo[..., 0], ends.hi[..., 0]
        inside &= (lo >= 0) & (hi < size)
        at.append((jnp.clip(lo, 0, size - 1), jnp.clip(hi, 0, size - 1)))
    leading = tuple(lo for lo, _ in at[:-1])
    out = _extremes(x.lo.transpose(*rest, moving), leading, *at[-1], tiles)
    clips = lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return out if eqn.params["mode"] in clips else _where(inside, out.lo, out.hi)


def _extremes(
    x: Any, leading: tuple[Any, ...], lo: Any, hi: Any, tiles: tuple[int, ...]
) -> Interval:
    """Least and greatest of ``x[leading, lo : hi + 1]``."""
    if x.dtype == bool:
        whole = _extremes(x.astype(jnp.int8), leading, lo, hi, tiles)
        return Interval(whole.lo > 0, whole.hi > 0)
    low, high = x.min(-1)[leading], x.max(-1)[leading]
    for size in {min(size, x.shape[-1]) for size in tiles}:
        near, least, most = _within_two_blocks(x, leading, lo, hi, size)
        low = jnp.where(near, lax.max(low, least), low)
        high = jnp.where(near, lax.min(high, most), high)
    here = x[(*leading, lo)]
    return Interval(jnp.where(lo == hi, here, low), jnp.where(lo == hi, here, high))


def _within_two_blocks(
    x: Any, leading: tuple[Any, ...], lo: Any, hi: Any, size: int
) -> tuple[Any, Any, Any]:
    """Where a range lies within two neighbouring blocks, and then its extremes.

    Running extremes from both ends of every block take O(S) once; a range that leaves
    its block has its extremes where it starts and ends. van Herk 1992, Gil and Werman
    1993. Inside one block both are of ranges that hold ours, so the tighter will do; it
    is exact when the range starts or ends with the block.
    """
    pad = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    padded = jnp.pad(x, pad, mode="edge")
    blocks = padded.reshape(*x.shape[:-1], -1, size)

    def ends(running: Callable[..., Any]) -> tuple[Any, Any]:
        onwards = running(blocks, blocks.ndim - 1, reverse=True).reshape(padded.shape)
        so_far = running(blocks, blocks.ndim - 1).reshape(padded.shape)
        return onwards[(*leading, lo)], so_far[(*leading, hi)]

    steps = hi // size - lo // size
    lows, highs = ends(lax.cummin), ends(lax.cummax)
    least = jnp.where(steps == 0, lax.max(*lows), lax.min(*lows))
    most = jnp.where(steps == 0, lax.min(*highs), lax.max(*highs))
    return steps <= 1, least, most


INCREASING = "max min sign floor ceil clamp reduce_max reduce_min reduce_and reduce_or"
MOVING = "broadcast_in_dim reshape squeeze transpose slice rev stack copy copy_p"

RULES: dict[str, Callable[..., Interval]] = {
    **dict.fromkeys((INCREASING + " " + MOVING).split(), _increasing),
    **COMPARISONS,
    "concatenate": _concatenate,
    "and": _for_bools(_increasing),
    "or": _for_bools(_increasing),
    "not": _for_bools(_not),
    "xor": _for_bools(COMPARISONS["ne"]),
    "select_n": _select,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "square": _square,
    "integer_pow": _power,
    "neg": _zero_less,
    "abs": _abs,
    "div": _div,
    "rem": _rem,
    "shift_left": _shift_left,
    "shift_right_arithmetic": _shift_right,
    "shift_right_logical": _shift_right,
    "convert_element_type": _convert,
}

# Functions of jax.numpy that are tighter as a whole than step by step.
IDIOMS: dict[Any, tuple[Callable[..., Any], Callable[..., Interval]]] = {
    "floor_divide": (jnp.floor_divide, _floor_divide),
    "remainder": (jnp.remainder, _remainder),
}
