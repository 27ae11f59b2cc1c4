"""Masks, lengths, sinks, dropout and cross attention in layers, against `attention`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from raptax import (
    AttentionWithRope,
    Causal,
    DistributedAttention,
    KVCacheParams,
    PagedKVCache,
    RotaryEmbedding,
    Unsupported,
    attention,
)
from raptax.compat.max import interfaces
from raptax.nn import checkpoint as weights
from raptax.nn.sharding.placement import make_mesh

KV = KVCacheParams(dtype=jnp.float32, n_kv_heads=2, head_dim=8, page_size=4)
B, T, H, K, C = 2, 7, 4, 2, 24
X = jax.random.normal(jax.random.key(0), (B, T, C))
OTHER = jax.random.normal(jax.random.key(1), (B, 10, C))


def build(**options):
    options = dict(rope=RotaryEmbedding.create(8), rngs=nnx.Rngs(0)) | options
    return AttentionWithRope(
        num_attention_heads=H,
        num_key_value_heads=K,
        hidden_size=C,
        kv_params=KV,
        **options,
    )


def by_hand(layer, x, kv=None, **options):
    """The layer's output from `attention` alone."""
    kv = x if kv is None else kv
    weight = layer.wqkv
    q, k, v = jnp.split(weight, [H * 8, (H + K) * 8])
    heads = lambda y, w: (y @ w.T.astype(y.dtype)).reshape(*y.shape[:2], -1, 8)
    q, k, v = heads(x, q), heads(kv, k), heads(kv, v)
    if layer.rope is not None:
        at = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        q, k = layer.rope(q, at), layer.rope(k, at)
    y = attention(*(a.swapaxes(1, 2) for a in (q, k, v)), **options).swapaxes(1, 2)
    return layer.out(y.reshape(*x.shape[:2], -1))


def check(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


causal = partial(by_hand, mask_mod=Causal())


@pytest.mark.parametrize("shape", [(T, T), (B, 1, T, T), (1, H, T, T)])
def test_mask_arrays(shape):
    layer = build()
    mask = jax.random.bernoulli(jax.random.key(2), 0.6, shape)
    check(layer(X, mask=mask)[0], causal(layer, X, mask=mask))
    check(layer(X, mask=mask, mask_mod=None)[0], by_hand(layer, X, mask=mask))
    jitted = nnx.jit(lambda layer, mask: layer(X, mask=mask)[0])
    check(jitted(layer, mask), causal(layer, X, mask=mask))


def test_segments_and_lengths():
    layer = build()
    ids = jnp.asarray([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2, 2]], jnp.int32)
    check(layer(X, segment_ids=ids)[0], causal(layer, X, segment_ids=ids))
    lengths = np.array([4, 7])
    actual = layer(X, key_lengths=lengths)[0]
    both = dict.fromkeys(("key_lengths", "query_lengths"), jnp.int32([4, 7]))
    check(actual, causal(layer, X, **both))
    check(actual[0, :4], layer(X[:1, :4])[0][0])
    assert (np.asarray(actual[0, 4:]) == 0).all()


@pytest.mark.parametrize("stacked", [False, True])
def test_cross_attention(stacked):
    layer = build(rope=None, stacked_qkv=stacked)
    check(layer(X, inputs_kv=OTHER)[0], by_hand(layer, X, OTHER))
    mask_mod = Causal() & Causal()
    actual = layer(X, inputs_kv=OTHER, mask_mod=mask_mod)[0]
    check(actual, causal(layer, X, OTHER))
    lengths = jnp.int32([3, 10])
    actual = layer(X, inputs_kv=OTHER, key_lengths=lengths)[0]
    check(actual, by_hand(layer, X, OTHER, key_lengths=lengths))
    check(actual[0], layer(X[:1], inputs_kv=OTHER[:1, :3])[0][0])
    mask = jax.random.bernoulli(jax.random.key(2), 0.6, (B, 1, T, 10))
    actual = layer(X, inputs_kv=OTHER, mask=mask)[0]
    check(actual, by_hand(layer, X, OTHER, mask=mask))
    gradient = jax.grad(lambda kv: (layer(X, inputs_kv=kv)[0] ** 2).sum())(OTHER)
    expected = jax.grad(lambda kv: (by_hand(layer, X, kv) ** 2).sum())(OTHER)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sinks_are_learned(dtype):
    layer = build(use_sinks=True, dtype=dtype)
    assert layer.sinks.dtype == dtype
    layer.sinks[...] = jnp.asarray([-1.0, 0.5, 2.0, 0.0], dtype)
    sinks = layer.sinks[...].astype(jnp.float32)
    check(layer(X)[0], causal(layer, X, sinks=sinks))
    loss = lambda layer: (layer(X)[0] ** 2).sum()
    gradient = nnx.grad(loss)(layer)["sinks"]
    hand = lambda s: (causal(layer, X, sinks=s.astype(jnp.float32)) ** 2).sum()
    expected = jax.grad(hand)(layer.sinks[...])
    tolerance = dict(rtol=1e-4) if dtype == jnp.float32 else dict(rtol=2e-2)
    np.testing.assert_allclose(
        gradient[...].astype(jnp.float32), expected.astype(jnp.float32), **tolerance
    )
    assert jnp.abs(expected).min() > 0


