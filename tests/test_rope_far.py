"""Rotary positions at any distance, against angles reduced in exact arithmetic."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raptax import rope
from raptax.compat.maxtext import positions as maxtext
from raptax.compat.maxtext.options import Settings
from raptax.rope import (
    DynamicRotaryEmbedding,
    LongRoPERotaryEmbedding,
    MultiAxisRotaryEmbedding,
    RotaryEmbedding,
)
from raptax.rope.table import RotaryTable
from tests.maxtext_cases import build

TURN = 2 * Fraction("3.14159265358979323846264338327950288419716939937510582097494459")
LONGEST = 2**31 - 1
FAR = np.array(
    [0, 1, 4095, 131_072, 1_000_003, 2**24 + 1, LONGEST - 7, LONGEST, -1, -131_072],
    np.int32,
)
PLAIN = rope.frequencies(32)


def angles(positions, inv_freq):
    """``positions * inv_freq`` modulo a turn, rounded once, ``(*rows, F)``."""
    exact = [Fraction(float(f)) for f in inv_freq]
    rows = [[float(int(p) * f % TURN) for f in exact] for p in positions.ravel()]
    return np.array(rows).reshape(*positions.shape, len(exact))


def check(tables, expected, scale=1.0, atol=1e-6):
    for table, function in zip(tables, (np.cos, np.sin), strict=True):
        np.testing.assert_allclose(table, function(expected) * scale, rtol=0, atol=atol)


def run(embedding, positions, **options):
    return jax.jit(lambda e, p: e.cos_sin(p, **options))(embedding, positions)


RULES = {
    "plain": (PLAIN, 1.0),
    "linear": (rope.linear_scaling(PLAIN, 8.0), 1.0),
    "llama3": (rope.llama3_scaling(rope.frequencies(32, 5e5)), 1.0),
    "yarn": (rope.yarn_scaling(PLAIN, factor=40.0), rope.yarn_attention_scale(40.0)),
    "faster than a turn": (PLAIN * 100, 1.0),
}


@pytest.mark.parametrize("rule", RULES)
def test_far_positions_are_exact(rule):
    inv_freq, scale = RULES[rule]
    embedding = RotaryEmbedding.create(32, inv_freq=inv_freq, attention_scale=scale)
    check(run(embedding, FAR), angles(FAR, inv_freq), scale)
    check(embedding.cos_sin(FAR), angles(FAR, inv_freq), scale)


@settings(max_examples=25, deadline=None)
@given(
    position=st.integers(-(2**31), LONGEST),
    theta=st.floats(1.5, 1e8),
    scaled_by=st.floats(1e-3, 1e3),
)
def test_any_position_and_any_base(position, theta, scaled_by):
    inv_freq = rope.frequencies(8, theta) / scaled_by
    positions = np.array([position], np.int32)
    embedding = RotaryEmbedding.create(8, inv_freq=inv_freq)
    check(embedding.cos_sin(positions), angles(positions, inv_freq))


@pytest.mark.parametrize("start", [131_072, 1_000_000, 2**24, LONGEST - 300])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_scores_depend_on_the_distance_alone(start, layout):
    q, k = jax.random.normal(jax.random.key(0), (2, 200, 1, 40))  # 32 lanes turn
    at = jnp.arange(200, dtype=jnp.int32)
    embedding = RotaryEmbedding.create(32, layout=layout)

    def scores(start):
        turned = embedding(q, at + start), embedding(k, at + start + 7)
        return jnp.einsum("thd,thd->t", *turned, precision="highest")

    np.testing.assert_allclose(scores(start), scores(0), rtol=0, atol=2e-5)


def test_bfloat16_is_the_float32_rotation_rounded():
    x = jax.random.normal(jax.random.key(0), (len(FAR), 2, 32)).astype(jnp.bfloat16)
    embedding = RotaryEmbedding.create(32)
    angle = angles(FAR, PLAIN)[:, None]
    first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
    expected = np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            first * np.sin(angle) + second * np.cos(angle),
        ],
        axis=-1,
    )
    actual = np.asarray(embedding(x, FAR), np.float64)
    # Half a step of bfloat16, and what float32 adds.
    bound = np.abs(expected) * 2.0**-8 + 2e-6
    assert (np.abs(actual - expected) <= bound).all()


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint8, np.uint16, np.uint32])
def test_integers_of_any_kind(dtype):
    ends = np.array([np.iinfo(dtype).min, 3, np.iinfo(dtype).max], dtype)
    embedding = RotaryEmbedding.create(32)
    for positions in (ends, jnp.asarray(ends)):
        check(embedding.cos_sin(positions), angles(ends, PLAIN))


def test_numpys_wide_positions_are_not_cut():
    wide = np.array([2**32 + 5, -(2**33) - 1, 2**31], np.int64)
    check(RotaryEmbedding.create(32).cos_sin(wide), angles(wide, PLAIN))


def test_positions_are_whole_numbers(unchecked):
    with pytest.raises(ValueError, match="positions must be integers; got float32"):
        RotaryEmbedding.create(32).cos_sin(jnp.ones(3))


# ------------------------------------------------------------ frequencies that are traced


def test_frequencies_of_jax_are_exact_and_learned():
    inv_freq = jnp.asarray(PLAIN.astype(np.float32))
    embedding = RotaryEmbedding(inv_freq)
    assert len(jax.tree.leaves(embedding)) == 1
    check(run(embedding, FAR), angles(FAR, np.asarray(inv_freq)))
    near = jnp.arange(9, dtype=jnp.int32)

    def value(embedding):
        cos, sin = embedding.cos_sin(near)
        return (cos * sin).sum(0)

    def definition(inv_freq):
        angle = near.astype(jnp.float32)[:, None] * inv_freq[None]
        return (jnp.cos(angle) * jnp.sin(angle)).sum(0)

    total = lambda f: lambda x: f(x).sum()
    for transform in (jax.grad, lambda f: jax.jit(jax.grad(jax.checkpoint(f)))):
        actual = transform(total(value))(embedding).inv_freq
        expected = transform(total(definition))(inv_freq)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    second = jax.jacfwd(jax.grad(total(value)))(embedding).inv_freq.inv_freq
    expected = jax.jacfwd(jax.grad(total(definition)))(inv_freq)
    np.testing.assert_allclose(second, expected, rtol=1e-4, atol=1e-3)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x / 2]), embedding)
    cos, _ = jax.vmap(lambda e: e.cos_sin(near))(stacked)
    half = RotaryEmbedding(inv_freq / 2).cos_sin(near)[0]
    np.testing.assert_array_equal(cos[1], half)


def test_known_frequencies_are_no_leaves():
    embedding = RotaryEmbedding.create(32)
    assert jax.tree.leaves(embedding) == []
    assert embedding == RotaryEmbedding(PLAIN) != RotaryEmbedding(PLAIN / 2)
    assert hash(embedding) == hash(RotaryEmbedding(PLAIN))
    assert embedding.inv_freq.tolist() == PLAIN.tolist()
    x = jnp.ones((2, 1, 32))
    static = jax.jit(lambda e, x, at: e(x, at), static_argnums=0)
    at = jnp.arange(2, dtype=jnp.int32)
    np.testing.assert_allclose(static(embedding, x, at), embedding(x, at), atol=1e-6)


# ------------------------------------------------------------------------- by the length

LENGTHS = 1000, 131_072, 2**24, 2**30


@pytest.mark.parametrize("length", LENGTHS)
def test_dynamic_ntk_is_exact(length):
    embedding = DynamicRotaryEmbedding.create(32, factor=4.0, max_position=4096)
    ratio = max(length / 4096, 1.0)
    base = 10000.0 * (4.0 * ratio - 3.0) ** (32 / 30)
    inv_freq = base ** (-np.arange(0, 32, 2) / 32)
    positions = np.array([0, 7, length // 3, length - 1], np.int32)
    expected = angles(positions, inv_freq)
    traced = jax.jit(lambda n, p: embedding.at(n).cos_sin(p))
    check(traced(jnp.int32(length), positions), expected)
    check(run(embedding, positions), expected)
    known = embedding.at(length)
    assert jax.tree.leaves(known) == []
    check(known.cos_sin(positions), expected)


def test_the_longest_position_has_a_length():
    """2 ** 31 - 1 and one more do not fit an int32."""
    last = np.array([LONGEST], np.int32)
    for embedding in (longrope(), DynamicRotaryEmbedding.create(**NTK)):
        own, known = embedding.cos_sin(last), embedding.at(2**31).cos_sin(last)
        np.testing.assert_allclose(own[0], known[0], rtol=0, atol=2e-6)


NTK = dict(rotary_size=32, factor=4.0, max_position=4096)


def longrope(**options):
    return LongRoPERotaryEmbedding.create(
        32,
        short_factor=(1 + 0.01 * np.arange(16)).tolist(),
        long_factor=(1 + 0.5 * np.arange(16)).tolist(),
        original_max_position=4096,
        max_position=131_072,
        **options,
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_longrope_is_exact(length):
    by_length, by_position = longrope(), longrope(switch="position")
    scale = by_length.attention_scale
    positions = np.array([0, 7, length // 3, length - 1], np.int32)
    inv_freq = by_length.long_inv_freq if length > 4096 else by_length.inv_freq
    expected = angles(positions, inv_freq)
    check(run(by_length, positions), expected, scale)
    check(by_length.at(length).cos_sin(positions), expected, scale)
    pinned = by_length.at(jnp.int32(length))
    check(run(pinned, positions), expected, scale)
    split = np.where(
        positions[:, None] >= 4096,
        angles(positions, by_length.long_inv_freq),
        angles(positions, by_length.inv_freq),
    )
    check(run(by_position, positions), split, scale)


@pytest.mark.parametrize("arrangement", ["contiguous", "interleaved"])
def test_several_axes_are_exact(arrangement):
    embedding = MultiAxisRotaryEmbedding.create(
        32, sections=(6, 5, 5), arrangement=arrangement
    )
    positions = np.stack([FAR, FAR[::-1], FAR // 2], axis=-1)
    by_axis = np.stack([angles(positions[:, a], PLAIN) for a in range(3)])
    expected = by_axis[embedding.axes(), :, np.arange(16)].T
    check(run(embedding, positions), expected)


# -------------------------------------------------------------------- MaxText's and MAX's

S = Settings()
PARTIAL = Settings(rope_linear_scaling_factor=8.0)
MAXTEXT = {
    "plain": lambda: maxtext.partial(32, 10000.0, 1.0, S),
    "partial, linear": lambda: maxtext.partial(32, 10000.0, 0.5, PARTIAL),
    "gemma4": lambda: maxtext.partial(32, 1e6, 0.25, Settings(decoder_block="gemma4")),
    "llama3.1": lambda: maxtext.llama3(32, 5e5, "llama3.1", S),
    "yarn": lambda: maxtext.yarn(32, 10000.0, Settings(rope_attention_scaling=True)),
    "mrope": lambda: maxtext.mrope(32, 10000.0, (6, 5, 5)),
}


@pytest.mark.parametrize("name", MAXTEXT)
def test_maxtexts_are_exact(name):
    rotary = MAXTEXT[name]()
    x = np.zeros((1, len(FAR), 1, 32), np.float32)
    pairs = len(rotary.inv_freq)
    ones = range(0, 2 * pairs, 2) if rotary.layout == "interleaved" else range(pairs)
    x[..., ones] = 1  # what is written is then (cos, sin) of each pair
    y = np.asarray(jax.jit(rotary)(jnp.asarray(x), FAR[None]))[0, :, 0, : 2 * pairs]
    written = (
        (y[:, 0::2], y[:, 1::2])
        if rotary.written == "interleaved"
        else np.split(y, 2, axis=1)
    )
    check(written, angles(FAR, np.array(rotary.inv_freq)), rotary.scale)


def test_images_are_exact():
    """Angles of patches are known: 900 rad in float32 were off by 3e-5."""
    qwen = maxtext.QwenVisionRotary(32, 2, 10000.0)
    x = jnp.zeros((1, 2 * 900, 1, 32)).at[..., :16].set(1.0)
    y = np.asarray(qwen(x, num_frames=1, height=2, width=900))[0, :, 0]
    check(np.split(y, 2, axis=1), qwen.angles(1, 2, 900))
    llama = maxtext.LlamaVisionRotary(32, 30, 10000.0)
    x = jnp.zeros((1, 901, 1, 32)).at[..., 0::2].set(1.0)
    y = np.asarray(llama(x))[0, :, 0]
    assert abs(y[29, 0] - math.cos(30)) < 1e-6
    np.testing.assert_array_equal(y[900], np.tile([1.0, 0.0], 16))


@pytest.mark.parametrize("floor_scale", [8192, 8192.0])
def test_temperature_counts_whole_spans(floor_scale):
    """Position 33,562,622 is the last of its span; in float32 it was in the next."""
    layer = build(
        is_nope_layer=True,
        temperature_tuning=True,
        temperature_tuning_scale=1000.0,
        temperature_tuning_floor_scale=floor_scale,
    )
    last = 8192 * 4097 - 2
    at = jnp.asarray([[0, last, last + 1]], jnp.int32)
    actual = layer._scaled(jnp.ones((1, 3, 4, 16)), at)[0, :, 0, 0]
    expected = 1 + 1000 * np.log1p([0, 4096, 4097])
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


# ------------------------------------------------------------------------------- float64


def test_float64_is_rotated_in_float64():
    """Under x64 both the angles and the rotation have 53 bits."""
    embeddings = {
        "known": (RotaryEmbedding.create(32), PLAIN),
        "interleaved": (RotaryEmbedding.create(32, layout="interleaved"), PLAIN),
        "by length": (longrope(attention_scale=1.0), longrope().long_inv_freq),
    }
    with jax.enable_x64(True):
        embeddings["learned"] = RotaryEmbedding(jnp.asarray(PLAIN)), PLAIN
        positions = jnp.asarray(FAR, jnp.int64)
        for name, (embedding, inv_freq) in embeddings.items():
            expected = angles(FAR, inv_freq)
            # Traced frequencies become turns in 53 bits, known ones in 64.
            atol = 3e-7 if name == "learned" else 2e-9
            check(run(embedding, positions, dtype=jnp.float64), expected, atol=atol)
            near = positions[:3]
            x = jnp.zeros((3, 1, 32)).at[..., :16].set(1.0)
            if embedding.layout == "interleaved":
                x = jnp.zeros((3, 1, 32)).at[..., 0::2].set(1.0)
            y = (
                embedding.at(2**20)(x, near)
                if name == "by length"
                else embedding(x, near)
            )
            assert y.dtype == jnp.float64
            y = np.asarray(y)[:, 0]
            interleaved = embedding.layout == "interleaved"
            pair = (y[:, 0::2], y[:, 1::2]) if interleaved else np.split(y, 2, axis=1)
            check(pair, expected[:3], atol=1e-12)
            narrow = run(embedding, positions)
            assert narrow[0].dtype == jnp.float32


def test_maxtexts_and_tables_in_float64():
    with jax.enable_x64(True):
        near = np.arange(50)[None]
        x = jnp.zeros((1, 50, 1, 32)).at[..., :16].set(1.0)
        y = maxtext.partial(32, 10000.0, 1.0, S)(x, near)
        expected = angles(near[0], PLAIN)
        check(np.split(np.asarray(y)[0, :, 0], 2, axis=1), expected, atol=1e-14)
        table = np.stack([np.cos(expected), np.sin(expected)], -1).reshape(50, 32)
        z = RotaryTable(jnp.asarray(table))(x[0], near[0])
        assert z.dtype == jnp.float64
        np.testing.assert_allclose(z[:, 0], y[0, :, 0], rtol=0, atol=1e-14)
