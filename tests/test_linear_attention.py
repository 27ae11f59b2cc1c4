"""Linear attention against its definition, in one pass, in parts and in derivatives."""

import functools
import inspect
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from raptax import AttentionFn, Causal, SlidingWindow, SoftCap, Unsupported
from raptax._core.pytree import pytree
from raptax.kernels.linear_attention import (
    CHUNK,
    LinearState,
    elu_plus_one,
    linear_attention,
)

BOTH = pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
REST = pytest.param(False, marks=pytest.mark.slow, id="all")
CAUSAL_FIRST = pytest.mark.parametrize(
    "causal", [REST, pytest.param(True, id="causal")]
)
attend_causal = functools.partial(linear_attention, causal=True)


def arrays(dtype=jnp.float32, *, B=2, H=4, K=2, T=65, S=None, D=8, E=5, seed=0):
    """65 tokens are two chunks, with one token of padding."""
    S, random = T if S is None else S, np.random.default_rng(seed)
    shapes = (B, H, T, D), (B, K, S, D), (B, K, S, E)
    return tuple(
        jnp.asarray(random.normal(size=shape).astype(np.float32)).astype(dtype)
        for shape in shapes
    )


def exact(q, k, v, *, causal=False, seen=None):
    """The definition, query by query, in float64. ``seen`` is (B, S)."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    phi = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    (B, H, T, _), (K, S), E = q.shape, k.shape[1:3], v.shape[3]
    out = np.zeros((B, H, T, E))
    for b, h, t in np.ndindex(B, H, T):
        own = slice(t + 1 if causal else S)
        weights = phi(k[b, h // (H // K), own]) @ phi(q[b, h, t])
        weights *= 1 if seen is None else seen[b, own]
        if weights.any():
            out[b, h, t] = weights @ v[b, h // (H // K), own] / weights.sum()
    return out


def dense(q, k, v, *, causal=False, seen=None):
    """The same with all T * S weights, for derivatives. ``seen`` is (B, S)."""
    phi = lambda x: jax.nn.elu(x) + 1
    k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    weights = jnp.einsum("bhtd,bhsd->bhts", phi(q), phi(k))
    if causal:
        weights = jnp.where(jnp.tri(q.shape[2], dtype=bool)[None, None], weights, 0)
    if seen is not None:
        weights = jnp.where(seen[:, None, None], weights, 0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    return jnp.einsum("bhts,bhse->bhte", weights, v)


def close(actual, expected, atol=2e-6):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = (np.asarray(x, np.float64) for x in (a, e))
        np.testing.assert_allclose(a, e, rtol=0, atol=atol * max(1, np.abs(e).max()))


TABLE = [
    dict(T=0),
    dict(T=1),
    dict(T=5, H=3, K=1, D=3, E=7),
    dict(T=CHUNK, K=4),
    dict(T=CHUNK + 1),
    dict(T=2 * CHUNK + 2, B=1, H=7, K=1, D=16, E=1),
    dict(B=0),
    dict(H=0),
    dict(E=0),
]


@pytest.mark.parametrize("sizes", TABLE, ids=str)
@BOTH
def test_float32(sizes, causal):
    q, k, v = arrays(**sizes)
    out = linear_attention(q, k, v, causal=causal)
    assert out.shape == (*q.shape[:3], v.shape[3])
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, exact(q, k, v, causal=causal), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("T", "S"), [(3, 65), (65, 3), (0, 5), (5, 0)])
def test_as_many_queries_as_one_likes(T, S):
    q, k, v = arrays(T=T, S=S)
    np.testing.assert_allclose(linear_attention(q, k, v), exact(q, k, v), atol=2e-6)


@BOTH
def test_low_precision_rounds_the_output_alone(causal):
    q, k, v = arrays(jnp.bfloat16)
    out, state = linear_attention(q, k, v, causal=causal, return_state=True)
    assert out.dtype == jnp.bfloat16
    assert state.sums.dtype == state.total.dtype == jnp.float32
    expected = exact(q, k, v, causal=causal)
    error = np.abs(np.asarray(out, np.float64) - expected)
    assert (error <= 2.0**-8 * np.abs(expected) + 2e-6).all()


@pytest.mark.slow
def test_float64_is_summed_in_float64():
    with jax.enable_x64(True):
        q, k, v = arrays(jnp.float64)
        out, state = attend_causal(q, k, v, return_state=True)
        assert out.dtype == state.sums.dtype == state.total.dtype == jnp.float64
        close(out, dense(q, k, v, causal=True), 1e-14)


def test_features_of_small_numbers_keep_their_digits():
    x = jnp.array([-80.0, -20.0, -1e-9, 0.0, 1e-9, 3.0])
    expected = np.exp(np.minimum(x, 0).astype(np.float64)) + np.maximum(x, 0)
    np.testing.assert_allclose(elu_plus_one(x), expected, rtol=2e-6)
    slopes = jax.vmap(jax.grad(elu_plus_one))(x)
    np.testing.assert_allclose(slopes, np.minimum(expected, 1), rtol=2e-6)


# ------------------------------------------------------------------------ order and parts


def test_causal_never_looks_ahead():
    q, k, v = arrays()
    out = np.asarray(attend_causal(q, k, v))
    for t in (0, 20, 32, 33, 63):  # 33 is where the second chunk begins
        later = (np.arange(65) > t)[None, None, :, None]
        changed = (jnp.where(later, x, y) for x, y in ((7.0, k), (-1e30, v)))
        changed = np.asarray(attend_causal(q, *changed))
        np.testing.assert_array_equal(changed[:, :, : t + 1], out[:, :, : t + 1])
        assert (changed[:, :, t + 1 :] != out[:, :, t + 1 :]).all()


def parts(x, at):
    return (x[:, :, a:b] for a, b in zip((0, *at), (*at, x.shape[2]), strict=True))


def test_prefill_and_decode_are_one_pass():
    q, k, v = arrays()
    expected, last = attend_causal(q, k, v, return_state=True)
    state, outs = LinearState.empty(2, 2, 8, 5), []
    for part in zip(*(parts(x, (5, 40)) for x in (q, k, v)), strict=True):
        out, state = attend_causal(*part, state=state, return_state=True)
        outs.append(out)
    close((jnp.concatenate(outs, 2), state), (expected, last))

    def step(state, token):
        out, state = attend_causal(*token, state=state, return_state=True)
        return state, out

    tokens = tuple(jnp.moveaxis(x, 2, 0)[:, :, :, None] for x in (q, k, v))
    state, outs = jax.lax.scan(step, LinearState.empty(2, 2, 8, 5), tokens)
    close((jnp.moveaxis(outs[:, :, :, 0], 0, 2), state), (expected, last))


def test_without_causal_parts_of_the_keys_add_up():
    q, k, v = arrays(T=9, S=65)
    expected, last = linear_attention(q, k, v, return_state=True)
    none = q[:, :, :0]
    _, state = linear_attention(none, k[:, :, :30], v[:, :, :30], return_state=True)
    rest = k[:, :, 30:], v[:, :, 30:]
    close(linear_attention(q, *rest, state=state, return_state=True), (expected, last))
    read, same = linear_attention(
        q, k[:, :, :0], v[:, :, :0], state=last, return_state=True
    )
    close(read, expected)
    assert same == last


@pytest.mark.slow
def test_gradients_reach_through_the_state():
    def loss(attend, q, k, v):
        return (attend(q, k, v) ** 2).sum()

    def in_two(q, k, v):
        first, second = zip(*(parts(x, (40,)) for x in (q, k, v)), strict=True)
        out, state = attend_causal(*first, return_state=True)
        return jnp.concatenate([out, attend_causal(*second, state=state)], 2)

    gradient = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)
    close(gradient(in_two, *arrays()), gradient(attend_causal, *arrays()), 1e-5)


# ---------------------------------------------------------------------------- masked keys


@BOTH
def test_masked_keys_add_nothing(causal):
    q, k, v = arrays()
    seen = np.random.default_rng(1).random((2, 65)) > 0.4
    seen[0, :40] = False  # the first chunk and more: rows that see nothing
    mask = jnp.asarray(seen)[:, None, None]
    attend = functools.partial(linear_attention, causal=causal, return_state=True)
    out, state = attend(q, k, v, mask=mask)
    np.testing.assert_allclose(out, exact(q, k, v, causal=causal, seen=seen), atol=2e-6)
    if causal:
        assert (out[0, :, :40] == 0).all()
    for bad in (jnp.nan, jnp.inf):
        hidden = [jnp.where(mask[:, :, 0, :, None], x, bad) for x in (k, v)]
        again, after = attend(q, *hidden, mask=mask)
        np.testing.assert_array_equal(again, out)
        assert after == state


@CAUSAL_FIRST
def test_gradients_of_masked_keys_and_empty_rows_are_zero(causal):
    q, k, v = arrays()
    seen = jnp.ones((2, 65), bool).at[0, :40].set(False).at[1].set(False)

    def loss(attend, q, k, v):
        return (attend(q, k, v, causal=causal) ** 2).sum()

    ours = functools.partial(linear_attention, mask=seen[:, None, None])
    gradient = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)
    hidden = [jnp.where(seen[:, None, :, None], x, jnp.nan) for x in (k, v)]
    actual = gradient(ours, q, *hidden)
    close(actual, gradient(functools.partial(dense, seen=seen), q, k, v), 1e-5)
    for x in actual:
        assert (x[1] == 0).all()
    for x in actual[0 if causal else 1 :]:
        assert (x[0, :, :40] == 0).all()


def test_nan_reaches_whom_it_may_concern():
    q, k, v = arrays()
    clean = attend_causal(q, k, v)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        for changed in (
            (k.at[0, 1, 20, 3].set(bad), v),
            (k, v.at[0, 1, 20, 3].set(bad)),
        ):
            out, state = attend_causal(q, *changed, return_state=True)
            lost = np.isnan(out)
            assert lost[0, 2:, 20:].all()  # the heads that read kv head 1
            assert lost.sum() == lost[0, 2:, 20:].size
            np.testing.assert_array_equal(out[~lost], clean[~lost])
            assert np.isnan(state.total[0, 1]).all()
            assert np.isnan(state.total).sum() == 8
        out = attend_causal(q.at[1, 2, 30, 0].set(bad), k, v)
        lost = np.isnan(out)
        assert lost[1, 2, 30].all()
        assert lost.sum() == 5
    blind = jnp.zeros((1, 1, 1, 1), bool)
    assert (linear_attention(q.at[0].set(jnp.nan), k, v, mask=blind) == 0).all()


# --------------------------------------------------------------------------- derivatives


def check_derivatives(causal, derivatives):
    """``derivatives(loss, inputs, directions)`` of both forms."""

    @functools.partial(jax.jit, static_argnums=0)
    def run(attend, inputs, directions):
        loss = lambda x: jnp.sin(3 * attend(*x, causal=causal)).sum()
        return derivatives(loss, inputs, directions)

    ours, wanted = (run(f, arrays(), arrays(seed=5)) for f in (linear_attention, dense))
    close(ours, wanted, 2e-5)


@BOTH
def test_gradient_tangent_and_hessian_vector_product(causal):
    def derivatives(loss, x, dx):
        _, tangent = jax.jvp(loss, (x,), (dx,))
        return tangent, jax.jvp(jax.grad(loss), (x,), (dx,))

    check_derivatives(causal, derivatives)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["of a gradient", "of a tangent"])
@BOTH
def test_gradient(order, causal):
    def derivatives(loss, x, dx):
        if order == "of a tangent":
            return jax.grad(lambda x: jax.jvp(loss, (x,), (dx,))[1])(x)
        dot = lambda a, b: sum(map(jnp.vdot, a, b))
        return jax.grad(lambda x: dot(jax.grad(loss)(x), dx))(x)

    check_derivatives(causal, derivatives)


@CAUSAL_FIRST
def test_vmap(causal):
    attend = functools.partial(linear_attention, causal=causal, return_state=True)
    q, k, v = arrays()
    both = jax.tree.map(lambda *x: jnp.stack(x), (q, k, v), arrays(seed=5))
    mapped = jax.jit(jax.vmap(attend, in_axes=(0, None, 1)))
    out = mapped(both[0], k, jnp.moveaxis(both[2], 0, 1))
    for n in range(2):
        one = jax.tree.map(operator.itemgetter(n), out)
        close(one, attend(both[0][n], k, both[2][n]))
    mask = jnp.asarray(np.random.default_rng(1).random((3, 1, 1, 1, 65)) > 0.5)
    state = LinearState(jnp.ones((3, 2, 2, 8, 5)), jnp.ones((3, 2, 2, 8)))
    masked = lambda mask, state: attend(q, k, v, mask=mask, state=state)
    out = jax.jit(jax.vmap(masked))(mask, state)
    first = jax.tree.map(operator.itemgetter(0), (mask, state))
    close(jax.tree.map(operator.itemgetter(0), out), masked(*first))


@BOTH
def test_shard_map(causal):
    """Each device has a sequence; loops in a shard_map mind which arrays vary."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    attend = functools.partial(linear_attention, causal=causal)
    split = PartitionSpec("data")
    out = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=split, out_specs=split))
    close(out(*arrays()), attend(*arrays()))


