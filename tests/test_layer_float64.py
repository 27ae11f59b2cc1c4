"""Layers under x64: float64 all the way, against formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from raptax import AttentionWithRope, KVCacheParams, RotaryEmbedding
from raptax.compat.maxtext import MLA, Attention

H, K, D, C, B, T = 4, 2, 8, 24, 2, 7


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def numpy_attention(q, k, v, scale, sinks=None, cap=None):
    """Causal, heads last but one; ``(B, T, H, D)``."""
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    scores = np.einsum("bthd,bshd->bhts", q, k) * scale
    if cap is not None:
        scores = np.tanh(scores / cap) * cap
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(np.asarray(sinks))[None, :, None, None]
    return np.einsum("bhts,bshd->bthd", weights / total, v)


def rotated(x, theta=10000.0):
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(D // 2) / (D // 2))
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = np.split(x, 2, axis=-1)
    both = first * cos - second * sin, first * sin + second * cos
    return np.concatenate(both, axis=-1)


def normed(x, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def inputs():
    return jax.random.normal(jax.random.key(0), (B, T, C), jnp.float64)


def test_attention_with_rope():
    params = KVCacheParams(dtype=jnp.float64, n_kv_heads=K, head_dim=D, page_size=4)
    layer = AttentionWithRope(
        rope=RotaryEmbedding.create(D),
        num_attention_heads=H,
        num_key_value_heads=K,
        hidden_size=C,
        kv_params=params,
        dtype=jnp.float64,
        use_qk_norm=True,
        use_sinks=True,
        rngs=nnx.Rngs(0),
    )
    layer.sinks[...] = jnp.linspace(-1.0, 1.0, H)
    x, weights = np.asarray(inputs()), np.asarray(layer.wqkv)
    q, k, v = np.split(x @ weights.T, [H * D, (H + K) * D], axis=-1)
    q, k, v = (a.reshape(B, T, -1, D) for a in (q, k, v))
    q, k = (rotated(normed(a, 1e-6)) for a in (q, k))
    y = numpy_attention(q, k, v, D**-0.5, np.linspace(-1, 1, H)).reshape(B, T, H * D)
    expected = y @ np.asarray(layer.out.weight[...]).T
    actual, _ = layer(inputs())
    assert actual.dtype == jnp.float64
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)


SIZES = dict(
    num_query_heads=H,
    num_kv_heads=K,
    head_dim=D,
    max_target_length=12,
    inputs_q_shape=(B, 12, C),
    inputs_kv_shape=(B, 12, C),
    dtype=jnp.float64,
    weight_dtype=jnp.float64,
)
OPTIONS = {
    "sinks, cap": dict(attn_logits_soft_cap=3.0, config=dict(attention_sink=True)),
    "norms": dict(use_qk_norm=True, use_v_norm=True),
    "llama4": dict(use_qk_norm=True, config=dict(decoder_block="llama4")),
    "float32 asked for": dict(float32_logits=True, float32_qk_product=True),
    "temperature": dict(
        is_nope_layer=True, temperature_tuning=True, temperature_tuning_floor_scale=2.0
    ),
    "blocks": dict(config=dict(moba=True, moba_chunk_size=20, moba_topk=2)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_maxtexts_attention(name):
    layer = Attention(**SIZES, **OPTIONS[name], rngs=nnx.Rngs(0))
    o, x = layer.options, np.asarray(inputs())
    q, k, v = (
        np.einsum("bte,ehd->bthd", x, np.asarray(getattr(layer, n).kernel[...]))
        for n in ("query", "key", "value")
    )
    if o.use_qk_norm and name != "llama4":
        q, k = normed(q, 1e-5), normed(k, 1e-5)
    if o.use_v_norm:
        v = normed(v, 1e-5)
    if o.is_nope_layer:
        at = np.floor((np.arange(T) + 1) / 2.0)
        q = q * (1 + 0.1 * np.log1p(at))[:, None, None]
    else:
        q, k = rotated(q), rotated(k)
    if name == "llama4":
        q, k = normed(q, 1e-5), normed(k, 1e-5)
    sinks = None
    if layer.sinks is not None:
        layer.sinks[...] = jnp.linspace(-1.0, 1.0, H)
        sinks = np.linspace(-1, 1, H)
    y = numpy_attention(q, k, v, 1.0, sinks, o.attn_logits_soft_cap)
    expected = np.einsum("bthd,hde->bte", y, np.asarray(layer.out.kernel[...]))
    actual, _ = layer(inputs(), deterministic=True)
    assert actual.dtype == jnp.float64
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.slow
def test_maxtexts_latent_attention():
    layer = MLA(
        **SIZES | dict(num_kv_heads=H),
        q_lora_rank=6,
        kv_lora_rank=10,
        qk_nope_head_dim=4,
        qk_rope_head_dim=D,
        v_head_dim=5,
        rngs=nnx.Rngs(0),
    )
    x = np.asarray(inputs())
    kernel = lambda name: np.asarray(getattr(layer, name).kernel[...])
    q = normed(x @ kernel("wq_a"), 1e-5)
    q = np.einsum("btr,rhd->bthd", q, kernel("wq_b"))
    both = x @ kernel("wkv_a")
    heads = np.einsum("btr,rhd->bthd", normed(both[..., :10], 1e-5), kernel("wkv_b"))
    shared = np.repeat(rotated(both[:, :, None, 10:]), H, axis=2)
    k = np.concatenate([heads[..., :4], shared], axis=-1)
    q = np.concatenate([q[..., :4], rotated(q[..., 4:])], axis=-1)
    y = numpy_attention(q, k, heads[..., 4:], layer.options.softmax_scale)
    expected = np.einsum("bthd,hde->bte", y, np.asarray(layer.out.kernel[...]))
    actual, _ = layer(inputs(), deterministic=True)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)
