"""MAX's attention classes on one device: numbers, properties, errors, checkpoints."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from raptax import (
    AttentionWithRope,
    CodesLinear,
    GGUFLinear,
    KVCacheParams,
    Linear,
    PagedKVCache,
    QuantizationConfig,
    RotaryEmbedding,
    ShardingStrategy,
)
from raptax.compat.max import (
    AttentionWithRopeNoOpaque,
    GGUFQAttentionWithRope,
    GPTQAttentionWithRope,
)
from raptax.io import safetensors as safetensors_file
from raptax.nn import checkpoint as weights
from raptax.quant import gguf, gptq
from raptax.quant.float8 import (
    Float8Config,
    Float8InputScaleSpec,
    Float8WeightScaleSpec,
)

DATA = Path(__file__).parent / "data"
KV = KVCacheParams(dtype=jnp.float32, n_kv_heads=2, head_dim=16, page_size=8)
SIZES = dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=48)
ROPE = RotaryEmbedding.create(16)
call = jax.jit(lambda layer, x: layer(x)[0])
step = jax.jit(lambda layer, x, cache, at: layer(x, cache, row_offsets=at))


def build(kind=AttentionWithRope, **options):
    return kind(**dict(rope=ROPE, kv_params=KV, **SIZES) | options)


def batch(width=48, seed=0):
    x = np.random.default_rng(seed).normal(size=(2, 7, width))
    return jnp.asarray(x, jnp.float32)


def float8(inputs=("tensor", "static"), weights="tensor", **options):
    return Float8Config(
        Float8InputScaleSpec(*inputs), Float8WeightScaleSpec(weights), **options
    )


# ------------------------------------------------ numbers of other programs


def max_calls(layer, inputs):
    """The three calls of a reference case: ours and MAX's outputs."""
    params = KVCacheParams(dtype=jnp.float32, n_kv_heads=2, head_dim=64)
    cache = PagedKVCache.create(params, pages=12, sequences=3, max_pages=3)
    table = jnp.asarray(inputs["c0.lookup_table"], jnp.int32)
    cache = PagedKVCache(cache.k_pages, cache.v_pages, table, cache.lengths)
    for number in "c0", "c1", "c2":
        offsets = jnp.asarray(inputs[f"{number}.row_offsets"], jnp.int32)
        y, cache = step(layer, jnp.asarray(inputs[f"{number}.x"]), cache, offsets)
        cache = cache.advance(offsets)
        yield number, y


MAX_SIZES = dict(
    num_attention_heads=8,
    num_key_value_heads=2,
    hidden_size=512,
    kv_params=KVCacheParams(dtype=jnp.float32, n_kv_heads=2, head_dim=64),
)


@pytest.mark.parametrize(
    "kind",
    [
        AttentionWithRope,
        pytest.param(AttentionWithRopeNoOpaque, marks=pytest.mark.slow),
    ],
)
def test_max_stacked(kind):
    options = dict(stacked_qkv=True) if kind is AttentionWithRope else {}
    layer = kind(rope=RotaryEmbedding.create(64), **MAX_SIZES, **options)
    stored = np.load(DATA / "attention_max_stacked.npz")
    qkv = np.load(DATA / "attention_max_stacked_qkv.npz")["w.qkv_proj.weight"]
    tensors = {"qkv_proj.weight": qkv, "o_proj.weight": stored["w.o_proj.weight"]}
    weights.load_state(layer, tensors)
    inputs = np.load(DATA / "attention_max.npz")  # the case with norms has the same
    for number, y in max_calls(layer, inputs):
        np.testing.assert_allclose(y, stored[f"{number}.out"], rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["q4_0", "q4_k"])
