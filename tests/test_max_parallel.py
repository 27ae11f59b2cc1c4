"""Attention on several devices: layouts, strategies, and agreement with one."""

import dataclasses
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from raptax import (
    ALiBi,
    AttentionWithRope,
    CodesLinear,
    DistributedAttention,
    Float8Config,
    Float8InputScaleSpec,
    Float8Linear,
    Float8WeightScaleSpec,
    GGUFLinear,
    GPTQLinear,
    KVCacheParams,
    Linear,
    PagedKVCache,
    QuantizationConfig,
    RotaryEmbedding,
    ShardingStrategy,
    SlotKVCache,
    TensorKVCache,
    alibi_slopes,
)
from raptax.compat.max import (
    DataParallelAttentionWithRope,
    TensorParallelAttentionWithRope,
)
from raptax.compat.max.call import call_as_max
from raptax.nn import checkpoint as weights
from raptax.nn.sharding.distributed import split_batch
from raptax.nn.sharding.heads import head_layout, split_range
from raptax.nn.sharding.placement import make_mesh, shard_cache
from raptax.nn.sharding.slice_linear import run_length, slice_inputs, slice_outputs
from raptax.quant import gguf

KV = KVCacheParams(dtype=jnp.float32, n_kv_heads=3, head_dim=8, page_size=4)
COMMON = dict(
    rope=RotaryEmbedding.create(8),
    num_attention_heads=6,
    num_key_value_heads=3,
    hidden_size=16,
    kv_params=KV,
)
ROOT = Path(__file__).parents[1]


# ----------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("heads", "q", "kv"),
    [
        ((4, 2, 1), [[0, 1, 2, 3]], [[0, 1]]),
        ((4, 2, 2), [[0, 1], [2, 3]], [[0], [1]]),
        ((6, 3, 2), [[0, 1, 2, 3], [4, 5, -1, -1]], [[0, 1], [2, -1]]),
        ((4, 2, 4), [[0], [1], [2], [3]], [[0], [0], [1], [1]]),
        ((4, 1, 3), [[0, 1], [2, -1], [3, -1]], [[0], [0], [0]]),
        ((8, 2, 3), [[0, 1, -1, -1], [2, 3, -1, -1], [4, 5, 6, 7]], [[0], [0], [1]]),
        ((3, 3, 2), [[0, 1], [2, -1]], [[0, 1], [2, -1]]),
    ],
)
def test_heads_of_each_device(heads, q, kv):
    layout = head_layout(*heads)
    np.testing.assert_array_equal(layout.q, q)
    np.testing.assert_array_equal(layout.kv, kv)


