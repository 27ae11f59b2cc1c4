"""Rotary positions against MAX's tables and against their definition."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from raptax import AttentionWithRope, KVCacheParams, PagedKVCache, rope
from raptax.rope import (
    DynamicRotaryEmbedding,
    LongRoPERotaryEmbedding,
    MultiAxisRotaryEmbedding,
    RotaryEmbedding,
)

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
    # An angle of 500 rad has a float32 step of 3e-5 in their tables.
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
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


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


# --------------------------------------------------------------------- DeepSeek's YaRN


def test_deepseek_yarn_is_that_of_max():
    """But for MAX's frequencies, which are float32: they are off by 3e-3 at 256."""
    inv_freq = rope.yarn_scaling(PLAIN, factor=4.0, original_max_position=64)
    both = rope.deepseek_yarn_attention_scale(4.0, 1.0, 1.0)
    embedding = RotaryEmbedding.create(64, inv_freq=inv_freq, attention_scale=both)
    positions = np.arange(32, dtype=np.int32) * 8
    cos, sin = embedding.cos_sin(jnp.asarray(positions))
    table = MAX["deepseek_yarn"]
    bound = 1e-6 + positions[:, None] * 1.3e-5
    assert (np.abs(cos - table[:, 0::2]) < bound).all()
    assert (np.abs(sin - table[:, 1::2]) < bound).all()


def test_deepseek_yarn_scales():
    m = lambda multiplier: 0.1 * multiplier * math.log(40) + 1
    assert rope.deepseek_yarn_attention_scale(40.0, 1.0, 0.7) == m(1.0) / m(0.7)
    assert rope.deepseek_yarn_attention_scale(40.0, 0.7) == m(0.7)
    assert rope.deepseek_yarn_softmax_factor(40.0, 0.7) == m(0.7) ** 2
    assert rope.deepseek_yarn_softmax_factor(40.0) == 1.0
    assert rope.deepseek_yarn_softmax_factor(1.0, 0.7) == 1.0


# -------------------------------------------------------------------- by the length


def angles(embedding, positions, lengths):
    """Cosines and sines as it chooses them, and at each length; compiled once."""
    traces = []

    @jax.jit
    def run(embedding, positions, length):
        traces.append(length)
        own = embedding.cos_sin(positions)
        return own, embedding.at(length).cos_sin(positions)

    out = [
        run(embedding, jnp.asarray(positions), jnp.int32(length)) for length in lengths
    ]
    assert len(traces) == 1
    return out


def ntk(length, factor=4.0, longest=64, D=64, theta=10000.0):
    """Hugging Face's definition in float64."""
    length = max(length, longest)
    base = theta * (factor * length / longest - (factor - 1)) ** (D / (D - 2))
    return base ** (-np.arange(0, D, 2) / D)


def test_dynamic_ntk_is_the_definition():
    embedding = DynamicRotaryEmbedding.create(64, factor=4.0, max_position=64)
    positions = np.arange(200, dtype=np.int32)
    lengths = (1, 64, 65, 128, 1000)
    for length, (own, at) in zip(
        lengths, angles(embedding, positions, lengths), strict=True
    ):
        for (cos, sin), n in ((at, length), (own, 200)):
            turned = positions[:, None] * ntk(n)
            np.testing.assert_allclose(cos, np.cos(turned), rtol=0, atol=1e-6)
            np.testing.assert_allclose(sin, np.sin(turned), rtol=0, atol=1e-6)
    np.testing.assert_allclose(ntk(64), PLAIN)
    assert ntk(1000)[-1] < ntk(65)[-1] < PLAIN[-1]


FACTORS = dict(
    short_factor=(1 + 0.01 * np.arange(32)).tolist(),
    long_factor=(1 + 0.5 * np.arange(32)).tolist(),
    original_max_position=100,
    max_position=800,
)


def test_longrope_is_the_definition():
    embedding = LongRoPERotaryEmbedding.create(64, **FACTORS)
    scale = math.sqrt(1 + math.log(8) / math.log(100))
    assert embedding.attention_scale == scale
    short, long = (PLAIN / FACTORS[f"{name}_factor"] for name in ("short", "long"))
    positions = np.arange(100, dtype=np.int32)
    lengths = (1, 100, 101, 10000)
    expected = (short, short, long, long)
    for inv_freq, (own, at) in zip(
        expected, angles(embedding, positions, lengths), strict=True
    ):
        for (cos, sin), table in ((at, inv_freq), (own, short)):
            turned = positions[:, None] * table
            np.testing.assert_allclose(cos, np.cos(turned) * scale, rtol=0, atol=1e-5)
            np.testing.assert_allclose(sin, np.sin(turned) * scale, rtol=0, atol=1e-5)
    (cos, _), _ = angles(embedding, positions + 1, [1])[
        0
    ]  # now there is a position 100
    turned = (positions[:, None] + 1) * long
    np.testing.assert_allclose(cos, np.cos(turned) * scale, rtol=0, atol=1e-5)


def test_stitched_longrope_is_that_of_max():
    embedding = LongRoPERotaryEmbedding.create(
        64, **FACTORS, switch="position", attention_scale=1.0
    )
    positions = np.arange(64, dtype=np.int32) * 8
    ((own, at),) = angles(embedding, positions, [7])
    for cos, sin in (own, at):
        np.testing.assert_allclose(cos, MAX["longrope"][:, 0::2], rtol=0, atol=5e-5)
        np.testing.assert_allclose(sin, MAX["longrope"][:, 1::2], rtol=0, atol=5e-5)