def test_max_gguf(encoding):
    """MAX rounds activations to int8 here, we do not: within 2 % of the largest."""
    stored = np.load(DATA / "attention_max_gguf.npz")
    rope = RotaryEmbedding.create(64, layout="interleaved")
    layer = GGUFQAttentionWithRope(
        rope=rope, dtype=jnp.uint8, quantization_encoding=encoding, **MAX_SIZES
    )
    tensors = {
        f"{n}_proj.weight": stored[f"{encoding}.w.{n}_proj.weight"] for n in "qkvo"
    }
    weights.load_state(layer, tensors)
    plain = AttentionWithRope(rope=rope, **MAX_SIZES)
    there = gguf.Encoding.from_name(encoding)
    blocks = {k: v.reshape(len(v), -1, there.bytes) for k, v in tensors.items()}
    numbers = {k: gguf.dequantize(jnp.asarray(v), there) for k, v in blocks.items()}
    weights.load_state(plain, numbers)
    exact = dict(max_calls(plain, stored))
    for number, y in max_calls(layer, stored):
        np.testing.assert_allclose(y, exact[number], rtol=0, atol=2e-6)
        y, theirs = np.asarray(y), stored[f"{encoding}.{number}.out"]
        y = y[::4] if number == "c0" else y
        assert 1e-4 < np.abs(y - theirs).max() / np.abs(theirs).max() < 0.02
    np.testing.assert_array_equal(layer.wqkv, plain.wqkv)


