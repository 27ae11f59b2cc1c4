"""Norms, rotary embeddings, quantized numbers and ragged rows next to MaxText's own."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from raptax.compat.maxtext import KVQuant, L2Norm, l2_norm_as_linen
from raptax.compat.maxtext import positions as rope
from raptax.compat.maxtext.options import Settings
from raptax.kv_cache.positioned import AttendSettings, KVSegment, attend

RAW = np.load(Path(__file__).parent / "data/maxtext_raw.npz")


def raw(name):
    return jnp.asarray(RAW[name])


def test_l2_norm():
    x = raw("l2norm/x")
    close = lambda a, b, atol: np.testing.assert_allclose(a, b, rtol=0, atol=atol)
    close(L2Norm()(x), raw("l2norm/y"), 1e-6)
    close(L2Norm(eps=0.5, rngs=nnx.Rngs(0))(x), raw("l2norm/y_eps_half"), 1e-6)
    low = L2Norm()(x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    close(low.astype(jnp.float32), raw("l2norm/y_bf16"), 3e-2)
    assert (L2Norm()(jnp.zeros((2, 4))) == raw("l2norm/y_zero")).all()
    module = l2_norm_as_linen("any", eps=0.5)
    assert module.init({}, x) == {}
    close(module.apply({}, x), raw("l2norm/y_eps_half"), 1e-6)
    assert L2Norm().eps == 1e-6


S = Settings()
YARN = dataclasses.replace(
    S, original_max_position_embeddings=64, rope_factor=4.0, beta_fast=4.0
)


def yarn(interleave=1, truncate=1, scaled=1, pairwise=0):
    settings = dataclasses.replace(
        YARN,
        rope_interleave=bool(interleave),
        rope_truncate=bool(truncate),
        rope_attention_scaling=bool(scaled),
        rope_pairwise=bool(pairwise),
    )
    return rope.yarn(16, 10000.0, settings)


GEMMA = dataclasses.replace(S, decoder_block="gemma4")
ROTARIES = {
    "default": lambda: rope.partial(16, 10000.0, 1.0, S),
    "llama31": lambda: rope.llama3(16, 500000.0, "llama3.1", S),
    "partial_0p25": lambda: rope.partial(16, 10000.0, 0.25, S),
    "gemma4_partial_0p25": lambda: rope.partial(16, 10000.0, 0.25, GEMMA),
    "yarn_pairwise": lambda: yarn(scaled=0, pairwise=1),
} | {
    f"yarn_il{i}_tr{t}_sc{s}": lambda i=i, t=t, s=s: yarn(i, t, s)
    for i in (0, 1)
    for t in (0, 1)
    for s in (0, 1)
}


@pytest.mark.parametrize("name", ROTARIES)
def test_rotary(name):
    x, positions = raw("rope/x"), raw("rope/pos")
    y = ROTARIES[name]()(x, positions)
    # Positions go up to 16160: there MaxText's angles, float32 frequencies times
    # positions, are off by up to 16160 * 2 ** -23 = 2e-3; ours by 5e-7.
    np.testing.assert_allclose(y, raw(f"rope/{name}"), rtol=0, atol=2e-3)
    near = np.asarray(positions) < 64
    near = near[:, :, None, None] & np.ones(x.shape, bool)
    np.testing.assert_allclose(
        np.asarray(y)[near], RAW[f"rope/{name}"][near], rtol=0, atol=2e-5
    )


def test_rotary_of_three_axes():
    x, positions = raw("rope/x"), raw("rope/mrope_pos")
    turn = rope.mrope(16, 1e6, (4, 2, 2))
    np.testing.assert_allclose(
        turn(x, positions), raw("rope/mrope_3d"), rtol=0, atol=2e-5
    )
    flat = turn(x, raw("rope/pos"))
    np.testing.assert_allclose(flat, raw("rope/mrope_2d"), rtol=0, atol=5e-4)
    plain = rope.partial(16, 1e6, 1.0, S)(x, raw("rope/pos"))
    np.testing.assert_array_equal(flat, plain)
    wide = rope.mrope(128, 1e6)(raw("rope/x128"), positions)
    np.testing.assert_allclose(
        wide, raw("rope/mrope_3d_d128_default_sections"), rtol=0, atol=2e-5
    )


def test_contiguous_sections_follow_one_axis_after_another():
    x, positions = raw("rope/x"), raw("rope/mrope_pos")
    y = rope.mrope(16, 10000.0, (3, 3, 2), arrangement="contiguous")(x, positions)
    inv = 10000.0 ** (-np.arange(8) / 8)
    axis = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    angle = (np.asarray(positions)[..., axis] * inv)[:, :, None]
    a, b = np.split(np.asarray(x, np.float64), 2, axis=-1)
    expected = np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)],
        axis=-1,
    )
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)


def test_rotaries_of_images():
    llama = rope.LlamaVisionRotary(16, 4, 10000.0)
    x = raw("rope/x_llama_vision")
    y = llama(x)
    np.testing.assert_allclose(y, raw("rope/llama_vision"), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(y[:, -1], x[:, -1])
    qwen = rope.QwenVisionRotary(16, 2, 10000.0)
    x = raw("rope/x_qwen_vision")
    grid = dict(num_frames=2, height=4, width=6)
    y = qwen(x, **grid)
    np.testing.assert_allclose(y, raw("rope/qwen_vision_t2_h4_w6"), rtol=0, atol=2e-5)
    some = jnp.arange(48)[None] % 3 > 0
    masked = qwen(x, **grid, token_mask=some)
    keep = some[..., None, None]
    np.testing.assert_array_equal(masked, jnp.where(keep, y, x))


def test_frequencies_of_deepseeks_yarn():
    angles = rope.yarn(64, 10000.0, S).inv_freq
    expected = RAW["rope/yarn_deepseek_defaults_d64_angles_row1"]
    np.testing.assert_allclose(angles, expected, rtol=2e-5, atol=1e-7)


NAMES = "cache_sequence", "cache_heads", "cache_batch", "cache_kv"


@pytest.mark.parametrize("axes", ["dkv", "heads_and_dkv"])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_codes_and_scales_are_maxtexts(kind, axes):
    config = dict(quantize_kvcache=True, kv_quant_dtype=kind, kv_quant_axis=axes)
    quant = KVQuant(config)
    kv = raw("kv_quantize/kv")
    codes, scale = quant.quantize(kv, NAMES)
    expected = RAW[f"kv_quantize/{kind}_{axes}_value"].astype(np.float32)
    expected = np.nan_to_num(expected)  # a vector of zeros: theirs is 0 * inf
    np.testing.assert_array_equal(codes.astype(jnp.float32), expected)
    np.testing.assert_array_equal(scale, RAW[f"kv_quantize/{kind}_{axes}_scale"])
    assert codes.dtype == quant.dtype
    assert quant.axis_cfg == axes
    assert (codes[0, 0, 0].astype(jnp.float32) == 0).all()
    back = quant.quantization.dequantize(codes, scale, jnp.float32)
    step = np.asarray(scale) / quant.quantization.top * (16 if kind == "fp8" else 1)
    assert (np.abs(back - kv) <= step + 1e-6).all()


@pytest.mark.parametrize(
    ("heads", "block"),
    [
        ("gqa", 5),
        *(
            pytest.param(heads, block, marks=pytest.mark.slow)
            for heads in ("mha", "gqa")
            for block in (None, 4, 64)
        ),
    ],
)
def test_ragged_rows_are_maxtexts(heads, block):
    q, k, v, lengths = (raw(f"ragged/{heads}/{n}") for n in ("q", "k", "v", "lengths"))
    expected = RAW[f"ragged/{heads}/out_unnormalised"] / np.maximum(
        RAW[f"ragged/{heads}/sum"], 1e-30
    )
    slot = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
    held = KVSegment(
        k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.where(slot < lengths[:, None], slot, -1)
    )
    settings = AttendSettings(scale=1.0, kernel="reference")
    at = lengths[:, None] - 1
    y = attend(q.swapaxes(1, 2), [held], at, settings, block=block).swapaxes(1, 2)
    some = np.asarray(lengths) > 0
    np.testing.assert_allclose(np.asarray(y)[some], expected[some], rtol=0, atol=2e-5)
    assert (np.asarray(y)[~some] == 0).all()
