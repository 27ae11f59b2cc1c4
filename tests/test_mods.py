"""Every mask_mod and score_mod against its definition, one score at a time."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import raptax
from raptax import mods
from raptax._core.types import position_indices, query_positions
from raptax.kernels.blockwise import blockwise_attention
from raptax.kernels.reference import reference_attention
from raptax.mods import t5_buckets

B, H, T, S = 2, 3, 11, 14
RNG = np.random.default_rng(0)
IDS = np.array([[0, 0, 0, 1, 1, 5, 5, 5, 5, 2, 2, 0, 0], [3] * 6 + [4] * 7], np.int32)
SPANS = np.array([[-1, 0, 0, 0, -1, -1, 1, 1, 1, -2, -2, 2, 2]], np.int32)
STARTS, STOPS = np.sort(RNG.integers(0, S, (2, 2, 13)), 0).astype(np.int32)
ALLOWED = RNG.random((1, H, 12, 13)) < 0.5
PARENTS = [-1, 0, 0, 1, 2, 2, -1, 6]


def plain(b_idx, h_idx, q_idx, kv_idx):
    return (q_idx + kv_idx) % 3 > 0


def in_natten(q, k, height, width, window):
    def near(q, k, size):
        first = min(max(q - window // 2, 0), size - window)
        return first <= k < first + window

    inside = max(q, k) < height * width
    q, k = divmod(q, width), divmod(k, width)
    return inside and near(q[0], k[0], height) and near(q[1], k[1], width)


def in_tree(q, k, start):
    q, k = q - start, k - start
    if k < 0 or q < 0:
        return k <= q
    while -1 < q < len(PARENTS) and q != k:
        q = PARENTS[q]
    return q == k < len(PARENTS)


def number(lengths):
    """The document of each position, -1 after the last."""
    ids = np.repeat(np.arange(len(lengths)), lengths)
    return np.pad(ids, (0, S - len(ids)), constant_values=-1)


def within(array, *indices):
    return all(0 <= i < n for i, n in zip(indices, array.shape, strict=True))


def same(ids, q, k):
    return within(ids, q) and within(ids, k) and ids[q] == ids[k]


MASKS = {
    "causal": (lambda: raptax.Causal(), lambda b, h, q, k: k <= q),
    "sliding": (
        lambda: raptax.SlidingWindow(3),
        lambda b, h, q, k: q - 3 < k <= q,
    ),
    "window": (
        lambda: raptax.Window(3, 2),
        lambda b, h, q, k: q - 3 <= k <= q + 2,
    ),
    "no limit": (lambda: raptax.Window(None, None), lambda b, h, q, k: True),
    "dilated": (
        lambda: raptax.Window(2, 1, dilation=3),
        lambda b, h, q, k: k in (q - 6, q - 3, q, q + 3),
    ),
    "sinks": (
        lambda: raptax.SinkWindow(2, 3),
        lambda b, h, q, k: k <= q and (k < 2 or k > q - 3),
    ),
    "strided": (
        lambda: raptax.Strided(stride=4, local=2),
        lambda b, h, q, k: k in (q, q - 1, *range(q - 4, -1, -4)),
    ),
    "chunked": (
        lambda: raptax.Chunked(4),
        lambda b, h, q, k: k <= q and int(q / 4) == int(k / 4) and q >= 0,
    ),
    "blocks": (
        lambda: raptax.BlockCausal(4),
        lambda b, h, q, k: math.floor(k / 4) <= math.floor(q / 4),
    ),
    "natten": (
        lambda: raptax.Natten2D(3, 4, 3),
        lambda b, h, q, k: q >= 0 and in_natten(q, k, 3, 4, 3),
    ),
    "keys": (
        lambda: raptax.KeyLengths(jnp.array([5, 0])),
        lambda b, h, q, k: k < [5, 0][b],
    ),
    "keys, one length": (lambda: raptax.KeyLengths(5), lambda b, h, q, k: k < 5),
    "queries": (
        lambda: raptax.QueryLengths(jnp.array([5, 9])),
        lambda b, h, q, k: q < [5, 9][b],
    ),
    "prefix": (
        lambda: raptax.PrefixLM(jnp.array([5, 0])),
        lambda b, h, q, k: k <= q or k < [5, 0][b],
    ),
    "documents": (
        lambda: raptax.Documents(jnp.asarray(IDS)),
        lambda b, h, q, k: same(IDS[b], q, k),
    ),
    "one row of documents": (
        lambda: raptax.Documents(jnp.asarray(IDS[:1])),
        lambda b, h, q, k: same(IDS[0], q, k),
    ),
    "lengths of documents": (
        lambda: raptax.documents_from_lengths(jnp.array([[4, 0, 3], [9, 5, 0]]), seq=S),
        lambda b, h, q, k: (
            same(number([[4, 0, 3], [9, 5, 0]][b]), q, k) and not (b == 0 and k >= 7)
        ),
    ),
    "no documents": (
        lambda: raptax.documents_from_lengths(jnp.zeros(0, jnp.int32), seq=S),
        lambda b, h, q, k: False,
    ),
    "segments": (
        lambda: raptax.Segments(jnp.asarray(IDS[:, ::-1]), jnp.asarray(IDS), 2),
        lambda b, h, q, k: (
            within(IDS[b], q - 2) and within(IDS[b], k) and IDS[b, 14 - q] == IDS[b, k]
        ),
    ),
    "ranges": (
        lambda: raptax.KeyRanges(jnp.asarray(STARTS), jnp.asarray(STOPS)),
        lambda b, h, q, k: within(STARTS[b], q) and STARTS[b, q] <= k < STOPS[b, q],
    ),
    "spans": (
        lambda: raptax.BidirectionalSpans(jnp.asarray(SPANS)),
        lambda b, h, q, k: k <= q or (same(SPANS[0], q, k) and SPANS[0, q] >= 0),
    ),
    "tree": (
        lambda: raptax.tree_from_parents(PARENTS, start=5),
        lambda b, h, q, k: in_tree(q, k, 5),
    ),
    "trees": (
        lambda: raptax.tree_from_parents(PARENTS, start=jnp.array([0, 5])),
        lambda b, h, q, k: in_tree(q, k, [0, 5][b]),
    ),
    "dense": (
        lambda: raptax.Dense(jnp.asarray(ALLOWED)),
        lambda b, h, q, k: within(ALLOWED[0, 0], q, k) and ALLOWED[0, h, q, k],
    ),
    "offset": (
        lambda: raptax.Offset(raptax.Causal(), q=-2, kv=jnp.array([0, 1])),
        lambda b, h, q, k: k + b <= q - 2,
    ),
    "offset of a function": (
        lambda: raptax.Offset(plain, q=1),
        lambda b, h, q, k: (q + k + 1) % 3 > 0,
    ),
    "per head": (
        lambda: raptax.PerHead(
            (raptax.Causal(), plain, ~raptax.Causal()), which=jnp.array([2, 0, 1])
        ),
        lambda b, h, q, k: [k > q, k <= q, (q + k) % 3 > 0][h],
    ),
    "and, or, not": (
        lambda: raptax.Causal() & plain | ~raptax.SlidingWindow(3),
        lambda b, h, q, k: (k <= q and (q + k) % 3 > 0) or not q - 3 < k <= q,
    ),
    "xor": (
        lambda: raptax.Causal() ^ raptax.BlockCausal(4),
        lambda b, h, q, k: (k <= q) != (k // 4 <= q // 4),
    ),
    "xor of a function": (
        lambda: plain ^ raptax.Causal(),
        lambda b, h, q, k: (k <= q) != ((q + k) % 3 > 0),
    ),
}


def positions(start):
    """Indices of all scores; the first queries stand at ``start``."""
    return position_indices(
        B, H, query_positions(start, T, S), jnp.arange(S, dtype=jnp.int32)
    )


def by_definition(definition, start):
    first = np.broadcast_to(S - T if start is None else start, B)
    return np.array(
        [
            [
                [
                    [definition(b, h, int(first[b]) + t, k) for k in range(S)]
                    for t in range(T)
                ]
                for h in range(H)
            ]
            for b in range(B)
        ]
    )


@pytest.mark.parametrize(
    "start", [None, 0, jnp.array([-2, 7])], ids=["end", "0", "each its own"]
)
@pytest.mark.parametrize("name", MASKS)
def test_mask_is_its_definition(name, start):
    build, definition = MASKS[name]
    allowed = jax.jit(lambda mask, at: mask(*at))(build(), positions(start))
    expected = by_definition(definition, start)
    np.testing.assert_array_equal(np.broadcast_to(allowed, expected.shape), expected)


BIAS = RNG.normal(size=(1, H, 12, 13)).astype(np.float32)
COLUMN = RNG.normal(size=(B, 1, 1, S)).astype(np.float32)
CLIPPED = RNG.normal(size=(H, 7)).astype(np.float32)
T5 = RNG.normal(size=(8, H)).astype(np.float32)


def t5_bucket(ahead, bidirectional, buckets, max_distance):
    """T5's `_relative_position_bucket`, for one number, in its words."""
    bucket, relative = 0, ahead
    if bidirectional:
        buckets //= 2
        bucket += (relative > 0) * buckets
        relative = abs(relative)
    else:
        relative = -min(relative, 0)
    exact = buckets // 2
    if relative < exact:
        return bucket + relative
    ratio = np.log(np.float32(relative / exact)) / np.float32(
        math.log(max_distance / exact)
    )
    return bucket + min(exact + int(ratio * (buckets - exact)), buckets - 1)