def test_gptq_checkpoint():
    """GPTQModel's layer against its own numbers, in the order of ``g_idx``."""
    stored = np.load(DATA / "gptq_smollm2.npz")
    config = QuantizationConfig.from_dict(json.loads(str(stored["asym.config"])))
    kv = KVCacheParams(dtype=jnp.float32, n_kv_heads=3, head_dim=64)
    sizes = 9, 3, 576, kv
    rope = RotaryEmbedding.create(64)
    layer = GPTQAttentionWithRope(config, rope, *sizes, dtype=jnp.float16)
    tensors = {
        k.removeprefix("asym."): v
        for k, v in stored.items()
        if k.startswith("asym.") and not k.endswith(("config", "original_weight"))
    }
    weights.load_state(layer, tensors)
    plain = AttentionWithRope(
        rope=rope,
        num_attention_heads=9,
        num_key_value_heads=3,
        hidden_size=576,
        kv_params=kv,
    )
    numbers = {}
    for n in "qkvo":
        held = {
            t: jnp.asarray(tensors[f"{n}_proj.{t}"])
            for t in ("qweight", "scales", "qzeros", "g_idx")
        }
        codes, scales = held.pop("qweight"), held.pop("scales")
        numbers[f"{n}_proj.weight"] = gptq.dequantize(codes, scales, config, **held).T
    weights.load_state(plain, numbers)
    np.testing.assert_allclose(
        call(layer, batch(576)), call(plain, batch(576)), rtol=0, atol=2e-5
    )
    packed = layer.wqkv  # 4 bits and, for each group, a float16
    assert packed.shape == (576 * 4 // 8 + 2 * 5, (9 + 2 * 3) * 64)
    assert packed.dtype == jnp.uint8
    word = tensors["k_proj.qweight"][7, 3].view(np.uint32)
    np.testing.assert_array_equal(
        packed[28:32, 576 + 3], np.frombuffer(word.tobytes(), np.uint8)
    )


# -------------------------------------------------------------------------- properties


def test_wqkv_and_its_bias():
    layer = build(has_bias=True)
    np.testing.assert_array_equal(layer.wqkv[64:96], layer.qkv.k.weight[...])
    layer.qkv.v.bias[...] = jnp.arange(32.0) / 32
    np.testing.assert_array_equal(layer.wqkv_bias[96:] * 32, np.arange(32))
    assert build().wqkv_bias is None
    stacked = build(stacked_qkv=True, has_bias=True)
    np.testing.assert_array_equal(stacked.wqkv, stacked.qkv.qkv.weight[...])
    assert stacked.wqkv_bias.shape == (128,)
    x = batch()
    weights.load_state(stacked, weights.state_dict(layer))  # from three to one
    np.testing.assert_allclose(call(stacked, x), call(layer, x), rtol=0, atol=2e-6)
    again = build(has_bias=True, rngs=nnx.Rngs(5))
    weights.load_state(again, weights.state_dict(stacked))  # and back
    np.testing.assert_array_equal(call(again, x), call(layer, x))


def test_float8_scales():
    layer = build(float8_config=float8())
    assert layer.wqkv.dtype == jnp.float8_e4m3fn
    layer.qkv.k.input_scale[...] = jnp.float32(7.0)
    assert layer.qkv_input_scale == 7
    scales = [p.weight_scale[...] for p in (layer.qkv.q, layer.qkv.k, layer.qkv.v)]
    assert layer.qkv_weight_scale == max(scales)
    assert layer.qkv_weight_scale_2 is None
    rows = build(
        float8_config=float8(("colwise", "dynamic"), "rowwise"), stacked_qkv=True
    )
    assert rows.qkv_input_scale is None
    np.testing.assert_array_equal(rows.qkv_weight_scale, rows.qkv.qkv.weight_scale[...])
    with pytest.raises(ValueError, match="no float8_config"):
        _ = build().qkv_weight_scale
    assert build().qkv_input_scale is None


@pytest.mark.slow
def test_nvfp4_scales():
    nvfp4 = build(
        float8_config=Float8Config(
            Float8InputScaleSpec("block", "static", block_size=(1, 16)),
            Float8WeightScaleSpec("block", jnp.float8_e4m3fn, (1, 16)),
            quant_method="modelopt",
            quant_algo="NVFP4",
        )
    )
    assert nvfp4.qkv_weight_scale.shape == (128, 3)
    assert nvfp4.qkv_weight_scale_2 > 0


def test_float8_dtype_is_of_the_weights_alone():
    layer = build(
        float8_config=float8(),
        dtype=jnp.float8_e4m3fn,
        use_qk_norm=True,
        has_bias=True,
    )
    assert layer.q_norm.weight.dtype == layer.wqkv_bias.dtype == jnp.float32


def test_own_projections():
    made = []

    def linear_cls(*sizes, **options):
        made.append((sizes, options.pop("rngs") is not None, options))
        return Linear(*sizes, has_bias=options["has_bias"], rngs=nnx.Rngs(0))

    build(linear_cls=linear_cls, has_bias=True, float8_config=float8())
    assert [sizes for sizes, *_ in made] == [(48, 64), (48, 32), (48, 32), (64, 48)]
    for _, rngs, options in made:
        assert rngs
        assert options.keys() == {"has_bias", "dtype", "config"}
    assert [options["has_bias"] for *_, options in made] == [True] * 3 + [False]


def test_devices():
    first, second = jax.devices()[:2]
    for layer in (
        build(devices=[second]),
        build(AttentionWithRopeNoOpaque, devices=[second, first]),
        build(
            GGUFQAttentionWithRope,
            hidden_size=64,
            quantization_encoding="Q8_0",
            devices=[second],
        ),
        GPTQAttentionWithRope(
            QuantizationConfig("gptq", 4, 16), ROPE, 4, 2, 48, KV, [second]
        ),
    ):
        leaves = jax.tree.leaves(nnx.state(layer))
        assert {d for leaf in leaves for d in leaf.devices()} == {second}


def test_gguf_placeholders():
    layer = build(
        GGUFQAttentionWithRope,
        hidden_size=64,
        quantization_encoding=gguf.Encoding.Q4_0,
        has_bias=True,
        clip_qkv=0.25,
    )
    assert layer.qkv.q.blocks.shape == (64, 2, 18)
    assert layer.wqkv_bias.shape == (128,)
    layer.qkv.v.bias[...] = jnp.ones(32)
    assert layer.clip_qkv == 0.25
    assert not call(layer, batch(64)).any()  # o is zeros
    codes = build(
        GGUFQAttentionWithRope,
        hidden_size=64,
        quantization_encoding="q8_0",
        linear_cls=lambda blocks, encoding, bias: CodesLinear(
            gguf.unpack(blocks, encoding), bias
        ),
    )
    assert isinstance(codes.qkv.q, CodesLinear)
    assert codes.wqkv_bias is None


# ---------------------------------------------------------------------------- sharding


@pytest.mark.parametrize("stacked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_shards_add_up(stacked):
    layer = build(
        num_attention_heads=6,
        num_key_value_heads=3,
        kv_params=KVCacheParams(dtype=jnp.float32, n_kv_heads=3, head_dim=16),
        stacked_qkv=stacked,
        use_qk_norm=True,
    )
    layer.sharding_strategy = ShardingStrategy.tensor_parallel(2)
    shards = layer.shard(jax.devices()[:2])
    widths = [shard.qkv.widths for shard in shards]
    assert widths == [(64, 32, 32), (32, 16, 16)]  # two kv heads, then one
    for shard, device in zip(shards, jax.devices(), strict=False):
        assert isinstance(shard, AttentionWithRope)
        assert {device} == shard.out.weight[...].devices()
    x = batch()
    total = sum(np.asarray(call(shard, x)) for shard in shards)
    np.testing.assert_allclose(total, call(layer, x), rtol=0, atol=2e-6)


def test_replicas():
    layer = build(sharding_strategy=ShardingStrategy.replicate(2))
    assert layer.sharding_strategy.is_replicate
    devices = jax.devices()[:2]
    for copy, device in zip(layer.shard(devices), devices, strict=True):
        assert copy.wqkv.devices() == {device}
        np.testing.assert_array_equal(copy.wqkv, layer.wqkv)


# -------------------------------------------------------------------------- checkpoints


def test_safetensors_files(tmp_path):
    path, prefix = tmp_path / "a.safetensors", "model.layers.3.self_attn."
    layer = build(
        float8_config=float8(("colwise", "dynamic"), "rowwise"), use_qk_norm=True
    )
    layer.q_norm.weight[...] = jnp.arange(16.0)
    weights.save_safetensors(path, layer, prefix)
    other = build(
        float8_config=float8(("colwise", "dynamic"), "rowwise"),
        use_qk_norm=True,
        rngs=nnx.Rngs(9),
    )
    weights.load_safetensors(path, other, prefix)
    ours, theirs = weights.state_dict(layer), weights.state_dict(other)
    assert ours.keys() == theirs.keys()
    names = {f"{n}_proj.{t}" for n in "qkvo" for t in ("weight", "weight_scale")}
    assert set(ours) == names | {"q_norm.weight", "k_norm.weight"}
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(
            ours[name].astype(jnp.float32), theirs[name].astype(jnp.float32)
        )


def test_safetensors_package_reads_what_we_write_and_back(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "b": rng.normal(size=(3, 5)).astype(np.float32),
        "a": rng.normal(size=(2, 1, 2)).astype(np.float16),
        "scalar": np.full((), 2.5),
        "empty": np.zeros((0, 4), np.int8),
        "words": rng.integers(0, 2**31, (4, 2), np.int32),
    }
    safetensors_file.write(tmp_path / "ours", tensors)
    for name, array in safetensors.numpy.load_file(tmp_path / "ours").items():
        np.testing.assert_array_equal(array, tensors[name])
        assert array.dtype == tensors[name].dtype
    low = {k: rng.normal(size=7).astype(k) for k in (jnp.bfloat16, jnp.float8_e4m3fn)}
    low = {jnp.dtype(k).name: v for k, v in low.items()}
    safetensors.numpy.save_file(tensors | low, tmp_path / "theirs")
    found = safetensors_file.read(tmp_path / "theirs")
    assert found.keys() == (tensors | low).keys()
    for name, array in (tensors | low).items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes()
    assert set(safetensors_file.read(tmp_path / "theirs", "b")) == {"", "float16"}


def header(text, size=0):
    return len(text).to_bytes(8, "little") + text.encode() + bytes(size)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"abc", "its header is cut off"),
        (header("{}")[:-1], "its header is cut off"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "its header is cut off"),
        (header("{nothing"), "the header is no JSON"),
        (header('{"a": 3}'), "a is described as 3"),
        (
            header('{"a": {"dtype": "F4", "shape": [], "data_offsets": [0, 4]}}', 4),
            "dtype 'F4'",
        ),
        (
            header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', 4),
            "does not fit its bytes 0 to 4 of 4",
        ),
        (
            header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', 4),
            "does not fit its bytes 4 to 8 of 4",
        ),
    ],
)
def test_files_that_are_broken(tmp_path, content, named):
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=named):
        safetensors_file.read(path)


