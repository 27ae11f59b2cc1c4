"""Rotary positions against MAX's tables and against their definition."""

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from raptax import rope
from raptax.rope import RotaryEmbedding

MAX = np.load(Path(__file__).parent / "data/rope_max.npz")
PLAIN = rope.frequencies(64)
RULES = {
    "plain": (PLAIN, 1.0),
    "llama3": (rope.llama3_scaling(PLAIN, original_max_position=64), 1.0),
    "yarn": (
        rope.yarn_scaling(PLAIN, factor=4.0, original_max_position=64),
        rope.yarn_attention_scale(4.0),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_tables_are_those_of_max(rule):
    inv_freq, scale = RULES[rule]
    embedding = RotaryEmbedding.create(64, inv_freq=inv_freq, attention_scale=scale)
    table = MAX[rule]
    cos, sin = embedding.cos_sin(jnp.arange(len(table), dtype=jnp.int32) * 8)
    # An angle of 500 rad has a float32 step of 3e-5, in their tables and in ours.
    np.testing.assert_allclose(cos, table[:, 0::2], rtol=0, atol=5e-5)
    np.testing.assert_allclose(sin, table[:, 1::2], rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("layout", "name", "start"),
    [
        ("interleaved", "apply_interleaved", 0),
        ("half", "apply_split", 0),
        ("half", "apply_split_start3", 3),
    ],
)
def test_rotation_is_that_of_max(layout, name, start):
    embedding = RotaryEmbedding.create(64, layout=layout)
    x = jnp.asarray(MAX["x"])  # (batch, length, heads, size)
    positions = jnp.broadcast_to(start + jnp.arange(9, dtype=jnp.int32), (2, 9))
    np.testing.assert_allclose(embedding(x, positions), MAX[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotation_is_multiplication_by_a_unit_complex_number(layout):
    x = np.random.default_rng(0).normal(size=(5, 3, 16)).astype(np.float32)
    positions = np.array([0, 1, 7, 100, 4096], np.int32)
    lanes = np.arange(16)
    first, second = (
        (lanes[0::2], lanes[1::2]) if layout == "interleaved" else np.split(lanes, 2)
    )
    angles = positions[:, None] * rope.frequencies(16)
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles)[:, None]
    expected = np.empty_like(x)
    expected[..., first], expected[..., second] = turned.real, turned.imag
    embedding = RotaryEmbedding.create(16, layout=layout)
    actual = embedding(jnp.asarray(x), jnp.asarray(positions))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-3)  # 4096 rad
    np.testing.assert_allclose(actual[:4], expected[:4], rtol=0, atol=3e-5)


def test_layouts_are_one_rotation_of_permuted_lanes():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2, 12)), jnp.float32)
    positions = jnp.arange(4, dtype=jnp.int32)
    half = RotaryEmbedding.create(12)(x, positions)
    to_interleaved = np.arange(12).reshape(2, 6).T.reshape(-1)
    interleaved = RotaryEmbedding.create(12, layout="interleaved")
    permuted = interleaved(x[..., to_interleaved], positions)
    np.testing.assert_array_equal(permuted, half[..., to_interleaved])


@pytest.mark.parametrize(
    ("layout", "turned"), [("half", slice(0, 8)), ("interleaved", slice(4, 12))]
)
def test_partial_rotation_leaves_the_other_lanes_alone(layout, turned):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 2, 12)), jnp.float32)
    positions = jnp.arange(4, dtype=jnp.int32)
    embedding = RotaryEmbedding.create(8, layout=layout)
    out = embedding(x, positions)
    np.testing.assert_array_equal(
        out[..., turned], embedding(x[..., turned], positions)
    )
    rest = np.delete(np.arange(12), np.arange(12)[turned])
    np.testing.assert_array_equal(out[..., rest], x[..., rest])


def test_linear_scaling_stretches_positions():
    np.testing.assert_allclose(rope.linear_scaling(PLAIN, 8.0) * 80, PLAIN * 10)


def test_llama3_scaling_keeps_short_waves_and_slows_long_ones():
    scaled = rope.llama3_scaling(PLAIN, factor=8.0, original_max_position=8192)
    waves = 2 * math.pi / PLAIN
    np.testing.assert_array_equal(scaled[waves < 8192 / 4], PLAIN[waves < 8192 / 4])
    np.testing.assert_allclose(scaled[waves > 8192], PLAIN[waves > 8192] / 8)
    between = (waves > 8192 / 4) & (waves < 8192)
    assert between.any()
    assert (scaled[between] < PLAIN[between]).all()
    assert (scaled[between] > PLAIN[between] / 8).all()
    step = rope.llama3_scaling(PLAIN, low_freq_factor=2.0, high_freq_factor=2.0)
    assert set(np.round(step / PLAIN, 6)) == {1.0, 0.125}  # no blend, no division by 0


def test_yarn_truncate_is_honoured():
    whole = rope.yarn_scaling(PLAIN, factor=4.0, original_max_position=64)
    exact = rope.yarn_scaling(
        PLAIN, factor=4.0, original_max_position=64, truncate=False
    )
    assert not np.allclose(whole, exact)
    assert rope.yarn_attention_scale(1.0) == 1.0


def test_bfloat16_is_rotated_in_float32():
    x = np.random.default_rng(3).normal(size=(64, 2, 16)).astype(np.float32)
    x = jnp.asarray(x).astype(jnp.bfloat16)
    positions = jnp.arange(64, dtype=jnp.int32) + 1000
    embedding = RotaryEmbedding.create(16)
    wide = embedding(x.astype(jnp.float32), positions).astype(jnp.bfloat16)
    np.testing.assert_array_equal(embedding(x, positions), wide)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: rope.frequencies(7), "rotary_size=7"),
        (lambda: rope.frequencies(0), "rotary_size=0"),
        (lambda: RotaryEmbedding.create(8, layout="neox"), "'half', 'interleaved'"),
        (lambda: RotaryEmbedding.create(8, inv_freq=PLAIN), "needs 4 frequencies"),
        (
            lambda: rope.llama3_scaling(PLAIN, low_freq_factor=9.0),
            "low_freq_factor=9.0",
        ),
    ],
)
def test_errors_name_the_slip(build, named):
    with pytest.raises(ValueError, match=named):
        build()


def test_too_many_rotary_lanes():
    x = jnp.zeros((2, 1, 4))
    with pytest.raises(ValueError, match="8 rotary lanes do not fit"):
        RotaryEmbedding.create(8)(x, jnp.zeros(2, jnp.int32))