SCORES = {
    "soft cap": (
        lambda: raptax.SoftCap(2.0),
        lambda x, b, h, q, k: 2 * math.tanh(x / 2),
    ),
    "alibi": (
        lambda: raptax.ALiBi(raptax.alibi_slopes(H)),
        lambda x, b, h, q, k: x - [2**-4, 2**-8, 2**-2][h] * abs(q - k),
    ),
    "temperature": (
        lambda: raptax.Temperature(jnp.array([1.0, 2.0, 3.0])),
        lambda x, b, h, q, k: x * (h + 1),
    ),
    "relative": (
        lambda: raptax.RelativeBias(jnp.asarray(CLIPPED)),
        lambda x, b, h, q, k: x + CLIPPED[h, min(max(k - q, -3), 3) + 3],
    ),
    "t5 encoder": (
        lambda: raptax.T5Bias(jnp.asarray(T5), max_distance=10),
        lambda x, b, h, q, k: x + T5[t5_bucket(k - q, True, 8, 10), h],
    ),
    "t5 decoder": (
        lambda: raptax.T5Bias(jnp.asarray(T5), bidirectional=False, max_distance=9),
        lambda x, b, h, q, k: x + T5[t5_bucket(k - q, False, 8, 9), h],
    ),
    "dense bias": (
        lambda: raptax.DenseBias(jnp.asarray(BIAS)),
        lambda x, b, h, q, k: x + (BIAS[0, h, q, k] if within(BIAS[0, 0], q, k) else 0),
    ),
    "bias per key": (
        lambda: raptax.DenseBias(jnp.asarray(COLUMN)),
        lambda x, b, h, q, k: x + COLUMN[b, 0, 0, k],
    ),
    "offset bias": (
        lambda: raptax.Offset(raptax.RelativeBias(jnp.asarray(CLIPPED)), kv=2),
        lambda x, b, h, q, k: x + CLIPPED[h, min(max(k + 2 - q, -3), 3) + 3],
    ),
    "masked": (
        lambda: raptax.MaskedScore(raptax.SlidingWindow(3)),
        lambda score, b, h, q, k: score if q - 3 < k <= q else -np.inf,
    ),
    "log n": (
        lambda: raptax.LogN(5),
        lambda x, b, h, q, k: x * max(1, math.log(max(q + 1, 1)) / math.log(5)),
    ),
}


