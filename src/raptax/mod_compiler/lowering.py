"""Lowering rules: the instructions of mod programs for each JAX operation."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from .ir import Code


class NotLowerable(Exception):
    """What a mod does that a program cannot say: the end of a sentence about it."""


def small(dtype: Any) -> bool:
    """Whole numbers of fewer bits than a value has."""
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 32


def kind_of(dtype: Any) -> str:
    """What holds numbers of a dtype: float, int, uint or bool."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return "bool"
    if dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        return "float"
    if dtype == np.uint32:
        return "uint"
    if dtype == np.int32 or small(dtype):
        return "int"
    raise NotLowerable(f"computes in {dtype.name}, which a mod program cannot")


Rule = Callable[..., int]


def _full_width(dtype: np.dtype) -> None:
    """Declines arithmetic that would have to round or wrap to a narrow type."""
    if small(dtype) or dtype in (jnp.bfloat16, jnp.float16):
        raise NotLowerable(f"computes in {dtype.name}, which a mod program cannot")


def _by_kind(
    floats: str | None, ints: str | None, bools: str | None = None, narrow: bool = False
) -> Rule:
    """A rule that is one operation for each kind of number.

    ``narrow`` says that the result of narrow numbers is one of them.
    """

    def rule(code: Code, eqn: Any, dtypes: list[np.dtype], *operands: int) -> int:
        kind = kind_of(dtypes[0])
        name = {"float": floats, "int": ints, "uint": None, "bool": bools}[kind]
        if kind == "uint" and (ints in SAME_BITS or _no_sign(code, *operands)):
            name = ints
        if name is None:
            raise NotLowerable(
                f"uses {eqn.primitive.name} of {dtypes[0].name}, which a mod program "
                "cannot say"
            )
        if not narrow:
            _full_width(dtypes[0])
        return code.do(name, *operands)

    return rule


# Operations on bits that do not care whether a number has a sign.
SAME_BITS = {"IntAdd", "IntSub", "IntMul", "And", "Or", "Xor", "Not", "ShiftLeft"}
SAME_BITS |= {"ShiftRightLogical"}


def _no_sign(code: Code, *values: int) -> bool:
    """Whether words are numbers that an int32 holds as well."""
    return all(code.nodes[value].range[0] >= 0 for value in values)


def _compare(
    floats: str, ints: str, swapped: bool = False, negated: bool = False
) -> Rule:
    def rule(code: Code, eqn: Any, dtypes: list[np.dtype], a: int, b: int) -> int:
        kind = kind_of(dtypes[0])
        if swapped:
            a, b = b, a
        if kind == "float":
            return code.do(floats, a, b)
        if kind == "uint":
            sign = code.constant(-(2**31))
            a, b = code.do("Xor", a, sign), code.do("Xor", b, sign)
        if kind == "bool" and ints in ("IntLess", "IntLessEqual"):
            a, b = b, a  # true is -1
        return code.do(ints, a, b)

    return rule


def _convert(code: Code, eqn: Any, dtypes: list[np.dtype], a: int) -> int:
    old, new = dtypes[0], np.dtype(eqn.params["new_dtype"])
    return convert(code, old, new, a)


def convert(code: Code, old: np.dtype, new: np.dtype, a: int) -> int:
    """A value as a number of another dtype."""
    before, after = kind_of(old), kind_of(new)
    if old == new:
        return a
    if after == "bool":
        zero = code.constant(0)
        return code.do("NotEqual" if before == "float" else "IntNotEqual", a, zero)
    if before == "bool":  # -1 is true: its bits and those of 1
        one = code.number(1.0) if after == "float" else code.constant(1)
        return code.do("And", a, one)
    if after == "float":
        narrow = new != jnp.float32
        if narrow or (before == "uint" and not _no_sign(code, a)):
            raise NotLowerable(
                f"converts {old.name} to {new.name}, which a mod program cannot"
            )
        return a if before == "float" else code.do("ToFloat", a)
    if before == "float":
        if new != np.int32:
            raise NotLowerable(
                f"converts {old.name} to {new.name}, which a mod program cannot"
            )
        return code.do("ToInt", a)
    if small(new):
        info, (lo, hi) = jnp.iinfo(new), code.nodes[a].range
        if before == "uint" or lo < info.min or hi > info.max:
            raise NotLowerable(
                f"converts {old.name} to {new.name}, which a mod program cannot"
            )
    return a


