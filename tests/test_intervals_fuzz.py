"""Random masks, operations with several results among them: tiles are what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import raptax
from raptax.block_mask import EMPTY, FULL, PARTIAL
from raptax.mods import mask_mod_to_boolean_mask

T, BLOCK = 24, (4, 8)
ENDS = jnp.array([3, 4, 9, 17, 30], jnp.int32)
TABLE = jnp.asarray(np.random.default_rng(0).integers(-9, 40, 31), jnp.int32)


def pair(x, y):
    return jnp.stack(jnp.broadcast_arrays(x, y))


def repeat(x, y):
    """A loop that carries two values."""
    return lax.fori_loop(
        0, 3, lambda _, xy: (xy[1] - 2, xy[0] + xy[1]), tuple(pair(x, y))
    )


def halve(x, y):
    def more(xy):
        return (xy[0] > 8).any()

    return lax.while_loop(more, lambda xy: (xy[0] // 2, xy[1] + 1), tuple(pair(x, y)))


def scanned(x, y):
    return lax.scan(lambda c, end: (c - end, None), x + y, ENDS)[0]


PAIRS = {  # functions of two whole numbers, one score at a time
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "max": jnp.maximum,
    "where": lambda x, y: jnp.where(x > y, x - 3, y),
    "sorted first": lambda x, y: jnp.sort(pair(x, y), axis=0)[0],
    "sorted along": lambda x, y: lax.sort(tuple(pair(x, y)[:, None]), num_keys=1)[1][0],
    "top": lambda x, y: lax.top_k(jnp.moveaxis(pair(x, y), 0, -1), 1)[0][..., 0],
    "where the top is": lambda x, y: lax.top_k(jnp.moveaxis(pair(x, y), 0, -1), 1)[1][
        ..., 0
    ],
    "split": lambda x, y: jnp.split(pair(x, y), 2)[1][0],
    "unstack": lambda x, y: jnp.subtract(*jnp.unstack(pair(x, y))),
    "loop": lambda x, y: repeat(x, y)[0],
    "loop until": lambda x, y: halve(x, y)[1],
    "scan": scanned,
    "branch": lambda x, y: lax.cond(
        ENDS[0] > 2, lambda x, y: (y - 1, x), lambda x, y: (x, y), x + 0 * y, y + 0 * x
    )[0],
    "divide": lambda x, y: divmod(x, jnp.abs(y) + 1)[1],
    "running sum": lambda x, y: jnp.cumsum(pair(x, y), axis=0, dtype=jnp.int32)[1],
    "least": lambda x, y: jnp.argmin(pair(x, y), axis=0).astype(jnp.int32),
    "checkpoint": lambda x, y: jax.checkpoint(repeat)(x, y)[1],
}
ONES = {
    "search": lambda x: jnp.searchsorted(ENDS, x, side="right").astype(jnp.int32),
    "digitize": lambda x: jnp.digitize(x, ENDS).astype(jnp.int32),
    "table": lambda x: TABLE[jnp.clip(x, 0, 30)],
    "exponent": lambda x: jnp.frexp(x.astype(jnp.float32))[1],
    "fraction": lambda x: jnp.modf(x.astype(jnp.float32) / 4)[1].astype(jnp.int32),
    "chunk": lambda x: x // 5,
    "remainder": lambda x: x % 7,
    "abs": jnp.abs,
    "bits": lax.population_count,
}
COMPARISONS = [jnp.less, jnp.less_equal, jnp.equal, jnp.not_equal]
LOGIC = [jnp.logical_and, jnp.logical_or, jnp.logical_xor]

leaves = st.one_of(st.sampled_from(["q", "k", "h"]), st.integers(-3, 30).map(jnp.int32))
numbers = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(sorted(ONES)), inner),
        st.tuples(st.sampled_from(sorted(PAIRS)), inner, inner),
    ),
    max_leaves=4,
)
comparisons = st.tuples(st.sampled_from(COMPARISONS), numbers, numbers)
conditions = st.recursive(
    comparisons,
    lambda inner: st.tuples(st.sampled_from(LOGIC), inner, inner),
    max_leaves=2,
)


def evaluate(tree, at):
    if isinstance(tree, str):
        return at[tree]
    if not isinstance(tree, tuple):
        return tree
    head, *operands = tree
    values = [evaluate(operand, at) for operand in operands]
    return (
        (ONES | PAIRS).get(head, head)(*values)
        if isinstance(head, str)
        else head(*values)
    )


def mask_of(tree):
    def mask(b, h, q, k):
        return evaluate(tree, dict(h=h, q=q, k=k))

    return mask


def check(mask, start=None):
    made = raptax.create_block_mask(
        mask, heads=2, seq_q=T, seq_kv=T, block=BLOCK, query_start=start
    )
    dense = mask_mod_to_boolean_mask(mask, batch=1, num_heads=2, seq_q=T, seq_kv=T)
    rows, keys = (T // n for n in BLOCK)
    tiles = np.asarray(dense[0]).reshape(2, rows, BLOCK[0], keys, BLOCK[1])
    some, every = tiles.any((2, 4)), tiles.all((2, 4))
    kinds = np.broadcast_to(made.kinds[0], some.shape)
    assert set(np.unique(kinds)) <= {EMPTY, PARTIAL, FULL}
    assert not some[kinds == EMPTY].any()
    assert every[kinds == FULL].all()


@settings(max_examples=8, deadline=None)
@given(conditions)
def test_tiles_of_random_masks_are_what_they_say(tree):
    check(mask_of(tree))


@pytest.mark.parametrize("name", [*PAIRS, *ONES])
def test_every_operation_of_the_grammar(name):
    operands = ("q", "k") if name in PAIRS else (("add", "q", "k"),)
    check(mask_of((jnp.less, (name, *operands), jnp.int32(6))))


@pytest.mark.parametrize("name", ["search", "loop"])
def test_long_sequences_take_such_masks(name):
    """From 16 tiles of 256 on, kernels ask for the kinds of tiles."""
    q = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, 1024, 4)), jnp.float32)
    operands = ("q", "k") if name in PAIRS else (("subtract", "q", "k"),)
    mask = mask_of((jnp.less, (name, *operands), jnp.int32(6)))
    got = raptax.attention(q, q, q, mask_mod=mask, kernel="blockwise")
    expected = raptax.attention(q, q, q, mask_mod=mask, kernel="reference")
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)
