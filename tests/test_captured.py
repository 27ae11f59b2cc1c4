"""Functions as mods: traced on every call, with programs that they share."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from raptax import attention, create_block_mask, linear_attention, paged_attention
from raptax.kernels.cpu import library as native
from raptax.mods import Causal, FunctionMod, SlidingWindow, SoftCap, compose_score_mods
from raptax.mods.functions import trace_functions

NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(not native.available(), reason="native was not built"),
)
KERNELS = pytest.mark.parametrize("kernel", [NATIVE, "blockwise"])


def numbers(*shape: int, seed: int = 0) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x.astype(np.float32))


Q, K, V = (numbers(1, 2, 9, 4, seed=n) for n in range(3))
attend = functools.partial(attention, Q, K, V)


def expected(**options):
    """By the kernel that is not compiled, which looks at everything anew."""
    return attention(Q, K, V, kernel="reference", **options)


def close(actual, wanted):
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=2e-6)


class Count:
    """How many programs XLA compiles, as JAX's monitoring says."""

    def __enter__(self) -> "Count":
        self.programs = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def _heard(self, event: str, duration: float, **_: object) -> None:
        self.programs += event == "/jax/core/compile/backend_compile_duration"

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)


# ---------------------------------------------------------------------- nothing is stale

factor = 1.0
table = jnp.zeros(2)


def scaled(scores, b_idx, h_idx, q_idx, kv_idx):
    return scores * factor + table[h_idx]


@KERNELS
def test_a_global_number_or_array_may_be_rebound(kernel):
    global factor, table
    for factor, scale in ((1.0, 1.0), (3.0, 1.0), (3.0, 4.0)):  # noqa: B007
        table = scale * numbers(2)
        close(attend(score_mod=scaled, kernel=kernel), expected(score_mod=scaled))


class Bias(nnx.Module):
    def __init__(self) -> None:
        self.table = nnx.Param(jnp.zeros(9))
        self.reach = 9

    def change(self, scores, b_idx, h_idx, q_idx, kv_idx):
        return scores + self.table[...][kv_idx]

    def near(self, b_idx, h_idx, q_idx, kv_idx):
        return jnp.abs(q_idx - kv_idx) < self.reach

    def __call__(self, *at):
        return self.change(*at)


@KERNELS
@pytest.mark.parametrize("form", ["method", "object", "partial"])
def test_an_object_may_change_in_place(kernel, form):
    bias = Bias()
    change = {
        "method": bias.change,
        "object": bias,
        "partial": functools.partial(Bias.change, bias),
    }[form]
    for bias.reach, seed in ((9, 1), (4, 2), (2, 3)):
        bias.table[...] = numbers(9, seed=seed)
        mods = dict(score_mod=change, mask_mod=Causal() & bias.near)
        close(attend(kernel=kernel, **mods), expected(**mods))


@KERNELS
def test_a_module_trained_under_jit_is_what_eager_calls_see(kernel):
    bias = Bias()

    @nnx.jit
    def step(bias):
        loss = lambda b: jnp.sin(attend(score_mod=b.change, kernel=kernel)).sum()
        gradient = nnx.grad(loss)(bias)
        bias.table[...] -= 0.5 * gradient.table[...]

    before = attend(score_mod=bias.change, kernel=kernel)
    for _ in range(2):
        step(bias)
        after = attend(score_mod=bias.change, kernel=kernel)
        close(after, expected(score_mod=bias.change))
        assert abs(after - before).max() > 1e-3
        before = after


@KERNELS
def test_two_gradients_through_one_function_that_captures_a_parameter(kernel):
    def loss(table, kernel):
        def change(scores, b_idx, h_idx, q_idx, kv_idx):
            return scores + table[h_idx, kv_idx]

        for _ in range(2):
            out = attend(score_mod=change, kernel=kernel)
        return jnp.sin(out).sum()

    for seed in range(2):
        given = numbers(2, 9, seed=seed)
        close(*(jax.grad(loss)(given, name) for name in (kernel, "reference")))


@pytest.mark.parametrize("kernel", [NATIVE, "jax"])
def test_pages_see_what_is_captured_now(kernel):
    pages = numbers(3, 2, 4, 4, seed=5)
    shift = 0.0
    change = lambda scores, b_idx, h_idx, q_idx, kv_idx: (
        scores + shift * kv_idx.astype(scores.dtype)
    )
    where = dict(
        table=jnp.array([[0, 1, 2]], jnp.int32),
        lengths=jnp.array([9], jnp.int32),
        row_offsets=jnp.array([0, 9], jnp.int32),
    )
    keys = pages.swapaxes(0, 1).reshape(1, 2, 12, 4)[:, :, :9]
    for shift in (0.0, 1.0):  # noqa: B007
        rows = Q[0].swapaxes(0, 1)
        out = paged_attention(
            rows, pages, pages, score_mod=change, kernel=kernel, **where
        )
        wanted = attention(
            Q, keys, keys, mask_mod=Causal(), score_mod=change, kernel="reference"
        )
        close(out, wanted[0].swapaxes(0, 1))


@pytest.mark.parametrize("kernel", [NATIVE, "blockwise", "reference"])
def test_a_masked_key_that_is_not_finite_teaches_nothing(kernel):
    """``0 * NaN`` in the derivative of a score that is masked."""
    keys = K.at[:, :, 7:].set(jnp.nan)

    def loss(scale, factors, k):
        change = lambda s, b_idx, h_idx, q_idx, kv_idx: s * factors[h_idx]
        options = dict(
            scale=scale, score_mod=change, key_lengths=jnp.array([7]), kernel=kernel
        )
        return jnp.sin(attention(Q, k, V, **options)).sum()

    gradients = jax.grad(loss, (0, 1))
    actual = gradients(jnp.float32(0.3), jnp.ones(2), keys)
    for a, e in zip(actual, gradients(jnp.float32(0.3), jnp.ones(2), K), strict=True):
        close(a, e)