def _bitcast(code: Code, eqn: Any, dtypes: list[np.dtype], a: int) -> int:
    new = np.dtype(eqn.params["new_dtype"])
    if any(d not in (np.float32, np.int32, np.uint32) for d in (dtypes[0], new)):
        raise NotLowerable(
            f"uses the bits of {dtypes[0].name}, which a mod program cannot"
        )
    return a


def _select(
    code: Code, eqn: Any, dtypes: list[np.dtype], which: int, *cases: int
) -> int:
    if kind_of(dtypes[0]) == "bool":
        return code.do("Select", which, *reversed(cases))
    out = cases[-1]
    for number in reversed(range(len(cases) - 1)):
        chosen = code.do("IntLessEqual", which, code.constant(number))
        out = code.do("Select", chosen, cases[number], out)
    return out


def _clamp(
    code: Code, eqn: Any, dtypes: list[np.dtype], lo: int, x: int, hi: int
) -> int:
    kind = kind_of(dtypes[1])
    if kind not in ("float", "int"):
        raise NotLowerable(
            f"uses clamp of {dtypes[1].name}, which a mod program cannot say"
        )
    least, most = ("Min", "Max") if kind == "float" else ("IntMin", "IntMax")
    return code.do(least, code.do(most, x, lo), hi)


def _power(code: Code, x: int, n: int) -> int:
    """``x ** n`` for a whole ``n >= 1``, by squaring."""
    out = None
    while n:
        if n & 1:
            out = x if out is None else code.do("Mul", out, x)
        n >>= 1
        if n:
            x = code.do("Mul", x, x)
    assert out is not None
    return out


def _integer_pow(code: Code, eqn: Any, dtypes: list[np.dtype], x: int) -> int:
    n, kind = eqn.params["y"], kind_of(dtypes[0])
    _full_width(dtypes[0])
    if kind == "int" and n >= 0:
        out = code.constant(1)
        for _ in range(n):
            out = code.do("IntMul", out, x)
        return out
    if kind != "float" or abs(n) > 64:
        raise NotLowerable(
            f"uses integer_pow of {dtypes[0].name}, which a mod program cannot say"
        )
    if n == 0:
        return code.number(1.0)
    out = _power(code, x, abs(n))
    return out if n > 0 else code.do("Div", code.number(1.0), out)


def _square(code: Code, eqn: Any, dtypes: list[np.dtype], x: int) -> int:
    return _by_kind("Mul", "IntMul")(code, eqn, dtypes, x, x)


def _one_minus_square(code: Code, eqn: Any, dtypes: list[np.dtype], x: int) -> int:
    """``1 - x ** 2``, in factors: the slope of tanh, small where x is near 1."""
    _full_width(dtypes[0])
    if kind_of(dtypes[0]) != "float":
        raise NotLowerable(f"uses one_minus_square of {dtypes[0].name}")
    one = code.number(1.0)
    return code.do("Mul", code.do("Sub", one, x), code.do("Add", one, x))


def _polynomial(
    code: Code, eqn: Any, dtypes: list[np.dtype], x: int, *coefficients: int
) -> int:
    """``sum_k c[k] x ** k``, by Horner's rule."""
    times, plus = _by_kind("Mul", "IntMul"), _by_kind("Add", "IntAdd")
    *lower, out = coefficients
    for c in reversed(lower):
        out = plus(code, eqn, dtypes, times(code, eqn, dtypes, out, x), c)
    return out


def _pow(code: Code, eqn: Any, dtypes: list[np.dtype], x: int, y: int) -> int:
    _full_width(dtypes[0])
    if dtypes != [np.dtype(np.float32)] * 2:
        raise NotLowerable(
            f"uses pow of {dtypes[1].name}, which a mod program cannot say"
        )
    bits = code.bits(y)
    power = None if bits is None else float(np.int32(bits).view(np.float32))
    if power is not None and power == int(power) and 1 <= power <= 16:
        return _power(code, x, int(power))
    return code.do("Pow", x, y)


