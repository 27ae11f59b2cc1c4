"""The forward pass, its builds and its projections."""

import inspect
from pathlib import Path

import gguf as ggml
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import raptax
from raptax import (
    AttentionWithRope,
    Causal,
    CodesLinear,
    GGUFLinear,
    KVCacheParams,
    Linear,
    PagedKVCache,
    RMSNorm,
    RotaryEmbedding,
    SlidingWindow,
    SoftCap,
    attention,
)
from raptax.compat.max import GGUFQAttentionWithRope
from raptax.compat.max import quantized_attention as packed
from raptax.nn import attention as layer_module
from raptax.nn.linear import Projection, StackedQKV
from raptax.quant import gguf

MAX = np.load(Path(__file__).parent / "data/attention_max.npz")
SIZES = dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=48)
KV = KVCacheParams(dtype=jnp.float32, n_kv_heads=2, head_dim=16, page_size=8)


def build(**options) -> AttentionWithRope:
    options = dict(rope=RotaryEmbedding.create(16), kv_params=KV, **SIZES) | options
    return AttentionWithRope(**options, rngs=nnx.Rngs(0))


def batch(seed=0, B=2, T=11):
    x = np.random.default_rng(seed).normal(size=(B, T, 48))
    return jnp.asarray(x, jnp.float32)


def cache_for(layer, B=2):
    params = KV
    cache = PagedKVCache.create(params, pages=8, sequences=B, max_pages=4)
    return cache.with_tables([[0, 2, 4, 6], [7, 5, 3, 1]][:B], [0] * B)


VARIANTS = {
    "plain": {},
    "stacked": dict(stacked_qkv=True),
    "bias": dict(has_bias=True),
    "stacked bias": dict(stacked_qkv=True, has_bias=True),
    "clip": dict(clip_qkv=0.3),
    "norms": dict(use_qk_norm=True),
    "scale": dict(scale=0.5),
    "zero scale": dict(scale=0.0),
    "interleaved": dict(rope=RotaryEmbedding.create(16, layout="interleaved")),
    "partial": dict(rope=RotaryEmbedding.create(8)),
    "no rope": dict(rope=None),
}


def by_hand(layer, x, options):
    """The formula, written a second time; `attention` itself is taken as given."""
    B, T, _ = x.shape
    if isinstance(layer.qkv, StackedQKV):
        q, k, v = jnp.split(layer.qkv.qkv(x), (64, 96), axis=-1)
    else:
        q, k, v = layer.qkv.q(x), layer.qkv.k(x), layer.qkv.v(x)
    if "clip_qkv" in options:
        c = options["clip_qkv"]
        q, k, v = (jnp.minimum(jnp.maximum(a, -c), c) for a in (q, k, v))
        assert (jnp.abs(q) == c).any()
    q, k, v = q.reshape(B, T, 4, 16), k.reshape(B, T, 2, 16), v.reshape(B, T, 2, 16)
    if "use_qk_norm" in options:
        q, k = (a / jnp.sqrt((a * a).mean(-1, keepdims=True) + 1e-6) for a in (q, k))
    rope = options.get("rope", RotaryEmbedding.create(16))
    if rope is not None:
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        q, k = rope(q, positions), rope(k, positions)
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    scale = options.get("scale", 16**-0.5)
    y = attention(q, k, v, mask_mod=Causal(), scale=scale, kernel="reference")
    return layer.out(y.swapaxes(1, 2).reshape(B, T, 64))


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_is_the_formula(name):
    layer, x = build(**VARIANTS[name]), batch()
    y, cache = layer(x)
    assert cache is None
    np.testing.assert_allclose(y, by_hand(layer, x, VARIANTS[name]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_decode_equals_training(name):
    layer, x = build(**VARIANTS[name]), batch()
    expected, _ = layer(x)
    cache, outs = cache_for(layer), []
    for first, last in ((0, 6), (6, 9), (9, 10), (10, 11)):
        y, cache = layer(x[:, first:last], cache)
        cache = cache.advance(jnp.arange(3, dtype=jnp.int32) * (last - first))
        outs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), expected, rtol=0, atol=2e-6)


def test_rules_reach_the_kernel_on_both_paths():
    layer, x = build(), batch()
    mods = dict(mask_mod=SlidingWindow(3), score_mod=SoftCap(0.5))
    plain, _ = layer(x)
    y, _ = layer(x, **mods)
    again, _ = layer(x, cache_for(layer), **mods)
    assert jnp.abs(y - plain).max() > 1e-2
    np.testing.assert_allclose(again, y, rtol=0, atol=2e-6)