def test_every_layout_keeps_queries_with_their_keys():
    for K in range(1, 6):
        for group in range(1, 5):
            H = K * group
            for devices in range(1, H + 1):
                q, kv = head_layout(H, K, devices)
                assert sorted(q[q >= 0]) == list(range(H))  # each once
                assert (q >= 0).any(axis=1).all()  # no device is idle
                there = np.repeat(kv, q.shape[1] // kv.shape[1], axis=1)
                assert (there[q >= 0] == q[q >= 0] // group).all()


def test_ranges():
    assert [len(r) for r in split_range(151674, 4)] == [37919, 37919, 37918, 37918]
    assert [list(r) for r in split_range(10, 3)] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert [len(r) for r in split_range(2, 3)] == [1, 1, 0]
    lengths = [len(r) for r in split_range(30, 4)]
    assert lengths == [8, 8, 7, 7]


KINDS = {
    "rowwise": ShardingStrategy.rowwise(3),
    "columnwise": ShardingStrategy.columnwise(3),
    "axiswise": ShardingStrategy.axiswise(-1, 3),
    "replicate": ShardingStrategy.replicate(3),
    "stacked_qkv": ShardingStrategy.stacked_qkv(3, 6, 2, num_kv_heads=2),
    "head_aware_columnwise": ShardingStrategy.head_aware_columnwise(3, 6, 2),
    "tensor_parallel": ShardingStrategy.tensor_parallel(3),
}


@pytest.mark.parametrize("name", KINDS)
def test_predicates(name):
    for other in KINDS:
        assert getattr(KINDS[name], f"is_{other}") == (name == other)
    assert {KINDS[name]: 1}[KINDS[name]] == 1


def test_strategies_cut_weights():
    weight = jnp.arange(20 * 12.0).reshape(20, 12)
    whole = np.asarray(weight)
    for name, cut in {
        "rowwise": (whole[:7], whole[7:14], whole[14:]),
        "columnwise": (whole[:, :4], whole[:, 4:8], whole[:, 8:]),
        "axiswise": (whole[:, :4], whole[:, 4:8], whole[:, 8:]),
        "replicate": (whole, whole, whole),
        "head_aware_columnwise": (whole[:, :4], whole[:, 4:8], whole[:, 8:]),
        # rows: q 6 heads x 2, k 2 x 2, v 2 x 2; devices 0 and 1 share kv head 0
        "stacked_qkv": (
            whole[[0, 1, 2, 3, 12, 13, 16, 17]],
            whole[[4, 5, 12, 13, 16, 17]],
            whole[[6, 7, 8, 9, 10, 11, 14, 15, 18, 19]],
        ),
    }.items():
        for index, part in enumerate(cut):
            np.testing.assert_array_equal(KINDS[name].shard(weight, index), part)
    assert KINDS["rowwise"].spec(2) == P("heads")
    assert KINDS["columnwise"].spec(2, "model") == P(None, "model")
    assert KINDS["axiswise"].spec(3) == P(None, None, "heads")
    assert KINDS["replicate"].spec(2) == P()


@pytest.mark.parametrize(
    ("act", "error", "named"),
    [
        (lambda w: KINDS["rowwise"].shard(w, 3), ValueError, r"index=3 must lie in"),
        (
            lambda w: KINDS["tensor_parallel"].shard(w, 0),
            NotImplementedError,
            "a strategy of a layer",
        ),
        (lambda w: KINDS["stacked_qkv"].shard(w[:-1], 0), ValueError, "cuts 20 places"),
        (
            lambda w: ShardingStrategy.axiswise(2, 2).shard(w, 0),
            ValueError,
            "axis=2 is not an axis of 2",
        ),
        (lambda w: ShardingStrategy.rowwise(0), ValueError, "num_devices=0"),
        (lambda w: ShardingStrategy(2, "diagonal"), ValueError, "not one of 'rowwise'"),
        (
            lambda w: ShardingStrategy.stacked_qkv(5, 4, 2),
            ValueError,
            "4 query heads cannot be shared out among 5 devices",
        ),
        (lambda w: head_layout(5, 2, 2), ValueError, "must be a multiple"),
    ],
)
def test_strategy_errors(unchecked, act, error, named):
    with pytest.raises(error, match=named):
        act(jnp.zeros((20, 12)))


def test_runs():
    index = np.asarray([[8, 9, 10, 11, 0, 1, 2, 3], [-1, -1, -1, -1, 4, 5, 6, 7]])
    assert run_length(index, 8) == 4
    assert run_length(index, 2) == 2
    assert run_length(np.asarray([[1, 2, 3, 4]]), 4) == 1
    assert run_length(np.asarray([[0, 1, 2, 3]]), 3) == 1


def test_an_unknown_projection():
    for cut in (slice_outputs, slice_inputs):
        with pytest.raises(
            ValueError, match="does not know how to slice the outputs of a int"
        ):
            cut(3, np.zeros((1, 1), int))


def made(kind):
    """A projection of 64 inputs and 32 outputs, and the numbers that it stands for."""
    rng = np.random.default_rng(0)
    if kind in ("Q8_0", "Q4_K", "codes"):
        encoding = gguf.Encoding.Q4_K if kind == "Q4_K" else gguf.Encoding.Q8_0
        shape = 32, 256 // encoding.values, encoding.bytes
        blocks = rng.integers(0, 256, shape, np.uint8)
        blocks[..., :4] = np.asarray([0.001, 0.002], np.float16).view(np.uint8)
        bias, blocks = jnp.arange(32.0), jnp.asarray(blocks)
        if kind == "codes":
            layer = CodesLinear(gguf.unpack(blocks, encoding), bias)
        else:
            layer = GGUFLinear(blocks, encoding, bias)
        return layer, layer.weight
    if kind.startswith("gptq"):
        config = QuantizationConfig("gptq", int(kind[4:]), 64)
        layer = GPTQLinear.create(256, 32, config=config, rngs=nnx.Rngs(0))
        return layer, layer.weight
    if kind == "block":
        scales = (
            Float8InputScaleSpec("block", "dynamic", block_size=(1, 32)),
            Float8WeightScaleSpec("block", block_size=(16, 32)),
        )
        config = Float8Config(*scales)
        layer = Float8Linear.create(256, 32, config=config, rngs=nnx.Rngs(0))
        return layer, layer.dequantized_weight
    layer = Linear(256, 32, has_bias=True, rngs=nnx.Rngs(0))
    return layer, layer.weight[...]


SLOW = pytest.mark.slow  # compiles much for what it adds


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "Q8_0",
        "block",
        pytest.param("gptq4", marks=SLOW),
        pytest.param("codes", marks=SLOW),
        pytest.param("Q4_K", marks=SLOW),
        pytest.param("gptq3", marks=SLOW),
    ],
)
def test_cutting_rounds_nothing(kind):
    """Rows in runs of 8 and columns in runs of 32 or 8, some of them not there."""
    layer, numbers = made(kind)
    numbers = np.asarray(numbers)
    value = lambda p: getattr(p, "dequantized_weight", p.weight)[...]
    rows = np.concatenate([np.arange(8, 24), np.full(8, -1), np.arange(8)])[None]
    columns = np.concatenate([np.arange(64, 160), np.full(32, -1)])[None]
    expected = np.concatenate([numbers[8:24], np.zeros((8, 256)), numbers[:8]])
    np.testing.assert_array_equal(value(slice_outputs(layer, rows)), expected)
    cut = value(slice_inputs(layer, columns))
    np.testing.assert_array_equal(cut[:, :96], numbers[:, 64:160])
    if layer.bias is not None:
        bias = np.asarray(layer.bias[...])
        new = slice_outputs(layer, rows).bias[...]
        np.testing.assert_array_equal(new, np.where(rows[0] < 0, 0, bias[rows[0]]))
    if kind != "block":
        odd = (np.arange(8, 40) + np.asarray([[0], [128]]))[:, ::-1].copy()
        cut = value(slice_inputs(layer, odd))
        np.testing.assert_array_equal(cut, numbers[:, odd.reshape(-1)])


