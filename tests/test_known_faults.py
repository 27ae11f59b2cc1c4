"""What has gone wrong in other attention libraries: 42 faults, each with its test.

`ELSEWHERE` names the tests of faults that the tests of a part of this library show to be
absent; the others are tested here. Numbers after a docstring are public threads about
such a fault. Expected values come from NumPy in float64, not from a kernel.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import raptax
from raptax import Causal, Documents, SlidingWindow, SoftCap, attention
from raptax._core.types import position_indices
from raptax.kernels import reference_attention
from raptax.kernels.cpu import library as native
from raptax.quant.rows import dequantize, quantize

ELSEWHERE = {
    2: "test_kernels.test_empty_rows_are_zero_and_have_no_gradient",
    5: "test_kernels.test_nan_that_no_query_sees_reaches_nothing",
    6: "test_paged.test_what_lies_beyond_a_length_changes_no_bit",
    7: "test_paged.test_page_ids_outside_the_pool_write_and_read_nothing",
    8: "test_sequences.test_merging_nothing_changes_nothing",
    9: "test_known_faults.test_row_1_nothing_allowed_is_zero_and_has_no_lse",
    12: "test_kernels.test_window_counts_its_own_key",
    13: "test_paged.test_any_split_equals_one_pass",
    14: "test_sizes.test_head_sizes",
    15: "test_sizes.test_value_sizes",
    16: "test_sizes.test_lengths",
    18: "test_sequences.test_lengths_are_as_if_each_sequence_were_cut",
    24: "test_sequences.test_packed_sequences_are_as_if_each_were_alone",
    25: "test_kernels.test_gradients_reach_what_a_function_captures",
    26: "test_sequences.test_a_block_mask_takes_no_lengths_from_elsewhere",
    31: "test_paged.test_page_ids_outside_the_pool_write_and_read_nothing",
    32: "test_paged.test_reused_pages_leak_nothing",
    34: "test_kernels.test_two_backward_runs_agree_to_the_bit",
    35: "test_kernels.test_low_precision",
    36: "test_attention.test_naming_a_kernel_turns_cannot_into_an_error",
    40: "test_mask_algebra.test_a_mask_that_is_traced",
    41: "test_derivatives.test_vmap_and_gradients_nest",
    42: "test_derivatives.test_gradients_under_shard_map",
}
BUILT = pytest.mark.skipif(not native.available(), reason="native was not built")
NATIVE = pytest.param("native", marks=BUILT)
REFERENCE = pytest.param("reference", marks=pytest.mark.slow)
KERNELS = pytest.mark.parametrize("kernel", [NATIVE, "blockwise", REFERENCE])


def test_every_fault_has_its_test():
    here = {
        int(name.split("_")[2]) for name in globals() if name.startswith("test_row")
    }
    assert sorted([*here, *ELSEWHERE]) == list(range(1, 43))
    for name in ELSEWHERE.values():
        module, test = name.split(".")
        assert callable(getattr(importlib.import_module(f"tests.{module}"), test))


def numbers(*shape: int, seed: int = 0) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x.astype(np.float32))


def qkv(B=1, H=2, K=1, T=6, S=6, D=4, E=4) -> tuple[jax.Array, ...]:
    shapes = (B, H, T, D), (B, K, S, D), (B, K, S, E)
    return tuple(numbers(*shape, seed=n) for n, shape in enumerate(shapes))


def exact(q, k, v, *, change=lambda s: s, allowed=True, bias=0.0, sinks=None):
    """``(out, lse)`` in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("bhtd,bhsd->bhts", q, k) * q.shape[-1] ** -0.5
    scores = np.where(allowed, change(scores + np.asarray(bias, np.float64)), -np.inf)
    if sinks is not None:
        sinks = np.asarray(sinks, np.float64)[None, :, None, None]
        sinks = np.broadcast_to(sinks, (*scores.shape[:3], 1))
        scores = np.concatenate([scores, sinks], axis=-1)
        v = np.concatenate([v, np.zeros_like(v[:, :, :1])], axis=2)
    high = np.maximum(scores.max(-1, keepdims=True), -1e300)
    weights = np.exp(scores - high)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.where(total == 0, -np.inf, high + np.log(total))[..., 0]
    weights = weights / np.where(total == 0, 1, total)
    return np.einsum("bhts,bhsd->bhtd", weights, v), lse


