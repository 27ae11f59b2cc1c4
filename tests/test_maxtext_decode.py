"""The decode invariant: every row of prefill and decode equals the row of training."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from raptax import attention
from raptax.compat.maxtext import KVQuant, masks
from raptax.kv_cache.contiguous import ContiguousKVCache, Partition
from raptax.kv_cache.quantization import KVQuantization
from tests.maxtext_cases import MLA_SIZES, YARN, build, call, decoded, randomise

L, P, E = 12, 7, 32
SIZES = dict(
    max_target_length=L,
    max_prefill_predict_length=P,
    inputs_q_shape=(2, L, E),
    inputs_kv_shape=(2, L, E),
)
config = lambda **options: dict(config=options)
moba = config(moba=True, moba_chunk_size=3, moba_topk=2)
OPTIONS = {
    "plain": {},
    "window 1": dict(attention_type="local_sliding", sliding_window_size=1),
    "window 3": dict(attention_type="local_sliding", sliding_window_size=3),
    "window 9": dict(attention_type="local_sliding", sliding_window_size=9),
    "window 50": dict(attention_type="local_sliding", sliding_window_size=50),
    "chunk 2": dict(attention_type="chunk", config=dict(chunk_attn_window_size=2)),
    "chunk 5": dict(attention_type="chunk", config=dict(chunk_attn_window_size=5)),
    "chunk 9": dict(attention_type="chunk", config=dict(chunk_attn_window_size=9)),
    "moba": moba,
    "sinks": config(attention_sink=True),
    "soft cap": dict(attn_logits_soft_cap=1.5),
    "nope": dict(is_nope_layer=True),
    "temperature": dict(
        is_nope_layer=True, temperature_tuning=True, temperature_tuning_floor_scale=3
    ),
    "scalar": dict(query_pre_attn_scalar=0.3),
    "qk-norm": dict(use_qk_norm=True),
    "qk-norm, no scale": dict(use_qk_norm=True, **config(qk_norm_with_scale=False)),
    "qk-norm, all heads": dict(use_qk_norm=True, **config(model_name="olmo3-7b")),
    "llama4 norm": dict(use_qk_norm=True, **config(decoder_block="llama4")),
    "value norm": dict(use_v_norm=True),
    "shared": dict(share_kv_projections=True),
    "fused": config(fused_qkv=True),
    "bias": dict(use_bias_in_projections=True),
    "float32": dict(float32_qk_product=True, float32_logits=True),
    "reshape_q": dict(reshape_q=True),
    "ragged": dict(use_ragged_attention=True, ragged_block_size=2),
    "ragged 4": dict(attention_kernel="ragged", ragged_block_size=4),
    "llama3": dict(rope_type="llama3.1"),
    "yarn": dict(rope_type="yarn", config=YARN),
    "yarn in pairs": dict(rope_type="yarn", config=YARN | dict(rope_pairwise=True)),
    "partial": dict(partial_rotary_factor=0.5),
    "mrope": dict(use_mrope=True, mrope_section=(4, 2, 2)),
    "mqa": dict(num_kv_heads=1),
    "ring window": dict(
        attention_type="local_sliding",
        sliding_window_size=3,
        config=dict(ring_kv_cache=True),
    ),
    "ring chunk": dict(
        attention_type="chunk",
        config=dict(ring_kv_cache=True, chunk_attn_window_size=4),
    ),
    "mla": dict(MLA_SIZES),
    "mla, q latent": dict(MLA_SIZES, q_lora_rank=6, rope_type="yarn"),
    "mla, heads stored": dict(MLA_SIZES, **config(mla_naive_kvcache=True)),
    "autoselected": dict(attention_kernel="autoselected"),
    "flash sinks": dict(attention_kernel="flash", **config(attention_sink=True)),
}
QUICK = {"chunk 5", "ring window"}
SCENES = {
    "whole": dict(prompt=7),
    "padded": dict(prompt=4, pad=3),
    "chunks": dict(prompt=7, chunks=[2, 3]),
    "padded chunks": dict(prompt=5, pad=2, chunks=[4]),
    "one by one": dict(prompt=2, chunks=[1]),
}
quick = lambda named: [
    n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in named
]


def inputs(seed=0):
    x = np.random.default_rng(seed).normal(size=(2, L, E))
    return jnp.asarray(x, jnp.float32)


def layer_with(**options):
    return randomise(build(**SIZES | options))


def check(options, scene, atol=2e-6):
    layer, x = layer_with(**options), inputs()
    rows = scene["prompt"] + L - P if scene.get("pad") else L
    rows = min(rows, scene["prompt"] + L - P)
    expected = call(layer, x)
    y = decoded(layer, x[:, :rows], **scene)
    np.testing.assert_allclose(y, expected[:, :rows], rtol=0, atol=atol)
    assert jnp.isfinite(y).all()


@pytest.mark.parametrize("name", quick(OPTIONS))
def test_decode_rows_are_training_rows(name):
    check(OPTIONS[name], SCENES["whole"])


@pytest.mark.parametrize("name", ["window 3", "mla"])
def test_so_they_are_in_pieces(name):
    check(OPTIONS[name], SCENES["padded chunks"])


@pytest.mark.slow
@pytest.mark.parametrize("scene", [s for s in SCENES if s != "whole"])
@pytest.mark.parametrize("name", OPTIONS)
def test_so_they_are_in_every_scene(name, scene):
    check(OPTIONS[name], SCENES[scene])


PAIRS = [
    pair
    for pair in itertools.combinations(
        ["window 3", "chunk 5", "moba", "sinks", "soft cap", "temperature", "qk-norm",
         "shared", "fused", "ragged", "yarn", "reshape_q", "bias", "llama4 norm"],
        2,
    )
    if pair
    not in {
        ("window 3", "chunk 5"),  # one layer has one type
        ("shared", "fused"),  # refused
        ("temperature", "yarn"),  # no positions, so no YaRN
        ("qk-norm", "llama4 norm"),  # the same option twice
    }
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=" + ".join)
def test_pairs_of_options(pair):
    first, second = (OPTIONS[name] for name in pair)
    both = config(**first.get("config", {}) | second.get("config", {}))
    check(first | second | both, SCENES["padded chunks"])


# --------------------------------------------------------------------- quantized caches


def quantized(kind, axes):
    options = dict(quantize_kvcache=True, kv_quant_dtype=kind, kv_quant_axis=axes)
    return dict(config=options, kv_quant=KVQuant(options))


STEP = {"int8": 3e-2, "int4": 0.6, "fp8": 0.15}  # of the rows, for scores of size 1


@pytest.mark.parametrize(
    ("kind", "axes", "dtype"),
    [
        pytest.param(
            kind,
            axes,
            dtype,
            marks=[]
            if (kind, axes, dtype) == ("int8", "dkv", jnp.float32)
            else pytest.mark.slow,
        )
        for kind in ("int8", "int4", "fp8")
        for axes in ("dkv", "heads_and_dkv")
        for dtype in (jnp.float32, jnp.bfloat16)
    ],
)
def test_a_quantized_cache_rounds_what_it_stores_and_nothing_else(kind, axes, dtype):
    options = quantized(kind, axes)
    layer, plain = (layer_with(dtype=dtype, **o) for o in (options, {}))
    x = inputs().astype(dtype)
    expected = call(layer, x)
    np.testing.assert_array_equal(expected, call(plain, x))
    y = decoded(layer, x, prompt=P)
    atol = 2e-6 if dtype == jnp.float32 else 5e-2
    close = lambda a, b, atol: np.testing.assert_allclose(
        *(np.asarray(z, np.float32) for z in (a, b)), rtol=0, atol=atol
    )
    close(y[:, :P], expected[:, :P], atol)
    # Decoded rows are attention to what the codes say, which is next to what was put.
    q, *put = layer._heads(x, x, jnp.arange(L, dtype=jnp.int32)[None], None)
    cache, rounded = layer.KVCache_0.value, KVQuantization(kind, axes)
    parts = cache.prefill.read(dtype), cache.generated.read(dtype)
    k, v = (jnp.concatenate(both, axis=2) for both in zip(*parts, strict=True))
    for held, new in zip((k, v), put, strict=True):
        codes = rounded.dequantize(*rounded.quantize(new), jnp.float32)
        step = np.abs(np.asarray(new, np.float32)).max() / rounded.top * 1.5
        step *= 16 if kind == "fp8" else 1  # its steps grow with the number
        close(held.swapaxes(1, 2), codes, step)
    rows = attention(
        q.swapaxes(1, 2),
        k,
        v,
        mask_mod=masks.base_mask(layer.options),
        scale=1.0,
        kernel="reference",
    )
    close(y[:, P:], layer.out_projection(rows.swapaxes(1, 2))[:, P:], atol)
    assert 0 < jnp.abs(y[:, P:] - expected[:, P:]).max() < STEP[kind] + 5e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["window 3", "sinks", "ring window", "mla"])
def test_quantized_caches_of_other_layers(name):
    options = quantized("int8", "dkv")
    both = config(**options["config"] | OPTIONS[name].get("config", {}))
    check(OPTIONS[name] | options | both, SCENES["padded chunks"], atol=5e-2)


# -------------------------------------------------------------------------- axis orders

ORDERS = list(itertools.permutations(range(4)))


@pytest.mark.parametrize(
    "orders", [ORDERS[1::9], pytest.param(ORDERS, marks=pytest.mark.slow)], ids=len
)
def test_a_partition_holds_the_same_in_every_order(orders):
    rng = np.random.default_rng(0)
    new = [jnp.asarray(rng.normal(size=(2, 3, 2, n)), jnp.float32) for n in (4, 5)]
    ids, slots = (
        jnp.ones((2, 3), jnp.int32),
        jnp.array([[1, 4, 0], [6, 2, 3]], jnp.int32),
    )
    for order in orders:
        empty = Partition.create(
            (2, 6, 2, 4), jnp.float32, value_size=5, axis_order=order
        )
        held = empty.put(*new, ids, slots)
        for array, rows in zip(held.read(jnp.float32), new, strict=True):
            expected = np.zeros((2, 2, 7, rows.shape[3]), np.float32)
            for b, t in itertools.product(range(2), range(3)):
                expected[b, :, slots[b, t]] = rows[b, t]
            np.testing.assert_array_equal(array, expected[:, :, :6])
        assert held.key.shape == tuple((2, 6, 2, 4)[axis] for axis in order)


def rows_in(order, compute):
    layer = layer_with(
        prefill_cache_axis_order=order,
        ar_cache_axis_order=order[::-1],
        compute_axis_order=compute,
    )
    return decoded(layer, inputs(), prompt=P)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS[1:])
def test_every_order_of_axes_computes_the_same(order):
    expected = rows_in(ORDERS[0], (0, 1, 2, 3))
    for compute in ((0, 1, 2, 3), (0, 2, 1, 3)):
        np.testing.assert_array_equal(rows_in(order, compute), expected)


# --------------------------------------------------------------------------- odd inputs


def test_rows_of_different_lengths_decode_together():
    layer, x = layer_with(**OPTIONS["window 3"]), inputs()
    expected = call(layer, x)
    ids = (jnp.arange(P)[None] < jnp.array([[7], [4]])).astype(jnp.int32)
    call(layer, x[:, :P], decoder_segment_ids=ids, model_mode="prefill")
    for t in range(3):
        row = jnp.stack([x[0, 7 + t], x[1, 4 + t]])[:, None]
        y = call(layer, row, model_mode="autoregressive")
        both = jnp.stack([expected[0, 7 + t], expected[1, 4 + t]])
        np.testing.assert_allclose(y[:, 0], both, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_padding_before_a_prompt():
    layer, x = layer_with(**OPTIONS["window 3"]), inputs()
    ids = (jnp.arange(L) >= 3).astype(jnp.int32)[None].repeat(2, 0)
    expected = call(layer, x, decoder_segment_ids=ids)
    call(layer, x[:, :P], decoder_segment_ids=ids[:, :P], model_mode="prefill")
    for t in range(P, L):
        y = call(layer, x[:, t : t + 1], model_mode="autoregressive")
        np.testing.assert_allclose(y[:, 0], expected[:, t], rtol=0, atol=2e-6)


def test_a_full_cache_raises_and_under_jit_is_nan():
    layer, x = layer_with(), inputs()
    decoded(layer, x, prompt=P)
    with pytest.raises(ValueError, match="the cache is full: 5 tokens"):
        layer(x[:, :1], model_mode="autoregressive")
    kept = layer.KVCache_0.value.generated.key
    y = call(layer, x[:, :1], model_mode="autoregressive")
    assert jnp.isnan(y).all()
    np.testing.assert_array_equal(layer.KVCache_0.value.generated.key, kept)
    call(layer, x[:, :P], model_mode="prefill")  # a new prompt empties it
    expected = call(layer, x)
    y = call(layer, x[:, P : P + 1], model_mode="autoregressive")
    np.testing.assert_allclose(y[:, 0], expected[:, P], rtol=0, atol=2e-6)


def test_update_kv_caches_returns_both_partitions():
    layer = layer_with()
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(2, 5, 2, 16)), jnp.float32) for _ in "kv")
    assert layer.update_kv_caches(k, v, None, "train", None) == [(k, v, None), None]
    (key, value, ids), ar = layer.update_kv_caches(k, v, None, "prefill", None)
    assert ar is None
    for mine, theirs in ((key, k), (value, v), (ids, jnp.ones((2, 5), jnp.int32))):
        np.testing.assert_array_equal(mine, theirs)
    prompt, later = layer.update_kv_caches(k[:, :1], v[:, :1], None, "autoregressive")
    assert prompt[0].shape == (2, P, 2, 16)
    np.testing.assert_array_equal(later[0][:, 0], k[:, 0])
    np.testing.assert_array_equal(later[3], jnp.ones(2, jnp.int32))
    cache = layer.KVCache_0.value
    assert isinstance(cache, ContiguousKVCache)
    np.testing.assert_array_equal(cache.next_positions, jnp.array([6, 6], jnp.int32))