def test_what_cannot_be_cut_says_so():
    packed, _ = made("gptq4")
    with pytest.raises(ValueError, match="GPTQ packs 8 inputs of 4 bits together; 2"):
        slice_inputs(packed, np.arange(24).reshape(2, 12))
    block, _ = made("block")
    with pytest.raises(ValueError, match="in blocks of 32 lanes"):
        slice_inputs(block, np.arange(32).reshape(2, 16))


# ------------------------------------------------------------------------- two devices


def inputs(rows=9, seed=0):
    x = np.random.default_rng(seed).normal(size=(rows, 16))
    return jnp.asarray(x, jnp.float32)


def paged(kv_heads, sequences=2):
    params = KVCacheParams(
        dtype=jnp.float32, n_kv_heads=kv_heads, head_dim=8, page_size=4
    )
    cache = PagedKVCache.create(params, pages=8, sequences=sequences, max_pages=3)
    return cache.with_tables([[5, 0, 2], [1, 7, 3]][:sequences], [0] * sequences)


serve = jax.jit(lambda layer, x, cache, at: layer(x, cache, row_offsets=at))
AT = jnp.asarray([0, 5, 9], jnp.int32)


def spread(layer, replicas=1):
    return DistributedAttention(layer, make_mesh(jax.devices()[:2], replicas))