@pytest.mark.parametrize("start", [None, jnp.array([-2, 7])], ids=["end", "its own"])
@pytest.mark.parametrize("name", SCORES)
def test_score_change_is_its_definition(name, start):
    build, definition = SCORES[name]
    x = RNG.normal(size=(B, H, T, S)).astype(np.float32)
    out = jax.jit(lambda mod, x, at: mod(x, *at))(build(), x, positions(start))
    first = np.broadcast_to(S - T if start is None else start, B)
    expected = [
        definition(float(x[b, h, t, k]), b, h, int(first[b]) + t, k)
        for b, h, t, k in np.ndindex(x.shape)
    ]
    np.testing.assert_allclose(out.reshape(-1), expected, rtol=2e-6, atol=1e-6)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    half = build()(jnp.asarray(x, jnp.bfloat16), *positions(start))
    assert half.dtype == jnp.bfloat16


def test_t5_buckets_are_those_of_the_paper_s_code():
    """First distance of each of the 16 buckets on a side of an encoder."""
    buckets = t5_buckets(16, 128)
    assert np.flatnonzero(np.diff(buckets, prepend=-1)).tolist() == [
        *range(8),
        *(8, 12, 16, 23, 32, 46, 64, 91),
    ]
    assert buckets[-1] == 15


@pytest.mark.parametrize("name", ["relative", "t5 encoder", "dense bias"])
def test_what_is_learned_gets_a_gradient(name):
    q = jnp.asarray(RNG.normal(size=(1, H, 12, 4)), jnp.float32)

    def loss(mod, kernel):
        return (kernel(q, q, q, score_mod=mod, mask_mod=raptax.Causal()) ** 2).sum()

    mod = SCORES[name][0]()
    got, expected = (
        jax.tree.leaves(jax.grad(loss)(mod, kernel))[0]
        for kernel in (blockwise_attention, reference_attention)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 1e-3


# ---------------------------------------------------------------------------- as values

VALUES = {**MASKS, **SCORES}


@pytest.mark.parametrize("name", VALUES)
def test_a_mod_is_a_value(name):
    build = VALUES[name][0]
    mod = build()
    assert build() == mod
    assert mod not in [VALUES[other][0]() for other in VALUES if other != name]
    if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(mod)):
        assert hash(build()) == hash(mod)
    assert repr(mod).startswith(type(mod).__name__)
    numbers = all(isinstance(leaf, int | float) for leaf in jax.tree.leaves(mod))
    if numbers and "plain" not in repr(mod):
        assert eval(repr(mod), vars(mods)) == mod
    leaves, structure = jax.tree.flatten(mod)
    assert jax.tree.unflatten(structure, leaves) == mod


