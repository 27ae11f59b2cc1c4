"""What MaxText decides by model_name or decoder_block, each by its formula."""

import enum

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from raptax.compat.maxtext import positions as rope
from tests.maxtext_cases import E, build

D = 16


def rotary(**options):
    return build(head_dim=D, **options).rotary_embedding


class Block(enum.Enum):
    GEMMA4 = "gemma4"
    GEMMA4_SMALL = "gemma4_small"


GEMMA4 = [
    dict(model_name="gemma4-26b"),
    dict(model_name="gemma4-e2b", decoder_block="llama2"),
    dict(decoder_block="gemma4"),
    dict(decoder_block=Block.GEMMA4),
    dict(decoder_block=Block.GEMMA4_SMALL),
]


@pytest.mark.parametrize("config", GEMMA4)
def test_gemma4_turns_the_first_pairs_of_the_whole_head(config):
    whole = rotary(partial_rotary_factor=0.25, rope_max_timescale=1e6, config=config)
    turning = 1e6 ** (-np.arange(2) / (D / 2))
    np.testing.assert_allclose(whole.inv_freq, [*turning, *[0.0] * 6], rtol=1e-12)
    plain = rotary(partial_rotary_factor=0.25, rope_max_timescale=1e6)
    np.testing.assert_allclose(plain.inv_freq, 1e6 ** (-np.arange(2) / 2), rtol=1e-12)
    x = jax.random.normal(jax.random.key(0), (1, 5, 1, D))
    pairs = np.asarray(whole(x)), np.asarray(plain(x))
    still = np.r_[2:8, 10:16]
    np.testing.assert_array_equal(pairs[0][..., still], np.asarray(x)[..., still])
    np.testing.assert_array_equal(pairs[1][..., 4:], np.asarray(x)[..., 4:])


LOCAL = dict(attention_type="local_sliding", sliding_window_size=3)
SCALED = dict(rope_linear_scaling_factor=8.0, rope_max_timescale=1e6)


@pytest.mark.parametrize(
    "name", [dict(model_name="gemma3-4b"), dict(decoder_block="gemma3")]
)
def test_gemma3_stretches_global_layers_alone(name):
    plain = 1e6 ** (-np.arange(8) / 8)
    local = rotary(**LOCAL, config=SCALED | name).inv_freq
    np.testing.assert_allclose(local, plain, rtol=1e-12)
    for options in (dict(config=SCALED | name), LOCAL | dict(config=SCALED)):
        np.testing.assert_allclose(rotary(**options).inv_freq, plain / 8, rtol=1e-12)
    near = SCALED | name | dict(local_rope_max_timescale=100.0)
    for options in (dict(), dict(rope_max_timescale=5e5)):
        inv_freq = rotary(**LOCAL, **options, config=near).inv_freq
        np.testing.assert_allclose(inv_freq, 100.0 ** (-np.arange(8) / 8), rtol=1e-12)


def test_the_local_base_is_of_plain_rotations():
    near = dict(local_rope_max_timescale=100.0)
    for options in (
        dict(rope_type="llama3.1"),
        dict(rope_type="yarn"),
        dict(partial_rotary_factor=0.5),
        dict(use_mrope=True, mrope_section=(3, 3, 2)),
    ):
        assert rotary(**LOCAL, **options, config=near) == rotary(**LOCAL, **options)


def test_the_least_timescale_is_of_all_but_yarn():
    first = dict(rope_min_timescale=10.0, rope_use_scale=False)
    plain = 0.1 * 1000.0 ** (-np.arange(8) / 8)
    for options in (
        dict(),
        dict(rope_type="llama3.1"),
        dict(use_mrope=True, mrope_section=(3, 3, 2)),
    ):
        found = rotary(**options, config=first).inv_freq
        np.testing.assert_allclose(found, plain, rtol=1e-12)
    found = rotary(partial_rotary_factor=0.5, config=first).inv_freq
    np.testing.assert_allclose(found, 0.1 * 1000.0 ** (-np.arange(4) / 4), rtol=1e-12)


def test_llama31_and_images_go_by_the_model_too():
    assert rotary(config=dict(model_name="llama3.1-8b")).layout == "interleaved"
    image = dict(is_vision=True, attention_type="full")
    for name, kind in (
        ("qwen3-omni-30b-a3b", rope.QwenVisionRotary),
        ("llama4-17b-16e", rope.LlamaVisionRotary),
    ):
        assert isinstance(rotary(**image, config=dict(model_name=name)), kind)


@pytest.mark.parametrize(
    "name", [dict(model_name="olmo3-7b"), dict(decoder_block="olmo3")]
)
def test_olmo3_norms_all_heads_at_once(name):
    layer = build(use_qk_norm=True, config=name)
    o = layer.options
    assert layer.query_norm.scale.shape == (o.num_query_heads * o.head_dim,)
    assert layer.key_norm.scale.shape == (o.num_kv_heads * o.head_dim,)


def test_qwen2_has_no_bias_behind_attention():
    for block, has in (("qwen2", False), ("llama2", True)):
        layer = build(use_bias_in_projections=True, config=dict(decoder_block=block))
        assert (layer.out.bias is not None) == has
        assert layer.query.bias is not None


@pytest.mark.parametrize("scaled", [True, False])
def test_the_norm_of_values_may_have_weights(scaled):
    config = {} if scaled else dict(v_norm_with_scale=False)
    layer, plain = build(use_v_norm=True, config=config), build()
    assert (layer.value_norm.scale is not None) == scaled
    names = dict(nnx.to_flat_state(nnx.state(layer, nnx.Param)))
    assert (("value_norm", "scale") in names) == scaled
    if scaled:
        layer.value_norm.scale[...] = jnp.arange(1.0, layer.head_dim + 1)
    x = jax.random.normal(jax.random.key(0), (2, 24, E))
    v = np.asarray(plain.kv_projection(x, "value"), np.float64)
    normed = v / np.sqrt((v * v).mean(-1, keepdims=True) + 1e-5)
    if scaled:
        normed = normed * np.arange(1.0, layer.head_dim + 1)
    _, _, actual = layer._heads(x, x, jnp.arange(24, dtype=jnp.int32)[None], None)
    np.testing.assert_allclose(actual, normed, rtol=0, atol=2e-5 * normed.max())


@pytest.mark.parametrize("block", ["qwen3_next", "qwen3_5"])
def test_gated_blocks_are_refused(block):
    with pytest.raises(ValueError, match="gates the output of attention"):
        build(config=dict(decoder_block=block))