def test_a_feature_map_may_change():
    power = 1

    def feature_map(x):
        return jnp.abs(x) ** power

    for power in (1, 2):
        out = linear_attention(Q, K, V, feature_map=feature_map)
        weights = jnp.einsum("bhtd,bhsd->bhts", *(jnp.abs(x) ** power for x in (Q, K)))
        weights /= weights.sum(-1, keepdims=True)
        close(out, jnp.einsum("bhts,bhsd->bhtd", weights, V))


def test_a_block_mask_is_decided_for_what_is_captured_now():
    least = 0
    later = lambda b_idx, h_idx, q_idx, kv_idx: kv_idx >= least
    for least in (0, 64):
        mask = create_block_mask(later, seq_q=128, seq_kv=128, block=(64, 64))
        assert (mask.kinds[0, 0, 0] > 0).tolist() == [least == 0, True]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.floats(-2, 2), st.integers(0, 9)), min_size=2, max_size=4))
def test_closures_that_are_changed_between_calls(states):
    """One function object, whose number, array and window change from call to call."""
    state = {}

    def change(scores, b_idx, h_idx, q_idx, kv_idx):
        return scores * state["factor"] + state["table"][kv_idx]

    def near(b_idx, h_idx, q_idx, kv_idx):
        return q_idx - kv_idx < state["window"]

    for factor, window in states:
        state.update(factor=factor, window=window, table=numbers(9, seed=window))
        mods = dict(score_mod=change, mask_mod=near)
        for kernel in ("blockwise", *(["native"] if native.available() else [])):
            close(attend(kernel=kernel, **mods), expected(**mods))


# ------------------------------------------------------------------- programs are shared


@KERNELS
def test_functions_that_compute_the_same_share_a_program(kernel):
    def fresh(n: int):
        weights = numbers(2, seed=n)
        every = lambda b_idx, h_idx, q_idx, kv_idx: (q_idx + kv_idx) % 3 > 0
        change = lambda s, b_idx, h_idx, q_idx, kv_idx: (
            s + weights[h_idx] * jax.nn.relu(s)
        )
        also = functools.partial(lambda s, *at, w: s - w[at[1]], w=weights)
        return dict(mask_mod=every, score_mod=compose_score_mods(change, also))

    attend(kernel=kernel, **fresh(0))
    with Count() as count:
        for n in range(1, 5):
            mods = fresh(n)
            out = attend(kernel=kernel, **mods)
        assert count.programs == 0
    close(out, expected(**mods))


@KERNELS
def test_numbers_need_no_program_of_their_own(kernel):
    def call(n: int):
        return attend(
            mask_mod=SlidingWindow(2 + n),
            score_mod=SoftCap(1.0 + n),
            scale=0.5 + n,
            dropout_rate=0.1 + n / 10,
            dropout_rng=jax.random.PRNGKey(0),
            deterministic=False,
            kernel=kernel,
        )

    call(0)
    with Count() as count:
        outs = [call(n) for n in range(1, 4)]
        jax.block_until_ready(outs)
    assert count.programs == 0
    for a, b in itertools.combinations(outs, 2):
        assert abs(a - b).max() > 1e-3


def test_what_differs_does_not_compare_equal():
    at = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, 1, 1, 1),) * 4]
    doubled = jax.custom_jvp(lambda x: 2 * x)
    doubled.defjvp(lambda x, d: (doubled(*x), 2 * d[0]))
    tripled = jax.custom_jvp(lambda x: 2 * x)
    tripled.defjvp(lambda x, d: (tripled(*x), 3 * d[0]))
    functions = [
        lambda b, h, q, k: q < 3,
        lambda b, h, q, k: q < 4,
        lambda b, h, q, k: k < 3,
        lambda b, h, q, k: (q < 3) & (k < 3),
        lambda b, h, q, k: q < jnp.asarray([3, 4])[h],
        lambda b, h, q, k: q.astype(jnp.float32) < 0.1,
        lambda b, h, q, k: (
            q.astype(jnp.float32) < float(np.nextafter(np.float32(0.1), 1))
        ),
        lambda b, h, q, k: doubled(q.astype(jnp.float32)) < 3,
        lambda b, h, q, k: tripled(q.astype(jnp.float32)) < 3,
        lambda b, h, q, k: jax.lax.cond(True, lambda: q < 3, lambda: q < 4),
        lambda b, h, q, k: jax.lax.cond(True, lambda: q < 3, lambda: q < 5),
    ]
    traced = [trace_functions(FunctionMod(f), *at) for f in functions]
    for a, b in itertools.combinations(traced, 2):
        assert jax.tree.structure(a) != jax.tree.structure(b)
    for f, a in zip(functions, traced, strict=True):
        again = trace_functions(FunctionMod(f), *at)
        assert jax.tree.structure(a) == jax.tree.structure(again)


def test_a_constant_made_from_the_number_of_positions_is_refused():
    def lower(b_idx, h_idx, q_idx, kv_idx):
        rows, columns = q_idx.shape[2], kv_idx.shape[3]
        return jnp.asarray(np.tri(rows, columns, dtype=bool))[None, None]

    x = numbers(1, 1, 300, 4)
    with pytest.raises(ValueError, match="captured other arrays on a second look"):
        attention(x, x, x, mask_mod=lower, kernel="blockwise")
