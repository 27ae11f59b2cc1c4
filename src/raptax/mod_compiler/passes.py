"""Optimization passes over mod programs: less work for each score.

Every operation on scores is a pass over a row in C++, while those on rows, columns and
diagonals cost next to nothing. So what can be combined among the latter is combined
first, and pairs of operations that have a common form become one.
"""

from collections.abc import Callable

import numpy as np

from .ir import CHEAP, Code, Node


def tidy(code: Code, answer: int) -> tuple[Code, int]:
    """The same program with fewer passes."""
    for rewrite in (_regroup, _reassociate, _fuse):
        code, answer = _rewritten(code, answer, rewrite)
    return code, answer


# What becomes of one instruction: its value in the new code, from its node and operands
# there. `once` says whether the value of an operand is read here alone.
Rewrite = Callable[[Code, Node, list[int], list[bool]], int]

# Where another rounding of what goes in may change what comes out altogether.
JUMPS = {"Less", "LessEqual", "Equal", "NotEqual", "Floor", "Ceil", "Round"}
JUMPS |= {"RoundEven", "Sign", "ToInt", "Rem"}


def _rewritten(code: Code, answer: int, rewrite: Rewrite) -> tuple[Code, int]:
    needed = code.needed(answer)
    readers = dict.fromkeys(needed, 0)
    exact: set[int] = set()
    for value in needed:
        node = code.nodes[value]
        for operand in node.operands:
            readers[operand] += 1
            if node.name in JUMPS and rewrite is not _regroup:
                exact |= code.needed(operand)
    new = Code()
    place: dict[int, int] = {}
    new.arrays = code.arrays
    for value in sorted(needed):
        node = code.nodes[value]
        operands = [place[v] for v in node.operands]
        once = [readers[v] == 1 for v in node.operands]
        if value in exact:
            place[value] = _same(new, node, operands)
        else:
            place[value] = rewrite(new, node, operands, once)
    return new, place[answer]


def _same(code: Code, node: Node, operands: list[int]) -> int:
    return code.emit(node.name, *operands, extra=node.extra, range=node.range)


# ------------------------------------------------------------------- and, or, regrouped


def _regroup(code: Code, node: Node, operands: list[int], once: list[bool]) -> int:
    """``(x & row) & column & row`` as ``x & column & (row & row)``.

    Scores come first: C++ does nothing for ``x & row`` where ``row`` is true.
    """
    if node.name not in ("And", "Or"):
        return _same(code, node, operands)
    leaves: list[int] = []
    for value, alone in zip(operands, once, strict=True):
        leaves += _leaves(code, node.name, value) if alone else [value]
    groups: dict[int, list[int]] = {}
    for leaf in leaves:
        depends = code.nodes[leaf].depends
        groups.setdefault(depends if depends in CHEAP else 7, []).append(leaf)
    order = sorted(groups, reverse=True)
    parts = [_joined(code, node, groups[depends]) for depends in order]
    return _joined(code, node, parts)


def _leaves(code: Code, name: str, value: int) -> list[int]:
    node = code.nodes[value]
    if node.name != name:
        return [value]
    return [leaf for operand in node.operands for leaf in _leaves(code, name, operand)]


def _joined(code: Code, node: Node, values: list[int]) -> int:
    out = values[0]
    for value in values[1:]:
        out = code.emit(node.name, out, value, range=node.range)
    return out


# -------------------------------------------------------- constant factors, outside first


def _reassociate(code: Code, node: Node, operands: list[int], once: list[bool]) -> int:
    """``c + c * u`` as ``c * (1 + u)``, and ``(c * u) * y`` as ``c * (u * y)``.

    Derivatives are full of such pairs, and most of the constants cancel.
    """
    out = None
    if node.name == "Mul":
        out = _product(code, *operands)
    elif node.name == "Add":
        out = _sum(code, *operands)
    return _same(code, node, operands) if out is None else out


def _product(code: Code, a: int, b: int) -> int | None:
    for x, y in ((a, b), (b, a)):
        node = code.nodes[x]
        if node.name != "Mul":
            continue
        for c, u in (node.operands, node.operands[::-1]):
            if not _ordinary(code, c):
                continue
            if code.bits(y) is None:
                return code.do("Mul", c, code.do("Mul", u, y))
            if _ordinary(code, both := code.do("Mul", c, y)):
                return code.do("Mul", u, both)
    return None


