"""Attention under masks of masks, against a softmax over the mask score by score.

Masks are drawn, given as they are, as a block mask, and to a kernel that looks for empty
tiles by itself; then they travel as traced values through everything JAX does to values.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, note, settings
from hypothesis import strategies as st
from jax import export, lax

import raptax
from raptax import attention, create_block_mask
from raptax._core.types import position_indices
from raptax.kernels import blockwise, tiles
from raptax.kernels.tiles import Tile
from tests.test_block_mask import LEAVES, grow

D, E = 4, 3


def arrays(B, H, K, T, S, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, H, T, D), (B, K, S, D), (B, K, S, E)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


def score_by_score(mask, B, H, T, S, start=None):
    """The mask of (B, H, T, S), asked about each score by its own four numbers."""
    start = np.full(B, S - T) if start is None else np.broadcast_to(start, B)
    q_idx = start.astype(np.int32)[:, None] + np.arange(T, dtype=np.int32)
    at = position_indices(B, H, jnp.asarray(q_idx), jnp.arange(S, dtype=jnp.int32))
    each = jnp.broadcast_arrays(*at)
    return np.broadcast_to(jax.jit(lambda mask: mask(*each))(mask), (B, H, T, S))


class Softmax(NamedTuple):
    """All of attention in float64, from scores that are all there at once."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    weights: np.ndarray
    out: np.ndarray
    lse: np.ndarray

    @classmethod
    def of(cls, q, k, v, allowed) -> "Softmax":
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
        groups = q.shape[1] // k.shape[1]
        k, v = (np.repeat(x, groups, axis=1) for x in (k, v))
        scores = np.where(allowed, q @ k.swapaxes(2, 3) * q.shape[3] ** -0.5, -np.inf)
        with np.errstate(divide="ignore"):
            lse = np.log(np.exp(scores).sum(-1))
        weights = np.exp(scores - np.where(np.isneginf(lse), 0, lse)[..., None])
        return cls(q, k, v, weights, weights @ v, lse)

    def pull(self, d_out, kv_heads: int) -> tuple[np.ndarray, ...]:
        """Gradients of ``(out * d_out).sum()`` with respect to query, key and value."""
        B, H, _, size = self.q.shape
        d_out, weights = np.asarray(d_out, np.float64), self.weights
        d_weights = d_out @ self.v.swapaxes(2, 3)
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
        d_scores *= size**-0.5
        by_head = d_scores.swapaxes(2, 3) @ self.q, weights.swapaxes(2, 3) @ d_out
        shape = B, kv_heads, H // kv_heads
        d_k, d_v = (x.reshape(*shape, *x.shape[2:]).sum(2) for x in by_head)
        return d_scores @ self.k, d_k, d_v


# -------------------------------------------------------------------- any mask, any way


class Case(NamedTuple):
    """A mask, as a function of the number of keys, and what it is asked about."""

    build: Any
    B: int
    heads: tuple[int, int]  # of queries, of keys
    T: int
    S: int
    block: tuple[int, int]
    start: tuple[int, ...] | None  # None, one for all, or one for each


@st.composite
def cases(draw):
    B, starts = draw(st.integers(1, 2)), st.integers(-4, 40)
    own = st.tuples(*[starts] * B)
    return Case(
        build=draw(st.recursive(LEAVES, grow, max_leaves=4)),
        B=B,
        heads=draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)])),
        T=draw(st.integers(1, 40)),
        S=draw(st.integers(1, 40)),
        block=draw(st.sampled_from([(8, 8), (7, 4), (16, 64), (3, 5), (1, 9)])),
        start=draw(st.one_of(st.none(), st.tuples(starts), own)),
    )


def with_small_tiles(block, *args, **options):
    """`attention` as it is where there are many tiles, though these be small."""
    small = lambda B, H, T, S: Tile(min(block[0], T), min(block[1], S))
    with pytest.MonkeyPatch.context() as patch:
        # Without its cache of programs, which does not know that it has been changed.
        patch.setattr(blockwise, "_blockwise", blockwise._blockwise.__wrapped__)
        patch.setattr(blockwise, "tile_sizes", small)
        patch.setattr(tiles, "MANY_TILES", 0)
        return attention(*args, **options)


def every_way(case: Case, mask, start, q, k, v):
    """The output and log-sum-exp as each of three ways to say the same gives them."""
    options = dict(return_lse=True, kernel="blockwise")
    sizes = dict(batch=case.B, heads=case.heads[0], seq_q=case.T, seq_kv=case.S)
    tiles = create_block_mask(mask, **sizes, block=case.block, query_start=start)
    options_here = options | dict(mask_mod=mask, query_start=start)
    return {
        "a mask": attention(q, k, v, **options_here),
        "a block mask": attention(q, k, v, mask_mod=tiles, **options),
        "small tiles": with_small_tiles(case.block, q, k, v, **options_here),
    }


