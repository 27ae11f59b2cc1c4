"""Every kernel on every problem, against the reference in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import raptax
from raptax import KERNELS, Causal, SlidingWindow, SoftCap, Unsupported
from raptax._core.types import position_indices, query_positions
from raptax.kernels import blockwise_attention, reference_attention
from raptax.kernels.cpu import library as native
from raptax.kernels.tiles import MANY_TILES, TILE
from tests.problems import PROBLEMS, Problem

KERNEL = {kernel.name: kernel for kernel in KERNELS}
BUILT = pytest.mark.skipif(not native.available(), reason="native was not built")
ALL = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=BUILT if n == "native" else ()) for n in KERNEL]
)
REST = [pytest.param(n, marks=pytest.mark.slow) for n in KERNEL if n != "blockwise"]
BLOCKWISE_FIRST = pytest.mark.parametrize("name", ["blockwise", *REST])


LEARNED = ("score_mod", "bias", "sinks")


def run(attend, problem: Problem, dtype):
    """The output, the log-sum-exp if asked for, and every gradient there is."""
    q, k, v = problem.arrays(dtype)
    kwargs = problem.kwargs()
    learned = {name: kwargs.pop(name) for name in LEARNED if name in kwargs}

    def loss(q, k, v, learned):
        out = attend(q, k, v, **learned, **kwargs)
        first, *lse = out if isinstance(out, tuple) else (out,)
        loss = (first * problem.cotangent(dtype).astype(first.dtype)).sum()
        for x in lse:  # rows that see nothing have none
            loss += jnp.sin(jnp.where(jnp.isneginf(x), 0, x)).sum().astype(loss.dtype)
        return loss, out

    gradient = jax.grad(loss, (0, 1, 2, 3), has_aux=True)
    gradients, out = jax.jit(gradient)(q, k, v, learned)
    return [np.asarray(x, np.float64) for x in jax.tree.leaves((out, gradients))]


@functools.cache
def expected(problem: Problem, dtype) -> list[np.ndarray]:
    """The same in float64, from inputs that have been rounded to ``dtype``."""
    with jax.enable_x64(True):

        def exact(q, k, v, **kwargs):
            wide = (x.astype(jnp.float64) for x in (q, k, v))
            return reference_attention(*wide, **kwargs)

        return run(exact, problem, dtype)


def cannot(kernel, problem: Problem, dtype) -> str | None:
    return kernel.unsupported_reason(*problem.arrays(dtype), **problem.kwargs())


def check_declines(kernel, problem: Problem, dtype) -> bool:
    """Whether the kernel declines, after checking that it does so in a sentence."""
    reason = cannot(kernel, problem, dtype)
    if reason is None:
        return False
    with pytest.raises(Unsupported, match="cannot run this"):
        kernel.run(*problem.arrays(dtype), **problem.kwargs())
    assert reason in raptax.explain(*problem.arrays(dtype), **problem.kwargs())
    return True


def compare(kernel, problem: Problem) -> None:
    """In float32, against float64."""
    if check_declines(kernel, problem, jnp.float32):
        return
    actual = run(kernel.run, problem, jnp.float32)
    # Weights of large logits are ratios of exponentials of rounded logits.
    tolerance = 1e-5 * problem.scale_of_logits
    for a, e in zip(actual, expected(problem, jnp.float32), strict=True):
        size = max(1.0, np.abs(e[np.isfinite(e)]).max(initial=0))
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@BLOCKWISE_FIRST
def test_float32(name, problem):
    compare(KERNEL[name], problem)


def plain(q, k, v, *, mask=None, mask_mod=None, score_mod=None, scale=None, **options):
    """Attention as one would first write it, every step rounded to the inputs' dtype."""
    (B, H, T, D), S = q.shape, k.shape[2]
    k, v = (jnp.repeat(x, H // k.shape[1], axis=1) for x in (k, v))
    scale = jnp.asarray(D**-0.5 if scale is None else scale).astype(q.dtype)
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k) * scale
    start = query_positions(options.get("query_start"), T, S)
    at = position_indices(B, H, start, jnp.arange(S, dtype=jnp.int32))
    if score_mod is not None:
        scores = score_mod(scores, *at)
    allowed = jnp.ones(scores.shape, bool) if mask is None else mask
    if mask_mod is not None:
        allowed = allowed & mask_mod(*at)
    scores = jnp.where(allowed, scores, jnp.finfo(q.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = jnp.where(allowed.any(-1, keepdims=True), weights, 0)
    return jnp.einsum("bhts,bhse->bhte", weights, v)


def compare_low_precision(kernel, problem: Problem, dtype) -> None:
    """FlashAttention's rule: at most twice the error of a plain implementation."""
    if check_declines(kernel, problem, dtype):
        return
    actual, naive = run(kernel.run, problem, dtype), run(plain, problem, dtype)
    for a, n, e in zip(actual, naive, expected(problem, dtype), strict=True):
        # Rounding of the output alone: what adding and taking away 0.3 loses.
        small = np.dtype(dtype).type(0.3)
        there = (e.astype(dtype) + small - small).astype(np.float64)
        rounding = np.abs(there - e)
        floor = 2 * rounding.max(initial=0) + 1e-5
        error, allowed = (np.abs(x - e).max(initial=0) for x in (a, n))
        assert error <= 2 * allowed + floor


QUICK = ("causal tiles", "alibi", "odd sizes")
LOW_PRECISION = (
    "plain",
    "decode",
    "mqa",
    "causal tiles",
    "more queries",
    "window",
    "documents",
    "mask",
    "soft cap",
    "alibi",
    "value size",
    "odd sizes",
    "large head",
)


CASES = [
    *((problem, jnp.bfloat16) for problem in QUICK),
    *(
        pytest.param(problem, dtype, marks=pytest.mark.slow)
        for problem, dtype in (
            *((problem, jnp.bfloat16) for problem in LOW_PRECISION),
            *((problem, jnp.float16) for problem in ("causal tiles", "soft cap")),
            ("odd sizes", jnp.float16),
        )
        if (problem, dtype) not in [(name, jnp.bfloat16) for name in QUICK]
    ),
]


@pytest.mark.parametrize(("problem", "dtype"), CASES)
@BLOCKWISE_FIRST
def test_low_precision(name, problem, dtype):
    compare_low_precision(KERNEL[name], PROBLEMS[problem], dtype)


@ALL
def test_nan_that_no_query_sees_reaches_nothing(name):
    """Rows 5 and 27 of what breaks elsewhere: 0 * NaN is NaN."""
    problem, kernel = PROBLEMS["causal tiles"], KERNEL[name]
    q, k, v = problem.arrays(jnp.float32)
    seen = 300  # queries stand before this key, poisoned keys from it on
    q = q[:, :, :seen]

    def outputs(k, v):
        attend = functools.partial(kernel.run, mask_mod=Causal())
        if name == "jax_nn":  # which has no query_start, and promises the output alone
            full = jnp.pad(q, ((0, 0), (0, 0), (0, k.shape[2] - seen), (0, 0)))
            return attend(full, k, v)[:, :, :seen]
        f = lambda q, k, v: attend(q, k, v, query_start=0).sum()
        gradients = jax.grad(f, (0, 1, 2))(q, k, v)
        return attend(q, k, v, query_start=0), gradients

    clean = outputs(k, v)
    for bad in (jnp.nan, jnp.inf):
        poisoned = outputs(k.at[:, :, seen:].set(bad), v.at[:, :, seen:].set(bad))
        for a, e in zip(jax.tree.leaves(poisoned), jax.tree.leaves(clean), strict=True):
            np.testing.assert_array_equal(a, e)


@ALL
def test_nan_that_is_seen_shows(name):
    q, k, v = PROBLEMS["mha"].arrays(jnp.float32)
    v = v.at[0, 1, 40, 0].set(jnp.nan)
    out = KERNEL[name].run(q, k, v, mask_mod=Causal())
    lost = np.isnan(out).all(-1)
    assert lost[0, 1, 40:].all()
    assert lost.sum() == out.shape[2] - 40


@ALL
def test_empty_rows_are_zero_and_have_no_gradient(name):
    kernel = KERNEL[name]
    q, k, v = PROBLEMS["more queries"].arrays(jnp.float32)
    problem = dict(mask_mod=Causal())  # 300 queries, 65 keys: 235 rows see nothing
    if kernel.unsupported_reason(q, k, v, **problem):
        return
    out = kernel.run(q, k, v, **problem)
    d_q = jax.grad(lambda q: (kernel.run(q, k, v, **problem) ** 2).sum())(q)
    assert (out[:, :, :235] == 0).all()
    assert (d_q[:, :, :235] == 0).all()
    assert (out[:, :, 235:] != 0).all()


@pytest.mark.parametrize(
    "name", [pytest.param("native", marks=BUILT), "blockwise", "reference"]
)
def test_window_counts_its_own_key(name):
    """Row i sees min(i + 1, size) keys: with equal scores and v = 1 / S, by the sum."""
    S, size = 300, 37
    q, k = jnp.zeros((1, 1, S, 4)), jnp.zeros((1, 1, S, 4))
    v = jnp.eye(S)[None, None]
    out = KERNEL[name].run(q, k, v, mask_mod=SlidingWindow(size))
    seen = (out[0, 0] > 0).sum(-1)
    np.testing.assert_array_equal(seen, np.minimum(np.arange(S) + 1, size))


@pytest.mark.parametrize(
    "name", [pytest.param("native", marks=BUILT), "blockwise", "reference"]
)
def test_gradients_reach_what_a_function_captures(name):
    problem = PROBLEMS["documents"]
    q, k, v = problem.arrays(jnp.float32)
    table = jnp.asarray(problem.random(problem.H, 2, seed=5), jnp.float32)

    def loss(table, scale):
        def score_mod(scores, b_idx, h_idx, q_idx, kv_idx):  # one array, used twice
            far = jnp.abs(q_idx - kv_idx) > 20
            return scores * table[h_idx, 0] + table[h_idx, far.astype(jnp.int32)]

        out = KERNEL[name].run(q, k, v, score_mod=score_mod, scale=scale)
        return (out * problem.cotangent(jnp.float32)).sum()

    def exact(table, scale):
        scores = jnp.einsum("bkgtd,bksd->bkgts", q.reshape(2, 2, 2, 257, 16), k) * scale
        scores = scores.reshape(2, 4, 257, 257)
        far = np.abs(np.arange(257)[:, None] - np.arange(257)) > 20
        bias = jnp.where(far[None], table[:, 1, None, None], table[:, :1, None])
        weights = jax.nn.softmax(scores * table[None, :, :1, None] + bias[None], -1)
        out = jnp.einsum("bhts,bhse->bhte", weights, jnp.repeat(v, 2, axis=1))
        return (out * problem.cotangent(jnp.float32)).sum()

    scale = jnp.float32(0.3)
    actual, wanted = (
        jax.grad(loss, (0, 1))(table, scale),
        jax.grad(exact, (0, 1))(table, scale),
    )
    for a, e in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-4)


def test_dropout_depends_on_the_place_alone():
    """The last queries of a sequence drop what they drop in the whole of it."""
    problem = PROBLEMS["dropout"]
    q, k, v = problem.arrays(jnp.float32)
    every = jnp.concatenate([jnp.zeros_like(k)[:, :, :260], q[:, :2]], axis=2)
    whole = blockwise_attention(every, k, v, **problem.kwargs())
    part = blockwise_attention(q[:, :2], k, v, **problem.kwargs())
    np.testing.assert_allclose(whole[:, :, 260:], part, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share(rate):
    """With equal scores and one-hot values, the output is the weights themselves."""
    S = 256
    q, k, v = jnp.zeros((2, 2, S, 4)), jnp.zeros((2, 2, S, 4)), jnp.eye(S)
    v = jnp.broadcast_to(v, (2, 2, S, S))
    options = dict(dropout_rng=jax.random.key(1), dropout_rate=rate)
    weights = reference_attention(q, k, v, deterministic=False, **options) * S
    kept = np.asarray(weights) > 0
    np.testing.assert_allclose(weights[kept], 1 / (1 - rate), rtol=1e-5)
    deviation = (rate * (1 - rate) / kept.size) ** 0.5
    assert abs(1 - kept.mean() - rate) < 4 * deviation
    for axis in range(4):  # no place is favoured, and no two places go together
        others = tuple(set(range(4)) - {axis})
        share = 1 - kept.mean(others)
        assert abs(share - rate).max() < 6 * deviation * kept.shape[axis] ** 0.5
    pairs = kept[..., 1:] & kept[..., :-1]
    assert abs(pairs.mean() - (1 - rate) ** 2) < 8 * deviation
    still = reference_attention(q, k, v, deterministic=True, **options)
    np.testing.assert_allclose(still, 1 / S, rtol=1e-5)


def test_rebuilt_mods_trace_once():
    problem = PROBLEMS["mha"]
    q, k, v = problem.arrays(jnp.float32)
    traces = []

    @jax.jit
    def attend(q, k, v, mask_mod, score_mod):
        traces.append(1)
        return raptax.attention(q, k, v, mask_mod=mask_mod, score_mod=score_mod)

    for _ in range(5):
        attend(q, k, v, SlidingWindow(4) & Causal(), SoftCap(3.0))
    assert len(traces) == 1
    other = attend(q, k, v, SlidingWindow(9) & Causal(), SoftCap(3.0))
    assert len(traces) == 1  # numbers are operands
    assert (other != attend(q, k, v, SlidingWindow(4) & Causal(), SoftCap(3.0))).any()


def test_two_backward_runs_agree_to_the_bit():
    problem = PROBLEMS["alibi"]
    for a, b in zip(
        run(blockwise_attention, problem, jnp.float32),
        run(blockwise_attention, problem, jnp.float32),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("depth", [1, 2])
def test_vmap(depth):
    problem = PROBLEMS["window"]
    q, k, v = (x[:1] for x in problem.arrays(jnp.float32))
    attend = lambda q, k, v: blockwise_attention(q, k, v, **problem.kwargs())
    expected = attend(q, k, v)
    mapped, lead = attend, (3, 2)[:depth]
    for _ in range(depth):
        mapped = jax.vmap(mapped, in_axes=(0, None, 0))
    tile = lambda x: jnp.broadcast_to(x, (*lead, *x.shape))
    out = mapped(tile(q), k, tile(v))
    np.testing.assert_allclose(out, tile(expected), rtol=0, atol=2e-6)


def compiled(T: int, *, backward: bool):
    shape = jax.ShapeDtypeStruct((1, 2, T, 64), jnp.float32)
    attend = functools.partial(blockwise_attention, mask_mod=Causal())
    if backward:
        attend = jax.grad(lambda q, k, v: attend_once(q, k, v).sum(), (0, 1, 2))
        attend_once = functools.partial(blockwise_attention, mask_mod=Causal())
    return jax.jit(attend).lower(shape, shape, shape).compile()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_grows_with_the_length_and_not_its_square(backward):
    short, long = (
        compiled(T, backward=backward).memory_analysis().temp_size_in_bytes
        for T in (2048, 32768)
    )
    array = 2 * 32768 * 64 * 4
    assert long < 5 * array + 32e6  # five copies of q at most, and a tile's scores
    assert long < 16 * short + 1e6


def test_program_does_not_grow_with_the_length():
    sizes = {T: len(compiled(T, backward=True).as_text()) for T in (2048, 32768)}
    assert sizes[32768] < 1.1 * sizes[2048]


def visited(S: int, mask_mod) -> int:
    """How many tiles the kernel worked on."""
    q = jnp.ones((1, 1, S, 4))
    looked = []

    def spy(scores, *_):
        jax.debug.callback(lambda: looked.append(1))
        return scores

    out = blockwise_attention(q, q, q, mask_mod=mask_mod, score_mod=spy)
    out.block_until_ready()
    jax.effects_barrier()
    return len(looked)


def test_empty_tiles_are_skipped():
    """The work is behind a condition: a mask that allows nothing costs next to none."""
    grid = -(-520 // TILE)
    assert grid**2 < MANY_TILES
    assert visited(520, None) == grid**2
    assert visited(520, Causal()) == grid * (grid + 1) // 2
    assert visited(520, SlidingWindow(2)) == 2 * grid - 1
    assert visited(520, lambda b, h, q, k: (q < 0) & (k < 0)) == 0


def test_a_window_costs_as_much_per_query_however_many_there_are():
    for S in (4 * TILE, 8 * TILE):
        assert (S // TILE) ** 2 >= MANY_TILES
        assert visited(S, SlidingWindow(TILE)) == 2 * (S // TILE) - 1


def test_a_block_mask_decides_which_tiles_are_worked_on():
    """Its own tiles, of its own size, and nothing in those that it calls empty."""
    mask = raptax.create_block_mask(Causal(), seq_q=96, seq_kv=96, block=(32, 16))
    assert visited(96, mask) == int((mask.kinds > 0).sum()) == 2 + 4 + 6
    nothing = dataclasses.replace(mask, kinds=jnp.zeros_like(mask.kinds))
    assert visited(96, nothing) == 0
