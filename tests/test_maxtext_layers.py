"""Masks, dropout, kernels, Linen modules, serving, meshes of `raptax.compat.maxtext`."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

from raptax import Causal, RotaryEmbedding, attention
from raptax.compat.maxtext import (
    AttentionOptions,
    attention_as_linen,
    masks,
    mla_as_linen,
    ragged_paged_attention,
)
from raptax.compat.maxtext.sharding import partition_spec
from raptax.kv_cache.positioned import KVSegment
from raptax.mods import mask_mod_to_boolean_mask
from tests.maxtext_cases import BASE, MLA_SIZES, E, build, call, decoded, randomise

T = 8
OPTIONS = BASE | dict(attention_kernel="autoselected", model_mode="train")


def batch(B=2, T=T, seed=0):
    x = np.random.default_rng(seed).normal(size=(B, T, E))
    return jnp.asarray(x, jnp.float32)


def seen(*mods, T=T):
    mask = mask_mod_to_boolean_mask(
        masks.combined(*mods), batch=1, num_heads=1, seq_q=T, seq_kv=T
    )
    return np.asarray(mask)[0, 0]


def options(**changes):
    return AttentionOptions(**OPTIONS | changes)


def test_the_rule_of_each_type():
    i, j = np.indices((T, T))
    causal = j <= i
    chunk = dict(chunk_attn_window_size=3, causal_block_size=3)
    for kind, expected in {
        "global": causal,
        "mla": causal,
        "local_sliding": causal & (i - j < 3),
        "chunk": causal & (i // 3 == j // 3),
        "block_diffusion": i // 3 >= j // 3,
    }.items():
        o = options(attention_type=kind, sliding_window_size=3, config=chunk)
        np.testing.assert_array_equal(seen(masks.base_mask(o)), expected, err_msg=kind)
    assert masks.base_mask(options(attention_type="full")) is None
    asked = chunk | dict(attention_type="block_diffusion")
    assert options(config=asked).kind == "block_diffusion"
    named = types.SimpleNamespace(value="chunk")  # a member of MaxText's own enum
    assert options(attention_type=named, config=chunk).kind == "chunk"


def test_segments_and_runs():
    ids = jnp.array([[1, 1, 2, 2, 0, 0, -1, -1]], jnp.int32)
    run = jnp.array([[0, 1, 1, 1, 0, 0, 1, 1]], jnp.int32)
    i, j = np.indices((T, T))
    alike = np.asarray(ids)[0][:, None] == np.asarray(ids)[0][None]
    alike &= np.asarray(ids)[0][None] >= 0
    narrow = masks.segments(ids, ids, 0)
    np.testing.assert_array_equal(seen(Causal(), narrow), (j <= i) & alike)
    both = masks.combined(Causal(), narrow, bidirectional=masks.runs(run))
    within = np.zeros((T, T), bool)
    within[1:4, 1:4] = within[6:, 6:] = True
    np.testing.assert_array_equal(seen(both), ((j <= i) & alike) | within)
    none = masks.runs(jnp.zeros((1, T), jnp.int32))
    assert not seen(none).any()


def test_moba_is_the_papers_choice():
    rng = np.random.default_rng(0)
    B, H, K, D, size, count = 2, 4, 2, 8, 3, 2
    q = rng.normal(size=(B, H, 11, D)).astype(np.float32)
    k = rng.normal(size=(B, K, 11, D)).astype(np.float32)
    o = options(
        config=dict(moba=True, moba_chunk_size=size, moba_topk=count),
        max_target_length=11,
        max_prefill_predict_length=4,
    )
    at = jnp.broadcast_to(jnp.arange(11, dtype=jnp.int32), (B, 11))
    held = [KVSegment(jnp.asarray(k), jnp.asarray(k), at)]
    chosen = np.asarray(masks.moba(jnp.asarray(q), held, at, o).chosen)
    for b, h, t in np.ndindex(B, H, 11):
        own = t // size
        means = [k[b, h // 2, n * size : n * size + size].mean(0) for n in range(own)]
        liking = [-(q[b, h, t] @ mean) for mean in means]
        best = {own, *np.argsort(liking, kind="stable")[: count - 1]}
        assert set(np.flatnonzero(chosen[b, h, t])) == best


@pytest.mark.slow
def test_padding_sees_padding_and_empty_slots_see_no_token():
    layer = build()
    ids = jnp.array([[1] * 5 + [0] * 3, [1] * 5 + [-1] * 3], jnp.int32)
    x = batch()
    y = call(layer, x, decoder_segment_ids=ids)
    short = call(layer, x[:, :5])
    np.testing.assert_allclose(y[:, :5], short, rtol=0, atol=2e-6)
    own = call(
        layer, x[:1, 5:], inputs_positions=jnp.arange(5, 8, dtype=jnp.int32)[None]
    )
    np.testing.assert_allclose(y[:1, 5:], own, rtol=0, atol=2e-5)
    assert (y[1, 5:] == 0).all()


def test_full_attention_across_inputs():
    layer = build(attention_type="full", is_nope_layer=True)
    x, other = batch(), batch(T=5, seed=1)
    y = call(layer, x, other)
    q = layer.query_projection(x)
    k, v = (layer.kv_projection(other, name) for name in ("key", "value"))
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    expected = attention(q, k, v, scale=1.0, kernel="reference").swapaxes(1, 2)
    np.testing.assert_allclose(y, layer.out_projection(expected), rtol=0, atol=2e-6)
    fused = build(
        attention_type="full", is_nope_layer=True, config=dict(fused_qkv=True)
    )
    kernels = [m.kernel[...] for m in (layer.query, layer.key, layer.value)]
    fused.qkv_proj.kernel[...] = jnp.concatenate(kernels, axis=1)
    fused.out.kernel[...] = layer.out.kernel[...]
    np.testing.assert_allclose(call(fused, x, other), y, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_shared_projections_are_a_copy_of_the_keys():
    shared, apart = (
        build(share_kv_projections=True, use_qk_norm=True),
        build(use_qk_norm=True),
    )
    for name in ("query", "key", "out"):
        getattr(apart, name).kernel[...] = getattr(shared, name).kernel[...]
    apart.value.kernel[...] = shared.key.kernel[...]
    np.testing.assert_allclose(
        call(shared, batch()), call(apart, batch()), rtol=0, atol=1e-6
    )


def test_temperature_is_float32_in_bfloat16():
    layer = build(
        is_nope_layer=True,
        temperature_tuning=True,
        dtype=jnp.bfloat16,
        max_target_length=10,
        max_prefill_predict_length=5,
    )
    q = jnp.ones((1, 3, 4, 16), jnp.bfloat16)
    at = jnp.array([[8190, 8191, 8192]], jnp.int32)  # the first two round to 8192
    scaled = layer._scaled(q, at)[0, :, 0, 0].astype(jnp.float32)
    once = float(jnp.asarray(1 + 0.1 * np.log(2), jnp.bfloat16))
    np.testing.assert_array_equal(scaled, np.array([1, once, once], np.float32))


@pytest.mark.parametrize(
    "mode",
    [
        "train",
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ("prefill", "autoregressive")
        ),
    ],
)
def test_dropout_drops(mode):
    layer, x = build(dropout_rate=0.5), batch()
    plain = build()
    nnx.update(plain, nnx.state(layer, nnx.Param))
    if mode == "autoregressive":
        for one in (layer, plain):
            call(one, x[:, :4], model_mode="prefill", deterministic=True)
        x = x[:, 4:5]
    run = lambda m, off: call(m, x, model_mode=mode, deterministic=off)
    kept = run(plain, False)
    if mode != "autoregressive":
        np.testing.assert_allclose(run(layer, True), kept, rtol=0, atol=2e-6)
    dropped = run(layer, False)
    assert jnp.abs(dropped - kept).max() > 1e-2
    assert jnp.isfinite(dropped).all()


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["flash", "paged", "ragged"])
def test_kernels_agree(kernel):
    x = batch()
    named, plain = build(attention_kernel=kernel), build()
    nnx.update(named, nnx.state(plain, nnx.Param))
    np.testing.assert_allclose(call(named, x), call(plain, x), rtol=0, atol=2e-6)


def test_gradients_are_finite_and_reach_every_weight():
    layer = randomise(
        build(
            use_bias_in_projections=True,
            use_qk_norm=True,
            config=dict(attention_sink=True),
        )
    )
    loss = lambda m: (m(batch())[0] ** 2).sum()
    gradients = nnx.jit(nnx.grad(loss))(layer)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    assert len(leaves) == 4 * 2 + 2 + 1
    for path, leaf in leaves:
        assert jnp.isfinite(leaf).all(), path
        assert (leaf != 0).any(), path


# -------------------------------------------------------------------------------- Linen


@pytest.mark.parametrize(
    "cls", ["attention", pytest.param("mla", marks=pytest.mark.slow)]
)
def test_the_linen_door_is_the_same_layer(cls):
    extra = MLA_SIZES if cls == "mla" else {}
    as_linen = mla_as_linen if cls == "mla" else attention_as_linen
    config = dict(attention_sink=True)
    made = BASE | extra | dict(config=config)
    module, x = as_linen(**made, name="attention"), batch()
    assert module.name == "attention"
    variables = module.init(jax.random.key(0), x, x)
    assert set(variables) == {"params", "cache"}
    kernel = variables["params"]["out"]["kernel"]
    assert isinstance(kernel, linen.LogicallyPartitioned)
    assert kernel.names == ("heads", "kv", "embed")
    layer = build(**extra, config=config)
    plain = linen.unbox(variables["params"])
    state = nnx.state(layer, nnx.Param)
    for path, variable in nnx.to_flat_state(state):
        variable[...] = functools.reduce(lambda tree, name: tree[name], path, plain)
    nnx.update(layer, state)
    expected = call(layer, x)
    y, _ = jax.jit(module.apply)(variables, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)
    run = functools.partial(module.apply, mutable=["cache"])
    run = jax.jit(run, static_argnames="model_mode")
    (y, _), cache = run(variables, x[:, :6], model_mode="prefill")
    rows = [y]
    for t in range(6, T):
        step = x[:, t : t + 1]
        held = {"params": variables["params"], **cache}
        (y, _), cache = run(held, step, model_mode="autoregressive")
        rows.append(y)
    np.testing.assert_allclose(jnp.concatenate(rows, 1), expected, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="num_kv_heads is not defined"):
        as_linen(**made | dict(num_kv_heads=-1))


# ------------------------------------------------------------------------------ serving


def pool(lengths, rows, K=2, D=16, P=4, pages=9, seed=0):
    """Sequences in shuffled pages, as vLLM keeps them: new rows are not written yet."""
    rng = np.random.default_rng(seed)
    B, M = len(lengths), 3
    table = rng.permutation(pages)[: B * M].reshape(B, M).astype(np.int32)
    dense = rng.normal(size=(B, P * M, 2 * K, D)).astype(np.float32)
    cache = np.full((pages, P, 2 * K, D), np.nan, np.float32)
    for b, (length, new) in enumerate(zip(lengths, rows, strict=True)):
        for t in range(length - new):
            cache[table[b, t // P], t % P] = dense[b, t]
    return jnp.asarray(cache), jnp.asarray(table), dense


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds",
    [
        {},
        dict(
            sliding_window_size=3, attention_type="local_sliding", sinks=True, cap=2.0
        ),
    ],
    ids=["plain", "window, sinks, cap"],
)
def test_vllms_contract(kinds):
    window, cap = kinds.get("sliding_window_size"), kinds.get("cap")
    layer = build(
        attention_kernel="vllm_rpa",
        attention_type=kinds.get("attention_type", "global"),
        sliding_window_size=window,
        attn_logits_soft_cap=cap,
        config=dict(attention_sink="sinks" in kinds),
    )
    layer = randomise(layer)
    lengths, rows = [9, 5, 1], [1, 4, 1]
    cache, table, dense = pool(lengths, rows)
    rng = np.random.default_rng(1)
    q, k, v = (
        jnp.asarray(rng.normal(size=(1, 8, n, 16)), jnp.float32) for n in (4, 2, 2)
    )
    metadata = dict(
        seq_lens=jnp.array([*lengths, 77], jnp.int32),
        block_tables=jnp.concatenate([table, table[:1] * 0 + 99]).reshape(-1),
        query_start_loc=jnp.array([0, 1, 5, 6, 99], jnp.int32),
        request_distribution=jnp.array([1, 1, 3], jnp.int32),
    )
    serve = nnx.jit(lambda m, *args: m.forward_serve_vllm(*args))
    y, new = serve(layer, q, k, v, [cache], metadata)
    assert isinstance(new, list)
    expected = np.zeros((8, 4, 16), np.float32)
    for b, start in enumerate((0, 1, 5)):
        length, count = lengths[b], rows[b]
        both = jnp.stack([k[0], v[0]], axis=2).reshape(8, 4, 16)
        dense[b, length - count : length] = both[start : start + count]
        for t in range(length):
            page = new[0][table[b, t // 4], t % 4]
            np.testing.assert_array_equal(page, dense[b, t])
        held = jnp.asarray(dense[b, :length])[None]
        out = attention(
            q[:, start : start + count].swapaxes(1, 2),
            *(held[:, :, n::2].swapaxes(1, 2) for n in (0, 1)),
            mask_mod=masks.base_mask(layer.options),
            score_mod=layer._settings(True).score_mod,
            sinks=layer.sinks[...] if "sinks" in kinds else None,
            scale=1.0,
            kernel="reference",
        )
        expected[start : start + count] = out[0].swapaxes(0, 1)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)
    packed = jnp.pad(cache, ((0, 0),) * 3 + ((0, 112),)).reshape(9, 4, 2, 2, 128)
    by_name = lambda m, *args: m.forward_serve_vllm(
        *args[:-1], types.SimpleNamespace(**args[-1])
    )
    other, wide = nnx.jit(by_name)(layer, q, k, v, packed, metadata)
    np.testing.assert_allclose(other, y, rtol=0, atol=1e-6)
    assert wide.shape == packed.shape
    empty, nothing = layer.forward_serve_vllm(q, k, v, None, None)
    np.testing.assert_array_equal(empty, q[0])
    assert nothing == []


@pytest.mark.slow
def test_a_layer_serves_what_it_trains():
    plain, served = build(), build(attention_kernel="vllm_rpa")
    nnx.update(served, nnx.state(plain, nnx.Param))
    assert not hasattr(served, "KVCache_0")
    x = batch(B=1)
    expected = call(plain, x)
    np.testing.assert_allclose(call(served, x), expected, rtol=0, atol=2e-6)
    cache, rows = jnp.zeros((3, 4, 4, 16)), []
    run = nnx.jit(lambda m, x, **given: m(x, model_mode="prefill", **given))
    for start, stop in ((0, 5), (5, 7), (7, 8)):
        metadata = dict(
            seq_lens=jnp.array([stop], jnp.int32),
            block_tables=jnp.array([[2, 0, 1]], jnp.int32),
            query_start_loc=jnp.array([0, stop - start], jnp.int32),
            request_distribution=jnp.array([0, 0, 1], jnp.int32),
        )
        y, cache = run(
            served,
            x[:, start:stop],
            inputs_positions=jnp.arange(start, stop, dtype=jnp.int32)[None],
            kv_cache=cache,
            attention_metadata=metadata,
        )
        rows.append(y)
    np.testing.assert_allclose(jnp.concatenate(rows, 1), expected, rtol=0, atol=2e-6)


def test_ragged_paged_attention_scales_keys_and_values():
    cache, table, dense = pool([5], [0])
    q = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 16)), jnp.float32)
    y = ragged_paged_attention(
        q,
        cache,
        jnp.array([5], jnp.int32),
        table[:1],
        jnp.array([0, 2], jnp.int32),
        jnp.array([1], jnp.int32),
        sm_scale=0.25,
        k_scale=2.0,
        v_scale=3.0,
    )
    k, v = (jnp.asarray(dense[:1, :5, n::2]).swapaxes(1, 2) for n in (0, 1))
    expected = attention(
        q[None].swapaxes(1, 2), k * 2, v * 3, mask_mod=Causal(), scale=0.25
    )
    np.testing.assert_allclose(y, expected[0].swapaxes(0, 1), rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------- meshes

RULES = [
    ("activation_kv_batch", "data"),
    ("activation_kv_heads", ("nowhere", "tensor")),
    ("activation_heads", "tensor"),
    ("q_heads", "tensor"),
    ("kv_heads", "tensor"),
    ("heads", "tensor"),
    ("embed", "data"),
]


def test_names_become_mesh_axes():
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "tensor"))
    spec = functools.partial(partition_spec, rules=RULES, mesh=mesh)
    names = "embed", "q_heads", "kv"
    assert spec(names, (8, 4, 16)) == P("data", "tensor", None)
    assert spec(names, (7, 4, 16)) == P(None, "tensor", None)  # 7 is not cut
    assert spec(("heads", "q_heads", None), (4, 4, 16)) == P("tensor", None, None)
    assert spec(("activation_kv_heads",), (4,)) == P("tensor")


@pytest.mark.parametrize(
    ("fused", "devices"),
    [
        (True, 2),
        pytest.param(True, 4, marks=pytest.mark.slow),
        pytest.param(False, 2, marks=pytest.mark.slow),
        pytest.param(False, 4, marks=pytest.mark.slow),
    ],
)
def test_heads_spread_over_devices_compute_the_same(fused, devices):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("tensor",))
    options = dict(
        num_kv_heads=devices, config=dict(logical_axis_rules=RULES, fused_qkv=fused)
    )
    alone, spread = build(**options), build(**options, mesh=mesh)
    kernel = (spread.qkv_proj if fused else spread.query).kernel[...]
    assert len(kernel.sharding.device_set) == devices
    assert kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // devices
    x = batch()
    run = nnx.jit(lambda m, x: m(x)[0])
    expected = run(alone, x)
    np.testing.assert_allclose(run(spread, x), expected, rtol=0, atol=2e-6)
    y = decoded(spread, x, prompt=6)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)


def test_a_rotary_embedding_is_raptaxs():
    x = batch().reshape(2, T, 2, 16)
    at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T))
    y = build().apply_rotary_embedding(x, at)
    np.testing.assert_array_equal(y, RotaryEmbedding.create(16)(x, at))
    np.testing.assert_array_equal(build().apply_rotary_embedding(x), y)
