"""What `attention` takes: shapes with one reading, and dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import raptax
from raptax import Causal, attention, varlen_attention
from raptax.kernels.cpu.library import missing_reason

RNG = np.random.default_rng(0)
B, H, T, D = 2, 2, 6, 4
ARRAYS = [RNG.normal(size=(B, H, T, D)).astype(np.float32) for _ in range(3)]
Q, K, V = map(jnp.asarray, ARRAYS)
KERNELS = ["reference", "blockwise", *([] if missing_reason() else ["native"])]


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


# --------------------------------------------------------------------- shapes, two ways


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_an_array_that_reads_two_ways_is_refused(name):
    x = jnp.asarray(RNG.random((B, T, T)) > 0.4)
    x = x if name == "mask" else x.astype(jnp.float32)
    said = rf"{name} \(2, 6, 6\) .* write {name}\[:, None\] for one per sequence, or "
    with pytest.raises(ValueError, match=said + rf"{name}\[None\] for one per head"):
        attention(Q, Q, Q, **{name: x})
    square = jnp.ones((T, 1, T, D))
    said = rf"write {name}\[:, None, None\] for one per sequence, or {name}\[None, None"
    with pytest.raises(ValueError, match=said + r"\] for all sequences"):
        attention(square, square, square, **{name: x[0]})
    by_sequence = attention(Q, Q, Q, **{name: x[:, None]})
    by_head = attention(Q, Q, Q, **{name: x[None]})
    assert np.abs(by_sequence - by_head).max() > 1e-3


def test_an_array_of_sequences_that_reads_one_way_is_refused_with_it():
    q = jnp.ones((3, 2, T, D))
    with pytest.raises(ValueError, match=r"fits only as .*: write mask\[:, None\] for"):
        attention(q, q, q, mask=jnp.ones((3, T, T), bool))
    with pytest.raises(ValueError, match=r"write mask\[:, None, None\] for one per"):
        attention(q, q, q, mask=jnp.ones((3, T), bool))


@pytest.mark.parametrize("shape", [(), (T,), (1, T), (T, T), (H, T, T), (1, T, T)])
def test_an_array_that_reads_one_way_is_taken(shape):
    q = jnp.concatenate([Q, Q[:1]])  # 3 sequences
    mask = jnp.asarray(np.random.default_rng(1).random(shape) > 0.3)
    full = jnp.broadcast_to(mask, (3, H, T, T))
    close(attention(q, q, q, mask=mask), attention(q, q, q, mask=full))


@pytest.mark.parametrize(
    "options",
    [
        dict(mask=jnp.ones((1, 1, 40, 40), bool)),
        dict(bias=jnp.ones((1, 1, 40, 40))),
    ],
)
def test_lengths_and_heads_that_look_swapped(options, unchecked):
    q, k = jnp.ones((1, 40, 4, D)), jnp.ones((1, 40, 2, D))
    with pytest.raises(ValueError, match=r"Are these \(batch, length, heads, size\)"):
        attention(q, q, q, **options)
    with pytest.raises(ValueError, match=r"multiple of .*Are these \(batch, length"):
        attention(q[:, :39], k, k)
    right = [x.swapaxes(1, 2) for x in (q, k, k)]
    assert attention(*right, **options).shape == (1, 4, 40, D)
    with pytest.raises(ValueError, match=r"must broadcast to .*axis each\.$"):
        attention(*right, mask=jnp.ones((1, 1, 4, 4), bool))


# ------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8, bool, jnp.complex64])
@pytest.mark.parametrize("kernel", [None, *KERNELS])
def test_what_is_not_of_floats_is_refused(dtype, kernel, unchecked):
    x = Q.astype(dtype)
    with pytest.raises(ValueError, match=f"query is {jnp.dtype(dtype).name}"):
        attention(x, x, x, kernel=kernel)
    with pytest.raises(ValueError, match="must be of floats; value is"):
        attention(Q, K, x, kernel=kernel)


@pytest.mark.parametrize("kernel", ["reference", "blockwise"])
def test_float64(kernel):
    with jax.enable_x64(True):
        q, k, v = (np.asarray(x, np.float64) for x in ARRAYS)
        scores = q @ k.swapaxes(2, 3) / 2
        cap = 2 * np.tanh(scores / 2)
        cap *= np.maximum(np.log(np.arange(T) + 1) / np.log(3), 1)[:, None]
        weights = np.exp(np.where(np.tril(np.ones((T, T), bool)), cap, -np.inf))
        expected = weights / weights.sum(-1, keepdims=True) @ v
        mods = raptax.compose_score_mods(raptax.SoftCap(2), raptax.LogN(3))
        got = attention(
            *map(jnp.asarray, (q, k, v)),
            mask_mod=Causal(),
            score_mod=mods,
            kernel=kernel,
        )
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-15)


OPTIONS = {
    "mask": RNG.random((T, T)) > 0.3,
    "bias": RNG.normal(size=(1, H, T, T)),
    "sinks": RNG.normal(size=H),
    "scale": np.float32(0.3),
    "key_lengths": np.array([3, 6]),
    "query_lengths": np.array([2, 6], np.int8),
    "query_start": np.array([1, 0]),
    "segment_ids": RNG.integers(0, 2, (B, T)),
    "pair": (RNG.integers(0, 2, (B, T)), RNG.integers(0, 2, (B, T))),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_numpy_arrays_are_taken(name, unchecked):
    option = OPTIONS[name]
    name = "segment_ids" if name == "pair" else name
    expected = attention(Q, K, V, **{name: jax.tree.map(jnp.asarray, option)})
    got = attention(*ARRAYS, **{name: option})
    close(got, expected)
    assert got.dtype == jnp.float32
    close(jax.jit(lambda q: attention(q, *ARRAYS[1:], **{name: option}))(Q), expected)
    if name.endswith("lengths"):
        close(attention(Q, K, V, **{name: option.tolist()}), expected)


def test_numpy_arrays_of_64_bits_are_taken(unchecked):
    wide = [x.astype(np.float64) for x in ARRAYS]
    close(attention(*wide), attention(Q, K, V))
    assert "runs" in raptax.explain(*wide, key_lengths=[1, 2])


def test_numpy_arrays_and_lists_of_packed_rows(unchecked):
    rows, offsets = [x[0].swapaxes(0, 1) for x in ARRAYS], np.array([0, 2, 6])
    expected = varlen_attention(
        *map(jnp.asarray, rows), row_offsets=jnp.asarray(offsets)
    )
    close(varlen_attention(*rows, row_offsets=offsets), expected)
    close(varlen_attention(*rows, row_offsets=[0, 2, 6], key_offsets=offsets), expected)


MODS = {
    "alibi": lambda a: raptax.ALiBi(a(np.array([0.5, 0.1]))),
    "documents": lambda a: raptax.Documents(a(np.array([[0, 0, 0, 1, 1, 1]]))),
    "lengths": lambda a: raptax.KeyLengths(a(np.array([2, 5]))),
    "dense": lambda a: raptax.Dense(a(RNG.random((1, H, T, T)) > -1)),
    "per head": lambda a: raptax.PerHead((Causal(), ~Causal()), a(np.array([0, 1]))),
    "offset": lambda a: raptax.Offset(Causal(), q=a(np.array([0, 1]))),
    "t5": lambda a: raptax.T5Bias(a(np.arange(16.0).reshape(8, 2)), max_distance=9),
}


@pytest.mark.parametrize("name", MODS)
def test_numpy_arrays_inside_mods(name, unchecked):
    kind = "score_mod" if name in ("alibi", "t5") else "mask_mod"
    expected = attention(Q, K, V, **{kind: MODS[name](jnp.asarray)}, kernel="reference")
    for kernel in KERNELS:
        mod = MODS[name](lambda x: x)
        close(attention(Q, K, V, **{kind: mod}, kernel=kernel), expected)
    made = MODS[name](lambda x: x.tolist())
    assert made == MODS[name](jnp.asarray)


def test_no_sequences_have_no_lengths():
    nothing = Q[:0]
    for kernel in KERNELS:
        out = attention(
            nothing,
            nothing,
            nothing,
            key_lengths=jnp.zeros(0, jnp.int32),
            kernel=kernel,
        )
        assert out.shape == nothing.shape