def test_loading_errors():
    layer = build()
    before = weights.state_dict(layer)
    zeros = {name: np.zeros(a.shape, np.float32) for name, a in before.items()}
    wrong = zeros["k_proj.weight"]
    for changes, named in (
        ({"k_proj.weight": wrong.T}, r"k_proj.weight has the shape \(48, 32\)"),
        ({"k_proj.bias": np.zeros(32)}, r"the layer has no \['k_proj.bias'\]"),
        ({"k_proj.weight": wrong.astype(np.int8)}, "is int8; the layer's is float32"),
        ({"q_norm.weight": np.zeros(16)}, r"the layer has no \['q_norm.weight'\]"),
    ):
        with pytest.raises(ValueError, match=named):
            weights.load_state(layer, zeros | changes)
    del zeros["o_proj.weight"]
    with pytest.raises(ValueError, match=r"the tensors lack 'o_proj.weight'"):
        weights.load_state(layer, zeros)
    for name, array in weights.state_dict(layer).items():
        np.testing.assert_array_equal(array, before[name])
    codes = CodesLinear(gguf.unpack(jnp.zeros((48, 2, 34), jnp.uint8), Q8_0))
    layer.out = codes
    with pytest.raises(ValueError, match="o_proj holds codes"):
        weights.state_dict(layer)


