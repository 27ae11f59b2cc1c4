"""Mod programs against the mods that they were made from, on every instruction set.

Run as a program, this checks the mods of `MODS` on the set that RAPTAX_ISA names.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import raptax
from raptax import Causal, Unsupported
from raptax._core.types import position_indices
from raptax.kernels.cpu import library as native
from raptax.mod_compiler import compile as mod_program
from raptax.mod_compiler import ir as mod_code
from raptax.mod_compiler.compile import ModProgram
from tests.instruction_sets import INSTRUCTION_SETS, REFUSED, run_file

pytestmark = pytest.mark.skipif(
    not native.available(), reason="the native library was not built"
)

B, H, T, S = 2, 3, 21, 37
CHANGE, SLOPE, MASK = range(3)


def numbers(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), jnp.float32)


IDS = jnp.asarray(np.arange(S)[None] // 9 + np.arange(B)[:, None], jnp.int32)
HERE = position_indices(
    B, H, jnp.arange(T, dtype=jnp.int32)[None] + S - T, jnp.arange(S, dtype=jnp.int32)
)
# Every mask_mod and score_mod of the library; a test says that none is missing.
MASKS: dict[str, Any] = {
    "causal": Causal(),
    "sliding window": raptax.SlidingWindow(5),
    "window": raptax.Window(4, 2, dilation=2),
    "open window": raptax.Window(None, 3, dilation=3),
    "sink window": raptax.SinkWindow(2, 4),
    "strided": raptax.Strided(4, 3),
    "chunked": raptax.Chunked(8),
    "block causal": raptax.BlockCausal(7),
    "natten": raptax.Natten2D(5, 6, 3),
    "key lengths": raptax.KeyLengths(jnp.array([30, 4], jnp.int32)),
    "query lengths": raptax.QueryLengths(23),
    "prefix": raptax.PrefixLM(jnp.array([20, 30], jnp.int32)),
    "documents": raptax.Documents(IDS),
    "one row of documents": raptax.Documents(IDS[:1]),
    "segments": raptax.mods.Segments(IDS[:, :T], IDS, S - T - 2),
    "key ranges": raptax.documents_from_lengths(
        jnp.array([[3, 4, 10], [5, 5, 20]], jnp.int32), seq=35
    ),
    "spans": raptax.BidirectionalSpans(IDS - 2),
    "tree": raptax.tree_from_parents([-1, 0, 0, 1, 1, 2, 5, 0], start=20),
    "dense": raptax.mods.Dense(numbers(B, 1, S - 3, S - 2) > 0),
    "offset": raptax.Offset(raptax.Chunked(4), q=jnp.array([3, 1], jnp.int32), kv=-2),
    "per head": raptax.PerHead(
        (Causal(), raptax.SlidingWindow(3), ~Causal()), jnp.array([2, 0, 1], jnp.int32)
    ),
    "and, or, xor, not": (Causal() & ~raptax.SlidingWindow(3))
    | raptax.Chunked(4) ^ raptax.KeyLengths(9),
    "function": lambda b, h, q, k: (q + k + h) % 3 == b,
}
SCORES: dict[str, Any] = {
    "soft cap": raptax.SoftCap(2.0),
    "alibi": raptax.ALiBi(numbers(H)),
    "composed": raptax.compose_score_mods(
        raptax.SoftCap(3.0), raptax.ALiBi(numbers(H)), raptax.mods.LogN(9)
    ),
    "temperature": raptax.mods.Temperature(numbers(H)),
    "relative": raptax.RelativeBias(numbers(H, 9)),
    "t5": raptax.T5Bias(numbers(8, H).astype(jnp.bfloat16), max_distance=20),
    "t5 decoder": raptax.T5Bias(numbers(8, H), bidirectional=False),
    "bias": raptax.DenseBias(numbers(1, H, S - 4, S)),
    "short bias": raptax.DenseBias(numbers(B, 1, 1, S - 5).astype(jnp.float16)),
    "masked": raptax.mods.MaskedScore(Causal()),
    "offset": raptax.Offset(raptax.ALiBi(numbers(H)), q=2),
    "function": lambda s, b, h, q, k: jnp.where(q > k, s * s, jnp.exp(-s)),
}


def run(
    program: ModProgram,
    scores: jax.Array,
    what: int,
    *,
    first: int = S - T,
    along_queries: bool = False,
    columns: int = 32,
    rows: int = 5,
) -> jax.Array:
    """A program on scores whose first query stands at ``first``, tile by tile."""
    call = jax.ffi.ffi_call(
        "raptax_run_program", jax.ShapeDtypeStruct(scores.shape, scores.dtype)
    )
    return call(
        scores,
        *program.arrays,
        code=program.words,
        what=np.int32(what),
        along_queries=along_queries,
        first=np.int64(first),
        columns=np.int64(columns),
        rows=np.int64(rows),
    )


WAYS: dict[str, dict[str, Any]] = {
    "rows of keys": {},
    "long rows": dict(columns=256, rows=1),
    "rows of queries": dict(along_queries=True, columns=16, rows=33),
}


def outcomes(masks: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    """What programs and what their mods make of the same scores, as pairs by name."""

    def everything(x: jax.Array) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        for name, mask in masks.items():
            expected = jnp.where(mask(*HERE), x, -jnp.inf)
            program = mod_program.mask_program(mask)
            for way, how in WAYS.items():
                pairs[f"{name}, {way}"] = run(program, x, MASK, **how), expected
        for name, score in scores.items():
            change = lambda x, score=score: score(x, *HERE)
            expected, slope = jax.jvp(change, (x,), (jnp.ones_like(x),))
            program = mod_program.score_program(score)
            slopes = mod_program.slope_program(score)
            for way, how in WAYS.items():
                pairs[f"{name}, {way}"] = run(program, x, CHANGE, **how), expected
                actual = jnp.ones_like(x)
                if slopes is not None:
                    actual = run(slopes, x, SLOPE, **how)
                pairs[f"slope of {name}, {way}"] = actual, slope
        return pairs

    return jax.jit(everything)(numbers(B, H, T, S))


def compare(masks: dict[str, Any], scores: dict[str, Any]) -> None:
    for name, (actual, expected) in outcomes(masks, scores).items():
        np.testing.assert_allclose(actual, expected, rtol=3e-6, atol=2e-6, err_msg=name)


def test_masks_say_what_their_mods_say():
    compare(MASKS, {})


def test_scores_change_as_their_mods_change_them():
    compare({}, SCORES)


def test_every_mod_of_the_library_is_tried():
    text = repr([*MASKS.values(), *SCORES.values()])
    for name, mod in vars(raptax.mods).items():
        if dataclasses.is_dataclass(mod) and name != "FunctionMod":
            assert f"{name}(" in text, f"{name} is in no table"


def test_instructions_have_the_numbers_that_c_plus_plus_gives_them():
    header = Path(__file__).parents[1] / "csrc" / "api" / "mod_program.h"
    listed = re.findall(r"X\(k(\w+), (\d)\)", header.read_text())
    assert {name: int(count) for name, count in listed} == mod_code.OPERANDS
    assert [name for name, _ in listed] == list(mod_code.OPERANDS)


@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_on_instruction_set(isa):
    run_file(__file__, isa)


# --------------------------------------------------------------------- plain functions

TABLE = numbers(H, 9)


def hashed(x: jax.Array, y: jax.Array) -> jax.Array:
    word = x.astype(jnp.uint32) * jnp.uint32(2654435761) ^ y.astype(jnp.uint32)
    return (word ^ (word >> jnp.uint32(15))) * jnp.uint32(2246822519)


FUNCTIONS: dict[str, Any] = {
    "filled": lambda s, b, h, q, k: (
        s + TABLE.at[h, k - 20].get(mode="fill", fill_value=7.0)
    ),
    "clipped": lambda s, b, h, q, k: s + TABLE.at[h, q - 3].get(mode="clip"),
    "from the end": lambda s, b, h, q, k: s + TABLE[h, k - q],
    "take": lambda s, b, h, q, k: s + jnp.take(TABLE[1], k % 9, mode="fill"),
    "a row of entries": lambda s, b, h, q, k: s + TABLE[h][..., 3],
    "of arrays alone": lambda s, b, h, q, k: s + TABLE.cumsum(1).max(1)[h],
    "small numbers": lambda s, b, h, q, k: (
        s + jnp.asarray([-3, 0, 120], jnp.int8)[h].astype(jnp.float32)
    ),
    "halves": lambda s, b, h, q, k: (
        s * TABLE.astype(jnp.float16)[h, k % 9].astype(jnp.float32)
    ),
    "numpy": lambda s, b, h, q, k: s + jnp.asarray(np.arange(3, dtype=np.float32))[h],
    "stacked": lambda s, b, h, q, k: (
        s + jnp.stack([h + k, k * h]).max(0).astype(s.dtype)
    ),
    "is in": lambda s, b, h, q, k: jnp.where(jnp.isin(k, jnp.array([1, 5, 9])), s, -s),
    "words": lambda s, b, h, q, k: jnp.where(
        (k.astype(jnp.uint32) * jnp.uint32(2654435761)) >> jnp.uint32(3)
        < jnp.uint32(2**28),
        s,
        0.0,
    ),
    "noise of its own": lambda s, b, h, q, k: (
        s
        + (hashed(q, k) >> jnp.uint32(8)).astype(s.dtype) * 2.0**-24
        + ((hashed(k, q) >> jnp.uint32(1)) % jnp.uint32(7) == jnp.uint32(3)).astype(
            s.dtype
        )
    ),
    "steps that rounding would move": lambda s, b, h, q, k: (
        s
        + jnp.floor((49 * k).astype(s.dtype) / 49)
        + jnp.where((k * 2).astype(s.dtype) * 0.1 - 1 <= 0, 5.0, 0.0)
        + jnp.ceil(k.astype(s.dtype) * 0.1 * 10)
    ),
    "bits": lambda s, b, h, q, k: jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(s, jnp.int32) & -256, jnp.float32
    ),
    "powers": lambda s, b, h, q, k: s**3 + jnp.abs(s) ** 2.5 + 1 / (1 + s**2) + 2.0**s,
    "roots": lambda s, b, h, q, k: jnp.sqrt(s * s + 1) + jax.lax.rsqrt(s * s + 1),
    "activations": lambda s, b, h, q, k: (
        jax.nn.gelu(s)
        + jax.nn.gelu(s, approximate=False)
        + jax.nn.softplus(s)
        + jax.nn.silu(s)
        + jax.nn.relu6(s)
    ),
    "waves": lambda s, b, h, q, k: (
        jnp.sin(s) * jnp.cos(k.astype(s.dtype)) + jnp.tan(s / 4)
    ),
    "logarithms": lambda s, b, h, q, k: (
        jnp.sign(s) * jnp.log1p(jnp.abs(s)) + jnp.log(1 + s * s) - jnp.expm1(-s * s)
    ),
    "by head": lambda s, b, h, q, k: jax.lax.select_n(
        jnp.broadcast_to(h % 3, s.shape), s, 2 * s, -s
    ),
    "a clamp": lambda s, b, h, q, k: (
        jax.lax.clamp(-1.0, s, 0.5) + jnp.clip(s, -0.3, 0.3)
    ),
    "a checkpoint": lambda s, b, h, q, k: jax.checkpoint(lambda x: x * jnp.tanh(x))(s),
    "no score": lambda s, b, h, q, k: jnp.zeros_like(s) + h.astype(s.dtype),
}


def test_functions_of_every_kind():
    compare({}, FUNCTIONS)


DECLINED: dict[str, tuple[Any, str]] = {
    "cumsum": (lambda s, b, h, q, k: s + k.cumsum(-1).astype(s.dtype), "uses cumsum"),
    "a mean": (lambda s, b, h, q, k: s - s.mean(-1, keepdims=True), "reduce_sum along"),
    "a softmax": (lambda s, b, h, q, k: jax.nn.softmax(s), "reduce_max along"),
    "a slice": (lambda s, b, h, q, k: s - s[..., :1], "slices along an axis"),
    "a flip": (lambda s, b, h, q, k: s[..., ::-1], "uses rev"),
    "a transpose": (
        lambda s, b, h, q, k: s + (q - k).swapaxes(2, 3).swapaxes(2, 3).astype(s.dtype),
        "",
    ),
    "axes that change places": (
        lambda s, b, h, q, k: s + k.reshape(1, 1, -1, 1).astype(s.dtype),
        "could not be traced",
    ),
    "a length": (
        lambda s, b, h, q, k: s * k.shape[-1],
        "depends on how many positions",
    ),
    "a length in an array": (
        lambda s, b, h, q, k: s + (TABLE[0] * k.shape[-1])[h],
        "depends on how many positions",
    ),
    "its own lengths": (
        lambda s, b, h, q, k: s + TABLE[:, :1][None, :, :, None],
        "do not match",
    ),
    "bfloat16": (
        lambda s, b, h, q, k: (s.astype(jnp.bfloat16) * 2).astype(jnp.float32),
        "converts float32 to bfloat16",
    ),
    "noise": (
        lambda s, b, h, q, k: s + jax.random.normal(jax.random.key(0), s.shape),
        "otherwise than by indexing",
    ),
    "a loop": (
        lambda s, b, h, q, k: jax.lax.fori_loop(0, 3, lambda i, x: x * 2, s),
        "uses scan",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declines_in_a_sentence(name):
    function, reason = DECLINED[name]
    if not reason:
        compare({}, {name: function})
        return
    with pytest.raises(Unsupported, match=f"its score_mod .*{reason}"):
        mod_program.score_program(function)


def test_slope_of_one_is_no_program():
    for score_mod in (raptax.ALiBi(numbers(H)), raptax.DenseBias(numbers(1, H, T, S))):
        assert mod_program.slope_program(score_mod) is None
    assert mod_program.slope_program(raptax.SoftCap(2.0)) is not None


@pytest.mark.parametrize("name", ["soft cap", "alibi", "function"])
def test_a_scale_comes_before_the_change(name):
    x = numbers(B, H, T, S)
    program = mod_program.score_program(SCORES[name], scale=0.3)
    expected = SCORES[name](0.3 * x, *HERE)
    np.testing.assert_allclose(run(program, x, CHANGE), expected, rtol=3e-6, atol=1e-6)


def test_a_scale_is_no_pass_of_its_own():
    names = list(mod_code.OPERANDS)
    for mod, expected in (("soft cap", "SoftCap"), ("alibi", "MulAdd")):
        code = mod_program.score_program(SCORES[mod], scale=0.3).code
        rows = [code[i : i + 4] for i in range(0, len(code), 4)]
        score = [names[row[0]] for row in rows].index("Score")
        read = [
            i
            for i, (op, *of) in enumerate(rows)
            if score in of[: mod_code.OPERANDS[names[op]]]
        ]
        assert read == [len(rows) - 1], mod
        assert names[rows[-1][0]] == expected


def test_arrays_may_be_traced_and_a_rebuilt_mod_retraces_nothing():
    traces = []

    @jax.jit
    def added(mod, x):
        traces.append(mod)
        return run(mod_program.score_program(mod), x, CHANGE)

    x = numbers(B, H, T, S)
    for slopes in (numbers(H), 2 * numbers(H)):
        mod = raptax.ALiBi(slopes)
        np.testing.assert_allclose(added(mod, x), mod(x, *HERE), rtol=1e-6, atol=1e-6)
    assert len(traces) == 1
    first, second = (
        mod_program.score_program(raptax.ALiBi(x)) for x in (slopes, 3 * slopes)
    )
    assert first.code == second.code


# ------------------------------------------------------------------ numbers of all kinds

UNARY: dict[str, tuple[Any, Any]] = {
    "exp": (jnp.exp, np.exp),
    "exp2": (jnp.exp2, np.exp2),
    "expm1": (jnp.expm1, np.expm1),
    "log": (jnp.log, np.log),
    "log1p": (jnp.log1p, np.log1p),
    "tanh": (jnp.tanh, np.tanh),
    "logistic": (jax.nn.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    "sqrt": (jnp.sqrt, np.sqrt),
    "floor": (jnp.floor, np.floor),
    "ceil": (jnp.ceil, np.ceil),
    "round": (jnp.round, np.round),
    "sign": (jnp.sign, np.sign),
    "is finite": (lambda x: jnp.isfinite(x).astype(jnp.float32), np.isfinite),
    "to int": (
        lambda x: x.astype(jnp.int32).astype(jnp.float32),
        lambda x: np.trunc(np.clip(np.nan_to_num(x), -(2.0**31), 2.0**31)),
    ),
    "max": (lambda x: jnp.maximum(x, 0.5), lambda x: np.maximum(x, 0.5)),
    "min": (lambda x: jnp.minimum(0.5, x), lambda x: np.minimum(0.5, x)),
    "inverse": (lambda x: 1 / x, lambda x: 1 / x),
}
ODD = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e38, -1e38, 89.0, -104.0, 1e-30, 0.5, -0.5]
ODD += [1.5, 2.5, -1.5, 3e9, -3e9, 2.0**23 + 1, 8388607.5, 128.0, 127.7, -126.0]


@pytest.mark.parametrize("name", UNARY)
def test_numbers_of_all_kinds(name):
    some = np.random.default_rng(0).normal(size=2026) * np.geomspace(1e-3, 100, 2026)
    x = np.concatenate([np.asarray(ODD), some]).astype(np.float32).reshape(1, 1, 32, 64)
    function, exact = UNARY[name]
    program = mod_program.score_program(lambda s, b, h, q, k: function(s))
    actual = np.asarray(run(program, jnp.asarray(x), CHANGE))
    with np.errstate(all="ignore"):
        expected = exact(x.astype(np.float64)).astype(np.float32)
    tiny = np.finfo(np.float32).tiny  # results that are not normal may be 0
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=2 * tiny)


def test_tanh_in_each_of_its_pieces():
    edges = np.concatenate(
        [[0.125, 9.02], *np.outer(2.0 ** np.arange(-3, 4), [1, 1.25, 1.5, 1.75])]
    )
    edges = edges.astype(np.float32)
    beside = [np.nextafter(edges, np.float32(to)) for to in (0, 20)]
    grid = np.linspace(0, 10, 2048 // 2 - 3 * edges.size, dtype=np.float32)
    x = np.concatenate([edges, *beside, grid])
    x = np.concatenate([x, -x]).reshape(1, 1, 32, 64)
    program = mod_program.score_program(lambda s, b, h, q, k: jnp.tanh(s))
    actual = run(program, jnp.asarray(x), CHANGE)
    np.testing.assert_allclose(actual, np.tanh(x.astype(np.float64)), rtol=3e-7)


@pytest.mark.parametrize("divisor", [0, 1, 2, 3, -3, 7, 8, 2**31 - 1, -(2**31)])
def test_whole_numbers_divide_as_they_do_in_jax(divisor):
    def mixed(s, b, h, q, k, divide):
        a = (q * 1000003 + k * 71) * (k - q) + jnp.where(k == 3, -(2**31), 0)
        return divide(a, jnp.full_like(a, divisor)).astype(
            jnp.float32
        ) + jnp.zeros_like(s)

    ways = {
        "//": jnp.floor_divide,
        "%": jnp.remainder,
        "div": jax.lax.div,
        "rem": jax.lax.rem,
        "by an array": lambda a, d: a // (d + jnp.where(a % 2 == 0, 1, 0)),
    }
    compare(
        {},
        {
            name: lambda *args, divide=divide: mixed(*args, divide)
            for name, divide in ways.items()
        },
    )


# -------------------------------------------------------------------- any combination

INDICES = st.sampled_from(["b", "h", "q", "k"])
WHOLE = st.recursive(
    INDICES | st.integers(-40, 40),
    lambda inner: (
        st.tuples(st.sampled_from(["+", "-", "*", "max", "min"]), inner, inner)
        | st.tuples(st.sampled_from(["//", "%"]), inner, st.integers(-9, 9))
        | st.tuples(st.sampled_from(["abs", "neg", "sign", "not", "table"]), inner)
        | st.tuples(st.sampled_from(["<<", ">>"]), inner, st.integers(0, 7))
        | st.tuples(st.sampled_from(["where<", "where==", "and", "or"]), inner, inner)
    ),
    max_leaves=9,
)
ENTRIES = jnp.asarray([5, -2, 30, 0, 7, 11, -40], jnp.int32)


def worked_out(tree: Any, at: dict[str, jax.Array]) -> Any:
    """A tree of operations on whole numbers."""
    if isinstance(tree, str):
        return at[tree]
    if isinstance(tree, int):
        return jnp.int32(tree)
    name, *inner = tree
    a, *rest = (worked_out(x, at) for x in inner)
    a = jnp.broadcast_to(a, jnp.broadcast_shapes(*(jnp.shape(x) for x in (a, *rest))))
    b = jnp.broadcast_to(rest[0], a.shape) if rest else a
    return {
        "+": lambda: a + b,
        "-": lambda: a - b,
        "*": lambda: a * b,
        "max": lambda: jnp.maximum(a, b),
        "min": lambda: jnp.minimum(a, b),
        "//": lambda: a // b,
        "%": lambda: a % b,
        "abs": lambda: jnp.abs(a),
        "neg": lambda: -a,
        "sign": lambda: jnp.sign(a),
        "not": lambda: ~a,
        "table": lambda: ENTRIES[a],
        "<<": lambda: a << b,
        ">>": lambda: a >> b,
        "where<": lambda: jnp.where(a < b, a, 3 * b),
        "where==": lambda: jnp.where(a == b, a + 1, b),
        "and": lambda: a & b,
        "or": lambda: a | b,
    }[name]()


@settings(max_examples=20, deadline=None)
@given(left=WHOLE, right=WHOLE, negated=st.booleans())
def test_any_rule_on_whole_numbers(left, right, negated):
    def rule(b, h, q, k):
        at = dict(b=b, h=h, q=q, k=k)
        x, y = (jnp.asarray(worked_out(tree, at)) for tree in (left, right))
        shape = jnp.broadcast_shapes(x.shape, y.shape)
        allowed = jnp.broadcast_to(x, shape) <= jnp.broadcast_to(y, shape)
        return ~allowed if negated else allowed | (q == k)

    compare({"rule": rule}, {})


BAD: dict[str, tuple[tuple[int, ...], str]] = {
    "cut off": ((0, 0, 0), "cut off"),
    "unknown operation": ((1000, 0, 0, 0), "unknown operation"),
    "negative operation": ((-1, 0, 0, 0), "unknown operation"),
    "itself": ((mod_code.NUMBER["Not"], 0, 0, 0), "before it is there"),
    "negative value": ((mod_code.NUMBER["Not"], -1, 0, 0), "before it is there"),
    "no array": ((0, 0, 0, 0, mod_code.NUMBER["Gather"], 0, 0, 0), "does not have"),
    "score": ((mod_code.NUMBER["Score"], 0, 0, 0), "reads the scores"),
    "too long": ((0, 0, 0, 0) * 513, "too many"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_program_is_an_error(name):
    words, reason = BAD[name]
    with pytest.raises(REFUSED, match=reason):
        run(ModProgram(words, []), numbers(1, 1, 2, 2), MASK).block_until_ready()


if __name__ == "__main__":
    compare(MASKS, {**SCORES, **FUNCTIONS})