@pytest.fixture(scope="module")
def base():
    layer = AttentionWithRope(**COMMON, use_qk_norm=True, stacked_qkv=True)
    layer.out = Linear.from_weight(layer.out.weight[...], jnp.arange(16.0) / 16)
    return layer


def test_two_devices_and_one_all_reduce(base):
    """Uneven heads, a bias of the output that is added once; see the compiled program."""
    layer = spread(base)
    assert layer.kv_heads == 4
    cache = layer.shard_cache(paged(4))
    program = serve.lower(layer, inputs(), cache, AT).compile()
    y, new = program(layer, inputs(), cache, AT)
    expected, _ = serve(base, inputs(), paged(3), AT)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)
    assert new.k_pages.sharding.shard_shape(new.k_pages.shape) == (1, 8, 2, 4, 8)
    text = program.as_text()
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 1
    assert not re.findall(r" (all-gather|all-to-all|collective-permute)", text)


@pytest.mark.slow
def test_arguments_in_the_order_of_max(base):
    layer, offsets = spread(base), np.asarray([0, 5, 9], np.uint32)
    at = jnp.arange(4, dtype=jnp.int32)  # a table of four positions
    table = jnp.stack(base.rope.cos_sin(at), axis=-1)  # (positions, pairs, 2)
    cache = layer.shard_cache(paged(4))
    call = jax.jit(call_as_max)
    expected, _ = serve(base, inputs(), paged(3), AT)
    y, _ = call(layer, 0, inputs(), cache, table, offsets)
    beyond = np.arange(9) == 4  # the fifth token of the first sequence
    np.testing.assert_allclose(y[~beyond], expected[~beyond], rtol=0, atol=2e-6)
    assert jnp.isnan(y[beyond]).all()
    other, _ = call(layer, 0, inputs(), cache, table[::-1], offsets)
    assert jnp.abs(other - expected)[~beyond].max() > 1e-3
    nowhere = AttentionWithRope(**COMMON | dict(rope=None))
    with pytest.raises(ValueError, match="the layer has rope=None"):
        call_as_max(nowhere, 0, inputs(), paged(3), table, offsets)


def test_gathered_again(base):
    layer = spread(base)
    again = layer.gather()
    ours, theirs = weights.state_dict(base), weights.state_dict(layer)
    assert ours.keys() == theirs.keys() == weights.state_dict(again).keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    other = spread(AttentionWithRope(**COMMON, use_qk_norm=True, stacked_qkv=True))
    other.base.out.inner.bias = nnx.data(nnx.Param(jnp.zeros(16)))
    weights.load_state(other, ours)
    for name, value in weights.state_dict(other).items():
        np.testing.assert_array_equal(ours[name], value)


@pytest.mark.slow
def test_gradients_and_rules_without_a_cache(base):
    """ALiBi asks for a head's number: the one that it has in the whole layer."""
    x = inputs(10).reshape(2, 5, 16)
    score_mod = ALiBi(alibi_slopes(6))

    @jax.jit
    def gradients(layer, x):
        loss = lambda layer, x: (layer(x, score_mod=score_mod)[0] ** 2).sum()
        return jax.value_and_grad(loss, (0, 1), allow_int=True)(layer, x)

    layer = spread(base)
    value, (of_base, of_x) = gradients(base, x)
    same, (of_layer, again) = gradients(layer, x)
    np.testing.assert_allclose(same, value, rtol=2e-6)
    np.testing.assert_allclose(again, of_x, rtol=0, atol=2e-5)
    of_layer = of_layer.base
    for name in ("q_norm", "k_norm"):
        theirs = getattr(of_layer, name).weight[...]
        ours = getattr(of_base, name).weight[...]
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-4)
    theirs, ours = of_layer.out.inner.bias[...], of_base.out.bias[...]
    np.testing.assert_allclose(theirs, ours, rtol=2e-5)
    plain = jax.jit(lambda layer, x: layer(x, score_mod=score_mod)[0])
    different = jax.jit(lambda layer, x: layer(x)[0])
    assert jnp.abs(plain(layer, x) - different(layer, x)).max() > 1e-3