def _round(code: Code, eqn: Any, dtypes: list[np.dtype], x: int) -> int:
    even = eqn.params["rounding_method"] == lax.RoundingMethod.TO_NEAREST_EVEN
    return _by_kind("RoundEven" if even else "Round", None)(code, eqn, dtypes, x)


def _idiom(name: str) -> Rule:
    def rule(code: Code, eqn: Any, dtypes: list[np.dtype], a: int, b: int) -> int:
        return code.do(name, a, b)

    return rule


ELEMENTWISE: dict[str, Rule] = {
    "add": _by_kind("Add", "IntAdd"),
    "add_any": _by_kind("Add", "IntAdd"),
    "sub": _by_kind("Sub", "IntSub"),
    "mul": _by_kind("Mul", "IntMul"),
    "div": _by_kind("Div", "IntDiv"),
    "rem": _by_kind("Rem", "IntRem"),
    "max": _by_kind("Max", "IntMax", "Or", narrow=True),
    "min": _by_kind("Min", "IntMin", "And", narrow=True),
    "pow": _pow,
    "atan2": _by_kind("Atan2", None),
    "neg": _by_kind("Neg", "IntNeg"),
    "abs": _by_kind("Abs", "IntAbs"),
    "sign": _by_kind("Sign", "IntSign", narrow=True),
    "floor": _by_kind("Floor", None),
    "ceil": _by_kind("Ceil", None),
    "round": _round,
    "exp": _by_kind("Exp", None),
    "exp2": _by_kind("Exp2", None),
    "expm1": _by_kind("Expm1", None),
    "log": _by_kind("Log", None),
    "log1p": _by_kind("Log1p", None),
    "tanh": _by_kind("Tanh", None),
    "logistic": _by_kind("Logistic", None),
    "sqrt": _by_kind("Sqrt", None),
    "rsqrt": _by_kind("Rsqrt", None),
    "cbrt": _by_kind("Cbrt", None),
    "sin": _by_kind("Sin", None),
    "cos": _by_kind("Cos", None),
    "tan": _by_kind("Tan", None),
    "atan": _by_kind("Atan", None),
    "sinh": _by_kind("Sinh", None),
    "cosh": _by_kind("Cosh", None),
    "erf": _by_kind("Erf", None),
    "erfc": _by_kind("Erfc", None),
    "is_finite": _by_kind("IsFinite", None, narrow=True),
    "square": _square,
    # Of JAX 0.12 and later.
    "one_minus_square": _one_minus_square,
    "polynomial": _polynomial,
    "integer_pow": _integer_pow,
    "not": _by_kind(None, "Not", "Not"),
    "and": _by_kind(None, "And", "And", narrow=True),
    "or": _by_kind(None, "Or", "Or", narrow=True),
    "xor": _by_kind(None, "Xor", "Xor", narrow=True),
    "shift_left": _by_kind(None, "ShiftLeft"),
    "shift_right_arithmetic": _by_kind(None, "ShiftRight"),
    "shift_right_logical": _by_kind(None, "ShiftRightLogical"),
    "lt": _compare("Less", "IntLess"),
    "le": _compare("LessEqual", "IntLessEqual"),
    "gt": _compare("Less", "IntLess", swapped=True),
    "ge": _compare("LessEqual", "IntLessEqual", swapped=True),
    "eq": _compare("Equal", "IntEqual"),
    "ne": _compare("NotEqual", "IntNotEqual"),
    "select_n": _select,
    "clamp": _clamp,
    "convert_element_type": _convert,
    "bitcast_convert_type": _bitcast,
    "stop_gradient": lambda code, eqn, dtypes, x: x,
}

# Reductions along axes that no position runs along, and what they do with two entries.
REDUCTIONS: dict[str, Rule] = {
    "reduce_or": ELEMENTWISE["or"],
    "reduce_and": ELEMENTWISE["and"],
    "reduce_sum": ELEMENTWISE["add"],
    "reduce_prod": ELEMENTWISE["mul"],
    "reduce_max": ELEMENTWISE["max"],
    "reduce_min": ELEMENTWISE["min"],
}

# Functions of jax.numpy that are one operation, of int32.
IDIOMS: dict[str, tuple[Callable[..., Any], Rule]] = {
    "floor_divide": (jnp.floor_divide, _idiom("FloorDiv")),
    "remainder": (jnp.remainder, _idiom("FloorRem")),
}