def test_halves_are_widened_and_gptq_biases_taken():
    layer = build()
    halves = {
        name: np.asarray(a).astype(jnp.bfloat16)
        for name, a in weights.state_dict(layer).items()
    }
    weights.load_state(layer, halves)
    assert layer.wqkv.dtype == jnp.float32
    config = QuantizationConfig("gptq", 4, 16, sym=True)
    packed = GPTQAttentionWithRope(config, ROPE, 4, 2, 48, KV)
    tensors = {
        name: a
        for name, a in weights.state_dict(packed).items()
        if not name.endswith(("g_idx", "qzeros"))
    }
    bias = np.arange(32, dtype=np.float32)
    weights.load_state(packed, tensors | {"v_proj.bias": bias})
    np.testing.assert_array_equal(packed.qkv.v.bias[...], bias)
    assert packed.qkv.k.bias is None


# -------------------------------------------------------------------------------- errors

Q8_0 = gguf.Encoding.Q8_0


def gguf_build(**changes):
    options = dict(hidden_size=64, quantization_encoding="Q8_0") | changes
    return build(GGUFQAttentionWithRope, **options)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: build(clip_qkv=0.0), "clip_qkv=0.0 must be above 0"),
        (lambda: build(devices=[]), "must name a device"),
        (
            lambda: build(sharding_strategy=ShardingStrategy.rowwise(2)),
            "sharding_strategy 'rowwise' is of a weight",
        ),
        (lambda: build().shard(jax.devices()), "without a sharding_strategy"),
        (
            lambda: build(sharding_strategy=ShardingStrategy.tensor_parallel(3)).shard(
                jax.devices()[:2]
            ),
            "is for 3 devices; got 2",
        ),
        (
            lambda: build(
                kv_params=KVCacheParams(
                    dtype=jnp.float32, n_kv_heads=2, head_dim=16, is_mla=True
                )
            ),
            "is_mla=True is for latent attention",
        ),
        (
            lambda: build(AttentionWithRopeNoOpaque, num_attention_heads=3),
            "multiple of",
        ),
        (
            lambda: GPTQAttentionWithRope(
                QuantizationConfig("gptq", 4, 16), ROPE, 4, 4, 48, KV
            ),
            "num_key_value_heads=4 must equal",
        ),
        (lambda: gguf_build(dtype=jnp.float32), "must be uint8"),
        (lambda: gguf_build(hidden_size=None), "needs hidden_size and quantization"),
        (lambda: gguf_build(quantization_encoding=None), "needs hidden_size and quant"),
        (lambda: gguf_build(quantization_encoding="q9"), "is not an encoding"),
        (lambda: gguf_build(hidden_size=48), "hidden_size = 48 must be whole Q8_0"),
        (
            lambda: gguf_build(hidden_size=256, quantization_encoding="Q4_K"),
            "head size = 64 must be whole Q4_K blocks of 256",
        ),
        (lambda: gguf_build(weights={}, has_bias=True), "bring their own biases"),
        (
            lambda: gguf_build(
                weights={
                    n: GGUFLinear(jnp.zeros((s, 2, 34), jnp.uint8), Q8_0)
                    for n, s in zip("qkvo", (64, 32, 32, 32), strict=True)
                }
            ),
            "o must be hidden_size=64 wide; got 32",
        ),
    ],
)
def test_construction_errors(make, named):
    with pytest.raises(ValueError, match=named):
        make()
