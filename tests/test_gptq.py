"""GPTQ's layout against GPTQModel's tensors and against its definition, bit by bit."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from raptax import AttentionWithRope, GPTQLinear, KVCacheParams, QuantizationConfig
from raptax.nn.linear import Projection
from raptax.quant import gptq

REFERENCE = np.load(Path(__file__).parent / "data/gptq_smollm2.npz")
unpack = jax.jit(gptq.unpack, static_argnums=1)
weight_of = nnx.jit(lambda layer: layer.weight)


def config(bits=4, group_size=16, **options):
    return QuantizationConfig("gptq", bits, group_size, **options)


def stored(tag, projection):
    """A projection's tensors, and the config of the file they come from."""
    name = f"{tag}.{projection}_proj."
    tensors = ("qweight", "qzeros", "scales", "g_idx")
    where = QuantizationConfig.from_dict(json.loads(str(REFERENCE[f"{tag}.config"])))
    return {t: REFERENCE[name + t] for t in tensors}, where


def stream(words, bits):
    """The fields of each row of words as one stream of bits."""
    every = np.unpackbits(
        np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little"
    )
    runs = every[:, : every.shape[1] // bits * bits].reshape(len(words), -1, bits)
    return runs.astype(np.int64) @ (1 << np.arange(bits))


def by_hand(tensors, where):
    """``(code - zero) * scale`` in float64."""
    bits, (C,), O = where.bits, tensors["g_idx"].shape, tensors["scales"].shape[1]
    codes = stream(tensors["qweight"].T, bits).T[:C]
    qzeros = tensors["qzeros"]
    less = where.checkpoint_format == "gptq"
    if less and bits != 3:  # 1 more in every field, with what is carried
        ones = np.uint32(0xFFFFFFFF // (2**bits - 1))
        qzeros = (qzeros.view(np.uint32) + ones).view(np.int32)
    zeros = stream(qzeros, bits)[:, :O]
    if less and bits == 3:
        zeros = (zeros + 1) % 8
    group = tensors["g_idx"]
    return (codes - zeros[group]) * tensors["scales"].astype(np.float64)[group]


# --------------------------------------------------------- the tensors of another program


@pytest.mark.parametrize(("tag", "projection"), [("sym", "k"), ("asym", "v")])
def test_weights_are_those_that_were_quantized(tag, projection):
    tensors, where = stored(tag, projection)
    weight = weight_of(GPTQLinear(where, **tensors))
    original = REFERENCE[f"{tag}.{projection}_proj.original_weight"].astype(np.float32)
    assert weight.shape == original.shape

    def error(weight):
        return np.abs(weight - original).mean() / np.abs(original).mean()

    assert 0.1 < error(weight) < 0.2  # that of four bits
    np.testing.assert_array_equal(weight, by_hand(tensors, where).T)
    raw = QuantizationConfig(**vars(where) | {"checkpoint_format": "gptq_v2"})
    assert error(weight_of(GPTQLinear(raw, **tensors))) > 0.5


def test_groups_out_of_order_belong_to_each_projection():
    q, where = stored("asym", "q")
    o, _ = stored("asym", "o")
    assert where.desc_act
    assert np.bincount(o["g_idx"]).tolist() == [128, 128, 128, 128, 64]
    assert (o["g_idx"] != q["g_idx"]).any()
    for tensors in (q, o):
        weight = weight_of(GPTQLinear(where, **tensors))
        np.testing.assert_array_equal(weight, by_hand(tensors, where).T)


# ----------------------------------------------------------------------- packing and back


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_one_stream_of_bits(bits):
    words = np.random.default_rng(bits).integers(-(2**31), 2**31, (6, 5))
    words = words.astype(np.int32)
    values = np.asarray(unpack(jnp.asarray(words), bits))
    np.testing.assert_array_equal(values, stream(words.T, bits).T)
    np.testing.assert_array_equal(gptq.pack(values.astype(np.int64), bits), words)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_zero_point_comes_back(bits, checkpoint_format):
    """0 too, which "gptq" stores as -1 and so borrows from its neighbour."""
    where = config(bits, checkpoint_format=checkpoint_format)
    zeros = np.random.default_rng(0).integers(0, 2**bits, (3, 64))
    zeros[0, :6] = 0
    packed = gptq.pack_zeros(zeros, where)
    back = gptq.unpack_zeros(jnp.asarray(packed), where, 64)
    np.testing.assert_array_equal(back, zeros)
    raw = gptq.unpack(jnp.asarray(packed).T, bits).T
    less = zeros[1:] - (checkpoint_format == "gptq")
    if less.min() >= 0:
        np.testing.assert_array_equal(raw[1:], less)


def test_a_file_says_how_its_zero_points_are_stored():
    said = dict(bits=3, group_size=-1, desc_act=True, damp_percent=0.05)
    assert QuantizationConfig.from_dict(said) == config(3, -1, desc_act=True)
    for key in ("format", "checkpoint_format"):
        read = QuantizationConfig.from_dict(said | {key: "gptq_v2"})
        assert read.checkpoint_format == "gptq_v2"


def test_zero_points_are_stored_less_one():
    zeros = np.array([[8, 1, 15, 3, 2, 7, 9, 4]])
    stored = gptq.pack_zeros(zeros, config(4)).view(np.uint32)
    assert hex(stored.item()) == "0x38612e07"  # the last comes first
    raw = gptq.pack_zeros(zeros, config(4, checkpoint_format="gptq_v2"))
    assert hex(raw.view(np.uint32).item()) == "0x49723f18"
    # GPTQModel takes 1 from all fields of a word at once: a zero point of 0 borrows.
    borrowed = gptq.pack_zeros(np.array([[0, 8, 8, 8, 8, 8, 8, 8]]), config(4))
    assert hex(borrowed.view(np.uint32).item()) == "0x7777776f"


CASES = {
    "plain": dict(bits=4, group_size=16),
    "short last group": dict(bits=4, group_size=40),
    "one group": dict(bits=4, group_size=-1),
    "group of one": dict(bits=8, group_size=1),
    "symmetric": dict(bits=4, group_size=16, sym=True),
    "raw zeros": dict(bits=4, group_size=16, checkpoint_format="gptq_v2"),
    "out of order": dict(bits=4, group_size=16, desc_act=True),
    "two bits": dict(bits=2, group_size=16),
    "three bits": dict(bits=3, group_size=24),
    "three bits, symmetric": dict(bits=3, group_size=-1, sym=True),
    "three bits, raw, out of order": dict(
        bits=3, group_size=40, desc_act=True, checkpoint_format="gptq_v2"
    ),
    "eight bits": dict(bits=8, group_size=32),
}


def packed(name, O=7, C=96, shift=0.2):
    where = QuantizationConfig("gptq", **CASES[name])
    weight = np.random.default_rng(1).normal(shift, 1, (O, C)).astype(np.float32)
    weight[0, :50] = 0  # groups of zeros
    index = None
    if where.desc_act:
        order = np.random.default_rng(2).permutation(C)
        index = gptq.contiguous_groups(C, where)[order]
    return weight, where, gptq.quantize(weight, where, index)


@pytest.mark.parametrize("name", CASES)
def test_quantized_weights_come_back_to_half_a_step(name):
    weight, where, tensors = packed(name)
    back = np.asarray(weight_of(GPTQLinear(where, **tensors)))
    np.testing.assert_array_equal(back, by_hand(tensors, where).T)
    step = tensors["scales"].astype(np.float32).T[:, tensors["g_idx"]]
    # Half a step by rounding; half a one more at the ends, where symmetric codes lack
    # 2 ** bits and zero points were rounded; float16 scales end 2 ** -11 too early.
    ends = 0.5 + 2**where.bits * 2**-11
    assert (np.abs(back - weight) <= step * (0.5 + ends)).all()
    inside = np.abs(back - weight) <= step * 0.5001
    assert inside.mean() > 0.8
    assert (back[0, :50] == 0).all()  # zero has a code in every group


def test_packed_again_the_words_are_the_same():
    _, where, tensors = packed("plain", shift=0)
    again = gptq.quantize(by_hand(tensors, where).T.astype(np.float32), where)
    np.testing.assert_array_equal(again["g_idx"], tensors["g_idx"])
    weight = weight_of(GPTQLinear(where, **again))
    np.testing.assert_allclose(weight, by_hand(tensors, where).T, rtol=2e-3, atol=0.02)


# --------------------------------------------------------------------------- the layer


@nnx.jit
def everything(layer, x, ids):
    """What a projection can be asked, in one compilation."""
    slope = jax.grad(lambda x: layer(x).sum())(x)
    return layer(x), layer(x.astype(jnp.bfloat16)), layer.rows(ids), slope, layer.weight


@pytest.mark.parametrize("name", ["symmetric", "three bits", "out of order"])
def test_layer_is_a_product_with_the_dequantized_weight(name):
    _, where, tensors = packed(name)
    bias = np.arange(7, dtype=np.float32)
    expected = by_hand(tensors, where).T
    if where.sym:  # zero points are known then
        del tensors["qzeros"]
    layer = GPTQLinear(where, **tensors, bias=bias)
    assert isinstance(layer, Projection)
    assert (layer.in_features, layer.out_features) == (96, 7)
    x = np.random.default_rng(3).normal(size=(2, 3, 96)).astype(np.float32)
    ids = jnp.array([[3, 0], [6, 3]], jnp.int32)
    y, low, rows, slope, weight = everything(layer, jnp.asarray(x), ids)
    np.testing.assert_array_equal(weight, expected)
    np.testing.assert_allclose(y, x @ expected.T + bias, rtol=0, atol=2e-5)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), y, rtol=0, atol=0.5)
    np.testing.assert_array_equal(rows, expected[np.asarray(ids)])
    every = np.broadcast_to(expected.sum(0), x.shape)
    np.testing.assert_allclose(slope, every, rtol=0, atol=2e-5)