@pytest.mark.parametrize("name", VALUES)
def test_building_a_mod_again_does_not_retrace(name):
    build, traces = VALUES[name][0], []

    @jax.jit
    def run(mod, x):
        traces.append(None)
        at = positions(None)
        return mod(*at) if name in MASKS else mod(x, *at)

    for _ in range(5):
        run(build(), jnp.ones((B, H, T, S), jnp.float32))
    assert len(traces) == 1


def test_every_public_mask_is_defined_here():
    built = {type(build()) for build, _ in VALUES.values()}
    classes = [c for _, c in inspect.getmembers(raptax, inspect.isclass)]
    ours = {c for c in classes if c.__module__.startswith(mods.__name__)}
    assert ours <= built


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: raptax.Window(-1), "left=-1 must be at least 0"),
        (lambda: raptax.Window(1, -2), "right=-2 must be at least 0"),
        (lambda: raptax.Window(1, dilation=0), "dilation=0 must be at least 1"),
        (lambda: raptax.SinkWindow(-1, 4), "sinks=-1 must be at least 0"),
        (lambda: raptax.SinkWindow(4, 0), "size=0 must be at least 1"),
        (lambda: raptax.Strided(0, 4), "stride=0 must be at least 1"),
        (lambda: raptax.Chunked(0), "size=0 must be at least 1"),
        (lambda: raptax.BlockCausal(-1), "size=-1 must be at least 1"),
        (lambda: raptax.Natten2D(4, 4, 2), "window=2 must be odd"),
        (lambda: raptax.Natten2D(4, 4, 5), "fit into height=4 and width=4"),
        (lambda: raptax.PerHead((), jnp.zeros(2, jnp.int32)), "at least one mask"),
        (lambda: raptax.Offset(3), "must be callable; got 3"),
        (lambda: raptax.tree_from_parents([0]), r"parents\[0\]=0 must name an earlier"),
        (lambda: raptax.tree_from_parents([-1, -2]), r"parents\[1\]=-2"),
        (
            lambda: raptax.documents_from_lengths(jnp.array([3, 4]), seq=6),
            r"lengths=\[3, 4\] must not be negative, nor add up to more than seq=6",
        ),
        (
            lambda: raptax.documents_from_lengths(jnp.array([3, -1]), seq=6),
            "must not be negative",
        ),
        (lambda: raptax.LogN(1), "train_length=1 must be at least 2"),
        (lambda: raptax.SoftCap(0.0), "cap=0.0 must be a positive"),
        (lambda: t5_buckets(1, 128), "1 buckets on a side"),
        (lambda: t5_buckets(32, 16), "less than max_distance=16"),
    ],
)
def test_a_senseless_number_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_lengths_of_documents_may_be_traced():
    @jax.jit
    def ids(lengths):
        return raptax.documents_from_lengths(lengths, seq=S).starts

    assert ids(jnp.array([3, 2])).tolist() == [[0] * 3 + [3] * 2 + [S] * 9]
    assert ids(jnp.array([0, 14])).tolist() == [[0] * 14]


def test_nothing_to_see():
    at = position_indices(1, 1, query_positions(0, 3, 0), jnp.zeros(0, jnp.int32))
    for build, _ in MASKS.values():
        assert build()(*at).shape[-1] in (0, 1)


def test_masks_of_two_types_have_two_structures():
    """Or jit may take the program of one for the other, whose arrays look alike."""
    ids = jnp.zeros((2, 3), jnp.int32)
    values = [
        raptax.Documents(ids),
        raptax.BidirectionalSpans(ids),
        raptax.KeyLengths(ids[0]),
        raptax.QueryLengths(ids[0]),
        raptax.PrefixLM(ids[0]),
        raptax.Causal() & raptax.Documents(ids),
        raptax.Causal() | raptax.Documents(ids),
        raptax.Causal() & raptax.BidirectionalSpans(ids),
        ~raptax.Documents(ids),
        raptax.SlidingWindow(3),
        raptax.Window(3),
        raptax.Window(3, None),
        raptax.Chunked(3),
        raptax.BlockCausal(3),
    ]
    structures = [jax.tree.structure(value) for value in values]
    for n, structure in enumerate(structures):
        assert structure == jax.tree.structure(values[n])
        assert all(structure != other for other in structures[:n])