def fitted(mask, B, H):
    """A mask of `LEAVES`, made for 2 sequences and 3 heads, for B and H of them."""

    def cut(x):
        if x.shape == (3,):  # which mask a head of PerHead follows
            return jnp.resize(x, H)
        if x.ndim == 4:  # Dense
            return x[:, jnp.arange(H) % 3]
        return x[:B]

    return jax.tree.map(lambda x: cut(x) if getattr(x, "ndim", 0) else x, mask)


def check(case: Case) -> None:
    """Every way gives what the softmax over all scores gives."""
    B, (H, K), T, S = case.B, case.heads, case.T, case.S
    mask = fitted(raptax.and_masks(case.build(S)), B, H)
    note(f"{mask} {case}")
    start = case.start
    if start is not None:
        start = jnp.asarray(start if len(start) == B else start[0], jnp.int32)
    q, k, v = arrays(B, H, K, T, S)
    allowed = score_by_score(mask, B, H, T, S, case.start)
    expected, blind = Softmax.of(q, k, v, allowed), ~allowed.any(-1)
    run = jax.jit(lambda *args: every_way(case, *args))
    for name, (out, lse) in run(mask, start, q, k, v).items():
        assert (np.asarray(out)[blind] == 0).all(), name
        assert (np.asarray(lse)[blind] == -np.inf).all(), name
        np.testing.assert_allclose(out, expected.out, rtol=0, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(lse, expected.lse, rtol=0, atol=1e-5, err_msg=name)


def first_keys_only(S):
    return raptax.Causal() & raptax.KeyLengths(jnp.array([S, 0]))


ROWS_WITHOUT_KEYS = Case(first_keys_only, 2, (4, 2), 21, 13, (4, 3), None)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(cases())
@example(ROWS_WITHOUT_KEYS)
def test_a_drawn_mask(case):
    check(case)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(cases())
def test_many_drawn_masks(case):
    check(case)


# ----------------------------------------------------------------- masks as traced values

N, SIZES, BLOCK = 3, (2, 2, 1, 9, 14), (4, 8)
Q, K, V = arrays(*SIZES)
W = arrays(*SIZES, seed=1)[0][..., :E]  # what gradients are asked for


def numbers(low, high, *shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(low, high, (N, *shape)), jnp.int32)


def bits(*shape):
    return jnp.asarray(np.random.default_rng(3).random((N, *shape)) < 0.4)


def mixed(lengths, ids):
    return raptax.Causal() & raptax.Documents(ids) | raptax.KeyLengths(lengths)


LENGTHS = jnp.array([[0, 5], [14, 1], [3, 0]], jnp.int32)
IDS = jnp.sort(numbers(0, 4, 2, 14, seed=2))

# `N` masks of one structure, their arrays stacked.
STACKED = {
    "one length": raptax.KeyLengths(jnp.array([0, 5, 14], jnp.int32)),
    "lengths": raptax.Causal() & raptax.KeyLengths(LENGTHS),
    "query lengths": raptax.QueryLengths(LENGTHS + 3),
    "prefix": raptax.PrefixLM(LENGTHS),
    "documents": raptax.Documents(IDS),
    "segments": raptax.Segments(IDS[:, :, 5:], IDS, jnp.array([5, 6, 4], jnp.int32)),
    "ranges": raptax.KeyRanges(numbers(-2, 9, 2, 14), numbers(4, 16, 1, 14)),
    "spans": raptax.BidirectionalSpans(IDS - 2),
    "tree": raptax.Tree(bits(1, 6, 6), jnp.array([8, 3, 9], jnp.int32)),
    "dense": raptax.Dense(bits(2, 1, 14, 14)),
    "offset": raptax.Offset(raptax.SlidingWindow(3), LENGTHS - 4, LENGTHS[:, ::-1]),
    "per head": ~raptax.PerHead((raptax.Causal(), raptax.Chunked(4)), LENGTHS % 2),
    "mixed": mixed(LENGTHS, IDS),
}
# Numbers are leaves as well, and are stacked like the arrays.
STACKED = {
    name: jax.tree.map(lambda x: x if np.ndim(x) else jnp.full(N, x, jnp.int32), mask)
    for name, mask in STACKED.items()
}


def by_mask(mask, q, k, v):
    return attention(q, k, v, mask_mod=mask, return_lse=True, kernel="blockwise")


def by_tiles(mask, q, k, v):
    B, H, _, T, S = SIZES
    sizes = dict(batch=B, heads=H, seq_q=T, seq_kv=S, block=BLOCK)
    return by_mask(create_block_mask(mask, **sizes), q, k, v)


WAYS = pytest.mark.parametrize("attend", [by_mask, by_tiles])


def slow_unless(values, quick):
    """Values to test with, most of them with the slow tests."""
    marks = lambda value: () if quick(value) else pytest.mark.slow
    return [pytest.param(value, marks=marks(value)) for value in values]


def one_by_one(stacked):
    """The softmax of each of the stacked masks."""
    B, H, _, T, S = SIZES
    for n in range(N):
        mask = jax.tree.map(lambda x, n=n: x[n], stacked)
        yield Softmax.of(Q, K, V, score_by_score(mask, B, H, T, S))


def compare(actual, expected, atol=1e-5):
    for a, e in zip(jax.tree.leaves(actual), expected, strict=True):
        np.testing.assert_allclose(a, np.asarray(e), rtol=0, atol=atol)


QUICK = "per head", "mixed"


@pytest.mark.parametrize("name", slow_unless(STACKED, QUICK.__contains__))
def test_vmap_over_the_arrays_of_a_mask(name):
    masks = STACKED[name]
    both = lambda mask: (by_mask(mask, Q, K, V), by_tiles(mask, Q, K, V))
    expected = list(one_by_one(masks))
    for out, lse in jax.jit(jax.vmap(both))(masks):
        compare((out, lse), ([x.out for x in expected], [x.lse for x in expected]))


def in_turn(attend, masks, q, k, v):
    return lax.scan(lambda _, mask: (None, attend(mask, q, k, v)), None, masks)[1]


def in_carry(attend, masks, q, k, v):
    """The masks are what the loop carries, each turn another one in front."""

    def turn(masks, _):
        out = attend(jax.tree.map(lambda x: x[0], masks), q, k, v)
        return jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), masks), out

    return lax.scan(turn, masks, None, length=N)[1]


