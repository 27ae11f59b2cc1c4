"""Instructions of mod programs, one value each, simplified as they are recorded.

`Code` is what `compile` writes a mod's operations into. Each value is a number that
names an instruction of ``csrc/api/mod_program.h``. Values that are alike are one value,
what is known at once is worked out at once, whole numbers carry the range they lie in,
and what no instruction reads is left out by `Code.words`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# The operations of csrc/api/mod_program.h in its order, and how many operands each takes.
OPERANDS = dict(
    Sequence=0, Head=0, Query=0, Key=0, Distance=0, Score=0, Constant=0, Gather=1,
    Select=3, MulAdd=3, SoftCap=3, SoftCapSlope=3, Neg=1, Abs=1, Sign=1, Floor=1,
    Ceil=1, Round=1, RoundEven=1, Exp=1, Exp2=1, Expm1=1, Log=1, Log1p=1, Tanh=1,
    Logistic=1, Sqrt=1, Rsqrt=1, Sin=1, Cos=1, Tan=1, Atan=1, Sinh=1, Cosh=1, Erf=1,
    Erfc=1, Cbrt=1, Add=2, Sub=2, Mul=2, Div=2, Max=2, Min=2, Pow=2, Rem=2, Atan2=2,
    Less=2, LessEqual=2, Equal=2, NotEqual=2, IsFinite=1, ToFloat=1, ToInt=1, IntNeg=1,
    IntAbs=1, IntSign=1, Not=1, IntAdd=2, IntSub=2, IntMul=2, IntMax=2, IntMin=2,
    IntDiv=2, IntRem=2, FloorDiv=2, FloorRem=2, And=2, Or=2, Xor=2, ShiftLeft=2,
    ShiftRight=2, ShiftRightLogical=2, IntLess=2, IntLessEqual=2, IntEqual=2,
    IntNotEqual=2,
)  # fmt: skip
NUMBER = {name: number for number, name in enumerate(OPERANDS)}
COMMUTES = {"Add", "Mul", "Equal", "NotEqual", "IntAdd", "IntMul", "IntMax", "IntMin"}
COMMUTES |= {"And", "Or", "Xor", "IntEqual", "IntNotEqual"}

MOST_INSTRUCTIONS = 512

LEAST, MOST = -(2**31), 2**31 - 1
Range = tuple[int, int]
ANY, YES_OR_NO = (LEAST, MOST), (-1, 0)

# What a value depends on besides sequence and head, in bits. Many operations are done
# once per row, column or diagonal of the scores instead of once per score.
DEPENDS = {"Query": 1, "Key": 2, "Distance": 4, "Score": 7}
CHEAP = (0, 1, 2, 4)

# Positions, and so their distance, are far from what 32 bits hold. The first queries may
# stand before the first key.
POSITIONS: dict[str, Range] = {
    "Sequence": (0, MOST),
    "Head": (0, MOST),
    "Query": (-(2**30), 2**30 - 1),
    "Key": (0, 2**30 - 1),
    "Distance": (1 - 2**30, MOST),
    "Score": ANY,
}


class Node(NamedTuple):
    """One instruction. ``extra`` is a constant's bits, or the number of an array."""

    name: str
    operands: tuple[int, ...]
    extra: int
    depends: int
    range: Range