def close(actual, expected, tolerance=2e-6):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------- empty, masked


@KERNELS
def test_row_1_nothing_allowed_is_zero_and_has_no_lse(kernel):
    """pytorch #103963, FlashAttention #978, FlashInfer #4452."""
    for mask in (jnp.zeros((1, 1, 1, 1), bool), jnp.zeros((1, 2, 6, 6), bool)):
        options = dict(mask=mask, kernel=kernel, return_lse=True)
        out, lse = attention(*qkv(), **options)
        assert (out == 0).all()
        assert jnp.isneginf(lse).all()


def test_row_3_queries_whose_tiles_are_all_empty_are_zero():
    """pytorch #131552: memory left over from before."""
    q, k, v = qkv(T=64, S=64)
    mask = raptax.create_block_mask(
        raptax.QueryLengths(jnp.int32(20)), seq_q=64, seq_kv=64, block=(16, 16)
    )
    assert (mask.kinds[0, 0, 2:] == 0).all()
    allowed = np.arange(64)[:, None] < 20
    for kernel in ("blockwise", "reference"):
        out = attention(q, k, v, mask_mod=mask, kernel=kernel)
        close(out, exact(q, k, v, allowed=allowed)[0])
        assert (out[:, :, 20:] == 0).all()


@KERNELS
def test_row_4_a_mask_is_a_bias_of_minus_infinity(kernel):
    """pytorch #110213; booleans are not added, and finfo.min is a number like others."""
    q, k, v = qkv(S=9)
    mask = jnp.asarray(np.random.default_rng(5).random((1, 1, 6, 9)) > 0.5)
    mask = mask.at[:, :, 2].set(False)
    attend = functools.partial(attention, q, k, v, kernel=kernel)
    by_bias = attend(bias=jnp.where(mask, 0, -jnp.inf))
    close(attend(mask=mask), by_bias)
    assert (by_bias[:, :, 2] == 0).all()
    lowest = attend(bias=jnp.where(mask, 0, jnp.finfo(jnp.float32).min))
    close(lowest[:, :, :2], by_bias[:, :, :2])
    mean = jnp.broadcast_to(v.mean(2), (1, 2, 4))
    close(lowest[:, :, 2], mean)


# --------------------------------------------------------------------------- log-sum-exp


@KERNELS
def test_row_10_the_logarithm_is_natural(kernel):
    """pytorch #181645: off by log 2."""
    q, k, v = qkv()
    _, lse = attention(q, k, v, kernel=kernel, return_lse=True)
    close(lse, exact(q, k, v)[1])


# ----------------------------------------------------------------------------- positions


@KERNELS
def test_row_11_the_last_query_stands_at_the_last_key(kernel):
    """pytorch #108108, FlashAttention #282: a chunk of queries is a slice of them all."""
    q, k, v = qkv(T=9, S=9)
    whole = exact(q, k, v, allowed=np.tri(9, dtype=bool))[0]
    chunk = attention(q[:, :, 4:], k, v, mask_mod=Causal(), kernel=kernel)
    close(chunk, whole[:, :, 4:])
    first = attention(q[:, :, :2], k, v, mask_mod=Causal(), query_start=0)
    close(first, whole[:, :, :2])


@KERNELS
@pytest.mark.parametrize(("shape", "start"), [((5, 9), None), ((9, 5), None)])
def test_row_11_more_keys_than_queries_or_fewer(kernel, shape, start):
    T, S = shape
    q, k, v = qkv(T=T, S=S)
    allowed = np.tri(T, S, S - T, dtype=bool)
    out = attention(q, k, v, mask_mod=Causal(), kernel=kernel, query_start=start)
    close(out, exact(q, k, v, allowed=allowed)[0])


def test_row_37_a_decode_step_of_any_group_is_a_slice_of_prefill():
    """Hugging Face's pack_gqa: groups of heads and rows of queries mixed up."""
    for group in (1, 2, 3, 8):
        q, k, v = qkv(H=2 * group, K=2, T=12, S=12)
        whole = exact(q, k, v, allowed=np.tri(12, dtype=bool))[0]
        for T in (1, 2, 7):
            step = attention(q[:, :, -T:], k, v, mask_mod=Causal())
            close(step, whole[:, :, -T:])