def test_no_rows_have_no_length():
    for embedding in (
        DynamicRotaryEmbedding.create(64, factor=4.0, max_position=64),
        LongRoPERotaryEmbedding.create(64, **FACTORS),
    ):
        cos, _ = embedding.cos_sin(jnp.zeros((2, 0), jnp.int32))
        assert cos.shape == (2, 0, 32)


# ------------------------------------------------------------------ along several axes


def three_axes(arrangement, layout="half"):
    return MultiAxisRotaryEmbedding.create(
        32, sections=(6, 5, 5), arrangement=arrangement, layout=layout
    )


@pytest.mark.parametrize(
    ("arrangement", "axes"),
    [
        ("contiguous", [0] * 6 + [1] * 5 + [2] * 5),
        ("interleaved", [0, 1, 2] * 5 + [0]),
    ],
)
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_each_pair_turns_by_its_own_axis(arrangement, axes, layout):
    embedding = three_axes(arrangement, layout)
    assert embedding.axes().tolist() == axes
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(2, 7, 3, 40)), jnp.float32)  # 32 lanes turn
    positions = jnp.asarray(rng.integers(0, 50, (2, 7, 3)), jnp.int32)
    out = embedding(x, positions)
    plain = RotaryEmbedding.create(32, layout=layout)
    for axis in range(3):
        one = plain(x, positions[..., axis])
        pairs = np.flatnonzero(np.array(axes) == axis)
        if layout == "half":
            lanes = np.concatenate([pairs, pairs + 16])
        else:
            lanes = 8 + np.concatenate([2 * pairs, 2 * pairs + 1])
        np.testing.assert_allclose(out[..., lanes], one[..., lanes], atol=2e-6)
    text = positions[..., 0]
    np.testing.assert_allclose(embedding(x, text), plain(x, text), atol=2e-6)


def test_sections_of_qwen3_vl():
    axes = MultiAxisRotaryEmbedding.create(
        128, sections=(24, 20, 20), arrangement="interleaved"
    ).axes()
    assert axes.tolist() == [0, 1, 2] * 20 + [0] * 4


def test_layers_take_positions_along_several_axes():
    params = KVCacheParams(dtype=jnp.float32, n_kv_heads=1, head_dim=32, page_size=4)
    layer = AttentionWithRope(
        rope=three_axes("interleaved"),
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=16,
        kv_params=params,
        rngs=nnx.Rngs(0),
    )
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(2, 6, 16)), jnp.float32)
    positions = jnp.asarray(rng.integers(0, 9, (2, 6, 3)), jnp.int32)
    cache = PagedKVCache.create(params, pages=4, sequences=2, max_pages=2)
    cache = cache.with_tables([[0, 1], [2, 3]], [0, 0])

    @nnx.jit
    def run(layer, x, cache, positions):
        whole, _ = layer(x, positions=positions)
        paged, _ = layer(x, cache, positions=positions)
        return whole, paged, layer(x)[0]

    whole, paged, text = run(layer, x, cache, positions)
    np.testing.assert_allclose(whole, paged, rtol=0, atol=2e-6)
    assert jnp.abs(whole - text).max() > 1e-3


# ------------------------------------------------------------------------------ details


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
        (
            lambda: DynamicRotaryEmbedding.create(2, factor=2.0, max_position=8),
            "rotary_size=2 must be at least 4",
        ),
        (
            lambda: DynamicRotaryEmbedding.create(8, factor=0.5, max_position=8),
            "factor=0.5 must be at least 1",
        ),
        (
            lambda: DynamicRotaryEmbedding.create(8, factor=2.0, max_position=0),
            "max_position=0 must be at least 1",
        ),
        (
            lambda: LongRoPERotaryEmbedding.create(
                64, **FACTORS | {"original_max_position": 1}
            ),
            "original_max_position=1 must be at least 2",
        ),
        (
            lambda: LongRoPERotaryEmbedding.create(32, **FACTORS),
            "short_factor must have 16 entries for rotary_size=32; got 32",
        ),
        (
            lambda: LongRoPERotaryEmbedding.create(64, **FACTORS, switch="batch"),
            "switch='batch' is not one of 'length', 'position'",
        ),
        (
            lambda: MultiAxisRotaryEmbedding.create(32, sections=(6, 5, 4)),
            r"sections=\(6, 5, 4\) must add up to 16",
        ),
        (lambda: three_axes("woven"), "'contiguous', 'interleaved'"),
        (
            lambda: MultiAxisRotaryEmbedding.create(
                32, sections=(4, 8, 4), arrangement="interleaved"
            ),
            r"sections=\(4, 8, 4\) cannot be interleaved",
        ),
        (
            lambda: three_axes("contiguous").cos_sin(jnp.zeros((2, 2), jnp.int32)),
            r"positions \(2, 2\) must end with 3",
        ),
    ],
)
def test_errors_name_the_slip(build, named, unchecked):
    with pytest.raises(ValueError, match=named):
        build()


def test_too_many_rotary_lanes():
    x = jnp.zeros((2, 1, 4))
    with pytest.raises(ValueError, match="8 rotary lanes do not fit"):
        RotaryEmbedding.create(8)(x, jnp.zeros(2, jnp.int32))
