"""The names that attnax's users know: each is there, and means what it says."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import raptax
from raptax import attention
from raptax.compat import attnax

# Name and documented parameters, without *masks and the like.
DOCUMENTED = {
    "mask_mod_to_boolean_mask": ("mask_mod", "batch", "num_heads", "seq_q", "seq_kv"),
    "compose_score_mods": ("score_mods",),
    "standard_attention": ("query", "key", "value"),
    "memory_efficient_attention": ("query", "key", "value", "block_size"),
    "flash_attention": ("query", "key", "value", "block_size"),
    "linear_attention": ("query", "key", "value", "mask", "causal", "chunk_size"),
    "ring_attention": ("query", "key", "value", "axis_name"),
    "paged_attention": ("query",),
    "alibi_mod": ("num_heads",),
    "alibi_slopes": (),
    "causal_mod": (),
    "sliding_window_mod": ("window_size", "causal"),
    "prefix_lm_mod": ("prefix_lengths",),
    "document_mask_mod": ("document_ids",),
    "additive_bias_mod": ("bias",),
    "mask_mod_to_score_mod": ("mask_mod",),
    "make_causal_mask": ("seq_len",),
    "make_sliding_window_mask": ("seq_q", "seq_kv", "window_size", "causal"),
    "make_document_mask": ("document_ids",),
    "make_padding_mask": ("input_ids", "pad_token_id"),
    "combine_masks": ("masks",),
}
B, H, S, D = 2, 4, 12, 8
IDS = jnp.asarray(np.arange(S)[None] // 5 + np.zeros((B, 1)), jnp.int32)
PREFIX = jnp.array([3, 7], jnp.int32)


def arrays():
    rng = np.random.default_rng(0)
    shape = (B, H, S, D)
    return [jnp.asarray(rng.normal(size=shape).astype(np.float32)) for _ in range(3)]


def named(name):
    return getattr(attnax if hasattr(attnax, name) else raptax, name)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_name_and_its_parameters_are_there(name):
    parameters = inspect.signature(named(name)).parameters
    assert set(DOCUMENTED[name]) <= parameters.keys()


@pytest.mark.parametrize("protocol", ["ScoreMod", "MaskMod", "AttentionFn"])
def test_the_protocols_are_there(protocol):
    assert inspect.isclass(named(protocol))


KERNELS = ("standard_attention", "memory_efficient_attention", "flash_attention")


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_take_the_documented_call(name):
    q, k, v = arrays()
    call = dict(
        mask=attnax.make_causal_mask(S),
        score_mod=attnax.alibi_mod(H),
        dropout_rng=None,
        dropout_rate=0.0,
        deterministic=True,
    )
    out = named(name)(q, k, v, **call)
    scores = np.einsum("bhtd,bhsd->bhts", q, k) * D**-0.5
    distance = np.arange(S)[:, None] - np.arange(S)
    slopes = 2.0 ** (-8 * (np.arange(H) + 1) / H)
    scores = scores - slopes[:, None, None] * np.abs(distance)
    weights = np.exp(np.where(distance >= 0, scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bhsd->bhtd", weights, v)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)


def rows_and_keys():
    return np.arange(S)[:, None], np.arange(S)[None]


def same_document(t, s):
    return (np.asarray(IDS)[:, t] == np.asarray(IDS)[:, s])[:, None]


MASKS = {
    "causal": (
        attnax.causal_mod,
        lambda: attnax.make_causal_mask(S),
        lambda t, s: s <= t,
    ),
    "window": (
        lambda: attnax.sliding_window_mod(3),
        lambda: attnax.make_sliding_window_mask(S, window_size=3),
        lambda t, s: (s <= t) & (t - s < 3),
    ),
    "window on both sides": (
        lambda: attnax.sliding_window_mod(3, causal=False),
        lambda: attnax.make_sliding_window_mask(S, window_size=3, causal=False),
        lambda t, s: abs(t - s) < 3,
    ),
    "documents": (
        lambda: attnax.document_mask_mod(IDS),
        lambda: attnax.make_document_mask(IDS),
        same_document,
    ),
    "prefix": (
        lambda: attnax.prefix_lm_mod(PREFIX),
        lambda: raptax.mask_mod_to_boolean_mask(
            raptax.PrefixLM(PREFIX), batch=B, num_heads=1, seq_q=S, seq_kv=S
        ),
        lambda t, s: (s <= t) | (s < np.asarray(PREFIX)[:, None, None, None]),
    ),
    "a function": (
        lambda: attnax.mask_mod_to_score_mod(lambda b, h, q, k: (q + k) % 2 == 0),
        lambda: jnp.asarray(sum(rows_and_keys()) % 2 == 0)[None, None],
        lambda t, s: (t + s) % 2 == 0,
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_the_same_as_array_and_as_score_change(name):
    score_mod, array, definition = MASKS[name]
    expected = np.broadcast_to(definition(*rows_and_keys()), (B, 1, S, S))
    np.testing.assert_array_equal(np.broadcast_to(array(), expected.shape), expected)
    q, k, v = arrays()
    by_score = attnax.standard_attention(q, k, v, score_mod=score_mod())
    by_array = attnax.standard_attention(q, k, v, mask=jnp.asarray(expected))
    np.testing.assert_allclose(by_score, by_array, rtol=0, atol=1e-6)


def test_a_mask_that_changes_scores_last_reaches_the_kernel_as_a_mask():
    """A soft cap after it would undo it, and so must stay after it."""
    q, k, v = arrays()
    cap, window = raptax.SoftCap(1.0), attnax.sliding_window_mod(3)
    last = attention(q, k, v, score_mod=raptax.compose_score_mods(cap, window))
    expected = attention(q, k, v, score_mod=cap, mask_mod=raptax.SlidingWindow(3))
    np.testing.assert_array_equal(last, expected)
    assert "cannot" not in raptax.explain(q, k, v, score_mod=window)
    first = attention(q, k, v, score_mod=raptax.compose_score_mods(window, cap))
    assert (first != expected).any()


def test_an_additive_bias_of_any_rank():
    q, k, v = arrays()
    bias = jnp.asarray(np.random.default_rng(5).normal(size=(H, S, S)), jnp.float32)
    for x in (bias, bias[:1], bias[0], bias[0, 0]):
        by_score = attention(q, k, v, score_mod=attnax.additive_bias_mod(x))
        np.testing.assert_allclose(by_score, attention(q, k, v, bias=x), atol=1e-6)


def test_masks_combine():
    causal = attnax.make_causal_mask(3)
    padding = attnax.make_padding_mask(jnp.array([[5, 6, 0]], jnp.int32))
    both = attnax.combine_masks(None, causal, padding)
    np.testing.assert_array_equal(both[0, 0], np.tril(np.ones((3, 3))) * [1, 1, 0])
    assert attnax.combine_masks(None, None) is None


def test_a_window_holds_at_least_one_key():
    with pytest.raises(ValueError, match="window_size=0 must be at least 1"):
        attnax.sliding_window_mod(0)


# ------------------------------------------------------------------------ sizes of tiles

TILED = attnax.flash_attention, attnax.memory_efficient_attention


@pytest.mark.parametrize("attend", TILED)
@pytest.mark.parametrize("block_size", [1, 5, (4, 7), 64])
def test_tiles_of_a_chosen_size(attend, block_size):
    q, k, v = arrays()
    for options in (
        dict(mask_mod=raptax.Causal(), score_mod=raptax.SoftCap(2.0)),
        dict(key_lengths=jnp.array([3, 12], jnp.int32), return_lse=True),
        dict(query_start=4, mask_mod=raptax.SlidingWindow(3)),
        dict(),
    ):
        got = attend(q, k, v, block_size=block_size, **options)
        expected = attention(q, k, v, kernel="reference", **options)
        for a, e in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-6)


def tiles_of(**options):
    """The shapes of the scores that a call works on at a time."""
    run = lambda *x: attnax.memory_efficient_attention(*x, **options)
    text = str(jax.make_jaxpr(run)(*arrays()))
    return {n for n in (3, 4, 12) if f"f32[{B},{H},1,{n},{n}]" in text}


def test_the_size_of_tiles_reaches_the_loops():
    assert tiles_of(block_size=3) == {3}
    assert tiles_of(block_size=4) == {4}
    assert tiles_of() == {12}


@pytest.mark.parametrize("attend", TILED)
def test_sizes_of_tiles_that_cannot_be(attend, unchecked):
    q, k, v = arrays()
    for size in (0, -1, (4,), (4, 0)):
        with pytest.raises(ValueError, match="each at least 1"):
            attend(q, k, v, block_size=size)
    made = raptax.create_block_mask(raptax.Causal(), seq_q=S, seq_kv=S)
    with pytest.raises(ValueError, match="contradicts a block mask"):
        attend(q, k, v, mask_mod=made, block_size=4)
    with pytest.raises(ValueError, match="only kernel='blockwise' takes"):
        attend(q, k, v, kernel="reference", block_size=4)
    with pytest.raises(TypeError, match="takes no 'tile'"):
        attend(q, k, v, tile=3, block_size=4)
    with pytest.raises(TypeError, match="block_size"):
        attnax.standard_attention(q, k, v, block_size=4)


def test_chunks_of_a_chosen_size(unchecked):
    q, k, v = arrays()
    expected = raptax.linear_attention(q, k, v, causal=True)
    for size in (1, 5, 100):
        got = raptax.linear_attention(q, k, v, causal=True, chunk_size=size)
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
    text = str(
        jax.make_jaxpr(
            lambda *x: raptax.linear_attention(*x, causal=True, chunk_size=4)
        )(q, k, v)
    )
    assert "length=3" in text
    for size in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=r"chunk_size=.* must be a whole number"):
            raptax.linear_attention(q, k, v, chunk_size=size)
