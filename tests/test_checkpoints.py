"""Layers and caches through Orbax: restored into abstract ones, and on other meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from raptax import (
    AttentionWithRope,
    CodesLinear,
    DistributedAttention,
    KVCacheParams,
    RotaryEmbedding,
)
from raptax.compat.max import GGUFQAttentionWithRope, GPTQAttentionWithRope, interfaces
from raptax.compat.maxtext import (
    MLA,
    Attention,
    KVQuant,
    attention_as_linen,
    mla_as_linen,
)
from raptax.kv_cache.contiguous import ContiguousKVCache, Partition
from raptax.kv_cache.quantization import KVQuantization
from raptax.kv_cache.sliding_window import RingKVCache
from raptax.nn.sharding.placement import make_mesh, weight_specs
from raptax.quant import gguf
from raptax.quant.float8 import (
    Float8Config,
    Float8InputScaleSpec,
    Float8WeightScaleSpec,
)
from raptax.quant.gptq import QuantizationConfig
from raptax.rope import DynamicRotaryEmbedding, LongRoPERotaryEmbedding

KV = KVCacheParams(dtype=jnp.float32, n_kv_heads=4, head_dim=8, page_size=4)
SIZES = dict(num_attention_heads=4, num_key_value_heads=4, hidden_size=32, kv_params=KV)
PLAIN = RotaryEmbedding.create(8)
GPTQ = QuantizationConfig("gptq", bits=4, group_size=8)
FLOAT8 = Float8Config(
    weight_scale=Float8WeightScaleSpec("rowwise"),
    input_scale=Float8InputScaleSpec("colwise", "dynamic"),
)
MAXTEXT = dict(
    num_query_heads=4,
    num_kv_heads=4,
    head_dim=8,
    max_target_length=12,
    max_prefill_predict_length=6,
    inputs_q_shape=(2, 12, 32),
    inputs_kv_shape=(2, 12, 32),
    model_mode="autoregressive",
)
LATENT = dict(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
LONG = LongRoPERotaryEmbedding.create(
    8,
    short_factor=[1.0] * 4,
    long_factor=[2.0] * 4,
    original_max_position=8,
    max_position=16,
)
NTK = DynamicRotaryEmbedding.create(8, factor=2.0, max_position=4)


def layer(cls=AttentionWithRope, seed=0, rope=PLAIN, **options):
    return cls(rope=rope, rngs=nnx.Rngs(seed), **SIZES, **options)


def gguf_layer(seed=0, linear_cls=None):
    rng = np.random.default_rng(seed)
    blocks = lambda: jnp.asarray(rng.integers(0, 64, (32, 1, 34)), jnp.uint8)
    made = dict(linear_cls=linear_cls) if linear_cls else {}
    return GGUFQAttentionWithRope(
        rope=PLAIN,
        weights={name: blocks() for name in "qkvo"},
        quantization_encoding="Q8_0",
        **SIZES,
        **made,
    )


def codes(blocks, encoding, bias):
    return CodesLinear(gguf.unpack(blocks, encoding), bias)


def interface(seed=0):
    wqkv, wo = jax.random.normal(jax.random.key(seed), (2, 96, 32))
    rope = RotaryEmbedding(jnp.ones(4))
    return interfaces.AttentionWithRope(4, KV, wqkv, wo[:32], 0.3, rope)


def maxtext(cls=Attention, seed=0, **options):
    return cls(**MAXTEXT | options, rngs=nnx.Rngs(seed))


LAYERS = {
    "plain": partial(layer, use_qk_norm=True, has_bias=True),
    "stacked": partial(layer, stacked_qkv=True),
    "longrope": partial(layer, rope=LONG),
    "a traced length": partial(layer, rope=NTK.at(jnp.int32(6))),
    "learned rope": partial(layer, rope=RotaryEmbedding(jnp.full(4, 0.5))),
    "a parameter": partial(layer, rope=RotaryEmbedding(nnx.Param(jnp.full(4, 0.5)))),
    "on a device": partial(
        layer, rope=RotaryEmbedding(jnp.full(4, 0.5)), devices=jax.devices("cpu")
    ),
    "gptq": partial(layer, partial(GPTQAttentionWithRope, GPTQ)),
    "float8": partial(layer, float8_config=FLOAT8),
    "gguf": gguf_layer,
    "codes": partial(gguf_layer, linear_cls=codes),
    "interface": interface,
    "maxtext": partial(maxtext, use_qk_norm=True, config=dict(attention_sink=True)),
    "maxtext, int8": partial(maxtext, kv_quant=KVQuant(dict(quantize_kvcache=True))),
    "maxtext, ring": partial(
        maxtext,
        attention_type="local_sliding",
        sliding_window_size=4,
        config=dict(ring_kv_cache=True),
    ),
    "latent": partial(maxtext, MLA, **LATENT),
}


@pytest.fixture(scope="module")
def checkpointer():
    with ocp.StandardCheckpointer() as made:
        yield made


def kept(checkpointer, path, tree, target):
    checkpointer.save(path, tree)
    checkpointer.wait_until_finished()
    return checkpointer.restore(path, target)


def bits(x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype, bits(x)) == (y.shape, y.dtype, bits(y))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_restored_into_abstract_ones(name, checkpointer, tmp_path):
    make = LAYERS[name]
    saved = nnx.state(make(seed=1))
    graph, abstract = nnx.split(nnx.eval_shape(make))
    state = kept(checkpointer, tmp_path / "layer", saved, abstract)
    same(state, saved)
    if name not in ("plain", "learned rope", "codes", "interface"):
        return  # the same arrays, in the same structure
    x = jax.random.normal(jax.random.key(2), (2, 5, 32))
    if isinstance(made := nnx.merge(graph, state), interfaces.AttentionWithRope):
        made, other = made.attention, make(seed=1).attention
    else:
        other = make(seed=1)
    np.testing.assert_array_equal(made(x)[0], other(x)[0])


MESHED = {name: LAYERS[name] for name in ("stacked", "learned rope", "float8", "codes")}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHED)
def test_layers_move_to_another_mesh(name, checkpointer, tmp_path):
    """From 2 devices that share heads to 2 replicas of 2, array by array."""
    devices = jax.devices("cpu")
    make, here = MESHED[name], make_mesh(devices[:2])
    there = make_mesh(devices[:4], 2)
    whole = make(seed=1)
    old, new = DistributedAttention(whole, here), DistributedAttention(make(), there)
    state = nnx.state(new.base)
    specs = weight_specs(state)
    target = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(there, spec)
        ),
        state,
        specs,
    )
    found = kept(checkpointer, tmp_path / "layer", nnx.state(old.base), target)
    same(found, nnx.state(DistributedAttention(whole, there).base))
    assert all(x.sharding.mesh == there for x in jax.tree.leaves(found))
    if name != "learned rope":
        return
    nnx.update(new.base, found)
    x = jax.random.normal(jax.random.key(2), (2, 5, 32))
    np.testing.assert_allclose(new(x)[0], whole(x)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("twin", [attention_as_linen, mla_as_linen])
def test_linen_twins_are_restored(twin, checkpointer, tmp_path):
    module = twin(**MAXTEXT, **(LATENT if twin is mla_as_linen else {}))
    x = jnp.ones((2, 1, 32))
    run = lambda: module.init(jax.random.key(0), x, model_mode="autoregressive")
    target = jax.eval_shape(run)
    numbers = np.random.default_rng(0)
    saved = jax.tree.map(
        lambda x: jnp.asarray(numbers.integers(0, 99, x.shape), x.dtype), target
    )
    same(kept(checkpointer, tmp_path / "twin", saved, target), saved)


def partition(quantization=None, slots=6):
    return Partition.create(
        (2, slots, 2, 8),
        jnp.float32,
        axis_order=(1, 2, 0, 3),
        quantization=quantization,
    )


INT8 = KVQuantization("int8", "dkv")
CACHES = {
    "contiguous": lambda: ContiguousKVCache.create(partition(), partition()),
    "contiguous, int8": lambda: ContiguousKVCache.create(
        partition(INT8), partition(INT8)
    ),
    "ring": lambda: RingKVCache.create(partition(slots=4)),
    "ring, int8": lambda: RingKVCache.create(partition(INT8, slots=4)),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_are_restored_into_abstract_ones(name, checkpointer, tmp_path):
    empty = CACHES[name]()
    key, value = jax.random.normal(jax.random.key(0), (2, 2, 5, 2, 8))
    if isinstance(empty, RingKVCache):
        cache = empty.append(key, value, jnp.ones((2, 5), bool))
    else:
        cache = empty.with_prompt(key, value)
    target = jax.eval_shape(CACHES[name])
    same(kept(checkpointer, tmp_path / "cache", cache, target), cache)
    mesh = make_mesh(jax.devices("cpu")[:2])
    on = lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, P())
    )
    moved = checkpointer.restore(tmp_path / "cache", jax.tree.map(on, target))
    same(moved, cache)
    assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(moved))