class Code:
    """Instructions, and the arrays that they read."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.arrays: list[Any] = []
        self._known: dict[tuple[Any, ...], int] = {}

    def emit(
        self, name: str, *operands: int, extra: int = 0, range: Range = ANY
    ) -> int:
        """The value of an instruction as it stands."""
        if name in COMMUTES:
            operands = tuple(sorted(operands))
        key = (name, operands, extra)
        if key not in self._known:
            depends = DEPENDS.get(name, 0)
            for value in operands:
                depends |= self.nodes[value].depends
            self._known[key] = len(self.nodes)
            self.nodes.append(Node(name, operands, extra, depends, range))
        return self._known[key]

    def position(self, name: str) -> int:
        """One of `POSITIONS`, or the score."""
        return self.emit(name, range=POSITIONS[name])

    def constant(self, bits: int) -> int:
        return self.emit("Constant", extra=bits, range=(bits, bits))

    def number(self, value: float) -> int:
        return self.constant(int(np.float32(value).view(np.int32)))

    def bits(self, value: int) -> int | None:
        """The bits of a constant; None for any other value."""
        node = self.nodes[value]
        return node.extra if node.name == "Constant" else None

    def gather(self, array: Any, index: int, range: Range = ANY) -> int:
        """Entry ``index`` of an array, counted through all its axes."""
        same = [n for n, other in enumerate(self.arrays) if other is array]
        if not same:
            self.arrays.append(array)
        number = same[0] if same else len(self.arrays) - 1
        return self.emit("Gather", index, extra=number, range=range)

    # ------------------------------------------------------------------ simplified

    def do(self, name: str, *operands: int) -> int:
        """The value of an operation, simplified where that is exact."""
        nodes = [self.nodes[value] for value in operands]
        known = [node.extra for node in nodes if node.name == "Constant"]
        if len(known) == len(nodes) and name in FOLDED:
            return self.constant(FOLDED[name](*known))
        if name in RULES and (simple := RULES[name](self, *operands)) is not None:
            return simple
        if name in RANGES:
            lo, hi = RANGES[name](*(node.range for node in nodes))
            if lo == hi:
                return self.constant(lo)
            return self.emit(name, *operands, range=(lo, hi))
        return self.emit(
            name, *operands, range=YES_OR_NO if name in FLOAT_TESTS else ANY
        )

    def needed(self, answer: int) -> set[int]:
        """The values that one is made of, itself included."""
        needed, stack = set(), [answer]
        while stack:
            value = stack.pop()
            if value not in needed:
                needed.add(value)
                stack += self.nodes[value].operands
        return needed

    def words(self, answer: int) -> tuple[tuple[int, ...], list[Any]]:
        """The program's words and the arrays it reads, without what is not needed."""
        needed = self.needed(answer)
        order = {value: n for n, value in enumerate(sorted(needed))}
        read = sorted(
            {self.nodes[v].extra for v in needed if self.nodes[v].name == "Gather"}
        )
        array_order = {number: n for n, number in enumerate(read)}
        words: list[int] = []
        for value in order:
            node = self.nodes[value]
            fields = [order[v] for v in node.operands]
            if node.name == "Constant":
                fields = [node.extra]
            elif node.name == "Gather":
                fields = [array_order[node.extra], *fields]
            words += [NUMBER[node.name], *fields, *[0] * (3 - len(fields))]
        return tuple(words), [self.arrays[number] for number in read]


FLOAT_TESTS = {"Less", "LessEqual", "Equal", "NotEqual", "IsFinite"}


# --------------------------------------------------------------- what is known at once


def _wrap(value: int) -> int:
    return (value - LEAST) % 2**32 + LEAST


def _divide(a: int, b: int) -> int:
    """Towards zero, as XLA has it."""
    return -1 if b == 0 else _wrap(abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1))


def _of_floats(function: Callable[..., Any]) -> Callable[..., int]:
    def folded(*bits: int) -> int:
        with np.errstate(all="ignore"):
            out = function(*(np.int32(b).view(np.float32) for b in bits))
        return int(np.float32(out).view(np.int32))

    return folded


def _yes(answer: Any) -> int:
    return -1 if answer else 0


