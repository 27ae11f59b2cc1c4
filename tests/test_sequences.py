"""Sequences of unequal lengths, padded or packed, and sequences in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import raptax
from raptax import ALiBi, Causal, SlidingWindow, attention, merge, varlen_attention

H, K, D, E = 4, 2, 8, 5
ALIBI = ALiBi(raptax.alibi_slopes(H))


def numbers(*shape: int, seed: int = 0) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x.astype(np.float32))


def qkv(B: int, T: int, S: int) -> tuple[jax.Array, ...]:
    shapes = (B, H, T, D), (B, K, S, D), (B, K, S, E)
    return tuple(numbers(*shape, seed=n) for n, shape in enumerate(shapes))


def alike(actual, expected, atol=2e-6):
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=atol)


def one(q, k, v, mask_mod=None):
    """What a single sequence without padding gives."""
    options = dict(mask_mod=mask_mod, score_mod=ALIBI, return_lse=True)
    return attention(q, k, v, kernel="reference", **options)


# ------------------------------------------------------------------------------- padded


@pytest.mark.parametrize(
    "mask_mod", [pytest.param(Causal(), marks=pytest.mark.slow), None], ids=str
)
def test_lengths_are_as_if_each_sequence_were_cut(mask_mod):
    q, k, v = qkv(3, 6, 9)
    queries, keys = [6, 2, 0], [9, 5, 3]
    out, lse = attention(
        q,
        k,
        v,
        mask_mod=mask_mod,
        score_mod=ALIBI,
        query_lengths=jnp.array(queries, jnp.int32),
        key_lengths=jnp.array(keys, jnp.int32),
        return_lse=True,
    )
    for b, (t, s) in enumerate(zip(queries, keys, strict=True)):
        cut = q[b : b + 1, :, :t], k[b : b + 1, :, :s], v[b : b + 1, :, :s]
        alike((out[b, :, :t][None], lse[b, :, :t][None]), one(*cut, mask_mod))
        assert (out[b, :, t:] == 0).all()
        assert jnp.isneginf(lse[b, :, t:]).all()


def test_padding_is_not_read():
    q, k, v = qkv(2, 6, 9)
    lengths = jnp.array([4, 0], jnp.int32)
    out = attention(q, k, v, key_lengths=lengths)
    bad = jnp.arange(9)[None, None, :, None] >= lengths[:, None, None, None]
    poisoned = (jnp.where(bad, jnp.nan, x) for x in (k, v))
    assert (attention(q, *poisoned, key_lengths=lengths) == out).all()


def test_segments_do_not_see_each_other():
    q, k, v = qkv(1, 9, 9)
    ids = jnp.array([[0, 0, 0, 0, 1, 1, 1, 2, 2]], jnp.int32)
    out = attention(
        q, k, v, segment_ids=ids, mask_mod=Causal(), score_mod=ALIBI, return_lse=True
    )
    for first, last in ((0, 4), (4, 7), (7, 9)):
        cut = (x[:, :, first:last] for x in (q, k, v))
        alike(tuple(x[:, :, first:last] for x in out), one(*cut, Causal()))


def test_segments_of_queries_and_keys_apart():
    q, k, v = qkv(1, 2, 5)
    ids = jnp.array([[1, 0]], jnp.int32), jnp.array([[0, 0, 1, 1, 1]], jnp.int32)
    out = attention(q, k, v, segment_ids=ids)
    alike(out[:, :, :1], attention(q[:, :, :1], k[:, :, 2:], v[:, :, 2:]))
    alike(out[:, :, 1:], attention(q[:, :, 1:], k[:, :, :2], v[:, :, :2]))
    with pytest.raises(ValueError, match=r"must be \(1, 2\) and \(1, 5\)"):
        attention(q, k, v, segment_ids=ids[1])


def test_a_block_mask_takes_no_lengths_from_elsewhere():
    q, k, v = qkv(1, 4, 4)
    mask = raptax.create_block_mask(Causal(), seq_q=4, seq_kv=4)
    alike(attention(q, k, v, mask_mod=mask), attention(q, k, v, mask_mod=Causal()))
    with pytest.raises(ValueError, match="belong into the block mask"):
        attention(q, k, v, mask_mod=mask, key_lengths=jnp.array([3], jnp.int32))
    with pytest.raises(ValueError, match="query_start=1 belongs to create_block_mask"):
        attention(q, k, v, mask_mod=mask, query_start=1)
    with pytest.raises(ValueError, match="made for seq_q=4"):
        attention(q[:, :, :3], k, v, mask_mod=mask)


# ------------------------------------------------------------------------------- packed


@pytest.mark.parametrize(
    "mask_mod",
    [pytest.param(Causal(), marks=pytest.mark.slow), SlidingWindow(3), None],
    ids=str,
)
def test_packed_sequences_are_as_if_each_were_alone(mask_mod):
    queries, keys, pad = [3, 0, 5, 1], [7, 2, 5, 0], 3
    row_offsets, key_offsets = (
        jnp.asarray(np.cumsum([0, *n]), jnp.int32) for n in (queries, keys)
    )
    q, k, v = (x[0].swapaxes(0, 1) for x in qkv(1, sum(queries) + pad, sum(keys) + pad))

    def attend(q, k, v):
        return varlen_attention(
            q,
            k,
            v,
            row_offsets=row_offsets,
            key_offsets=key_offsets,
            mask_mod=mask_mod,
            score_mod=ALIBI,
            return_lse=True,
        )

    out, lse = attend(q, k, v)
    for b in range(4):
        rows = slice(row_offsets[b], row_offsets[b + 1])
        columns = slice(key_offsets[b], key_offsets[b + 1])
        alone = (x.swapaxes(0, 1)[None] for x in (q[rows], k[columns], v[columns]))
        expected = (x[0].swapaxes(0, 1) for x in one(*alone, mask_mod))
        alike((out[rows], lse[rows]), tuple(expected))
    assert (out[-pad:] == 0).all()
    assert jnp.isneginf(lse[-pad:]).all()
    poisoned = (x.at[-pad:].set(jnp.nan) for x in (k, v))
    assert (attend(q, *poisoned)[0] == out).all()


def test_new_offsets_compile_nothing_anew():
    traces = []

    @jax.jit
    def attend(q, k, v, row_offsets):
        traces.append(1)
        return varlen_attention(q, k, v, row_offsets=row_offsets)

    q, k, v = (x[0].swapaxes(0, 1) for x in qkv(1, 9, 9))
    outs = [
        attend(q, k, v, jnp.array(offsets, jnp.int32))
        for offsets in ([0, 4, 9], [0, 5, 9])
    ]
    assert len(traces) == 1
    assert (outs[0] != outs[1]).any()


def test_offsets_speak_of_the_same_sequences(unchecked):
    q, k, v = (x[0].swapaxes(0, 1) for x in qkv(1, 9, 9))
    two, three = (jnp.array(x, jnp.int32) for x in ([0, 9], [0, 4, 9]))
    with pytest.raises(ValueError, match="must speak of the same sequences"):
        varlen_attention(q, k, v, row_offsets=two, key_offsets=three)


# ----------------------------------------------------------------------------- in parts


def test_merged_parts_are_the_whole():
    """Three parts of the keys, one of which some queries do not see at all."""
    q, k, v = qkv(2, 6, 11)

    def whole(q, k, v):
        return attention(q, k, v, mask_mod=Causal(), return_lse=True)

    def in_parts(q, k, v):
        parts = [
            attention(
                q,
                k[:, :, first:last],
                v[:, :, first:last],
                mask_mod=raptax.Offset(Causal(), kv=first),
                query_start=5,
                return_lse=True,
            )
            for first, last in ((0, 4), (4, 8), (8, 11))
        ]
        assert jnp.isneginf(parts[2][1]).any()
        return merge(*reversed(parts))

    alike(in_parts(q, k, v), whole(q, k, v))
    loss = lambda f: lambda *x: sum(jnp.sin(y).sum() for y in f(*x))
    gradients = (jax.grad(loss(f), (0, 1, 2))(q, k, v) for f in (in_parts, whole))
    alike(*gradients, atol=1e-5)


def test_merging_nothing_changes_nothing():
    some = numbers(3, 4), numbers(3, seed=1)
    nothing = jnp.zeros((3, 4)), jnp.full(3, -jnp.inf)
    alike(merge(some, nothing), some, atol=0)
    alike(merge(nothing, some), some, atol=0)
    alike(merge(nothing, nothing), nothing, atol=0)
    d_lse = jax.grad(lambda lse: merge((nothing[0], lse), nothing)[0].sum())(nothing[1])
    assert (d_lse == 0).all()
    with pytest.raises(ValueError, match="at least one"):
        merge()


# --------------------------------------------------------------------------- on a ring


def ring(**options):
    """`ring_attention` on two devices, as a function of whole arrays."""
    mesh = jax.make_mesh((2,), ("s",), axis_types=(AxisType.Auto,))
    spec = P(None, None, "s")
    return jax.jit(
        jax.shard_map(
            lambda q, k, v: raptax.ring_attention(q, k, v, axis_name="s", **options),
            mesh=mesh,
            in_specs=(spec, spec, spec),
            out_specs=spec,
        )
    )


@pytest.mark.parametrize("S", [8, 20])
def test_a_ring_of_devices_is_as_one(S):
    q, k, v = qkv(2, 8, S)
    options = dict(mask_mod=SlidingWindow(5), score_mod=ALIBI)
    loss = lambda f: lambda *x: (f(*x) ** 2).sum()
    actual, expected = (
        (f(q, k, v), jax.grad(loss(f), (0, 1, 2))(q, k, v))
        for f in (ring(**options), lambda *x: attention(*x, **options))
    )
    alike(actual, expected, atol=1e-5)


def test_a_ring_needs_its_axis():
    with pytest.raises(ValueError, match="axis_name='s' is no mesh axis here"):
        raptax.ring_attention(*qkv(1, 4, 4), axis_name="s")