def test_row_38_keys_keep_their_positions_when_the_first_are_dropped():
    """Hugging Face #46654: evicting from a cache moved what was left."""
    q, k, v = qkv(T=2, S=12)
    window, alibi = SlidingWindow(5), raptax.ALiBi(raptax.alibi_slopes(2))
    whole = attention(q, k, v, mask_mod=window, score_mod=alibi)
    evicted = attention(
        q,
        k[:, :, 6:],
        v[:, :, 6:],
        mask_mod=raptax.Offset(window, kv=6),
        score_mod=raptax.Offset(alibi, kv=6),
        query_start=10,
    )
    close(evicted, whole)


# --------------------------------------------------------------------- numbers and sizes


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        ("blockwise", "float32"),
        ("blockwise", "bfloat16"),
        pytest.param("native", "float32", marks=BUILT),
        pytest.param("native", "bfloat16", marks=BUILT),
        *(
            pytest.param(kernel, dtype, marks=pytest.mark.slow)
            for kernel, dtype in (
                ("blockwise", "float16"),
                ("reference", "float32"),
                ("reference", "bfloat16"),
                ("reference", "float16"),
            )
        ),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_row_17_large_logits_overflow_nothing(kernel, sign, dtype):
    """pytorch #196678: a log-sum-exp below -88 and NaN in the gradient."""
    q, k, v = (x.astype(dtype) for x in qkv(K=2, T=5, S=7))
    ones = jnp.ones_like(q)
    q, k = 200 * ones, sign * 100 * jnp.ones_like(k)  # logits of sign * 40 000
    k = k + numbers(1, 2, 7, 1, seed=8).astype(dtype)  # rounded away, or it decides
    attend = functools.partial(attention, kernel=kernel, return_lse=True)
    out, lse = attend(q, k, v)
    expected_out, expected_lse = exact(q, k, v)
    close(np.asarray(out, np.float64), expected_out, 2e-2)
    close(lse, expected_lse, 1e-6)
    loss = lambda q, k, v: attend(q, k, v)[0].sum()
    for gradient in jax.grad(loss, (0, 1, 2))(q, k, v):
        assert jnp.isfinite(gradient).all()


def test_row_21_sizes_beyond_32_bits():
    """FlashAttention #1500, pytorch #190857: 2^32 scores, most of them never made."""
    S = 2**16
    q, k, v = (numbers(1, 1, S, 1, seed=n) for n in range(3))
    out = attention(q, k, v, mask_mod=SlidingWindow(3))
    last = slice(S - 40, S)
    allowed = np.tri(40, dtype=bool) & ~np.tri(40, k=-3, dtype=bool)
    expected, _ = exact(*(x[:, :, last] for x in (q, k, v)), allowed=allowed)
    close(out[:, :, -30:], expected[:, :, -30:])
    large = jax.ShapeDtypeStruct((16, 64, 2**16, 128), jnp.bfloat16)  # 2^33 entries
    assert jax.eval_shape(attention, large, large, large).shape == large.shape


def test_row_22_views_of_a_fused_projection():
    """FlashAttention #355: strides taken for granted."""
    fused = numbers(2, 9, 3, 4, 8)  # (B, T, qkv, H, D)
    split = lambda x: tuple(x[:, :, n].swapaxes(1, 2) for n in range(3))
    inside = jax.jit(lambda x: attention(*split(x), mask_mod=Causal()))(fused)
    allowed = np.tri(9, dtype=bool)
    close(inside, exact(*split(np.asarray(fused)), allowed=allowed)[0])


