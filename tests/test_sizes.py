"""Head sizes, lengths, ratios of heads and dtypes, each against float64.

Not every combination: a value of one axis meets values of the others in turn, so that
each occurs, in pairs that differ. What compiles for long runs with the slow tests.
"""

from collections.abc import Iterator

import jax.numpy as jnp
import pytest

from raptax import Causal, SlidingWindow
from tests.problems import Problem
from tests.test_kernels import KERNEL, compare, compare_low_precision

HEAD_SIZES = (1, 8, 16, 40, 63, 64, 80, 128, 192, 256)
LENGTHS = (0, 1, 2, 63, 64, 65, 127, 129, 257, 1000)
RATIOS = (1, 2, 3, 5, 7, 8)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
VALUE_SIZES = ((192, 128), (128, 96), (64, 512), (96, 128))
MASKS = (Causal(), None, SlidingWindow(50))


def turn(values, n: int):
    return values[n % len(values)]


def problem(name: str, n: int, **sizes: int) -> Problem:
    """Sizes that are not given take the ``n``-th value of their axis."""
    ratio, D = turn(RATIOS, n), turn(HEAD_SIZES, n + 1)
    made = dict(B=1, H=2 * ratio, K=2, T=33, S=65, D=D, E=D) | sizes
    mask = turn(MASKS, n)
    options = {} if mask is None else dict(mask_mod=mask)
    return Problem(f"{name} {n}", **made, options=lambda p: dict(options))


def by_head_size() -> Iterator[Problem]:
    for n, D in enumerate(HEAD_SIZES):
        yield problem(f"head size {D}", n, D=D, E=D)


def by_value_size() -> Iterator[Problem]:
    for n, (D, E) in enumerate(VALUE_SIZES):
        yield problem(f"sizes {D} and {E}", n, D=D, E=E)


def by_length() -> Iterator[Problem]:
    for n, S in enumerate(LENGTHS):
        for T in {S, turn(LENGTHS, 3 * n + 1)}:
            yield problem(f"{T} queries, {S} keys", n, T=T, S=S, D=16, E=16)


def by_ratio() -> Iterator[Problem]:
    for n, ratio in enumerate(RATIOS):
        yield problem(f"ratio {ratio}", n, H=3 * ratio, K=3, D=8, E=8)


def cases(problems: Iterator[Problem], quick: int):
    """Every kernel and dtype in turn; every ``quick``-th one runs with quick tests."""
    table = []
    for n, made in enumerate(problems):
        for m, (name, dtype) in enumerate(
            (name, dtype)
            for name in ("blockwise", "reference", "native")
            for dtype in DTYPES
        ):
            often = name != "reference" and m % 3 == n % 3 and n % quick == 0
            marks = () if often else pytest.mark.slow
            label = f"{name}-{jnp.dtype(dtype)}-{made.name}"
            table.append(pytest.param(name, made, dtype, marks=marks, id=label))
    return pytest.mark.parametrize(("name", "made", "dtype"), table)


def check(name: str, made: Problem, dtype) -> None:
    if dtype == jnp.float32:
        compare(KERNEL[name], made)
    else:
        compare_low_precision(KERNEL[name], made, dtype)


@cases(by_head_size(), quick=5)
def test_head_sizes(name, made, dtype):
    check(name, made, dtype)


@cases(by_value_size(), quick=5)
def test_value_sizes(name, made, dtype):
    check(name, made, dtype)


@cases(by_length(), quick=5)
def test_lengths(name, made, dtype):
    check(name, made, dtype)


@cases(by_ratio(), quick=5)
def test_ratios(name, made, dtype):
    check(name, made, dtype)