FOLDED: dict[str, Callable[..., int]] = {
    "IntAdd": lambda a, b: _wrap(a + b),
    "IntSub": lambda a, b: _wrap(a - b),
    "IntMul": lambda a, b: _wrap(a * b),
    "IntNeg": lambda a: _wrap(-a),
    "IntAbs": lambda a: _wrap(abs(a)),
    "IntSign": lambda a: (a > 0) - (a < 0),
    "IntMax": max,
    "IntMin": min,
    "IntDiv": _divide,
    "IntRem": lambda a, b: _wrap(a - _divide(a, b) * b) if b else a,
    "FloorDiv": lambda a, b: _wrap(a // b) if b else (-2 if a else -1),
    "FloorRem": lambda a, b: a % b if b else 0,
    "And": lambda a, b: a & b,
    "Or": lambda a, b: a | b,
    "Xor": lambda a, b: a ^ b,
    "Not": lambda a: ~a,
    "IntLess": lambda a, b: _yes(a < b),
    "IntLessEqual": lambda a, b: _yes(a <= b),
    "IntEqual": lambda a, b: _yes(a == b),
    "IntNotEqual": lambda a, b: _yes(a != b),
    "Select": lambda a, b, c: b if a else c,
    "ToFloat": lambda a: int(np.float32(a).view(np.int32)),
    "Add": _of_floats(lambda a, b: a + b),
    "Sub": _of_floats(lambda a, b: a - b),
    "Mul": _of_floats(lambda a, b: a * b),
    "Div": _of_floats(lambda a, b: a / b),
    "Max": _of_floats(np.maximum),
    "Min": _of_floats(np.minimum),
    "Neg": _of_floats(lambda a: -a),
    "Abs": _of_floats(abs),
    "Sqrt": _of_floats(np.sqrt),
}


# ---------------------------------------------------------------------------- ranges


def _fits(lo: int, hi: int) -> Range:
    return (lo, hi) if lo >= LEAST and hi <= MOST else ANY


def _products(a: Range, b: Range) -> Range:
    ends = [x * y for x in a for y in b]
    return _fits(min(ends), max(ends))


def _abs_range(a: Range) -> Range:
    lo = 0 if a[0] <= 0 <= a[1] else min(abs(a[0]), abs(a[1]))
    return _fits(lo, max(abs(a[0]), abs(a[1])))


def _quotients(a: Range, b: Range) -> Range:
    if b[0] <= 0:
        return ANY
    ends = [x // y for x in a for y in b]
    return min(ends), max(ends)


def _rest(a: Range, b: Range) -> Range:
    if b[0] <= 0:
        return ANY
    if a[0] >= 0 and a[1] < b[0]:
        return a
    return 0, b[1] - 1


def _shifted(a: Range, by: Range) -> Range:
    if by[0] != by[1] or not 0 <= by[0] < 32:
        return ANY
    return a[0] >> by[0], a[1] >> by[0]


def _shifted_word(a: Range, by: Range) -> Range:
    if by[0] != by[1] or not 0 < by[0] < 32:
        return ANY
    return (a[0] >> by[0], a[1] >> by[0]) if a[0] >= 0 else (0, (2**32 - 1) >> by[0])


def _less(a: Range, b: Range) -> Range:
    return (-1, -1) if a[1] < b[0] else (0, 0) if a[0] >= b[1] else YES_OR_NO


def _less_equal(a: Range, b: Range) -> Range:
    return (-1, -1) if a[1] <= b[0] else (0, 0) if a[0] > b[1] else YES_OR_NO


def _bits(a: Range, b: Range) -> Range:
    if a[0] >= -1 and a[1] <= 0 and b[0] >= -1 and b[1] <= 0:
        return YES_OR_NO
    return ANY


def _and_bits(a: Range, b: Range) -> Range:
    most = [hi for lo, hi in (a, b) if lo >= 0]
    return (0, min(most)) if most else _bits(a, b)


RANGES: dict[str, Callable[..., Range]] = {
    "IntAdd": lambda a, b: _fits(a[0] + b[0], a[1] + b[1]),
    "IntSub": lambda a, b: _fits(a[0] - b[1], a[1] - b[0]),
    "IntMul": _products,
    "IntNeg": lambda a: _fits(-a[1], -a[0]),
    "IntAbs": _abs_range,
    "IntMax": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "IntMin": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "IntSign": lambda a: ((a[0] > 0) - (a[0] < 0), (a[1] > 0) - (a[1] < 0)),
    "FloorDiv": _quotients,
    "FloorRem": _rest,
    "ShiftRight": _shifted,
    "ShiftRightLogical": _shifted_word,
    "IntLess": _less,
    "IntLessEqual": _less_equal,
    "IntEqual": lambda a, b: (0, 0) if a[1] < b[0] or b[1] < a[0] else YES_OR_NO,
    "IntNotEqual": lambda a, b: (-1, -1) if a[1] < b[0] or b[1] < a[0] else YES_OR_NO,
    "And": _and_bits,
    "Or": _bits,
    "Xor": _bits,
    "Not": lambda a: (~a[1], ~a[0]),
    "Select": lambda a, b, c: (min(b[0], c[0]), max(b[1], c[1])),
}


# ------------------------------------------------- simpler forms, None if there are not

ONE = int(np.float32(1).view(np.int32))
MINUS_ZERO = int(np.float32(-0.0).view(np.int32))


def _neutral(bits: int, *more: int) -> Callable[..., int | None]:
    """Operations that return their other operand when one is a certain constant."""

    def rule(code: Code, a: int, b: int) -> int | None:
        if code.bits(b) in (bits, *more):
            return a
        return b if code.bits(a) in (bits, *more) else None

    return rule


def _subtract(code: Code, a: int, b: int) -> int | None:
    if a == b:
        return code.constant(0)
    if (shifts := _distance(code, a, b)) is None:
        return a if code.bits(b) == 0 else None
    sign, shift = shifts
    name, distance = ("IntAdd" if sign > 0 else "IntSub"), code.position("Distance")
    return code.do(name, shift, distance)


def _shifted_position(code: Code, value: int) -> tuple[str, int] | None:
    """``(name, shift)`` of a position plus a number that all scores of a head share."""
    node = code.nodes[value]
    if node.name in ("Key", "Query"):
        return node.name, code.constant(0)
    if node.name not in ("IntAdd", "IntSub"):
        return None
    a, b = node.operands
    for position, shift in ((a, b), (b, a))[: 2 if node.name == "IntAdd" else 1]:
        inner = _shifted_position(code, position)
        if inner is not None and code.nodes[shift].depends == 0:
            return inner[0], code.do(node.name, inner[1], shift)
    return None


def _distance(code: Code, a: int, b: int) -> tuple[int, int] | None:
    """``(sign, shift)`` if ``a - b`` is ``shift + sign * (key - query)``."""
    left, right = _shifted_position(code, a), _shifted_position(code, b)
    if left is None or right is None or left[0] == right[0]:
        return None
    return (1 if left[0] == "Key" else -1), code.do("IntSub", left[1], right[1])


def _compare_positions(name: str) -> Callable[..., int | None]:
    """A comparison of a key's and a query's position is one of their distance."""

    def rule(code: Code, a: int, b: int) -> int | None:
        (a_lo, a_hi), (b_lo, b_hi) = code.nodes[a].range, code.nodes[b].range
        if _fits(a_lo - b_hi, a_hi - b_lo) == ANY:
            return None
        if (shifts := _distance(code, a, b)) is None:
            return None
        sign, shift = shifts
        distance = code.position("Distance")
        if sign > 0:
            return code.do(name, distance, code.do("IntNeg", shift))
        return code.do(name, shift, distance)

    return rule


def _and(code: Code, a: int, b: int) -> int | None:
    if a == b:
        return a
    if 0 in (code.bits(a), code.bits(b)):
        return code.constant(0)
    return _neutral(-1)(code, a, b)


def _or(code: Code, a: int, b: int) -> int | None:
    if a == b:
        return a
    if -1 in (code.bits(a), code.bits(b)):
        return code.constant(-1)
    return _neutral(0)(code, a, b)


def _not(code: Code, a: int) -> int | None:
    node = code.nodes[a]
    if node.name == "Not":
        return node.operands[0]
    if node.name == "IntLess":
        return code.do("IntLessEqual", node.operands[1], node.operands[0])
    if node.name == "IntLessEqual":
        return code.do("IntLess", node.operands[1], node.operands[0])
    return None


def _select(code: Code, which: int, yes: int, no: int) -> int | None:
    if yes == no:
        return yes
    if (bits := code.bits(which)) is not None:
        return yes if bits else no
    if (code.bits(yes), code.bits(no)) == (-1, 0):
        return which
    return None


def _larger(code: Code, a: int, b: int) -> int | None:
    (a_lo, a_hi), (b_lo, b_hi) = code.nodes[a].range, code.nodes[b].range
    return a if a_lo >= b_hi else b if b_lo >= a_hi else None


def _smaller(code: Code, a: int, b: int) -> int | None:
    (a_lo, a_hi), (b_lo, b_hi) = code.nodes[a].range, code.nodes[b].range
    return a if a_hi <= b_lo else b if b_hi <= a_lo else None


def _power_of_two(code: Code, value: int) -> int | None:
    """``n`` of a constant ``2**n``."""
    bits = code.bits(value)
    return (
        bits.bit_length() - 1 if bits and bits > 0 and bits & (bits - 1) == 0 else None
    )


def _floor_divide(code: Code, a: int, b: int) -> int | None:
    power = _power_of_two(code, b)
    if power is None:
        return None
    return a if power == 0 else code.do("ShiftRight", a, code.constant(power))


def _floor_rest(code: Code, a: int, b: int) -> int | None:
    power = _power_of_two(code, b)
    return None if power is None else code.do("And", a, code.constant(2**power - 1))


def _truncating(name: str) -> Callable[..., int | None]:
    """Division towards zero is division downwards when nothing is below zero."""

    def rule(code: Code, a: int, b: int) -> int | None:
        if code.nodes[a].range[0] >= 0 and code.nodes[b].range[0] > 0:
            return code.do(name, a, b)
        return None

    return rule


def _float_divide(code: Code, a: int, b: int) -> int | None:
    """A product with the inverse of a power of two, which is exact."""
    if (bits := code.bits(b)) is None:
        return None
    mantissa, exponent = np.frexp(np.int32(bits).view(np.float32))
    if abs(mantissa) != 0.5 or abs(exponent) > 100:
        return None
    return code.do(
        "Mul", a, code.number(float(np.ldexp(0.25 / mantissa, 2 - exponent)))
    )


RULES: dict[str, Callable[..., int | None]] = {
    "IntAdd": _neutral(0),
    "IntSub": _subtract,
    "IntMul": _neutral(1),
    "IntMax": _larger,
    "IntMin": _smaller,
    "IntDiv": _truncating("FloorDiv"),
    "IntRem": _truncating("FloorRem"),
    "FloorDiv": _floor_divide,
    "FloorRem": _floor_rest,
    "And": _and,
    "Or": _or,
    "Xor": _neutral(0),
    "Not": _not,
    "IntLess": _compare_positions("IntLess"),
    "IntLessEqual": _compare_positions("IntLessEqual"),
    "IntEqual": _compare_positions("IntEqual"),
    "IntNotEqual": _compare_positions("IntNotEqual"),
    "Select": _select,
    "Add": _neutral(MINUS_ZERO, 0),
    "Sub": lambda code, a, b: a if code.bits(b) == 0 else None,
    "Mul": _neutral(ONE),
    "Div": _float_divide,
}
