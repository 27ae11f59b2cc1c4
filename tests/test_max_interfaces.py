"""The interfaces of MAX's page and the variants that it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raptax import (
    ALiBi,
    Causal,
    KVCacheParams,
    PagedKVCache,
    RotaryEmbedding,
    alibi_slopes,
    attention,
)
from raptax.compat.max import AttentionImpl, interfaces
from raptax.compat.max.interfaces import (
    AttentionWithAlibi,
    AttentionWithAlibiQKV,
    AttentionWithRope,
    AttentionWithRopeQKV,
    VanillaAttentionWithCausalMask,
    VanillaAttentionWithCausalMaskQKV,
)

B, T, C, H, K, D = 2, 6, 12, 4, 2, 8
KV = KVCacheParams(dtype=jnp.float32, n_kv_heads=K, head_dim=D, page_size=4)
RNG = np.random.default_rng(0)
WEIGHTS = [
    jnp.asarray(RNG.normal(size=(rows, cols)) / 4, jnp.float32)
    for rows, cols in ((H * D, C), (K * D, C), (K * D, C), (C, H * D))
]
X = jnp.asarray(RNG.normal(size=(B, T, C)), jnp.float32)
ROPE = RotaryEmbedding.create(D)
CAUSAL = jnp.tril(jnp.ones((T, T), bool))
VARIANTS = {
    "rope": (AttentionWithRope, AttentionWithRopeQKV, dict(rope=ROPE), {}),
    "alibi": (AttentionWithAlibi, AttentionWithAlibiQKV, {}, {}),
    "mask": (
        VanillaAttentionWithCausalMask,
        VanillaAttentionWithCausalMaskQKV,
        {},
        dict(attn_mask=CAUSAL),
    ),
    "numbers": (
        VanillaAttentionWithCausalMask,
        VanillaAttentionWithCausalMaskQKV,
        {},
        dict(attn_mask=jnp.where(CAUSAL, 0.0, -jnp.inf)),
    ),
}


def cache():
    empty = PagedKVCache.create(KV, pages=4, sequences=B, max_pages=2)
    return empty.with_tables([[3, 0], [1, 2]], [0] * B)


def build(name, *, fused=True):
    together, apart, options, _ = VARIANTS[name]
    q, k, v, o = WEIGHTS
    if fused:
        return together(H, KV, jnp.concatenate([q, k, v]), o, 0.3, **options)
    return apart(H, KV, q, k, v, o, 0.3, **options)


def by_hand(name):
    wq, wk, wv, wo = WEIGHTS
    q, k, v = ((X @ w.T).reshape(B, T, -1, D).swapaxes(1, 2) for w in (wq, wk, wv))
    if name == "rope":
        at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        q, k = (ROPE(a.swapaxes(1, 2), at).swapaxes(1, 2) for a in (q, k))
    score_mod = ALiBi(alibi_slopes(H)) if name == "alibi" else None
    y = attention(
        q, k, v, mask_mod=Causal(), score_mod=score_mod, scale=0.3, kernel="reference"
    )
    return y.swapaxes(1, 2).reshape(B, T, -1) @ wo.T


@jax.jit
def run(layers, extras):
    """Whole, in two calls, ragged, and padded: all of it in one compilation."""
    (fused, apart), (whole, first, then) = layers, extras
    y, _ = fused(X, cache(), **whole)
    same, _ = apart(X, cache(), None, **whole)
    one, held = fused(X[:, :4], cache(), **first)
    held = held.advance(jnp.arange(B + 1, dtype=jnp.int32) * 4)
    two, _ = fused(X[:, 4:], held, **then)
    offsets = jnp.asarray([0, 4, 10], jnp.uint32)
    rows = jnp.concatenate([X[0, :4], X[1]])
    ragged, _ = apart(rows, cache(), input_row_offsets=offsets, layer_idx=0, **whole)
    padded, held = fused(X, cache(), jnp.asarray([4, 6], jnp.uint32), **whole)
    return y, same, jnp.concatenate([one, two], 1), ragged, padded, held


@pytest.mark.parametrize(
    "name", ["rope", pytest.param("alibi", marks=pytest.mark.slow), "mask", "numbers"]
)
def test_variants(name):
    extras = VARIANTS[name][3]
    parts = [extras] * 3
    if extras:  # a mask is of this call's rows and of all keys so far
        mask = extras["attn_mask"]
        parts = [extras, dict(attn_mask=mask[:4]), dict(attn_mask=mask[4:])]
    layers = build(name), build(name, fused=False)
    y, same, stepped, ragged, padded, held = run(layers, parts)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-6)
    close(y, by_hand(name))
    for other in (same, stepped):
        close(other, y)
    close(ragged, jnp.concatenate([y[0, :4], y[1]]))
    close(padded[0, :4], y[0, :4])
    close(padded[1], y[1])
    assert not padded[0, 4:].any()
    np.testing.assert_array_equal(held.k_pages[0, 0], 0)  # padding was not written


def test_fields():
    q, k, v, o = WEIGHTS
    fused, apart = build("alibi"), build("alibi", fused=False)
    np.testing.assert_array_equal(fused.wqkv[...], jnp.concatenate([q, k, v]))
    for name, w in zip(("wq", "wk", "wv"), (q, k, v), strict=True):
        np.testing.assert_array_equal(getattr(apart, name)[...], w)
    for layer in (fused, apart):
        assert (layer.n_heads, layer.kv_params, layer.scale) == (H, KV, 0.3)
        np.testing.assert_array_equal(layer.wo.weight[...], o)


def test_a_variant_of_ones_own():
    class Twice(AttentionImpl):
        def __call__(self, x, kv_collection, valid_lengths=None, **kwargs):
            if "factor" not in kwargs:
                raise ValueError("factor not provided to Twice")
            x = x * kwargs.pop("factor")
            return self.attend(x, kv_collection, valid_lengths, **kwargs)

    q, k, v, o = WEIGHTS
    layer = Twice(H, KV, jnp.concatenate([q, k, v]), o, 0.3)
    y, _ = layer(X / 2, cache(), factor=2.0)
    again, _ = layer(X, cache(), factor=1.0)
    np.testing.assert_allclose(y, again, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="factor not provided"):
        layer(X, cache())


@pytest.mark.parametrize(
    ("act", "error", "named"),
    [
        (
            lambda: build("mask")(X, cache()),
            ValueError,
            "attn_mask not provided to VanillaAttentionWithCausalMask",
        ),
        (
            lambda: build("mask", fused=False)(X, cache()),
            ValueError,
            "attn_mask not provided to VanillaAttentionWithCausalMaskQKV",
        ),
        (lambda: build("alibi")(X[0], cache()), ValueError, "with input_row_offsets"),
        (
            lambda: build("alibi")(
                X, cache(), input_row_offsets=jnp.zeros(3, jnp.int32)
            ),
            ValueError,
            "input_row_offsets go with rows",
        ),
        (lambda: build("alibi")(X, cache(), attn_mask=CAUSAL), TypeError, "attn_mask"),
        (
            lambda: AttentionWithAlibi(H, KV, WEIGHTS[0], WEIGHTS[3], 0.3),
            ValueError,
            "does not hold q, k and v",
        ),
        (
            lambda: AttentionWithAlibiQKV(H, KV, *WEIGHTS[:2], *WEIGHTS[:2], 0.3),
            ValueError,
            "must be",
        ),
        (
            lambda: AttentionWithAlibiQKV(H, KV, *WEIGHTS, None),
            ValueError,
            "scale must be provided to AttentionWithAlibiQKV",
        ),
        (
            lambda: AttentionWithAlibiQKV(3, KV, *WEIGHTS, 0.3),
            ValueError,
            "query_heads=3 must be a multiple",
        ),
        (
            lambda: AttentionImpl(H, KV, WEIGHTS[0], WEIGHTS[3], 0.3),
            TypeError,
            "abstract",
        ),
        (interfaces.DistributedAttentionImpl, TypeError, "abstract"),
    ],
)
def test_errors(unchecked, act, error, named):
    with pytest.raises(error, match=named):
        act()