def in_branches(attend, masks, q, k, v):
    """Both branches attend: one by the mask that comes in, one to the wrong keys."""

    def turn(n):
        right = lambda mask, q: attend(mask, q, k, v)
        wrong = lambda mask, q: attend(mask, q, k[:, :, ::-1], v)
        mask = jax.tree.map(lambda x: x[n], masks)
        return lax.cond(n < N, right, wrong, mask, q)

    return lax.map(turn, jnp.arange(N, dtype=jnp.int32))


def while_there_are(attend, masks, q, k, v):
    """A mask is part of the state, and what it gives is written where it belongs."""
    at = lambda n: jax.tree.map(lambda x: x[jnp.minimum(n, N - 1)], masks)

    def turn(state):
        n, mask, outs = state
        found = attend(mask, q, k, v)
        return n + 1, at(n + 1), jax.tree.map(lambda x, y: x.at[n].set(y), outs, found)

    shapes = jax.eval_shape(attend, at(0), q, k, v)
    outs = jax.tree.map(lambda x: jnp.full((N, *x.shape), jnp.nan, x.dtype), shapes)
    first = jnp.int32(0)
    return lax.while_loop(lambda s: s[0] < N, turn, (first, at(first), outs))[2]


def again(attend, masks, q, k, v):
    """What the backward pass needs is worked out anew, from the mask."""
    kept = jax.checkpoint(attend, policy=jax.checkpoint_policies.nothing_saveable)
    return in_turn(kept, masks, q, k, v)


TRACED = [in_turn, in_carry, in_branches, while_there_are, again]


def with_gradients(attend):
    """The output, the log-sum-exp and the gradients, for loops inside which they are."""

    def run(mask, *qkv):
        (out, lse), pull = jax.vjp(lambda *qkv: attend(mask, *qkv), *qkv)
        return out, lse, pull((W, jnp.zeros_like(lse)))

    return run


@pytest.mark.parametrize("context", slow_unless(TRACED, lambda x: x is in_carry))
@WAYS
def test_a_mask_that_is_traced(attend, context):
    """Gradients are asked for inside a loop, and through all that can be reversed."""
    masks, reversible = STACKED["mixed"], context is not while_there_are
    expected = list(one_by_one(masks))
    pulled = list(zip(*(x.pull(W, SIZES[2]) for x in expected), strict=True))
    values = [x.out for x in expected], [x.lse for x in expected]

    @jax.jit
    def run(masks, *qkv):
        if not reversible:
            return context(with_gradients(attend), masks, *qkv)
        (out, lse), pull = jax.vjp(lambda *qkv: context(attend, masks, *qkv), *qkv)
        d_out = jnp.broadcast_to(W, out.shape)
        return out, lse, pull((d_out, jnp.zeros_like(lse)))

    if reversible:
        pulled = [np.sum(x, axis=0) for x in pulled]
    compare(run(masks, Q, K, V), (*values, *pulled))


@pytest.mark.parametrize("written", [False, True], ids=["kept", "written"])
@WAYS
def test_an_exported_program_keeps_its_mask(attend, written):
    """And its derivative, also after both were written out and read back."""

    def run(lengths, ids, q, k, v):
        return attend(mixed(lengths, ids), q, k, v)

    exported = export.export(jax.jit(run))(LENGTHS[0], IDS[0], Q, K, V)
    if written:
        pytest.importorskip("flatbuffers", reason="JAX writes programs with it")
        exported = export.deserialize(exported.serialize(vjp_order=1))

    @jax.jit
    def call(lengths, ids, *qkv):
        (out, lse), pull = jax.vjp(lambda *qkv: exported.call(lengths, ids, *qkv), *qkv)
        return out, lse, pull((W, jnp.zeros_like(lse)))

    for n, softmax in enumerate(one_by_one(STACKED["mixed"])):
        wanted = softmax.out, softmax.lse, *softmax.pull(W, SIZES[2])
        compare(call(LENGTHS[n], IDS[n], Q, K, V), wanted)