def test_ragged_rows_equal_batches():
    layer, x = build(), batch()
    y, _ = layer(x)
    rows = jnp.concatenate([x[0, :7], x[1]])
    ragged, _ = layer(
        rows, cache_for(layer), row_offsets=jnp.array([0, 7, 18], jnp.int32)
    )
    expected = jnp.concatenate([y[0, :7], y[1]])
    np.testing.assert_allclose(ragged, expected, rtol=0, atol=2e-6)


def test_own_positions_move_the_rope_alone():
    layer, x = build(), batch()
    y, _ = layer(x)
    at = jnp.broadcast_to(jnp.arange(11, dtype=jnp.int32) + 50, (2, 11))
    moved, _ = layer(x, positions=at)  # rotary scores depend on differences
    np.testing.assert_allclose(moved, y, rtol=0, atol=2e-5)
    stretched, _ = layer(x, positions=at * 3)
    assert jnp.abs(stretched - y).max() > 1e-2


@pytest.mark.slow
def test_gradients_are_finite_and_reach_every_weight():
    layer, x = build(has_bias=True, use_qk_norm=True), batch()
    gradients = nnx.grad(lambda layer: (layer(x)[0] ** 2).sum())(layer)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    assert len(leaves) == 4 + 3 + 2
    for path, leaf in leaves:
        assert jnp.isfinite(leaf).all(), path
        if "k" not in str(path) or "bias" not in str(path):
            assert (leaf != 0).any(), path


@pytest.mark.slow
def test_max_ragged_prefill_mixed_step_and_decode():
    """Numbers computed by MAX 26.1; see tests/data/README.md."""
    params = KVCacheParams(dtype=jnp.float32, n_kv_heads=2, head_dim=64)
    weight = lambda name: Linear.from_weight(jnp.asarray(MAX[f"w.{name}.weight"]))
    layer = GGUFQAttentionWithRope(  # any projections, here of plain numbers
        rope=RotaryEmbedding.create(64),
        num_attention_heads=8,
        num_key_value_heads=2,
        kv_params=params,
        weights={name: weight(f"{name}_proj") for name in "qkvo"},
    )
    for name in ("q_norm", "k_norm"):
        gamma = jnp.asarray(MAX[f"w.{name}.weight"])
        setattr(layer, name, nnx.data(RMSNorm(64, eps=1e-5, weight=gamma)))
    cache = PagedKVCache.create(params, pages=12, sequences=3, max_pages=3)
    cache = raptax.PagedKVCache(
        cache.k_pages, cache.v_pages, jnp.asarray(MAX["c0.lookup_table"], jnp.int32),
        cache.lengths,
    )  # fmt: skip
    for call in ("c0", "c1", "c2"):
        np.testing.assert_array_equal(cache.lengths, MAX[f"{call}.cache_lengths"])
        np.testing.assert_array_equal(cache.table, MAX[f"{call}.lookup_table"])
        offsets = jnp.asarray(MAX[f"{call}.row_offsets"], jnp.int32)
        y, cache = layer(jnp.asarray(MAX[f"{call}.x"]), cache, row_offsets=offsets)
        cache = cache.advance(offsets)
        np.testing.assert_allclose(y, MAX[f"{call}.out"], rtol=0, atol=2e-5)


def test_builds_define_no_forward_pass():
    builds = [
        c
        for _, c in (
            *inspect.getmembers(layer_module, inspect.isclass),
            *inspect.getmembers(packed, inspect.isclass),
        )
        if issubclass(c, layer_module.AbstractAttention)
        and c is not layer_module.AbstractAttention
    ]
    assert len(set(builds)) >= 4
    for build_class in builds:
        own = {n for n, v in vars(build_class).items() if inspect.isfunction(v)}
        assert own <= {"__init__", "shard"}, build_class


# ------------------------------------------------------------------------- projections


def quantized(encoding: str, rows=24, cols=64):
    weight = np.random.default_rng(0).normal(size=(rows, cols)).astype(np.float32)
    kind = ggml.GGMLQuantizationType[encoding]
    packed = ggml.quants.quantize(weight, kind)
    there = gguf.Encoding.from_name(encoding)
    blocks = packed.view(np.uint8).reshape(rows, -1, there.bytes)
    return jnp.asarray(blocks), there, ggml.quants.dequantize(packed, kind)


