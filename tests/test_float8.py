"""float8 and NVFP4 against ml_dtypes and NumPy in float64."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from raptax import (
    AttentionWithRope,
    Float8Config,
    Float8InputScaleSpec,
    Float8Linear,
    Float8WeightScaleSpec,
    KVCacheParams,
    float8_config_from_dict,
)
from raptax.nn.linear import Projection
from raptax.quant import float8

E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
In, Weight = Float8InputScaleSpec, Float8WeightScaleSpec
NVFP4 = Float8Config(
    In("block", "static", block_size=(1, 16)),
    Weight("block", jnp.float8_e4m3fn, (1, 16)),
    quant_method="modelopt",
    quant_algo="NVFP4",
)
CONFIGS = {
    "static, tensor": Float8Config(In("tensor", "static"), Weight("tensor")),
    "static, row": Float8Config(In("tensor", "static"), Weight("rowwise")),
    "whole, tensor": Float8Config(In("tensor", "dynamic"), Weight("tensor")),
    "token, row": Float8Config(
        In("colwise", "dynamic"), Weight("rowwise", jnp.bfloat16)
    ),
    "token with a bound": Float8Config(
        In("colwise", "dynamic", activation_scale_ub=1.5), Weight("rowwise")
    ),
    "block": Float8Config(
        In("block", "dynamic", block_size=(1, 32)), Weight("block", block_size=(16, 32))
    ),
    "powers of two": Float8Config(
        In("block", "dynamic", jnp.float8_e8m0fnu, block_size=(1, 32)),
        Weight("block", jnp.float8_e8m0fnu, (16, 32)),
    ),
    "nvfp4": NVFP4,
}
O, C = 24, 80  # neither fills its last block of 16 and 32


def example(name, seed=0):
    """A layer's tensors, and an input with a row of zeros and one of small numbers."""
    config = CONFIGS[name]
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(O, C)).astype(np.float32)
    weight[3] = 0
    tensors = float8.quantize_weight(jnp.asarray(weight), config)
    x = rng.normal(size=(2, 3, C)).astype(np.float32)
    x[0, 1], x[1, 0], x[1, 2, :16] = 0, x[1, 0] * 1e-3, 0
    if config.is_static:
        tensors["input_scale"] = jnp.float32(0.004 if config.is_nvfp4 else 0.01)
    return config, weight, tensors, x


# --------------------------------------------------------------- the same thing in NumPy