def test_plain_jit_divides_the_work_too():
    even = AttentionWithRope(**COMMON | dict(num_key_value_heads=6, kv_params=KV6))
    layer = spread(even)
    cache = layer.shard_cache(paged(6))
    y, _ = serve(layer.base, inputs(), cache, AT)
    expected, _ = serve(even, inputs(), paged(6), AT)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)
    weight = layer.base.qkv.q.weight[...]
    np.testing.assert_array_equal(weight, even.qkv.q.weight[...])  # as in a checkpoint
    assert weight.sharding.spec == P("heads")


KV6 = KVCacheParams(dtype=jnp.float32, n_kv_heads=6, head_dim=8, page_size=4)


def test_data_parallel_replicas_keep_their_own():
    one = AttentionWithRope(**COMMON)
    layer = DataParallelAttentionWithRope(**COMMON, devices=jax.devices()[:2])
    x, at, places = split_batch(inputs(), AT, [0, 1, 2])
    assert x.shape == (10, 16)
    np.testing.assert_array_equal(at, [0, 5, 0, 4])
    cache = PagedKVCache.create(KV, pages=8, sequences=2, max_pages=3)
    table = jnp.asarray([[3, 1, 0], [3, 0, 2]], jnp.int32)  # ids count in each replica
    cache = PagedKVCache(cache.k_pages, cache.v_pages, table, cache.lengths)
    program = serve.lower(layer, x, layer.shard_cache(cache), at).compile()
    y, new = program(layer, x, layer.shard_cache(cache), at)
    expected, _ = serve(one, inputs(), paged(3), AT)
    np.testing.assert_allclose(y[places], expected, rtol=0, atol=2e-6)
    assert not y[9].any()
    assert not re.findall(r" (all-reduce|all-gather|collective)", program.as_text())
    assert new.k_pages[0, 3].any()
    assert new.k_pages[0, 4 + 3].any()


@pytest.mark.slow
def test_slots_and_tensors_lie_on_a_mesh():
    mesh = make_mesh(jax.devices()[:2])
    layer = DistributedAttention(AttentionWithRope(**COMMON), mesh)
    sizes = dict(dtype=jnp.float32, n_kv_heads=4, head_dim=8, page_size=4)
    slots = SlotKVCache.create(
        KVCacheParams(**sizes, cache_strategy="continuous"),
        slots=2,
        sequences=2,
        max_length=12,
    )
    plain = TensorKVCache.create(
        KVCacheParams(**sizes, cache_strategy="naive"), sequences=2, max_length=8
    )
    outs = [
        serve(layer, inputs(), shard_cache(cache, mesh), AT)[0]
        for cache in (slots, plain)
    ]
    np.testing.assert_allclose(outs[0], outs[1], rtol=0, atol=2e-6)