@pytest.mark.slow
def test_sinks_travel_with_their_heads():
    layer = build(use_sinks=True)
    layer.sinks[...] = jnp.asarray([-1.0, 0.5, 2.0, 3.0])
    mesh = make_mesh(jax.devices("cpu")[:3])  # with heads of zeros to fill up
    spread = DistributedAttention(layer, mesh)
    check(spread(X)[0], layer(X)[0])
    np.testing.assert_array_equal(spread.gather().sinks[...], layer.sinks[...])
    tensors = weights.state_dict(layer)
    np.testing.assert_array_equal(tensors["sinks"], layer.sinks[...])
    other = build(use_sinks=True, rngs=nnx.Rngs(1))
    weights.load_state(other, tensors)
    check(other(X)[0], layer(X)[0])
    del tensors["sinks"]
    with pytest.raises(ValueError, match="the tensors lack 'sinks'"):
        weights.load_state(other, tensors)


def test_dropout_is_that_of_attention():
    layer, key = build(dropout_rate=0.5), jax.random.key(3)
    dropped = causal(layer, X, dropout_rng=key, dropout_rate=0.5, deterministic=False)
    check(layer(X, rngs=key)[0], dropped)
    check(layer(X, deterministic=True)[0], causal(layer, X))
    run = nnx.jit(lambda layer: layer(X)[0])
    first, second = run(layer), run(layer)
    assert jnp.abs(first - second).max() > 1e-2  # another key for each call
    again = build(dropout_rate=0.5)
    check(run(again), first)
    rngs = nnx.Rngs(dropout=7)
    check(layer(X, rngs=rngs)[0], layer(X, rngs=nnx.Rngs(dropout=7))[0])
    layer.eval()
    check(layer(X)[0], causal(layer, X))
    check(layer(X, deterministic=False, rngs=key)[0], dropped)
    layer.train()
    check(layer(X, rngs=key)[0], dropped)
    assert not jax.tree.leaves(nnx.state(build(), nnx.RngState))


# --------------------------------------------------------------------------- with NumPy


def cache():
    made = PagedKVCache.create(KV, pages=8, sequences=B, max_pages=4)
    return made.with_tables([[0, 2, 4], [7, 5, 3]], [0, 0])


@pytest.mark.slow
def test_numpys_positions_and_offsets():
    layer = build()
    rows = X.reshape(B * T, C)
    offsets, at = np.array([0, T, 2 * T]), np.tile(np.arange(T) + 3, (B, 1))
    whole = layer(X, positions=jnp.asarray(at, jnp.int32))[0]

    @nnx.jit
    def run(layer, cache):
        batch = layer(X, positions=at)[0]
        ragged, _ = layer(rows, cache, row_offsets=offsets, positions=at.reshape(-1))
        return batch, ragged

    for batch, ragged in (run(layer, cache()), run.__wrapped__(layer, cache())):
        check(batch, whole)
        check(ragged.reshape(B, T, C), whole)
    mesh = make_mesh(jax.devices("cpu")[:2])
    spread = DistributedAttention(layer, mesh)
    ragged, _ = spread(rows, spread.shard_cache(cache()), row_offsets=offsets)
    check(ragged.reshape(B, T, C), layer(X)[0])
    wo = layer.out.weight[...]
    impl = interfaces.AttentionWithRope(H, KV, layer.wqkv, wo, 8**-0.5, layer.rope)
    check(impl(rows, cache(), input_row_offsets=offsets)[0], ragged)
    padded, _ = impl(X, cache(), np.array([4, 7]))
    check(padded[0, :4], layer(X)[0][0, :4])


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("call", "named", "kind"),
    [
        (
            lambda: build()(X, cache(), mask=jnp.ones((T, T), bool)),
            "mask with a cache",
            ValueError,
        ),
        (
            lambda: build()(X, cache(), key_lengths=jnp.int32([1, 2])),
            "key_lengths with a cache",
            ValueError,
        ),
        (
            lambda: build(rope=None)(X, cache(), inputs_kv=OTHER),
            "inputs_kv with a cache",
            ValueError,
        ),
        (lambda: build()(X, inputs_kv=OTHER), "rope=None", ValueError),
        (lambda: build(use_sinks=True)(X, cache()), "without sinks", Unsupported),
        (lambda: build(dropout_rate=0.1)(X, cache()), "without dropout", Unsupported),
        (lambda: build(dropout_rate=1.0), "dropout_rate=1.0 must lie", ValueError),
        (
            lambda: DistributedAttention(
                build(dropout_rate=0.1), make_mesh(jax.devices("cpu")[:2])
            ),
            "dropout_rate=0.1 on a mesh",
            ValueError,
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, named, kind):
    with pytest.raises(kind, match=named):
        call()


def test_a_layer_that_has_no_keys_for_dropout():
    layer = build(dropout_rate=0.1)
    layer.rngs = nnx.data(None)
    with pytest.raises(ValueError, match="needs a dropout_rng"):
        layer(X)


def test_evaluation_with_dropout_takes_a_cache():
    layer = build(dropout_rate=0.1)
    layer.eval()
    check(layer(X, cache())[0], build()(X)[0])
