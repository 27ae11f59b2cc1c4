"""Bounds hold what they bound, and are tight where they are said to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from raptax.block_mask.interval_analysis import Interval, analyse

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
TABLE = jnp.asarray(RNG.integers(-50, 50, 17), jnp.int8)
SQUARE = jnp.asarray(RNG.integers(-50, 50, (3, 256)), jnp.int8)
TABLES = SQUARE[:, :100]
FLAGS = jnp.asarray(RNG.random(40) < 0.2)
NAN = jnp.asarray([0.0, np.nan, 2.0, 5.0, np.nan], jnp.float32)


@jax.jit
def remainder(x, n):  # not jnp.remainder, though it is called that
    return x - n


def like(x, value):
    return jnp.full_like(x, value)


WHOLE = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "square": lambda x, y: x * x,
    "power": lambda x, y: x**2,
    "negate": lambda x, y: -x,
    "abs": lambda x, y: jnp.abs(x),
    "sign": lambda x, y: jnp.sign(x),
    "max": jnp.maximum,
    "min": jnp.minimum,
    "clip": lambda x, y: jnp.clip(x, -3, 20),
    "//": lambda x, y: x // 7,
    "// negative": lambda x, y: x // -7,
    "// ranging": lambda x, y: x // y,
    "%": lambda x, y: x % 7,
    "% negative": lambda x, y: x % -7,
    "% ranging": lambda x, y: x % y,
    "divide": lambda x, y: lax.div(x, y),
    "rem": lambda x, y: lax.rem(x, like(x, 7)),
    "namesake": lambda x, y: remainder(x, y),
    "<<": lambda x, y: x << 2,
    "<< ranging": lambda x, y: x << y,
    ">>": lambda x, y: x >> 2,
    ">> ranging": lambda x, y: x >> y,
    ">>>": lambda x, y: lax.shift_right_logical(x, like(x, 2)),
    "where": lambda x, y: jnp.where(x < y, x + like(x, 3), y),
    "where certain": lambda x, y: jnp.where(x < 0, x, -x),
    "switch": lambda x, y: lax.select_n(jnp.asarray(2), x, y, x - y),
    "wider": lambda x, y: x.astype(jnp.int32) * y.astype(jnp.int32),
    "unsigned": lambda x, y: x.astype(jnp.uint8),
    "narrower": lambda x, y: (x.astype(jnp.int32) * 3).astype(jnp.int8),
    "to float": lambda x, y: x.astype(jnp.float32) * 0.1 - y.astype(jnp.float32),
    "to bool": lambda x, y: x.astype(bool),
    "from bool": lambda x, y: (x < y).astype(jnp.int32),
    "table": lambda x, y: TABLE[x],
    "rows": lambda x, y: SQUARE[1, x.astype(jnp.int32) + 128],
    "columns": lambda x, y: SQUARE.T[x.astype(jnp.int32) + 128, 2],
    "fill": lambda x, y: TABLE.at[x].get(mode="fill", fill_value=99),
    "clipped": lambda x, y: TABLE.at[x].get(mode="clip"),
    "flags": lambda x, y: FLAGS[x],
    "nan": lambda x, y: NAN[x] < 3,
    "not nan": lambda x, y: ~(NAN[x] >= 3),
    "moved": lambda x, y: jnp.stack([x.T, y.T]).max(0).T.reshape(x.shape),
    "recursion": lambda x, y: jax.checkpoint(jax.nn.relu)(x),
    "<": lambda x, y: x < y,
    "<=": lambda x, y: x <= y,
    ">": lambda x, y: x > y,
    ">=": lambda x, y: x >= y,
    "==": lambda x, y: x == y,
    "!=": lambda x, y: x != y,
    "and": lambda x, y: (x < 5) & (y > 9),
    "or": lambda x, y: (x < 5) | ~(y > 9),
    "xor": lambda x, y: (x < 5) ^ (y > 9),
}
ONE = jnp.zeros((1, 1), jnp.int8)
EVERY = np.arange(-128, 128, dtype=np.int8)


def some_ranges():
    """Short, long and very long ones."""
    lo = RNG.integers(-128, 128, 60)
    lo[::10] = -128
    hi = np.minimum(lo + RNG.integers(0, np.repeat([1, 9, 256], 20)), 127)
    return jnp.asarray(lo, jnp.int8), jnp.asarray(hi, jnp.int8)


def bounds(function, x, y):
    """Bounds of each pair of ranges, with the lowest and highest in truth."""
    closed = jax.make_jaxpr(function)(ONE, ONE)

    def one(*ends):
        ends = [end.reshape(1, 1) for end in ends]
        (out,) = analyse(closed, (Interval(*ends[:2]), Interval(*ends[2:])), (4, 16))
        return out

    out = jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(*x, *y))
    # All pairs of int8, so that whatever overflows does.
    table = function(*np.meshgrid(EVERY, EVERY, indexing="ij"))
    table, ranges = np.asarray(table), np.stack([*x, *y], axis=1)
    for n, ends in enumerate(ranges):
        first, last, top, end = (int(end) + 128 for end in ends)
        yield out, n, table[first : last + 1, top : end + 1]


@pytest.mark.filterwarnings("ignore:.*(overflow|divide by zero)")
@pytest.mark.parametrize("name", WHOLE)
def test_bounds_hold_every_value(name):
    ranges = some_ranges(), some_ranges()
    for out, n, values in bounds(WHOLE[name], *ranges):
        assert out.lo is not None, "a rule is missing"
        lo, hi = out.lo[n], out.hi[n]
        if np.isnan(lo) or np.isnan(hi):  # anything
            continue
        assert (lo <= values).all(), (lo, hi, values.min(), values.max())
        assert (values <= hi).all(), (lo, hi, values.min(), values.max())


TIGHT = [
    "subtract",
    "sign",
    "max",
    "clip",
    "%",
    "//",
    "<",
    "<=",
    "==",
    "!=",
    "and",
    "or",
    "flags",
    "rows",
    "columns",
    ">>",
]


@pytest.mark.parametrize("name", TIGHT)
def test_bounds_are_tight(name):
    """Of short ranges that do not overflow, and that are tiles where a table is read."""
    start = jnp.asarray(RNG.integers(-15, 15, 60) * 4, jnp.int8)
    if name == "flags":
        start = jnp.abs(start) % 32
    ranges = (start, start + 3), (start[::-1], start[::-1] + 3)
    for out, n, values in bounds(WHOLE[name], *ranges):
        assert (out.lo[n], out.hi[n]) == (values.min(), values.max())


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: jnp.sin(x.astype(jnp.float32)) > 0,
        lambda x, y: (x < 3) & (x.astype(jnp.uint8) * y.astype(jnp.uint8) > 9),
        lambda x, y: TABLES[x, y] < 3,
        lambda x, y: jnp.where(lax.population_count(x) > 1, x < 2, y < 3),
        lambda x, y: jax.random.bernoulli(jax.random.fold_in(KEY, x[0, 0])),
    ],
)
def test_a_missing_rule_is_owned_up_to(function):
    ranges = some_ranges(), some_ranges()
    closed = jax.make_jaxpr(function)(ONE, ONE)
    ends = [end[:1, None] for pair in ranges for end in pair]
    (out,) = analyse(closed, (Interval(*ends[:2]), Interval(*ends[2:])), (4,))
    assert out.unsure


def test_any_operation_on_known_values_is_exact():
    closed = jax.make_jaxpr(lambda x, y: (jnp.sin(x) * 2, y))(1.0, 2)
    known = jnp.float32(0.5)
    out, _ = analyse(closed, (Interval(known, known), Interval(0, 1)))
    assert (out.known, out.unsure) == (True, False)
    assert out.lo == jnp.sin(known) * 2


def test_floats_are_rounded_outwards():
    """So that a product which XLA adds to without rounding it lies within."""
    closed = jax.make_jaxpr(lambda x, y: x * y)(0.5, 0.5)
    third = jnp.float32(1 / 3)
    (out,) = analyse(closed, (Interval(third, third + 0), Interval(third, third)))
    product = np.float64(third) ** 2
    assert float(out.lo) < product < float(out.hi)
    assert float(out.hi) - float(out.lo) < 1e-7