def test_batches_for_replicas():
    x = jnp.arange(12.0).reshape(6, 2)
    at = jnp.asarray([0, 2, 2, 3, 6], jnp.int32)
    rows, offsets, places = split_batch(x, at, [0, 2, 4])
    np.testing.assert_array_equal(offsets, [0, 2, 2, 0, 1, 4])
    np.testing.assert_array_equal(places, [0, 1, 4, 5, 6, 7])
    np.testing.assert_array_equal(rows[places], x)
    assert rows.shape == (8, 2)
    empty, offsets, _ = split_batch(x, jnp.asarray([0, 6, 6], jnp.int32), [0, 1, 2])
    np.testing.assert_array_equal(offsets, [0, 6, 0, 0])
    assert not empty[6:].any()
    for splits in ([0, 1, 4], [0, 2], [1, 2, 4]):
        with pytest.raises(ValueError, match="must cut 4 sequences into parts"):
            split_batch(x, at, splits)


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (
            lambda: TensorParallelAttentionWithRope(
                **COMMON | dict(num_attention_heads=1, num_key_value_heads=1),
                devices=jax.devices()[:2],
            ),
            "must equal kv_params",
        ),
        (
            lambda: DistributedAttention(
                AttentionWithRope(
                    **COMMON
                    | dict(
                        num_attention_heads=1,
                        num_key_value_heads=1,
                        kv_params=KVCacheParams(
                            dtype=jnp.float32, n_kv_heads=1, head_dim=8
                        ),
                    )
                ),
                make_mesh(jax.devices()[:2]),
            ),
            "1 query heads cannot be shared out among 2 devices",
        ),
        (lambda: make_mesh(jax.devices()[:1], 2), "1 devices do not divide"),
        (
            lambda: TensorParallelAttentionWithRope(
                **COMMON | dict(kv_params=dataclasses.replace(KV, devices=(1, 2))),
                devices=jax.devices()[:2],
            ),
            r"must be kv_params.devices=\[1, 2\]",
        ),
        (
            lambda: DataParallelAttentionWithRope(
                **COMMON
                | dict(
                    kv_params=dataclasses.replace(
                        KV, devices=[1, 2, 3, 4], data_parallel_degree=2
                    )
                ),
            ),
            "must be the number of devices, 4",
        ),
        (
            lambda: DistributedAttention(
                AttentionWithRope(**COMMON), jax.make_mesh((2,), ("x",))
            ),
            "must be one of make_mesh",
        ),
        (
            lambda: DataParallelAttentionWithRope(**COMMON, devices=jax.devices()[:2])(
                inputs(9), paged(3), row_offsets=jnp.zeros(4, jnp.int32)
            ),
            r"x \(9\) must be of equal size in each of 2 replicas",
        ),
        (
            lambda: spread(AttentionWithRope(**COMMON))(
                inputs(9), paged(3), row_offsets=AT
            ),
            "the cache has 3 kv heads; on this mesh it must have kv_heads=4",
        ),
    ],
)
def test_errors(act, named):
    with pytest.raises(ValueError, match=named):
        act()


# ------------------------------------------------------ more devices, more processes


def worker(*arguments):
    command = [sys.executable, "-m", "tests.max_worker", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


FORMATS = ("float", "static", "static rows", "token", "token rows", "dynamic", "block")
OPTIONS = ("separate", "stacked", "bias", "clip", "norms", "all", "separate all")
BATCHES = {
    **{kind: [f"{kind}:{option}" for option in OPTIONS] for kind in FORMATS},
    "nvfp4": [f"nvfp4:{option}" for option in OPTIONS],
    "gguf": ["gguf", "gguf bias clip"],
    "gptq": ["gptq", "gptq 8 whole", "gptq 2 act"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BATCHES)
def test_every_combination_on_four_devices(kind):
    """Prefill, mixed and decode on TP 2, 3, 4, DP 2 and TP 2 x DP 2 equal one device."""
    process = worker("matrix", *BATCHES[kind])
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    meshes = 3 if kind == "dynamic" else 5
    assert output.count(" of ") == meshes * len(BATCHES[kind]), output


@pytest.mark.slow
def test_two_processes_agree_with_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [worker("process", number, port) for number in range(2)]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    for process, output in zip(pair, outputs, strict=True):
        assert process.returncode == 0, output
        assert "agree" in output
