"""Every derivative that JAX knows, through the blockwise kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import raptax
from raptax._core.transposable import linear_with_transpose
from raptax.kernels import blockwise_attention, reference_attention

B, H, K, T, S, D, E = 2, 4, 2, 37, 53, 8, 5


def numbers(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def inputs() -> tuple[jax.Array, ...]:
    """Query, key, value, bias, sinks and slopes, in the widest dtype there is."""
    shapes = (B, H, T, D), (B, K, S, D), (B, K, S, E), (1, H, 1, S), (H,), (H,)
    return tuple(numbers(*shape, seed=n) for n, shape in enumerate(shapes))


def directions() -> tuple[jax.Array, ...]:
    return tuple(numbers(*x.shape, seed=10 + n) for n, x in enumerate(inputs()))


def loss(attend, q, k, v, bias, sinks, slopes):
    """Uses both outputs. Tiles that the window leaves empty are not visited."""
    mask = raptax.SlidingWindow(20)
    if attend is blockwise_attention:
        mask = raptax.create_block_mask(
            mask, batch=B, heads=H, seq_q=T, seq_kv=S, block=(16, 16)
        )
    out, lse = attend(
        q,
        k,
        v,
        bias=bias,
        sinks=sinks,
        mask_mod=mask,
        score_mod=raptax.ALiBi(slopes),
        return_lse=True,
    )
    return jnp.sin(out).sum() + (lse**2).sum()


def gradient(function):
    return jax.grad(function, range(6))


def along(function):
    """The derivative of ``function`` in fixed directions."""
    return lambda *x: jax.jvp(function, x, directions())[1]


DERIVATIVES = {
    "reverse": gradient,
    "forward": along,
    "reverse of reverse": lambda f: gradient(
        lambda *x: sum(
            (g * d).sum() for g, d in zip(gradient(f)(*x), directions(), strict=True)
        )
    ),
    "forward of reverse": lambda f: along(gradient(f)),
    "reverse of forward": lambda f: gradient(along(f)),
    "forward of forward": lambda f: along(along(f)),
    "rematerialised": lambda f: gradient(jax.checkpoint(f)),
    "third order": lambda f: along(along(gradient(f))),
}
QUICK = ("reverse of reverse", "forward of forward")
CASES = [
    pytest.param(d, marks=() if name in QUICK else pytest.mark.slow, id=name)
    for name, d in DERIVATIVES.items()
]


@pytest.mark.parametrize("derivative", CASES)
def test_any_derivative_is_that_of_the_reference(derivative):
    with jax.enable_x64(True):
        actual, expected = (
            jax.jit(derivative(functools.partial(loss, attend)))(*inputs())
            for attend in (blockwise_attention, reference_attention)
        )
        for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-9 * np.abs(e).max())


def some_inputs(*lead: int) -> tuple[jax.Array, ...]:
    q, k, v = (x.astype(jnp.float32) for x in inputs()[:3])
    return tuple(jnp.broadcast_to(x, (*lead, *x.shape)) for x in (q, k, v))


def window(q, k, v):
    return blockwise_attention(q, k, v, mask_mod=raptax.SlidingWindow(20)).sum()


@pytest.mark.parametrize("order", ["gradient of vmap", "vmap of gradient"])
def test_vmap_and_gradients_nest(order):
    """Over queries in one vmap and keys in the other, values shared by all."""
    across = functools.partial(jax.vmap, in_axes=(0, None, None))
    along_keys = functools.partial(jax.vmap, in_axes=(None, 0, None))
    q, k, v = (some_inputs(*lead)[n] for n, lead in enumerate([(3,), (2,), ()]))
    if order == "gradient of vmap":
        total = lambda *x: along_keys(across(window))(*x).sum()
        d_q, d_k, d_v = jax.grad(total, (0, 1, 2))(q, k, v)
        counts = 2, 3, 6
    else:
        nested = along_keys(across(jax.grad(window, (0, 1, 2))))
        d_q, d_k, d_v = (x[0] for x in nested(q, k, v))
        counts = 1, 1, 1
        d_v = d_v[:1]
    expected = jax.grad(window, (0, 1, 2))(*some_inputs())
    for actual, e, n in zip((d_q, d_k, d_v), expected, counts, strict=True):
        e = jnp.broadcast_to(n * e, actual.shape)
        np.testing.assert_allclose(actual, e, rtol=0, atol=2e-5)


def test_gradients_under_shard_map():
    """Sequences on two devices; the bias on both, so that its gradient is a sum."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    arrays = tuple(x.astype(jnp.float32) for x in inputs())

    def total(attend, mask_mod):
        def shard(q, k, v, bias, sinks, slopes):
            score_mod = raptax.ALiBi(slopes)
            options = dict(bias=bias, sinks=sinks, mask_mod=mask_mod)
            out = attend(q, k, v, score_mod=score_mod, **options)
            return jnp.sin(out).sum()

        return shard

    mask_mod = raptax.KeyLengths(jnp.int32(50)) & raptax.Causal()
    shard = total(blockwise_attention, mask_mod)
    sharded = jax.shard_map(
        lambda *x: jax.lax.psum(shard(*x), "x"),
        mesh=mesh,
        in_specs=(P("x"), P("x"), P("x"), P(), P(), P()),
        out_specs=P(),
    )
    actual = jax.jit(gradient(sharded))(*arrays)
    expected = jax.jit(gradient(total(reference_attention, mask_mod)))(*arrays)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e).max())


def test_a_tangent_takes_memory_that_grows_with_the_length():
    def compiled(T: int):
        x = jax.ShapeDtypeStruct((1, 2, T, 32), jnp.float32)
        attend = functools.partial(blockwise_attention, mask_mod=raptax.Causal())
        tangent = lambda x, d: jax.jvp(lambda x: attend(x, x, x), (x,), (d,))
        return jax.jit(tangent).lower(x, x).compile()

    short, long = (
        compiled(T).memory_analysis().temp_size_in_bytes for T in (2048, 16384)
    )
    assert long < 8 * short + 1e6


# ------------------------------------------------------------------------------- linear


def test_linear_runs_its_transpose_and_nothing_else():
    """A transpose that is wrong on purpose, to see that it is what runs."""
    run = lambda known, x: known * x
    wrong = lambda known, ct: known * ct + 1

    f = lambda x: linear_with_transpose(run, wrong, jnp.float32(3), x)
    assert jax.jvp(f, (jnp.float32(2),), (jnp.float32(1),)) == (6, 3)
    assert jax.grad(f)(jnp.float32(2)) == 4
    assert jax.vmap(jax.grad(f))(jnp.ones(3)).tolist() == [4, 4, 4]
    assert jax.grad(lambda x: jax.vmap(f)(x).sum())(jnp.ones(3)).tolist() == [4, 4, 4]


def test_linear_is_differentiated_by_what_its_functions_do():
    """``known`` enters by ``plain``; two of it make the second derivative visible."""
    times = lambda known, x: known * x
    plain = lambda known, x: 2 * known * x
    f = lambda a, x: linear_with_transpose(times, times, a, x, plain=(plain, plain))
    a, x = jnp.float32(3), jnp.float32(5)
    assert f(a, x) == 15
    assert jax.grad(f, 0)(a, x) == 10
    assert jax.grad(f, 1)(a, x) == 3
    assert jax.grad(jax.grad(f, 1), 0)(a, x) == 2