def groups(x, size):
    """The last axis in runs of ``size``, the last one filled up with zeros."""
    padded = np.zeros((*x.shape[:-1], -(-x.shape[-1] // size) * size), x.dtype)
    padded[..., : x.shape[-1]] = x
    return padded.reshape(*x.shape[:-1], -1, size)


def spread(scale, size, length):
    return np.repeat(scale, size, axis=-1)[..., :length]


def scale_by_hand(largest, dtype):
    """``largest / 448`` as a checkpoint keeps it, in float32, and 1 for zero."""
    if dtype == jnp.float8_e8m0fnu:
        ratio = np.where(largest == 0, 1, largest.astype(float) / 448)
        return (2 ** np.ceil(np.log2(ratio))).astype(np.float32)
    scale = (largest * np.float32(1 / 448)).astype(dtype).astype(np.float32)
    return np.where(scale == 0, np.float32(1), scale)


def input_by_hand(x, config, input_scale):
    """The numbers and the scale of each of them, in float64."""
    spec = config.input_scale
    if config.is_nvfp4:
        largest = np.abs(groups(x, 16)).max(-1)
        scale = (largest * np.float32(1 / 6) / input_scale).clip(0, 448).astype(E4M3)
        wide = spread(scale.astype(np.float32) * input_scale, 16, x.shape[-1])
        numbers = np.where(wide == 0, 0, x / np.where(wide == 0, 1, wide))
        return numbers.clip(-6, 6).astype(E2M1).astype(float), wide.astype(float)
    if config.is_static:
        wide = np.broadcast_to(input_scale, x.shape)
    else:
        size = {"tensor": x.size, "colwise": x.shape[-1]}.get(spec.granularity)
        rows = x.reshape(-1) if spec.granularity == "tensor" else x
        size = size or spec.block_size[1]
        largest = np.abs(groups(rows, size)).max(-1)
        if spec.activation_scale_ub is not None:
            largest = np.minimum(largest, np.float32(spec.activation_scale_ub))
        scale = scale_by_hand(largest, spec.dtype)
        wide = spread(scale, size, rows.shape[-1]).reshape(x.shape)
    numbers = (x / wide).clip(-448, 448).astype(E4M3)
    return numbers.astype(float), wide.astype(float)


def weight_by_hand(tensors, config):
    """The numbers that stored tensors stand for, in float64."""
    scale = np.asarray(tensors["weight_scale"]).astype(float)
    if config.is_nvfp4:
        packed = np.asarray(tensors["weight"])
        nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
        numbers = nibbles.view(E2M1).astype(float)
        scale = scale * float(tensors["weight_scale_2"])
        return numbers * spread(scale, 16, C)
    numbers = np.asarray(tensors["weight"]).astype(float)
    if config.weight_scale.is_block:
        b0, b1 = config.weight_scale.block_size
        scale = spread(spread(scale, b1, C).T, b0, O).T
    return numbers * scale


# ----------------------------------------------------------------------------- numbers


def test_nibbles_are_e2m1_low_first():
    every = np.arange(256, dtype=np.uint8)[None]
    numbers = jax.jit(float8.decode_e2m1)(jnp.asarray(every))
    nibbles = np.stack([every & 15, every >> 4], -1).reshape(1, -1)
    expected = nibbles.view(E2M1).astype(np.float32)
    np.testing.assert_array_equal(numbers, expected)
    back = jax.jit(float8.encode_e2m1)(numbers)
    np.testing.assert_array_equal(back, every)  # -0 too


def test_numbers_are_rounded_to_the_nearest_e2m1():
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -5, -0.25, 0]
    x = np.array([*np.linspace(-6, 6, 2000), *ties], np.float32)
    odd = np.array([9.0, -np.inf, np.nan, np.inf], np.float32)
    through = jax.jit(lambda x: float8.decode_e2m1(float8.encode_e2m1(x)))
    numbers = through(jnp.asarray(np.concatenate([x, odd])))
    expected = x.astype(E2M1).astype(np.float32)
    np.testing.assert_array_equal(numbers, [*expected, 6, -6, 0, 6])


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_is_the_scaled_product_of_rounded_numbers(name):
    config, weight, tensors, x = example(name)
    bias = np.arange(O, dtype=np.float32)
    layer = Float8Linear(config, **tensors, bias=bias)
    assert isinstance(layer, Projection)
    assert (layer.in_features, layer.out_features) == (C, O)
    ids = jnp.array([[3, 0], [23, 3]], jnp.int32)

    @nnx.jit
    def everything(layer, x, ids):
        slope = jax.grad(lambda x: layer(x).sum())(x)
        numbers, scale = float8.quantize_input(x, config, tensors.get("input_scale"))
        low = layer(x.astype(jnp.bfloat16))
        return (
            layer(x),
            low,
            layer.rows(ids),
            slope,
            layer.dequantized_weight,
            (
                numbers.astype(jnp.float32),
                scale,
            ),
        )

    y, low, rows, slope, stored, (numbers, scale) = everything(
        layer, jnp.asarray(x), ids
    )

    w = weight_by_hand(tensors, config)
    np.testing.assert_allclose(stored, w, rtol=2e-7, atol=0)
    np.testing.assert_array_equal(rows, np.asarray(stored)[np.asarray(ids)])
    assert (w[3] == 0).all()
    step = {"nvfp4": 0.25, "powers of two": 0.126}.get(name, 0.063)
    assert np.abs(w - weight).max() < step * np.abs(weight).max()
    assert np.abs(w - weight).mean() > 1e-3  # it has been rounded

    input_scale = np.asarray(tensors.get("input_scale"))
    x_q, wide = input_by_hand(x, config, input_scale)
    np.testing.assert_array_equal(numbers, x_q)
    groups_of = config.scales_granularity_mnk[2]
    if groups_of == -1:
        assert scale.shape == ((1, 1, 1) if config.input_scale.is_tensor else (2, 3, 1))
        np.testing.assert_array_equal(np.broadcast_to(scale, x.shape), wide)
    else:
        np.testing.assert_array_equal(spread(np.asarray(scale), groups_of, C), wide)
    expected = (x_q * wide) @ w.T + bias
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y[0, 1], bias)  # a row of zeros
    assert np.abs(expected - (x @ w.T + bias)).max() > 1e-3

    # Rounding is passed over. What would not have been rounded to the largest number has
    # been clipped and has no slope, nor have NVFP4's groups of zeros.
    inside = np.abs(x) < wide * (7 if config.is_nvfp4 else 464)
    assert inside.all() == (name in CONFIGS.keys() - {"token with a bound", "nvfp4"})
    expected = np.broadcast_to(w.sum(0), x.shape) * inside
    np.testing.assert_allclose(slope, expected, rtol=0, atol=2e-5)


def test_float8_numbers_are_those_of_ml_dtypes():
    """All ties between neighbours, and the numbers next to them."""
    every = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    ties = (every[1:] + every[:-1]) / 2
    above, below = np.nextafter(ties, np.float32(1e9)), np.nextafter(ties, -ties - 1)
    x = np.concatenate([every, ties, above, below, [1e3, -1e9, np.inf, np.nan]])
    x = x.astype(np.float32)[None]
    config = CONFIGS["static, tensor"]
    numbers, _ = float8.quantize_input(jnp.asarray(x), config, jnp.float32(1))
    expected = x.clip(-448, 448).astype(E4M3)
    got = np.asarray(numbers).view(np.uint8), expected.view(np.uint8)
    np.testing.assert_array_equal(*got)


def test_tiny_and_bad_rows():
    x = np.zeros((5, C), np.float32)
    x[1, 0], x[2, 0], x[3, 7], x[4] = 1e-37, 1e-45, np.nan, 1
    config = CONFIGS["token, row"]
    numbers, scale = float8.quantize_input(jnp.asarray(x), config)
    numbers = np.asarray(numbers).astype(np.float32)
    assert np.asarray(scale)[[0, 1, 2], 0].tolist() == [1, 1, 1]
    assert (numbers[:3] == 0).all()
    assert np.isnan(numbers[3, 7])
    assert (numbers[4] == 448).all()


@pytest.mark.parametrize("name", ["whole, tensor", "token, row", "nvfp4"])
def test_rows_do_not_see_each_other(name):
    """Scales are of single rows, but for the one that is taken over everything."""
    config, _, tensors, x = example(name)
    layer = Float8Linear(config, **tensors)
    louder = x.copy()
    louder[0] *= 7

    @nnx.jit
    def run(layer, x, louder):
        return layer(x)[1], layer(louder)[1], layer(x[:, :0])

    quiet, loud, empty = run(layer, jnp.asarray(x), jnp.asarray(louder))
    assert np.array_equal(quiet, loud) == (name != "whole, tensor")
    assert empty.shape == (2, 0, O)


def test_stored_tensors_stay_small_and_untrained():
    config, _, tensors, _ = example("nvfp4")
    layer = Float8Linear(config, **tensors, bias=np.zeros(O, np.float32))
    _, trained, rest = nnx.split(layer, nnx.Param, ...)
    assert [leaf.shape for leaf in jax.tree.leaves(trained)] == [(O,)]
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(rest))
    assert kept == O * C // 2 + O * C // 16 + 4 + 4
    names = {str(path[-1]) for path, _ in nnx.to_flat_state(nnx.state(layer))}
    assert names == {"weight", "weight_scale", "weight_scale_2", "input_scale", "bias"}