def _sum(code: Code, a: int, b: int) -> int | None:
    for c, product in ((a, b), (b, a)):
        node = code.nodes[product]
        if _ordinary(code, c) and node.name == "Mul" and c in node.operands:
            u = node.operands[node.operands[0] == c]
            return code.do("Mul", c, code.do("Add", code.number(1.0), u))
    return None


def _ordinary(code: Code, value: int) -> bool:
    """A constant whose products neither overflow nor vanish."""
    if (bits := code.bits(value)) is None:
        return False
    return 2.0**-60 < abs(float(np.int32(bits).view(np.float32))) < 2.0**60


# ------------------------------------------------------------------------------- fused


def _fuse(code: Code, node: Node, operands: list[int], once: list[bool]) -> int:
    if node.depends in CHEAP:
        return _same(code, node, operands)
    fused = None
    if node.name == "Mul":
        fused = _soft_cap(code, operands, once)
        if fused is None:
            fused = _soft_cap_slope(code, operands)
    elif node.name in ("Add", "Sub"):
        fused = _multiply_add(code, node.name, operands, once)
    return _same(code, node, operands) if fused is None else fused


def _soft_cap(code: Code, operands: list[int], once: list[bool]) -> int | None:
    """``c * tanh(x * b)`` for ``b`` and ``c`` that rows and columns share."""
    for (factor, _), (value, alone) in _both_ways(operands, once):
        inner = code.nodes[value]
        if not alone or inner.name != "Tanh" or code.nodes[factor].depends != 0:
            continue
        return code.emit("SoftCap", *_scaled(code, inner.operands[0]), factor)
    return None


def _soft_cap_slope(code: Code, operands: list[int]) -> int | None:
    """``(1 + t) * (1 - t)`` for ``t = tanh(x * b)``, and a factor before it."""
    one = code.number(1.0)
    for x, y in (operands, operands[::-1]):
        plus, minus = code.nodes[x], code.nodes[y]
        if plus.name == "Add" and minus.name == "Sub" and one in plus.operands:
            t = plus.operands[plus.operands[0] == one]
            if minus.operands == (one, t) and code.nodes[t].name == "Tanh":
                argument = code.nodes[t].operands[0]
                return code.emit("SoftCapSlope", *_scaled(code, argument), one)
        if code.nodes[x].depends == 0 and minus.name == "SoftCapSlope":
            argument, b, factor = minus.operands
            return code.emit("SoftCapSlope", argument, b, code.do("Mul", factor, x))
    return None


def _scaled(code: Code, value: int) -> tuple[int, int]:
    """``(x, b)`` for ``x * b`` or ``x / b``, where ``b`` is one number for a head."""
    one = scale = code.number(1.0)
    while code.nodes[value].name in ("Mul", "Div"):
        name, (x, b) = code.nodes[value].name, code.nodes[value].operands
        if name == "Mul" and code.nodes[x].depends == 0:
            x, b = b, x
        if code.nodes[b].depends != 0:
            break
        factor = b if name == "Mul" else code.do("Div", one, b)
        value, scale = x, code.do("Mul", scale, factor)
    return value, scale


def _multiply_add(
    code: Code, name: str, operands: list[int], once: list[bool]
) -> int | None:
    """``a * b + c``, and ``a * b - c`` and ``c - a * b`` if what is negated is cheap."""
    for (other, _), (value, alone) in _both_ways(operands, once):
        product = code.nodes[value]
        if not alone or product.name != "Mul" or product.depends in CHEAP:
            continue
        a, b = product.operands
        if name == "Add":
            return code.emit("MulAdd", a, b, other)
        if value == operands[0]:
            if code.nodes[other].depends in CHEAP:
                return code.emit("MulAdd", a, b, code.do("Neg", other))
            continue
        for x, y in ((a, b), (b, a)):
            if code.nodes[x].depends in CHEAP:
                return code.emit("MulAdd", code.do("Neg", x), y, other)
    return None


def _both_ways(
    values: list[int], once: list[bool]
) -> list[tuple[tuple[int, bool], tuple[int, bool]]]:
    first, second = zip(values, once, strict=True)
    return [(first, second), (second, first)]
