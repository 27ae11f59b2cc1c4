"""GGUF's encodings against the gguf package, bit for bit."""

import inspect

import gguf as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raptax.io.gguf import GGUFFile
from raptax.quant.gguf import Codes, Encoding, dequantize, unpack

PLAIN = {Encoding.F32: "f4", Encoding.F16: "f2", Encoding.BF16: jnp.bfloat16}
BLOCKED = [encoding for encoding in Encoding if encoding not in PLAIN]
# Where a block keeps its float16 numbers; the other bytes may hold anything.
FLOAT16 = {
    Encoding.Q4_0: [0],
    Encoding.Q4_1: [0, 2],
    Encoding.Q5_0: [0],
    Encoding.Q5_1: [0, 2],
    Encoding.Q8_0: [0],
    Encoding.Q2_K: [80, 82],
    Encoding.Q3_K: [108],
    Encoding.Q4_K: [0, 2],
    Encoding.Q5_K: [0, 2],
    Encoding.Q6_K: [208],
}
jitted = jax.jit(dequantize, static_argnums=1)
each = pytest.mark.parametrize("encoding", Encoding, ids=lambda e: e.name)
each_blocked = pytest.mark.parametrize("encoding", BLOCKED, ids=lambda e: e.name)


def some_blocks(encoding, rows=7, blocks=5):
    """Any bytes at all, with finite numbers where a block keeps floats."""
    rng = np.random.default_rng(encoding.number)
    if encoding in PLAIN:
        floats = rng.normal(size=(rows, blocks, 1)).astype(PLAIN[encoding])
        return floats.view(np.uint8)
    raw = rng.integers(0, 256, (rows, blocks, encoding.bytes), np.uint8)
    for at in FLOAT16[encoding]:
        # Any sign, exponent and fraction but the exponent of infinity and NaN: zeros
        # and subnormals too, of which random bytes have one in 32.
        high = raw[..., at + 1]
        raw[..., at + 1] = np.where(high >> 2 & 31 == 31, high & 0x83, high)
    return raw


def expected(blocks, encoding):
    kind = oracle.GGMLQuantizationType[encoding.name]
    return oracle.quants.dequantize(blocks.reshape(blocks.shape[0], -1), kind)


def assert_same_bits(got, want):
    assert got.dtype == want.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(got).view(np.int32), want.view(np.int32))


@each
def test_sizes_are_ggmls(encoding):
    kind = oracle.GGMLQuantizationType[encoding.name]
    assert encoding.number == kind
    assert (encoding.values, encoding.bytes) == oracle.GGML_QUANT_SIZES[kind]


@each
def test_dequantize_random_blocks(encoding):
    blocks = some_blocks(encoding)
    assert_same_bits(jitted(jnp.asarray(blocks), encoding), expected(blocks, encoding))


@pytest.mark.parametrize("name", ["F16", "Q4_1", "Q5_K"])
def test_dequantize_needs_no_jit(name):
    encoding = Encoding.from_name(name)
    blocks = some_blocks(encoding)
    got = dequantize(jnp.asarray(blocks), encoding)
    assert_same_bits(got, expected(blocks, encoding))


@each_blocked
def test_codes_are_the_same_weight(encoding):
    blocks = some_blocks(encoding)
    codes = jax.jit(unpack, static_argnums=1)(jnp.asarray(blocks), encoding)
    assert_same_bits(jax.jit(Codes.dequantize)(codes), expected(blocks, encoding))


@each_blocked
def test_codes_are_small(encoding):
    codes = jax.eval_shape(
        lambda blocks: unpack(blocks, encoding), some_blocks(encoding)
    )
    assert codes.codes.dtype == jnp.int8
    assert codes.group == (16 if encoding.name in ("Q2_K", "Q3_K", "Q6_K") else 32)
    assert codes.scale.shape[1] * codes.group == codes.codes.shape[1]
    halves = jnp.float32 if encoding.name.endswith("_K") else jnp.float16
    assert codes.scale.dtype == halves
    symmetric = encoding.name in ("Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K")
    assert (codes.offset is None) == symmetric
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(codes))
    assert size <= 1.5 * codes.codes.size