# --------------------------------------------------------------------------- feature maps


@pytree
class Projected:
    """Positive features of their own number, with an array to learn."""

    weight: jax.Array

    def __call__(self, x):
        return jnp.exp(x @ self.weight)


def project_and_divide(q, k, v, weight, causal):
    """All weights, for the features ``exp(x @ weight)``."""
    q, k = (jnp.exp(x @ weight) for x in (q, k))
    k, v = (jnp.repeat(x, 2, axis=1) for x in (k, v))
    weights = jnp.einsum("bhtf,bhsf->bhts", q, k)
    if causal:
        weights = jnp.where(jnp.tri(65, dtype=bool)[None, None], weights, 0)
    return jnp.einsum("bhts,bhse->bhte", weights / weights.sum(-1, keepdims=True), v)


@CAUSAL_FIRST
def test_a_feature_map_of_its_own(causal):
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(8, 6)) / 4, jnp.float32)

    def ours(weight, wrap):
        learned = wrap(Projected(weight))
        options = dict(causal=causal, feature_map=learned, return_state=True)
        out, state = linear_attention(*arrays(), **options)
        assert state.total.shape == (2, 2, 6)
        return (out**2).sum(), out

    def wanted(weight):
        out = project_and_divide(*arrays(), weight, causal)
        return (out**2).sum(), out

    differentiate = lambda f: jax.value_and_grad(f, has_aux=True)

    @jax.jit
    def run(weight):
        tree = differentiate(functools.partial(ours, wrap=lambda f: f))
        captured = differentiate(functools.partial(ours, wrap=lambda f: lambda x: f(x)))
        return tree(weight), captured(weight), differentiate(wanted)(weight)

    tree, captured, expected = run(weight)
    close(tree, expected, 1e-5)
    close(captured, expected, 1e-5)


