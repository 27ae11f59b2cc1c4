"""Tiles against the whole mask: never called empty or full when they are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import core

import raptax
from raptax import create_block_mask
from raptax._core.pytree import pytree
from raptax._core.types import position_indices, query_positions
from raptax.mods.combine import Mask

B, H = 2, 3
SHAPES = [(50, 50), (33, 50), (50, 33), (1, 40), (5, 3)]
BLOCKS = [(8, 8), (7, 4), (16, 64)]


def whole(mask, T, S, start=None):
    """The mask itself; `mask_mod_to_boolean_mask` with a choice of start."""
    q_idx, kv_idx = query_positions(start, T, S), jnp.arange(S, dtype=jnp.int32)
    allowed = mask(*position_indices(B, H, q_idx, kv_idx))
    return np.broadcast_to(allowed, (B, H, T, S))


def looked_at(allowed, block):
    """The kinds of all tiles, from all scores."""
    T, S = allowed.shape[2:]
    rows, columns = (range(0, n, size) for n, size in zip((T, S), block, strict=True))
    kinds = np.zeros((B, H, len(rows), len(columns)), np.int8)
    for i, j in np.ndindex(kinds.shape[2:]):
        tile = allowed[:, :, rows[i] :, columns[j] :][:, :, : block[0], : block[1]]
        kinds[:, :, i, j] = tile.any((2, 3)).astype(int) + tile.all((2, 3))
    return kinds


def create(mask, T, S, block, start=None):
    """The kinds that are found, for every sequence and head."""
    made = create_block_mask(
        mask, batch=B, heads=H, seq_q=T, seq_kv=S, block=block, query_start=start
    )
    assert made.kinds.dtype == jnp.int8
    assert made.kinds.shape == (
        made.batch or 1,
        made.heads or 1,
        -(-T // block[0]),
        -(-S // block[1]),
    )
    return np.broadcast_to(made.kinds, (B, H, *made.kinds.shape[2:]))


def ordered(rng, *shape):
    return jnp.asarray(np.sort(rng.integers(0, 5, shape), -1), jnp.int32)


# --------------------------------------------------------------------------- any mask


def leaf(kind, seed, a, b):
    """One mask of any kind for S positions, with arrays of any numbers."""

    def build(S):
        rng = np.random.default_rng(seed)
        ids = jnp.asarray(rng.integers(-2, 3, (1 + a % B, S)), jnp.int32)
        limits = jnp.asarray(rng.integers(-3, S + 3, (2, B, S)), jnp.int32)
        return {
            "causal": lambda: raptax.Causal(),
            "sliding": lambda: raptax.SlidingWindow(b),
            "window": lambda: raptax.Window(a, b, dilation=1 + seed % 5),
            "one_side": lambda: raptax.Window(None, a),
            "sinks": lambda: raptax.SinkWindow(a, b),
            "strided": lambda: raptax.Strided(stride=b, local=a + 1),
            "chunked": lambda: raptax.Chunked(b),
            "blocks": lambda: raptax.BlockCausal(b),
            "natten": lambda: raptax.Natten2D(4, b + 2, 3),
            "keys": lambda: raptax.KeyLengths(limits[0, :, 0]),
            "queries": lambda: raptax.QueryLengths(a),
            "prefix": lambda: raptax.PrefixLM(limits[0, :, 0]),
            "ids": lambda: raptax.Documents(ids),
            "documents": lambda: raptax.Documents(jnp.sort(ids)),
            "ranges": lambda: raptax.KeyRanges(*limits),
            "ordered_ranges": lambda: raptax.KeyRanges(*jnp.sort(limits)),
            "spans": lambda: raptax.BidirectionalSpans(ids),
            "tree": lambda: raptax.tree_from_parents([-1, 0, 0, 1, 1, 4], start=a),
            "dense": lambda: raptax.Dense(
                jnp.asarray(rng.random((1, H, S, S)) < b / 20)
            ),
            "sines": lambda: sines,
            "arithmetic": lambda: arithmetic,
        }[kind]()

    return build


KINDS = (
    "causal sliding window one_side sinks strided chunked blocks natten keys queries "
    "prefix ids documents ranges ordered_ranges spans tree dense sines arithmetic"
)


def sines(b_idx, h_idx, q_idx, kv_idx):
    return jnp.sin((q_idx * kv_idx + h_idx).astype(jnp.float32)) < 0.9


def arithmetic(b_idx, h_idx, q_idx, kv_idx):
    back = jnp.abs(q_idx - kv_idx)
    near = back**2 - q_idx * (h_idx + 1) < jnp.where(kv_idx > 9, 50, b_idx)
    return near | (back.astype(jnp.float32) * 0.5 > (kv_idx >> 2).astype(jnp.float32))


def grow(masks):
    """Masks of masks; each is a function of S, so that arrays are made in the test."""
    one, two = raptax.and_masks, [masks, masks]
    shifts = st.integers(-9, 9)
    which = st.lists(st.integers(0, 1), min_size=H, max_size=H)
    return st.one_of(
        st.builds(lambda x, y: lambda S: one(x(S), y(S)), *two),
        st.builds(lambda x, y: lambda S: raptax.or_masks(x(S), y(S)), *two),
        st.builds(lambda x, y: lambda S: one(x(S)) ^ y(S), *two),
        st.builds(lambda x: lambda S: ~one(x(S)), masks),
        st.builds(
            lambda x, q, kv: lambda S: raptax.Offset(x(S), q, kv), masks, shifts, shifts
        ),
        st.builds(
            lambda x, y, n: lambda S: raptax.PerHead((x(S), y(S)), jnp.array(n)),
            *two,
            which,
        ),
    )


LEAVES = st.builds(
    leaf,
    st.sampled_from(KINDS.split()),
    st.integers(0, 99),
    st.integers(0, 20),
    st.integers(1, 20),
)
STARTS = {"end": None, "first": 0, "own": np.array([3, -4], np.int32)}


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    st.recursive(LEAVES, grow, max_leaves=4),
    st.sampled_from(SHAPES),
    st.sampled_from(BLOCKS),
    st.sampled_from(sorted(STARTS)),
)
def test_no_tile_is_called_what_it_is_not(build, shape, block, start):
    start = STARTS[start]
    start = start if start is None else jnp.asarray(start)
    mask = raptax.and_masks(build(shape[1]))
    kinds = create(mask, *shape, block, start)
    truth = looked_at(whole(mask, *shape, start), block)
    assert (kinds[kinds != 1] == truth[kinds != 1]).all()


# --------------------------------------------------------------------- decided exactly


def exact_masks(S):
    rng = np.random.default_rng(0)
    causal, window = raptax.Causal(), raptax.SlidingWindow(9)
    lengths = jnp.array([[10, 0, 15, 3]])
    documents = raptax.Documents(ordered(rng, B, S))
    return {
        "causal": causal,
        "not causal": ~causal,
        "window": window,
        "two sides": raptax.Window(5, 3),
        "one side": raptax.Window(None, 4),
        "chunks": raptax.Chunked(10),
        "blocks": raptax.BlockCausal(10),
        "keys": raptax.KeyLengths(jnp.array([20, 0])),
        "queries": raptax.QueryLengths(17),
        "prefix": raptax.PrefixLM(jnp.array([13, 2])),
        "documents": documents,
        "one row of documents": raptax.Documents(ordered(rng, 1, S)),
        "lengths": raptax.documents_from_lengths(jnp.clip(lengths, 0, S // 4), seq=S),
        "offset": raptax.Offset(causal, q=-5, kv=jnp.array([0, 2])),
        "per head": raptax.PerHead((causal, window), jnp.array([0, 1, 0])),
        "all": causal & window & documents,
    }


@pytest.mark.parametrize("name", exact_masks(8))
def test_what_structure_decides_is_exact(name):
    for (T, S), block in zip(SHAPES[:3], BLOCKS, strict=True):
        mask = exact_masks(S)[name]
        truth = looked_at(whole(mask, T, S), block)
        np.testing.assert_array_equal(create(mask, T, S, block), truth)


def pixels(b_idx, h_idx, q_idx, kv_idx):
    """Float arithmetic without a rule, and a condition that decides by itself."""
    return (jnp.sin(q_idx.astype(jnp.float32)) > 0.3) & (kv_idx <= q_idx)


def remainder(q_idx, kv_idx):
    return jax.lax.population_count(q_idx + kv_idx)


LOOKED_AT = {
    "unknown": sines,
    "unknown in part": pixels,
    "dense": raptax.Dense(
        jnp.asarray(np.random.default_rng(0).random((B, 1, 50, 50)) < 0.98)
    ),
    "tree": raptax.tree_from_parents([-1, 0, 0, 1, 2, 4], start=30),
    "namesake": lambda b, h, q, k: jax.jit(remainder)(q, k) % 5 > 0,
    "unsigned": lambda b, h, q, k: (q - k).astype(jnp.uint32) * jnp.uint32(3) < 90,
}


@pytest.mark.parametrize("name", LOOKED_AT)
def test_what_has_no_rule_is_looked_at(name):
    mask = raptax.and_masks(LOOKED_AT[name])
    for (T, S), start in zip(SHAPES, [None, jnp.array([0, 9])], strict=False):
        truth = looked_at(whole(mask, T, S, start), (7, 4))
        np.testing.assert_array_equal(create(mask, T, S, (7, 4), start), truth)


def every_equation(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr)),
        ):
            if isinstance(inner, core.ClosedJaxpr):
                inner = inner.jaxpr
            if isinstance(inner, core.Jaxpr):
                yield from every_equation(inner)


def test_nothing_is_larger_than_the_tiles():
    """And structure never pays for looking: there is no loop."""
    S, tiles = 65536, 512

    def run(ids, start):
        mask = raptax.Causal() & raptax.SlidingWindow(4096) & raptax.Documents(ids)
        return create_block_mask(mask, seq_q=S, seq_kv=S, query_start=start).kinds

    ids = jax.ShapeDtypeStruct((1, S), jnp.int32)
    closed = jax.make_jaxpr(run)(ids, jax.ShapeDtypeStruct((), jnp.int32))
    equations = list(every_equation(closed.jaxpr))
    assert len(equations) > 50
    assert max(x.aval.size for eqn in equations for x in eqn.outvars) == tiles**2
    assert not {"scan", "while", "cond"} & {eqn.primitive.name for eqn in equations}


def test_looking_takes_one_tile_at_a_time():
    S, tiles, block = 4096, 32, 128
    closed = jax.make_jaxpr(
        lambda: create_block_mask(sines, seq_q=S, seq_kv=S).kinds,
    )()
    equations = list(every_equation(closed.jaxpr))
    assert max(x.aval.size for eqn in equations for x in eqn.outvars) <= block**2
    assert tiles**2 < block**2


# --------------------------------------------------------------------------- its shape


@pytest.mark.parametrize(
    ("mask", "batch", "heads"),
    [
        (raptax.Causal(), None, None),
        (raptax.KeyLengths(jnp.array([3, 9])), B, None),
        (raptax.KeyLengths(jnp.array([3])), None, None),
        (raptax.Documents(jnp.zeros((1, 9), jnp.int32)), None, None),
        (raptax.PerHead((raptax.Causal(),), jnp.zeros(H, jnp.int32)), None, None),
        (raptax.Dense(jnp.ones((1, H, 9, 9), bool)), None, H),
        (lambda b, h, q, k: jnp.zeros_like(b + h) == 0, None, None),
        (lambda b, h, q, k: k < b + h, B, H),
        (lambda b, h, q, k: k < jnp.array([3, 9]).reshape(B, 1, 1, 1), B, None),
        (lambda b, h, q, k: jnp.array(True), None, None),
    ],
)
def test_axes_are_those_the_mask_depends_on(mask, batch, heads):
    made = create_block_mask(mask, batch=B, heads=H, seq_q=9, seq_kv=9, block=(4, 4))
    assert (made.batch, made.heads) == (batch, heads)
    assert made.kinds.shape == (batch or 1, heads or 1, 3, 3)
    truth = looked_at(whole(mask, 9, 9), (4, 4))
    np.testing.assert_array_equal(*np.broadcast_arrays(made.kinds, truth))


def test_each_sequence_may_start_elsewhere():
    sizes = dict(batch=B, seq_q=4, seq_kv=8, block=(4, 4))
    starts = jnp.array([0, 4])
    made = create_block_mask(raptax.Causal(), **sizes, query_start=starts)
    assert made.batch == B
    assert made.kinds.tolist() == [[[[1, 0]]], [[[2, 1]]]]
    made = create_block_mask(
        lambda b, h, q, k: jnp.zeros_like(q) == 0, **sizes, query_start=starts
    )
    assert (made.batch, made.kinds.tolist()) == (None, [[[[2, 2]]]])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((16, 9), "was made for seq_q=9; got 16"),
        ((9, 16), "was made for seq_kv=9; got 16"),
        ((9, 9, 3), "was made for batch=2; got 3"),
    ],
)
def test_other_lengths_are_refused(asked, message):
    mask = raptax.KeyLengths(jnp.array([3, 9]))
    made = create_block_mask(mask, batch=B, heads=H, seq_q=9, seq_kv=9, block=(4, 4))
    made.check(9, 9)
    made.check(9, 9, batch=B, heads=77)  # one row of kinds serves any number of heads
    with pytest.raises(ValueError, match=message):
        made.check(*asked[:2], batch=asked[2] if asked[2:] else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seq_q=-1), "seq_q=-1 must not be negative"),
        (dict(block=(0, 4)), r"block=\(0, 4\) must be \(queries, keys\)"),
        (dict(query_start=jnp.zeros(3, jnp.int32)), "query_start has 3 numbers"),
        (dict(mask_mod=lambda b, h, q, k: q - k), "it returned int32"),
        (
            dict(mask_mod=lambda b, h, q, k: jnp.ones((1, 1, 9, 1), bool) & (k <= q)),
            r"it returned \(1, 1, 9, 1\). Index the arrays it captures",
        ),
    ],
)
def test_a_slip_is_named(change, message):
    given = dict(mask_mod=raptax.Causal(), batch=B, seq_q=9, seq_kv=9)
    with pytest.raises(ValueError, match=message):
        create_block_mask(**{**given, **change})


@pytest.mark.parametrize("empty", ["batch", "heads", "seq_q", "seq_kv"])
def test_nothing_at_all(empty):
    sizes = {**dict(batch=B, heads=H, seq_q=9, seq_kv=9), empty: 0}
    made = create_block_mask(raptax.Causal(), **sizes, block=(4, 4))
    rows, columns = -(-sizes["seq_q"] // 4), -(-sizes["seq_kv"] // 4)
    assert made.kinds.shape == (1, 1, rows, columns)
    assert made.sparsity() == 100
    assert str(made).startswith("BlockMask(")


# ---------------------------------------------------------------------- values, tracing


def test_picture():
    mask = raptax.Causal() & raptax.SlidingWindow(9)
    made = create_block_mask(mask, seq_q=24, seq_kv=24, block=(4, 4))
    assert str(made).splitlines() == [
        "BlockMask(B=1, H=1, T=24, S=24, block=4x4, 58.33% empty)",
        "░     ",
        "█░    ",
        "░█░   ",
        " ░█░  ",
        "  ░█░ ",
        "   ░█░",
    ]
    assert made.sparsity() == pytest.approx(100 * 21 / 36)


def test_a_large_picture_is_coarse():
    made = create_block_mask(raptax.Causal(), seq_q=5000, seq_kv=9000, block=(16, 16))
    _, *rows = str(made).splitlines()
    assert len(rows) <= 30
    assert {len(row) for row in rows} == {57}
    assert rows[0][0] == rows[-1][0] == "█"
    assert rows[0][-1] == " "


def test_a_block_mask_is_a_value():
    def build():
        mask = raptax.Documents(jnp.array([[0, 0, 1, 1]]))
        return create_block_mask(mask, seq_q=4, seq_kv=4, block=(2, 2))

    assert build() == build()
    out = jax.jit(lambda made: made)(build())
    assert out == build()
    traced = []
    jax.jit(lambda made: traced.append(str(made)))(build())
    assert traced == ["BlockMask(B=1, H=1, T=4, S=4, block=2x2, traced)"]


@pytree
class Counted(Mask):
    """Sees keys below a number, and counts how often it is traced."""

    number: jax.Array
    traces = []  # noqa: RUF012

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        self.traces.append(None)
        return kv_idx < self.number


def test_new_numbers_compile_nothing():
    def build(number, start):
        sizes = dict(seq_q=8, seq_kv=8, block=(4, 4))
        mask = Counted(jnp.asarray(number))
        return create_block_mask(mask, **sizes, query_start=start)

    assert build(4, 0).kinds.tolist() == [[[[2, 0], [2, 0]]]]
    traced = len(Counted.traces)
    assert build(5, 3).kinds.tolist() == [[[[2, 1], [2, 1]]]]
    jitted = jax.jit(build)
    jitted(4, 0)
    inside = len(Counted.traces)
    assert jitted(8, 2).kinds.tolist() == [[[[2, 2], [2, 2]]]]
    assert (traced > 0, len(Counted.traces)) == (True, inside)


def made_from(length):
    """Kinds of a mask that captures a traced number, in two ways."""

    def shorter(b_idx, h_idx, q_idx, kv_idx):
        return (kv_idx < length) & (sines(b_idx, h_idx, q_idx, kv_idx) | (q_idx < 8))

    mask = raptax.KeyLengths(length) & shorter
    return create_block_mask(mask, seq_q=8, seq_kv=16, block=(4, 4)).kinds


def in_while_loop(number):
    """One turn, in which the number is part of the state."""
    kinds = jnp.zeros((1, 1, 2, 4), jnp.int8)
    out = jax.lax.while_loop(
        lambda state: state[0] < number,
        lambda state: (state[0] + 1, made_from(state[0] + 1)),
        (number - 1, kinds),
    )
    return out[1]


LOOPS = {
    "jit": lambda ns: jnp.stack([jax.jit(made_from)(n) for n in ns]),
    "vmap": jax.vmap(made_from),
    "scan": lambda ns: jax.lax.scan(lambda _, n: (None, made_from(n)), None, ns)[1],
    "map in jit": jax.jit(lambda ns: jax.lax.map(made_from, ns)),
    "remat": jax.vmap(jax.checkpoint(made_from)),
    "cond": lambda ns: jnp.stack(
        [jax.lax.cond(n > 0, made_from, made_from, n) for n in ns]
    ),
    "while": jax.vmap(in_while_loop),
}


@pytest.mark.parametrize("name", LOOPS)
def test_traced_wherever(name):
    numbers = jnp.array([0, 5, 16])
    expected = np.stack([made_from(n) for n in numbers])
    np.testing.assert_array_equal(LOOPS[name](numbers), expected)
