"""Products with packed weights, in C++ and in plain JAX, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from raptax.kernels.cpu import library
from raptax.kernels.cpu.packed_linear import _plain, packed_linear
from raptax.nn.packed_linear import PackedLinear
from raptax.quant import gguf
from raptax.quant.gguf import Encoding
from raptax.quant.packed import pack, stacked
from tests.instruction_sets import INSTRUCTION_SETS, run_file
from tests.test_gguf import BLOCKED, FLOAT16, each_blocked, some_blocks

C = 512  # two blocks of the largest kind


def blocks_of(encoding, rows=21, seed=0, size=0.02):
    """Random codes whose scales are about ``size``, of both signs."""
    rng = np.random.default_rng(encoding.number + seed)
    blocks = some_blocks(encoding, rows, C // encoding.values)
    for at in FLOAT16[encoding]:
        scale = rng.normal(size=blocks.shape[:2]).astype(np.float16) * np.float16(size)
        blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    return jnp.asarray(blocks)


def rows_of(M, dtype="float32", seed=0):
    x = np.random.default_rng(M + seed).normal(size=(M, C))
    return jnp.asarray(x, jnp.float32).astype(dtype)


def float64(x):
    return np.asarray(x, np.float64)


def bound(x, W, precision, dtype="float32"):
    """What each output may be wrong by: sums, the last rounding, and int8's rounding."""
    x, W = float64(x), float64(W)
    sizes = np.abs(x) @ np.abs(W).T
    eps = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    most = 64 * 2.0**-24 * sizes + 2 * eps * np.abs(x @ W.T) + 2.0**-24
    if precision == "int8":
        steps = np.abs(x).reshape(len(x), -1, 32).max(-1).repeat(32, axis=1) / 127
        # A sum of unsigned codes, of which 128 times the sum of inputs is taken off.
        largest = np.abs(W).max(1) * 2
        most += (steps / 2) @ np.abs(W).T + 2.0**-18 * np.abs(x).sum(1)[
            :, None
        ] * largest
    return most


def check(x, weights, W, precision, **options):
    y = packed_linear(x, weights, precision=precision, **options)
    assert (y.shape, y.dtype) == ((*x.shape[:-1], len(W)), x.dtype)
    wrong = np.abs(float64(y) - float64(x) @ float64(W).T)
    limit = bound(x, W, precision, x.dtype.name)
    assert (wrong <= limit).all(), (wrong / limit).max()


@each_blocked
def test_packing_loses_nothing(encoding):
    """Zeros, subnormal scales and rows that do not fill a tile included."""
    blocks = jnp.asarray(some_blocks(encoding, rows=21))
    want = gguf.dequantize(blocks, encoding)
    packed = pack(blocks, encoding)
    got = packed.dequantize()
    np.testing.assert_array_equal(got.view(jnp.int32) << 1, want.view(jnp.int32) << 1)
    ids = jnp.array([20, 0, 16, 15, 20])
    np.testing.assert_array_equal(packed.rows(ids), got[ids])


def test_plain_numbers_are_not_packed():
    with pytest.raises(ValueError, match="F16 holds plain numbers"):
        pack(jnp.zeros((2, 32, 2), jnp.uint8), Encoding.F16)


@pytest.mark.parametrize("precision", ["float32", "int8"])
@each_blocked
def test_against_float64(encoding, precision):
    blocks = blocks_of(encoding)
    W, packed = gguf.dequantize(blocks, encoding), pack(blocks, encoding)
    for M in (1, 3, 13):
        check(rows_of(M), [packed], W, precision)


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(dtype, precision):
    blocks = blocks_of(Encoding.Q4_1)
    W, packed = gguf.dequantize(blocks, Encoding.Q4_1), pack(blocks, Encoding.Q4_1)
    check(rows_of(5, dtype), [packed], W, precision)