@KERNELS
@pytest.mark.parametrize("ratio", [1, 2, 3, 5, 6, 7, 8, 16, 24])
def test_row_23_query_head_h_reads_kv_head_h_over_ratio(kernel, ratio):
    """FlashInfer #996: interleaved heads, and ratios that are no power of two."""
    K = 2
    q = jnp.ones((1, K * ratio, 1, 1))
    v = jnp.arange(K, dtype=jnp.float32).reshape(1, K, 1, 1)
    out = attention(q, jnp.ones_like(v), v, kernel=kernel)
    np.testing.assert_array_equal(out.reshape(-1), np.arange(K * ratio) // ratio)


@pytest.mark.slow
def test_row_33_a_batch_changes_no_row():
    """sglang #10278, FlashAttention #2450."""
    q, k, v = qkv(B=5, H=4, K=2, T=300, S=300, D=16, E=16)
    together = attention(q, k, v, mask_mod=Causal())
    for b in range(5):
        alone = attention(*(x[b : b + 1] for x in (q, k, v)), mask_mod=Causal())
        close(alone[0], together[b], 1e-6)


@pytest.mark.parametrize("kernel", [NATIVE, "jax"])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_row_39_codes_attend_as_the_numbers_they_stand_for(kernel, dtype):
    """ik_llama #172: keys read in another layout than they were written in."""
    H, K, T, D, P = 4, 2, 11, 8, 4
    q, k, v = (numbers(T, heads, D, seed=n) for n, heads in enumerate((H, K, K)))
    params = raptax.KVCacheParams(dtype=dtype, n_kv_heads=K, head_dim=D, page_size=P)
    cache = raptax.PagedKVCache.create(params, pages=5, sequences=1, max_pages=3)
    cache = cache.with_tables([[4, 0, 2]], lengths=[0])
    outs = []
    for start, stop in ((0, 6), (6, 10), (10, 11)):
        rows, offsets = slice(start, stop), jnp.array([0, stop - start], jnp.int32)
        out, cache = cache.append_and_attend(
            q[rows], k[rows], v[rows], row_offsets=offsets, kernel=kernel
        )
        outs.append(out)
        cache = cache.advance(offsets)
    heads_first = (x.swapaxes(0, 1)[None] for x in (q, k, v))
    q, k, v = heads_first
    k, v = (dequantize(*quantize(x, dtype)) for x in (k, v))
    expected = exact(q, k, v, allowed=np.tri(T, dtype=bool))[0]
    close(jnp.concatenate(outs).swapaxes(0, 1)[None], expected, 1e-5)


# ----------------------------------------------------------------- what scores go through


MASK_SHAPES = [
    tuple(size if n >> axis & 1 else 1 for axis, size in enumerate((2, 4, 3, 5)))
    for n in range(16)
]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_row_19_every_way_to_broadcast(shape):
    """jax #28974, xformers #813: a mask and a bias, with and without one another."""
    q, k, v = qkv(B=2, H=4, K=2, T=3, S=5)
    mask = jnp.asarray(np.random.default_rng(1).random(shape) > 0.3)
    bias = numbers(*shape, seed=2)
    close(attention(q, k, v, mask=mask), exact(q, k, v, allowed=mask)[0])
    both = attention(q, k, v, mask=mask, bias=bias)
    close(both, exact(q, k, v, allowed=mask, bias=bias)[0])
    rank = next((n for n, size in enumerate(shape) if size > 1), 3)
    shorter = attention(q, k, v, mask=mask.reshape(shape[rank:]))
    close(shorter, exact(q, k, v, allowed=mask)[0])


@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 1, 5),
        pytest.param((1, 1, 3, 5), marks=pytest.mark.slow),
        pytest.param((2, 4, 3, 5), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_row_20_a_float32_bias_of_bfloat16_queries_has_its_gradient(shape):
    """jax #32242, #27184: NaN, or no sum over what was broadcast."""
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv(B=2, H=4, K=2, T=3, S=5))
    bias = numbers(*shape, seed=2)

    def loss(bias, kernel, *arrays):
        return attention(*arrays, bias=bias, kernel=kernel).astype(jnp.float32).sum()

    actual = jax.grad(loss)(bias, "blockwise", q, k, v)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    expected = jax.grad(loss)(bias, "reference", *wide)
    assert actual.dtype == jnp.float32
    assert (jnp.abs(actual - expected) < 2e-2).all()
    assert (jnp.abs(expected) > 2e-2).any()