@pytest.mark.parametrize("encoding", ["F32", "F16", "Q4_0", "Q4_1", "Q8_0"])
def test_gguf_projections_are_products_with_the_dequantized_weight(encoding):
    blocks, there, weight = quantized(encoding)
    bias = jnp.arange(24, dtype=jnp.float32)
    made = {"blocks": GGUFLinear(blocks, there, bias)}
    if not there.is_plain:
        made["codes"] = CodesLinear(gguf.unpack(blocks, there), bias)
    x = np.random.default_rng(1).normal(size=(2, 3, 64)).astype(np.float32)
    ids = jnp.array([[3, 0], [23, 3]], jnp.int32)
    for projection in made.values():
        assert isinstance(projection, Projection)
        assert projection.out_features == 24
        expected = x.astype(np.float64) @ weight.T.astype(np.float64) + np.arange(24)
        y = projection(jnp.asarray(x))
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(projection.rows(ids), weight[np.asarray(ids)])
        assert projection(jnp.asarray(x).astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_linear():
    layer = Linear(5, 3, has_bias=True, rngs=nnx.Rngs(0))
    assert layer.weight.shape == (3, 5)
    assert (layer.bias[...] == 0).all()
    layer.bias[...] = jnp.array([1.0, 2.0, 3.0])
    x = batch()[..., :5]
    expected = x @ layer.weight[...].T + jnp.array([1.0, 2.0, 3.0]).reshape(1, 1, 3)
    np.testing.assert_allclose(layer(x), expected, rtol=0, atol=1e-6)
    wide = Linear(4000, 50, rngs=nnx.Rngs(0)).weight[...]
    assert abs(wide.std() * 4000**0.5 - 1) < 0.02  # LeCun's variance


def test_gguf_weights_are_not_trained():
    blocks, there, _ = quantized("Q4_0")
    _, trained, rest = nnx.split(GGUFLinear(blocks, there), nnx.Param, ...)
    assert not jax.tree.leaves(trained)
    assert len(jax.tree.leaves(rest)) == 1


def test_rms_norm():
    x = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32) * 100
    gamma = np.arange(7, dtype=np.float32)
    norm = RMSNorm(7, eps=0.5, weight=jnp.asarray(gamma))
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected * gamma, rtol=1e-5)
    low = norm(jnp.asarray(x).astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), expected * gamma, rtol=2e-2)


# ------------------------------------------------------------------------------ errors


def gguf_build(**changes):
    blocks, there, _ = quantized("Q4_0", rows=64, cols=64)
    options = dict(
        rope=None,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_params=KVCacheParams(dtype=jnp.float32, n_kv_heads=4, head_dim=16),
        weights=dict.fromkeys("qkvo", blocks),
        quantization_encoding=there,
    )
    return GGUFQAttentionWithRope(**options | changes)


def test_gguf_build_runs():
    y, _ = gguf_build()(jnp.ones((1, 3, 64)))
    assert jnp.isfinite(y).all()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: build(num_attention_heads=3), "query_heads=3 must be a multiple"),
        (lambda: build(num_key_value_heads=4), "num_key_value_heads=4 must equal"),
        (lambda: gguf_build(weights={}), r"weights lack \['k', 'o', 'q', 'v'\]"),
        (
            lambda: gguf_build(quantization_encoding=None),
            "need a quantization_encoding",
        ),
        (lambda: gguf_build(num_attention_heads=8), "q, k and v must be"),
        (lambda: StackedQKV(Linear(4, 9, rngs=nnx.Rngs(0)), (4, 2, 2)), "width 9"),
    ],
)
def test_construction_errors(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda a: a(batch()[0]), "without a cache x must be"),
        (lambda a: a(batch(), row_offsets=jnp.zeros(3, jnp.int32)), "no row_offsets"),
        (lambda a: a(batch()[0], cache_for(a)), "rows"),
        (
            lambda a: a(batch(), cache_for(a), row_offsets=jnp.zeros(3, jnp.int32)),
            "row_offsets go with rows",
        ),
        (
            lambda a: a(batch()[0], cache_for(a), row_offsets=jnp.zeros(5, jnp.int32)),
            "one entry more than the cache's 2 sequences",
        ),
    ],
)
def test_call_errors(call, named):
    with pytest.raises(ValueError, match=named):
        call(build())