def test_only_the_bias_is_trained():
    _, where, tensors = packed("plain")
    layer = GPTQLinear(where, **tensors, bias=np.zeros(7, np.float32))
    _, trained, rest = nnx.split(layer, nnx.Param, ...)
    assert [leaf.shape for leaf in jax.tree.leaves(trained)] == [(7,)]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(rest))
    assert held == sum(tensor.nbytes for tensor in tensors.values())
    names = {str(path[-1]) for path, _ in nnx.to_flat_state(nnx.state(layer))}
    assert names == {"qweight", "qzeros", "scales", "g_idx", "bias"}


def test_random_layers_vary_like_linear():
    def make(seed):
        return GPTQLinear.create(
            1000,
            60,
            config=config(3, 128),
            has_bias=True,
            dtype=jnp.float16,
            rngs=nnx.Rngs(jax.random.key(seed)),
        )

    made = jax.jit(lambda seed: (make(seed).weight, make(seed).scales[...]))
    weight, scales = made(0)
    assert (weight.shape, scales.dtype) == ((60, 1000), jnp.float16)
    assert abs(np.asarray(weight).std() * 1000**0.5 - 1) < 0.02
    assert (made(1)[0] != weight).mean() > 0.5
    layer = make(0)
    assert layer.bias.dtype == jnp.float16
    np.testing.assert_array_equal(weight_of(layer), weight)