def test_float64_inputs_are_not_rounded():
    with jax.enable_x64(True):
        blocks = blocks_of(Encoding.Q8_0)
        W = gguf.dequantize(blocks, Encoding.Q8_0)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, C)))
        y = packed_linear(x, [pack(blocks, Encoding.Q8_0)])
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, float64(x) @ float64(W).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_several_weights_of_a_stack_in_one_call(precision):
    """Of other encodings and heights; a traced number chooses from each stack."""
    kinds = (Encoding.Q4_K, 21), (Encoding.Q6_K, 16), (Encoding.Q5_1, 3)
    blocks = [[blocks_of(e, rows, n) for n in range(3)] for e, rows in kinds]
    weights = [
        stacked([pack(b, e) for b in one])
        for one, (e, _) in zip(blocks, kinds, strict=True)
    ]
    call = jax.jit(lambda x, n: packed_linear(x, weights, index=n, precision=precision))
    x = rows_of(4)
    for n in range(3):
        W = jnp.concatenate(
            [gguf.dequantize(b[n], e) for b, (e, _) in zip(blocks, kinds, strict=True)]
        )
        wrong = np.abs(float64(call(x, n)) - float64(x) @ float64(W).T)
        assert (wrong <= bound(x, W, precision)).all()


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_row_does_not_depend_on_its_company(precision):
    packed = pack(blocks_of(Encoding.Q4_1), Encoding.Q4_1)
    x = rows_of(23)
    whole = packed_linear(x, [packed], precision=precision)
    for some in (slice(0, 1), slice(4, 9), slice(2, 22)):
        part = packed_linear(x[some], [packed], precision=precision)
        np.testing.assert_array_equal(part, whole[some])


@pytest.mark.parametrize("encoding", BLOCKED, ids=lambda e: e.name)
def test_int8_is_what_plain_jax_says_it_is(encoding):
    blocks = blocks_of(encoding)
    packed, x = pack(blocks, encoding), rows_of(6)
    plain = _plain(True, (packed,), jnp.int32(0), x)
    y = packed_linear(x, [packed], precision="int8")
    scale = np.abs(float64(x)) @ np.abs(float64(packed.dequantize())).T
    assert (np.abs(float64(y) - float64(plain)) <= 2e-6 * scale + 1e-6).all()


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(bad, precision):
    packed = pack(blocks_of(Encoding.Q4_0), Encoding.Q4_0)
    x = rows_of(9)
    y = packed_linear(x.at[3, 40].set(bad), [packed], precision=precision)
    good = packed_linear(x, [packed], precision=precision)
    assert not np.isfinite(y[3]).any()
    np.testing.assert_array_equal(np.delete(y, 3, 0), np.delete(good, 3, 0))


def test_rows_of_zeros_give_zeros():
    packed = pack(blocks_of(Encoding.Q6_K), Encoding.Q6_K)
    y = packed_linear(jnp.zeros((5, C)), [packed], precision="int8")
    np.testing.assert_array_equal(y, np.zeros((5, 21)))
    assert packed_linear(jnp.zeros((0, C)), [packed]).shape == (0, 21)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_derivatives(precision):
    """Those of the product without rounding, in both modes and twice."""
    weights = [pack(blocks_of(e), e) for e in (Encoding.Q4_1, Encoding.Q6_K)]
    W = jnp.concatenate([w.dequantize() for w in weights])
    x, moved = rows_of(3), rows_of(3, seed=1)
    call = lambda x: packed_linear(x, weights, precision=precision)
    y, pulled = jax.vjp(call, x)

    def close(actual, expected):
        most = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=most)

    close(pulled(y)[0], y @ W)
    close(jax.jvp(call, (x,), (moved,))[1], moved @ W.T)
    loss = lambda x: (call(x) ** 2).sum() / 2
    close(jax.jvp(jax.grad(loss), (x,), (moved,))[1], moved @ W.T @ W)