def test_weights_that_cancel_give_zero_and_no_nan():
    q, k, v = arrays(T=1)
    flat = lambda x: x * 0
    attend = lambda q, k, v: linear_attention(q, k, v, feature_map=flat).sum()
    out, gradients = jax.jit(jax.value_and_grad(attend, (0, 1, 2)))(q, k, v)
    for x in (out, *gradients):
        assert (x == 0).all()


# --------------------------------------------------------------------- what it cannot do


def test_called_like_an_attention_fn():
    ours = inspect.signature(linear_attention).parameters
    theirs = dict(inspect.signature(AttentionFn.__call__).parameters)
    del theirs["self"]
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default
        assert ours[name].kind == parameter.kind
    q, k, v = arrays()
    out = linear_attention(q, k, v, mask_mod=Causal(), deterministic=True)
    np.testing.assert_array_equal(out, attend_causal(q, k, v))
    still = linear_attention(q, k, v, dropout_rate=0.5, deterministic=True)
    np.testing.assert_array_equal(still, linear_attention(q, k, v))


DROPOUT = dict(dropout_rate=0.5, deterministic=False)
DECLINED = [
    (dict(score_mod=SoftCap(2.0)), "it has no scores that a score_mod could change"),
    (dict(bias=jnp.zeros((1, 1, 1, 65))), "it has no scores to add a bias to"),
    (dict(sinks=jnp.zeros(4)), "it has no softmax in which sinks could take"),
    (dict(scale=1.0), "it has no scores to scale"),
    (dict(query_start=0), "it knows no positions"),
    (dict(return_lse=True), "it has no softmax, and so no log-sum-exp"),
    (
        dict(dropout_rng=jax.random.key(0), **DROPOUT),
        "it makes no attention weights that dropout could drop",
    ),
    (dict(mask=jnp.ones((1, 1, 65, 65), bool)), r"one of keys.*\(1, 1, 65, 65\)"),
    (dict(mask=jnp.ones((1, 4, 1, 65), bool)), r"one of keys.*\(1, 4, 1, 65\)"),
    (dict(mask_mod=SlidingWindow(3)), "of masks it knows Causal, not SlidingWindow"),
    (dict(mask_mod=~Causal()), "of masks it knows Causal, not Not"),
]