def test_attention_is_built_of_it():
    def run(x):
        layer = AttentionWithRope(
            rope=None,
            num_attention_heads=4,
            num_key_value_heads=2,
            hidden_size=32,
            kv_params=KVCacheParams(dtype=jnp.float32, n_kv_heads=2, head_dim=8),
            linear_cls=partial(GPTQLinear.create, config=config(4, 16)),
            has_bias=True,
            rngs=nnx.Rngs(0),
        )
        assert isinstance(layer.qkv.k, GPTQLinear)
        return layer(x)[0]

    y = jax.jit(run)(jnp.ones((1, 3, 32)))
    assert jnp.isfinite(y).all()


# ------------------------------------------------------------------------------ errors


def changed(name="plain", **changes):
    _, where, tensors = packed(name)
    tensors |= changes
    return GPTQLinear(where, **{n: t for n, t in tensors.items() if t is not None})


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: QuantizationConfig("awq", 4, 128), "quant_method='awq'.*'gptq'"),
        (lambda: config(5), "bits=5 is not one of 2, 3, 4, 8"),
        (lambda: config(group_size=0), "group_size=0"),
        (lambda: config(checkpoint_format="marlin"), "'gptq', 'gptq_v2'"),
        (lambda: QuantizationConfig.from_dict({"bits": 4}), r"lacks \['group_size'\]"),
        (
            lambda: QuantizationConfig.from_dict(
                dict(bits=4, group_size=8, dynamic={"-:o_proj": {}})
            ),
            "dynamic=.* formats of their own",
        ),
        (
            lambda: QuantizationConfig.from_dict(
                dict(bits=4, group_size=8, pack_dtype="int16")
            ),
            "pack_dtype='int16'",
        ),
        (
            lambda: QuantizationConfig.from_dict(
                dict(bits=4, group_size=8, is_marlin_format=True)
            ),
            "is_marlin_format=True",
        ),
        (lambda: changed(qzeros=None), "qzeros=None needs sym=True"),
        (lambda: changed("out of order", g_idx=None), "desc_act=True needs a g_idx"),
        (lambda: changed(g_idx=np.arange(96, dtype=np.int32) % 6), "out of order"),
        (
            lambda: changed("out of order", g_idx=np.arange(96, dtype=np.int32)),
            "groups from 0 to 95, not from 0 to 5",
        ),
        (lambda: changed(scales=np.ones((5, 7), np.float16)), r"scales .*\(6, 7\)"),
        (lambda: changed(qweight=np.ones((12, 6), np.int32)), r"qweight .*\(12, 7\)"),
        (lambda: changed(bias=np.ones(6, np.float32)), r"bias .*\(7,\)"),
        (
            lambda: gptq.quantize(np.ones((2, 8)), config(desc_act=True)),
            "desc_act=True with g_idx None",
        ),
        (
            lambda: gptq.quantize(np.ones((2, 8)), config(), np.zeros(8, np.int32)),
            r"desc_act=False with g_idx of shape \(8,\)",
        ),
        (lambda: gptq.quantize(np.full((2, 8), 1e9), config()), "finite in float16"),
        (
            lambda: gptq.unpack(jnp.ones((4, 2), jnp.int32), 3),
            "4 words are no multiple",
        ),
    ],
)
def test_errors_name_the_slip(make, named, unchecked):
    with pytest.raises(ValueError, match=named):
        make()