def test_codes_multiply_in_one_row():
    blocks = jnp.asarray(some_blocks(Encoding.Q4_1))
    x = jnp.linspace(-1, 1, 160).reshape(1, 160)
    product = jax.jit(lambda x, codes: x @ codes.dequantize().T)
    want = np.asarray(x) @ expected(np.asarray(blocks), Encoding.Q4_1).T
    got = product(x, unpack(blocks, Encoding.Q4_1))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * abs(want).max())


def test_codes_are_a_tree():
    codes = unpack(jnp.asarray(some_blocks(Encoding.Q4_K)), Encoding.Q4_K)
    shapes = jax.tree.map(lambda x: x.shape, codes)
    assert shapes == Codes((7, 1280), (7, 40), (7, 40), 32)
    abstract = jax.eval_shape(lambda: codes)
    assert abstract.codes.dtype == jnp.int8
    assert len(jax.tree.leaves(unpack(jnp.zeros((1, 1, 34), "u1"), Encoding.Q8_0))) == 2


@each_blocked
def test_no_rows_and_no_blocks(encoding):
    for rows, blocks in ((0, 2), (3, 0)):
        empty = jnp.zeros((rows, blocks, encoding.bytes), jnp.uint8)
        got = jax.eval_shape(lambda x: dequantize(x, encoding), empty)
        assert got.shape == (rows, blocks * encoding.values)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_quantized_and_back_is_near(name):
    weight = np.random.default_rng(0).normal(size=(8, 128)).astype(np.float32)
    raw = oracle.quants.quantize(weight, oracle.GGMLQuantizationType[name])
    encoding = Encoding.from_name(name)
    blocks = jnp.asarray(raw.reshape(8, -1, encoding.bytes))
    error = np.abs(dequantize(blocks, encoding) - weight).max()
    assert error < {"Q4_0": 0.5, "Q8_0": 0.03}[name]


def test_real_rows(smollm2_path):
    tensors = GGUFFile(smollm2_path).tensors
    seen = set()
    for name in ("token_embd", "blk.0.attn_q", "blk.0.ffn_down", "blk.29.attn_norm"):
        tensor = tensors[f"{name}.weight"]
        blocks = np.atleast_3d(tensor.blocks)[-8:]
        blocks = blocks.reshape(len(blocks), -1, tensor.encoding.bytes)
        got = jitted(jnp.asarray(blocks), tensor.encoding)
        assert_same_bits(got, expected(blocks, tensor.encoding))
        seen.add(tensor.encoding.name)
    assert seen == {"Q8_0", "Q4_1", "F32"}


def test_names():
    assert Encoding.from_name("Q4_K") is Encoding.from_name("q4_k") is Encoding.Q4_K
    with pytest.raises(ValueError, match=r"'Q4_K_M' is not .* Q4_0, Q4_1, .* is a mix"):
        Encoding.from_name("Q4_K_M")
    with pytest.raises(ValueError, match="'IQ2_XS' is not an encoding raptax reads"):
        Encoding.from_name("IQ2_XS")


@pytest.mark.parametrize("function", [dequantize, unpack])
def test_blocks_of_another_encoding(function):
    with pytest.raises(ValueError, match=r"Q4_0 blocks are 18 bytes.* \(2, 3, 20\)"):
        function(jnp.zeros((2, 3, 20), jnp.uint8), Encoding.Q4_0)


def test_plain_numbers_have_no_codes():
    with pytest.raises(ValueError, match="BF16 holds plain numbers"):
        unpack(jnp.zeros((2, 3, 2), jnp.uint8), Encoding.BF16)


@pytest.mark.parametrize("array", [jnp.zeros((2, 54), "u1"), jnp.zeros((2, 3, 18))])
def test_rows_of_bytes_and_other_dtypes(array):
    bare = inspect.unwrap(unpack)  # the tests' shape checks would speak first
    with pytest.raises(ValueError, match=r"uint8 \(rows, blocks, 18\); got .*reshape"):
        bare(array, Encoding.Q4_0)