@pytest.mark.parametrize(("options", "sentence"), DECLINED)
@BOTH
def test_declines_in_a_sentence(options, sentence, causal):
    sentence = rf"linear_attention cannot run this: .*{sentence}.*(?<!\.)\.$"
    with pytest.raises(Unsupported, match=sentence):
        linear_attention(*arrays(), causal=causal, **options)


@pytest.mark.parametrize(("T", "S"), [(3, 5), (5, 3)])
def test_causal_needs_as_many_keys_as_queries(T, S):
    state = LinearState.empty(2, 2, 8, 5)
    for options in (dict(causal=True), dict(mask_mod=Causal()), dict(state=state)):
        sentence = f"as many keys as queries, got {S} and {T}; keys that came before"
        with pytest.raises(Unsupported, match=sentence):
            linear_attention(*arrays(T=T, S=S), **{"causal": True} | options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(state=LinearState.empty(1, 2, 8, 5)), r"state.sums must be float32 \(2,"),
        (dict(state=LinearState.empty(2, 2, 8, 5, jnp.float16)), "got float16"),
        (dict(state=LinearState.empty(2, 2, 7, 5)), r"got float32 \(2, 2, 7, 5\)"),
        (dict(mask=jnp.ones((1, 1, 1, 9), bool)), "mask .* must broadcast"),
        (dict(mask=jnp.ones((1, 1, 1, 65))), "mask must be boolean"),
        (dict(dropout_rate=1.5), "must lie in"),
        (DROPOUT, "needs a dropout_rng"),
        (dict(feature_map="elu"), "feature_map must be callable; got 'elu'"),
        (dict(feature_map=lambda x: x.sum(-1)), "must change the last axis of float32"),
        (dict(feature_map=lambda x: x > 0), r"it returned bool \(2, 2, 0, 8\)"),
    ],
)
def test_mistakes_are_told(unchecked, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        linear_attention(*arrays(), **options)


# ------------------------------------------------------------------------ what it costs


def compiled(T: int, *, causal: bool, backward: bool):
    shape = jax.ShapeDtypeStruct((1, 2, T, 64), jnp.float32)
    attend = functools.partial(linear_attention, causal=causal)
    if backward:
        loss = lambda q, k, v: (linear_attention(q, k, v, causal=causal) ** 2).sum()
        attend = jax.grad(loss, (0, 1, 2))
    return jax.jit(attend).lower(shape, shape, shape).compile()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@BOTH
def test_memory_and_work_grow_with_the_length(causal, backward):
    short, long = (compiled(T, causal=causal, backward=backward) for T in (2048, 8192))
    sizes = [x.memory_analysis().temp_size_in_bytes for x in (short, long)]
    array = 2 * 8192 * 64 * 4
    assert sizes[1] < 4.2 * sizes[0] + 1e5
    assert sizes[1] < (12 if backward else 5) * array
    assert len(long.as_text()) < 1.1 * len(short.as_text())


def test_one_program_serves_every_step():
    q, k, v = arrays(T=3)
    traces = []

    @jax.jit
    def step(q, k, v, state):
        traces.append(1)
        return attend_causal(q, k, v, state=state, return_state=True)

    state = LinearState.empty(2, 2, 8, 5)
    for _ in range(4):
        _, state = step(q, k, v, state)
    assert len(traces) == 1


@pytest.mark.slow
def test_long_sums_stay_accurate():
    """16384 tokens, whose sums in float32 are taken chunk by chunk."""
    with jax.enable_x64(True):
        q, k, v = arrays(jnp.float64, B=1, H=1, K=1, T=16384, D=4, E=2)
        expected = attend_causal(q, k, v)
        actual = attend_causal(*(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)