def test_single_scales_come_in_any_shape_and_from_numpy():
    config, _, tensors, x = example("static, tensor")
    tensors = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    column = {name: tensors[name].reshape(1, 1) for name in ("weight_scale",)}
    vector = {"input_scale": tensors["input_scale"].reshape(1)}
    layer = Float8Linear(config, **tensors | column | vector)
    run = nnx.jit(lambda layer, x: layer(x))
    expected = run(Float8Linear(config, **tensors), jnp.asarray(x))
    np.testing.assert_array_equal(run(layer, jnp.asarray(x)), expected)


@pytest.mark.parametrize("name", ["static, row", "nvfp4"])
def test_attention_is_built_of_it(name):
    config = dataclasses.replace(CONFIGS[name], bias_dtype=jnp.bfloat16)

    def run(x):
        layer = AttentionWithRope(
            rope=None,
            num_attention_heads=4,
            num_key_value_heads=2,
            hidden_size=32,
            kv_params=KVCacheParams(dtype=jnp.float32, n_kv_heads=2, head_dim=8),
            linear_cls=partial(Float8Linear.create, config=config),
            has_bias=True,
            rngs=nnx.Rngs(0),
        )
        assert layer.qkv.k.bias.dtype == jnp.bfloat16
        return layer(x)[0], layer.qkv.q.dequantized_weight

    y, weight = jax.jit(run)(jnp.ones((1, 3, 32)))
    assert jnp.isfinite(y).all()
    assert abs(np.asarray(weight).std() * 32**0.5 - 1) < 0.1  # as `Linear` begins


# ------------------------------------------------------------------------------ configs


def dialect(method, **config):
    return {"quant_method": method} | config