def test_under_vmap_rows_become_more_rows():
    packed = pack(blocks_of(Encoding.Q4_1), Encoding.Q4_1)
    x = rows_of(12).reshape(3, 4, C)
    call = lambda x: packed_linear(x, [packed])
    np.testing.assert_array_equal(jax.vmap(call)(x), call(x))
    text = str(jax.jit(jax.vmap(call)).lower(x).compile().as_text())
    assert text.count("raptax_packed_linear") == library.available()


def test_on_other_platforms_it_is_plain_jax():
    packed = pack(blocks_of(Encoding.Q4_1), Encoding.Q4_1)
    call = jax.jit(lambda x: packed_linear(x, [packed]))
    exported = jax.export.export(call, platforms=["tpu"])(rows_of(2))
    assert "raptax_packed_linear" not in exported.mlir_module()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(precision="int4"), "precision='int4' must be 'float32' or 'int8'"),
        (dict(weights=9), "takes 1 to 8 weights"),
        (dict(x=jnp.zeros((2, 256))), "512 inputs does not fit x of shape"),
    ],
)
def test_refusals(options, sentence, unchecked):
    packed = pack(blocks_of(Encoding.Q4_1), Encoding.Q4_1)
    weights = [packed] * options.pop("weights", 1)
    with pytest.raises(ValueError, match=sentence):
        packed_linear(options.pop("x", rows_of(1)), weights, **options)


def test_a_number_beyond_the_stack_is_refused():
    if not library.available():
        pytest.skip("the native library was not built")
    packed = pack(blocks_of(Encoding.Q4_1), Encoding.Q4_1)
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="do not fit"):
        jax.block_until_ready(packed_linear(rows_of(1), [packed], index=1))


# ----------------------------------------------------------------------------- the layer


def test_joined_projections_are_one_call_of_the_same_numbers():
    x = rows_of(2)
    make = lambda e, bias=None: PackedLinear([pack(blocks_of(e), e)], bias)
    parts = [make(Encoding.Q4_K), make(Encoding.Q6_K, jnp.arange(21.0))]
    joined = PackedLinear.joined(parts)
    assert joined.out_features == 42
    apart = jnp.concatenate([p(x) for p in parts], axis=1)
    np.testing.assert_array_equal(joined(x), apart)
    np.testing.assert_array_equal(
        joined.weight, jnp.concatenate([p.weight for p in parts])
    )


def test_projections_of_two_precisions_are_not_joined():
    packed = pack(blocks_of(Encoding.Q4_K), Encoding.Q4_K)
    exact, rounded = PackedLinear([packed]), PackedLinear([packed], precision="int8")
    with pytest.raises(ValueError, match="'float32', 'int8' cannot be joined"):
        PackedLinear.joined([exact, rounded])


def test_a_layer_survives_splitting_and_abstract_copies():
    layer = PackedLinear([pack(blocks_of(Encoding.Q5_0), Encoding.Q5_0)])
    graph, state = nnx.split(layer)
    x = rows_of(2)
    np.testing.assert_array_equal(nnx.merge(graph, state)(x), layer(x))
    abstract = nnx.eval_shape(lambda: nnx.merge(graph, state))
    assert nnx.graphdef(abstract) == graph
    np.testing.assert_array_equal(layer.rows(jnp.array([[3, 4]]))[0], layer.weight[3:5])


# --------------------------------------------------------------- other instruction sets


@pytest.mark.skipif(not library.available(), reason="the native library was not built")
@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set(isa):
    run_file(__file__, isa)


if __name__ == "__main__":
    for encoding in BLOCKED:
        for precision in ("float32", "int8"):
            test_against_float64(encoding, precision)
    for precision in ("float32", "int8"):
        test_several_weights_of_a_stack_in_one_call(precision)
        test_a_row_does_not_depend_on_its_company(precision)
        test_what_is_not_finite_stays_in_its_row(np.nan, precision)