def test_row_27_a_change_in_one_document_changes_no_bit_of_another():
    """pytorch #177378."""
    q, k, v = qkv(T=12, S=12)
    ids = jnp.asarray(np.arange(12)[None] // 5, jnp.int32)
    attend = jax.jit(
        lambda k, v: attention(q, k, v, mask_mod=Documents(ids) & Causal())
    )
    before = attend(k, v)
    after = attend(k.at[:, :, 5:10].multiply(3), v.at[:, :, 5:10].add(1))
    np.testing.assert_array_equal(before[:, :, :5], after[:, :, :5])
    np.testing.assert_array_equal(before[:, :, 10:], after[:, :, 10:])
    assert (before[:, :, 5:10] != after[:, :, 5:10]).all()


@KERNELS
def test_row_28_scale_then_bias_then_cap_then_mask(kernel):
    """FlashInfer #3682: a cap of what is masked brings it back."""
    q, k, v = qkv()
    q, bias = 10 * q, numbers(1, 2, 6, 6, seed=7)
    out = attention(
        q, k, v, bias=bias, score_mod=SoftCap(1.5), mask_mod=Causal(), kernel=kernel
    )
    cap = lambda s: 1.5 * np.tanh(s / 1.5)
    allowed = np.tri(6, dtype=bool)
    expected = exact(q, k, v, change=cap, bias=bias, allowed=allowed)[0]
    close(out, expected)
    cap_first = lambda s: cap(s - np.asarray(bias)) + np.asarray(bias)
    other = exact(q, k, v, change=cap_first, bias=bias, allowed=allowed)[0]
    assert np.abs(other - expected).max() > 1e-3


@KERNELS
def test_row_29_sinks_take_their_share(kernel):
    """Hugging Face #41026, FlashAttention #2102: a row with its sink alone."""
    q, k, v = qkv(T=9, S=5)
    sinks = numbers(2, seed=3)
    out, lse = attention(
        q, k, v, sinks=sinks, mask_mod=Causal(), kernel=kernel, return_lse=True
    )
    allowed = np.tri(9, 5, -4, dtype=bool)
    expected_out, expected_lse = exact(q, k, v, allowed=allowed, sinks=sinks)
    close(out, expected_out)
    close(lse, expected_lse)
    assert (out[:, :, :4] == 0).all()
    no_sink = attention(q, k, v, sinks=jnp.full(2, -jnp.inf), kernel=kernel)
    close(no_sink, exact(q, k, v)[0])

    def loss(sinks):
        attend = functools.partial(attention, q, k, v, mask_mod=Causal())
        out, lse = attend(sinks=sinks, kernel=kernel, return_lse=True)
        return (out * numbers(1, 2, 9, 4, seed=6)).sum() + lse.sum()

    step = 1e-2 * jnp.eye(2)
    slopes = [(loss(sinks + h) - loss(sinks - h)) / 2e-2 for h in step]
    close(jax.grad(loss)(sinks), jnp.stack(slopes), 2e-2)


def test_row_30_no_number_is_left_out_of_what_was_compiled():
    """FlashInfer #4014, FlashAttention #2507: same shapes, other scalars."""
    q, k, v = qkv()
    outs = [
        attention(q, k, v, **options)
        for options in (
            dict(),
            dict(scale=0.3),
            dict(scale=0.4),
            dict(score_mod=SoftCap(0.5)),
            dict(score_mod=SoftCap(0.6)),
            dict(mask_mod=SlidingWindow(2)),
            dict(mask_mod=SlidingWindow(3)),
            dict(mask_mod=SlidingWindow(3), query_start=1),
        )
    ]
    for n, a in enumerate(outs):
        assert all((a != b).any() for b in outs[:n])
    traces = []

    @jax.jit
    def attend(scale, lengths):
        traces.append(1)
        return attention(q, k, v, scale=scale, key_lengths=lengths)

    for n in range(1, 4):
        length = jnp.array([n], jnp.int32)
        out = attend(jnp.float32(n), length)
        cut = q * (n * q.shape[-1] ** 0.5), k[:, :, :n], v[:, :, :n]
        close(out, exact(*cut)[0], 1e-5)
    assert len(traces) == 1


def test_position_indices_are_what_a_mod_sees():
    """What rows 11 to 13 rest on: absolute positions, along axes of their own."""
    seen = []

    def mask_mod(*at):
        seen.append(at)
        return at[3] <= at[2]

    reference_attention(*qkv(T=2, S=6), mask_mod=mask_mod)
    q_idx = jnp.arange(4, 6, dtype=jnp.int32)[None]
    expected = position_indices(1, 2, q_idx, jnp.arange(6, dtype=jnp.int32))
    for a, e in zip(seen[-1], expected, strict=True):
        np.testing.assert_array_equal(a, e)