def compressed(weights, inputs, **more):
    kinds = dict(num_bits=8, type="float", symmetric=True)
    group = dict(weights=kinds | weights, input_activations=kinds | inputs)
    return dialect(
        "compressed-tensors",
        format="float-quantized",
        config_groups={"group_0": group | {"targets": ["Linear"]}},
        **more,
    )


DIALECTS = {
    "compressed-tensors, static": (
        compressed(dict(strategy="tensor"), dict(strategy="tensor", dynamic=False)),
        In("tensor", "static"),
        Weight("tensor"),
    ),
    "compressed-tensors, dynamic": (
        compressed(dict(strategy="channel"), dict(strategy="token", dynamic=True)),
        In("colwise", "dynamic"),
        Weight("rowwise"),
    ),
    "compressed-tensors, blocks": (
        compressed(
            dict(strategy="block", block_structure=[128, 128]),
            dict(strategy="group", dynamic=True, group_size=128),
        ),
        In("block", "dynamic", block_size=(1, 128)),
        Weight("block", block_size=(128, 128)),
    ),
    "fbgemm": (
        dialect("fbgemm_fp8", activation_scale_ub=1200.0),
        In("colwise", "dynamic", activation_scale_ub=1200.0),
        Weight("rowwise"),
    ),
    "deepseek": (
        dialect(
            "fp8",
            activation_scheme="dynamic",
            fmt="e4m3",
            weight_block_size=[128, 128],
        ),
        In("block", "dynamic", block_size=(1, 128)),
        Weight("block", block_size=(128, 128)),
    ),
    "deepseek, powers of two": (
        dialect("fp8", fmt="e4m3", scale_fmt="ue8m0", weight_block_size=[128, 128]),
        In("block", "dynamic", jnp.float8_e8m0fnu, block_size=(1, 128)),
        Weight("block", block_size=(128, 128)),
    ),
    "fp8, static": (
        dialect("fp8", activation_scheme="static"),
        In("tensor", "static"),
        Weight("tensor"),
    ),
    "fp8, dynamic": (
        dialect("fp8", activation_scheme="dynamic"),
        In("colwise", "dynamic"),
        Weight("tensor"),
    ),
    "modelopt": (
        {"producer": {}, "quantization": {"quant_algo": "FP8", "exclude_modules": []}},
        In("tensor", "static"),
        Weight("tensor"),
    ),
    "nvfp4": (
        dialect("modelopt", quant_algo="NVFP4", group_size=16),
        NVFP4.input_scale,
        NVFP4.weight_scale,
    ),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_checkpoint_configs(name):
    written, inputs, weights = DIALECTS[name]
    config = float8_config_from_dict(written)
    assert (config.input_scale, config.weight_scale) == (inputs, weights)
    assert config.is_nvfp4 == (name == "nvfp4")
    assert config.is_static != config.is_dynamic
    hash(config)  # layers hold it as part of their structure


@pytest.mark.parametrize(
    ("left_out", "attention", "mlp"),
    [
        ({"ignore": ["lm_head"]}, {0, 1, 2}, {0, 1, 2}),
        ({"ignore": ["re:.*self_attn.*"]}, set(), {0, 1, 2}),
        (
            {
                "ignore": [
                    f"model.layers.1.mlp.{n}_proj" for n in ("up", "gate", "down")
                ]
            },
            {0, 1, 2},
            {0, 2},
        ),
        ({"ignore": ["model.layers.2"]}, {0, 1}, {0, 1}),
        ({"ignore": ["model.layers.2.*", "*.1.mlp*"]}, {0, 1}, {0}),
    ],
)
def test_layers_left_out(left_out, attention, mlp):
    written = dialect("modelopt", quant_algo="FP8", **left_out)
    config = float8_config_from_dict(written, num_layers=3)
    assert config.attn_qkv_in_float8 == attention
    assert config.mlp_in_float8 == mlp


def test_granularities_of_the_product():
    expected = {
        "static, tensor": (-1, -1, -1),
        "static, row": (-1, 1, -1),
        "token, row": (1, 1, -1),
        "block": (1, 16, 32),
        "nvfp4": (1, 1, 16),
    }
    for name, sizes in expected.items():
        assert CONFIGS[name].scales_granularity_mnk == sizes
    config = Float8Config(In("tensor", "static"), Weight("tensor"), {1, 2}, {3})
    assert (config.mlp_in_float8, config.attn_qkv_in_float8) == ({1, 2}, {3})


# ------------------------------------------------------------------------------- errors


def changed(name="static, tensor", **changes):
    config, _, tensors, _ = example(name)
    tensors |= changes
    return Float8Linear(config, **{n: t for n, t in tensors.items() if t is not None})


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: In("rowwise", "dynamic"), "granularity='rowwise' .* each lane"),
        (lambda: Weight("colwise"), "granularity='colwise' .* each input"),
        (lambda: In("tensor", "learned"), "origin='learned'.*'static', 'dynamic'"),
        (lambda: In("block", "dynamic"), "block_size=None must be a pair"),
        (lambda: Weight("block", block_size=128), "block_size=128 must be a pair"),
        (lambda: Weight("tensor", block_size=(1, 1)), "belongs to granularity 'block'"),
        (lambda: Weight("tensor", jnp.int8), "must be a float type"),
        (lambda: In("block", "dynamic", block_size=(2, 8)), r"\(2, 8\) must be \(1, g"),
        (
            lambda: In("tensor", "static", activation_scale_ub=1.0),
            "activation_scale_ub=1.0 .* origin is 'static'",
        ),
        (
            lambda: In("tensor", "dynamic", activation_scale_ub=0.0),
            "activation_scale_ub=0.0 must be above 0",
        ),
        (
            lambda: Float8Config(In("colwise", "static"), Weight("tensor")),
            "origin='static' with granularity 'colwise'",
        ),
        (
            lambda: Float8Config(
                In("colwise", "dynamic"), Weight("block", block_size=(8, 8))
            ),
            "must agree along the inputs",
        ),
        (
            lambda: dataclasses.replace(CONFIGS["block"], quant_algo="NVFP4"),
            "needs quant_method='modelopt'",
        ),
        (lambda: changed(input_scale=None), "needs input_scale"),
        (lambda: changed("token, row", input_scale=jnp.ones(())), "takes no input_sc"),
        (lambda: changed(weight_scale_2=jnp.ones(())), "takes no weight_scale_2"),
        (lambda: changed("nvfp4", weight_scale_2=None), "needs weight_scale_2"),
        (
            lambda: changed(weight=jnp.ones((O, C))),
            "weight is float32, not float8_e4m3",
        ),
        (
            lambda: changed("block", weight_scale=jnp.ones((2, 2))),
            r"\(2, 2\), not \(2, 3",
        ),
        (lambda: changed(input_scale=jnp.ones(3)), r"input_scale .*\(3,\)"),
        (lambda: changed(bias=jnp.ones(3)), r"bias .*\(24,\)"),
        (
            lambda: float8.quantize_weight(jnp.ones((2, 24)), NVFP4),
            "groups of 16; 24 is no multiple",
        ),
        (
            lambda: float8.quantize_input(jnp.ones((1, C)), CONFIGS["static, row"]),
            "origin 'static' needs an input_scale",
        ),
        (lambda: float8.encode_e2m1(jnp.ones(3)), "3 numbers do not fill"),
        (
            lambda: float8_config_from_dict({}),
            "quant_method=None.*'compressed-tensors'",
        ),
        (lambda: float8_config_from_dict(dialect("awq")), "quant_method='awq'"),
        (
            lambda: float8_config_from_dict(dialect("modelopt", quant_algo="W4A8")),
            "quant_algo='W4A8' is not one of 'FP8', 'NVFP4'",
        ),
        (
            lambda: float8_config_from_dict(dialect("fp8", fmt="e5m2")),
            "fmt='e5m2' is not one of 'e4m3'",
        ),
        (
            lambda: float8_config_from_dict(
                compressed(dict(strategy="tensor", type="int"), dict(strategy="token"))
            ),
            "type='int'",
        ),
        (
            lambda: float8_config_from_dict(
                dialect("compressed-tensors", config_groups={"a": {}, "b": {}})
            ),
            r"config_groups=\['a', 'b'\]",
        ),
        (
            lambda: float8_config_from_dict(
                dialect("compressed-tensors", config_groups={"a": {"weights": None}})
            ),
            "weights=None",
        ),
        (
            lambda: float8_config_from_dict(
                dialect("compressed-tensors", config_groups={"a": {"targets": ["x"]}})
            ),
            r"targets=\['x'\] is not one of \['Linear'\]",
        ),
        (
            lambda: float8_config_from_dict(
                dialect("fp8", modules_to_not_convert=["model.layers.0.mlp.up_proj"]),
                num_layers=1,
            ),
            "must be quantized uniformly",
        ),
    ],
)
def test_errors_name_the_slip(make, named, unchecked):
    with pytest.raises(ValueError, match=named):
        make()
