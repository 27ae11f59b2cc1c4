"""Sinks, the log-sum-exp and every derivative of attention to pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raptax import (
    Causal,
    KeyLengths,
    KVCacheParams,
    PagedKVCache,
    SlidingWindow,
    SoftCap,
    attention,
    paged_attention,
)
from raptax.kernels.cpu import library as native
from raptax.kernels.paged import attention as paged

H, K, D, E, P = 4, 2, 6, 5, 4
HELD, NEW, PADDING = (9, 0, 3), (2, 3, 1), 2
BUILT = pytest.mark.skipif(not native.available(), reason="native was not built")
NATIVE = pytest.param("native", marks=BUILT)
KERNELS = pytest.mark.parametrize("kernel", [NATIVE, "jax"])
# Both kernels have the same derivatives: one of them is enough for quick tests.
NATIVE_FIRST = pytest.mark.parametrize(
    "kernel", [NATIVE, pytest.param("jax", marks=pytest.mark.slow)]
)
SLOW = pytest.mark.slow
TABLE = jnp.asarray([[7, 2, 5], [0, -1, -1], [4, 6, -1]], jnp.int32)
WHERE = dict(
    table=TABLE,
    lengths=jnp.asarray(HELD, jnp.int32),
    row_offsets=jnp.asarray(np.cumsum([0, *NEW]), jnp.int32),
)


def numbers(*shape: int, seed: int = 0) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x.astype(np.float32))


def arguments() -> dict[str, jax.Array]:
    """All that derivatives reach; padding rows are NaN, and so are free pages."""
    R = sum(NEW)
    rows = dict(query=(H, D), key=(K, D), value=(K, E))
    arrays = {
        name: jnp.concatenate(
            [numbers(R, *size, seed=n), jnp.full((PADDING, *size), jnp.nan)]
        )
        for n, (name, size) in enumerate(rows.items())
    }
    pool = jnp.full((1, 8, K, P, D), jnp.nan), jnp.full((1, 8, K, P, E), jnp.nan)
    held = TABLE.reshape(-1)[jnp.asarray([0, 1, 2, 3, 6, 7])]
    arrays["k_pages"], arrays["v_pages"] = (
        x.at[:, held].set(numbers(1, 6, *x.shape[2:], seed=9 + n))
        for n, x in enumerate(pool)
    )
    arrays["slopes"] = numbers(H, seed=5)
    arrays["sinks"] = numbers(H, seed=6)
    return arrays | dict(scale=jnp.float32(0.4))


def mods_of(x, mask_mod=SlidingWindow(7)):
    """A score_mod that is a plain function, and captures an array."""

    def change(scores, b, h, q, k):
        away = (q - k).astype(scores.dtype)
        return SoftCap(3.0)(scores, b, h, q, k) - x["slopes"][h] * away * 0.1

    return dict(mask_mod=mask_mod, score_mod=change, scale=x["scale"], sinks=x["sinks"])


def by_pages(x, kernel, **changes):
    """``(out, lse)`` of the rows, and the pages after appending."""
    (out, lse), pool = paged.append_and_attend(
        x["query"],
        x["key"],
        x["value"],
        paged.Pool(x["k_pages"], x["v_pages"]),
        **WHERE,
        layer=0,
        return_lse=True,
        kernel=kernel,
        **mods_of(x) | changes,
    )
    return out, lse, pool


def by_sequence(x):
    """The same without pages: each sequence by itself, by the reference."""
    outs = []
    for b, (held, new) in enumerate(zip(HELD, NEW, strict=True)):
        start = sum(NEW[:b])
        mine = slice(start, start + new)
        k, v = (
            jnp.concatenate(
                [
                    x[pages][0, TABLE[b]].swapaxes(1, 2).reshape(-1, K, size)[:held],
                    x[rows][mine],
                ]
            )
            for pages, rows, size in (("k_pages", "key", D), ("v_pages", "value", E))
        )
        q, k, v = (a.swapaxes(0, 1)[None] for a in (x["query"][mine], k, v))
        out, lse = attention(q, k, v, return_lse=True, kernel="reference", **mods_of(x))
        outs.append((out[0].swapaxes(0, 1), lse[0].swapaxes(0, 1)))
    out, lse = (jnp.concatenate(a) for a in zip(*outs, strict=True))
    return out, lse


def weighed(out, lse):
    R = sum(NEW)
    out, lse = out[:R], lse[:R]
    out = out.astype(jnp.float32)
    return (out * numbers(*out.shape, seed=20)).sum() + jnp.sin(lse).sum()


def loss(x, kernel):
    out, lse, pool = by_pages(x, kernel)
    kept = TABLE[0, 0]  # what is appended is differentiated as well
    return weighed(out, lse) + (pool.keys[0, kept].astype(jnp.float32) ** 2).sum()


def exact_loss(x):
    return weighed(*by_sequence(x)) + (x["k_pages"][0, TABLE[0, 0]] ** 2).sum()


@functools.cache
def exact():
    return jax.jit(jax.value_and_grad(exact_loss))(arguments())


def close(actual, expected, atol=5e-6):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


@KERNELS
def test_outputs_and_log_sum_exp(kernel):
    out, lse, _ = by_pages(arguments(), kernel)
    expected = jax.jit(by_sequence)(arguments())
    R = sum(NEW)
    close((out[:R], lse[:R]), expected)
    assert (out[R:] == 0).all()
    assert jnp.isneginf(lse[R:]).all()


@KERNELS
def test_gradients(kernel):
    """Of every array at once; 0 for padding, and for pages that no sequence holds."""
    value, gradients = jax.jit(jax.value_and_grad(loss), static_argnums=1)(
        arguments(), kernel
    )
    expected, wanted = exact()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            gradient, wanted[name], rtol=1e-5, atol=1e-5, err_msg=name
        )
        assert np.abs(gradient).max() > 1e-3


@NATIVE_FIRST
def test_gradients_of_attention_alone(kernel):
    x = arguments()

    def run(x):
        out, lse = paged_attention(
            x["query"],
            x["k_pages"][0],
            x["v_pages"][0],
            **WHERE | dict(lengths=WHERE["lengths"] + jnp.asarray(NEW, jnp.int32)),
            return_lse=True,
            kernel=kernel,
            **mods_of(x),
        )
        return weighed(out, lse)

    def appended(x):
        pool = paged.append(
            paged.Pool(x["k_pages"], x["v_pages"]),
            x["key"],
            x["value"],
            **WHERE,
            layer=0,
        )
        return run(x | dict(k_pages=pool.keys, v_pages=pool.values))

    gradients = jax.jit(jax.grad(appended))(x)
    wanted = jax.jit(jax.grad(lambda x: weighed(*by_sequence(x))))(x)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            gradient, wanted[name], rtol=1e-5, atol=1e-5, err_msg=name
        )


@NATIVE_FIRST
def test_forward_mode_agrees_with_reverse_mode(kernel):
    x = arguments()
    tangents = {n: numbers(*a.shape, seed=n) for n, a in enumerate(x.values())}
    moved = dict(zip(x, tangents.values(), strict=True))
    _, along = jax.jvp(functools.partial(loss, kernel=kernel), (x,), (moved,))
    _, gradients = exact()
    products = (jnp.vdot(gradients[name], moved[name]) for name in x)
    np.testing.assert_allclose(along, sum(products), rtol=2e-5)


@SLOW
@KERNELS
def test_gradients_of_gradients(kernel):
    """Of the norm of a gradient, by the query and by the sinks."""

    def norm(f, moved):
        return (jax.grad(lambda m: f(arguments() | m))(moved)["query"] ** 2)[:6].sum()

    moved = {name: arguments()[name] for name in ("query", "sinks")}
    found = jax.grad(lambda m: norm(functools.partial(loss, kernel=kernel), m))(moved)
    close(found, jax.grad(lambda m: norm(exact_loss, m))(moved), 3e-4)


@SLOW
@KERNELS
def test_vmap_of_gradients(kernel):
    x, (_, wanted) = arguments(), exact()
    scales = jnp.asarray([0.4, 0.1], jnp.float32)
    found = jax.vmap(lambda s: jax.grad(loss)(x | dict(scale=s), kernel)["sinks"])(
        scales
    )
    np.testing.assert_allclose(found[0], wanted["sinks"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@NATIVE_FIRST
def test_codes_are_constants(kernel):
    """Rounding has no derivative; the query and the scale have theirs."""
    params = KVCacheParams(dtype=jnp.int8, n_kv_heads=K, head_dim=D, page_size=P)
    cache = PagedKVCache.create(params, pages=3, sequences=1, max_pages=3)
    cache = cache.with_tables([[2, 0, 1]], [0])
    rows = numbers(9, H, D), numbers(9, K, D, seed=1), numbers(9, K, D, seed=2)
    offsets = jnp.asarray([0, 9], jnp.int32)

    def run(q, k, v, cache=cache):
        return cache.append_and_attend(q, k, v, row_offsets=offsets, kernel=kernel)

    weights = numbers(9, H, D, seed=3)
    d_q, d_k, d_v = jax.grad(lambda *x: (run(*x)[0] * weights).sum(), (0, 1, 2))(*rows)
    assert not d_k.any()
    assert not d_v.any()
    pool = run(*rows)[1].pool
    order = jnp.asarray([2, 0, 1])
    k, v = (
        (codes * scales[..., None])[0, order]
        .swapaxes(0, 1)
        .reshape(1, K, 12, D)[:, :, :9]
        for codes, scales in (
            (pool.keys.astype(jnp.float32), pool.key_scales),
            (pool.values.astype(jnp.float32), pool.value_scales),
        )
    )
    dense = lambda q: attention(
        q.swapaxes(0, 1)[None], k, v, mask_mod=Causal(), kernel="reference"
    )
    expected = jax.grad(lambda q: (dense(q)[0].swapaxes(0, 1) * weights).sum())(rows[0])
    np.testing.assert_allclose(d_q, expected, rtol=0, atol=5e-6)


@SLOW
@KERNELS
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_of_small_floats(kernel, dtype):
    x = arguments()
    narrow = {
        n: a.astype(dtype) if a.ndim > 2 else a for n, a in x.items() if n != "scale"
    } | dict(scale=x["scale"])
    gradients = jax.grad(lambda x: loss(x, kernel).astype(jnp.float32))(narrow)
    _, wanted = exact()
    for name, gradient in gradients.items():
        assert gradient.dtype == narrow[name].dtype
        np.testing.assert_allclose(
            gradient.astype(jnp.float32), wanted[name], rtol=0, atol=0.3, err_msg=name
        )


@KERNELS
def test_sinks_where_no_key_is_seen(kernel):
    """The output is 0, and the log-sum-exp the sink; -inf is no sink at all."""
    x = arguments()
    nothing = dict(mask_mod=KeyLengths(0))
    out, lse, _ = by_pages(x, kernel, **nothing)
    assert (out == 0).all()
    np.testing.assert_allclose(lse[:6], jnp.broadcast_to(x["sinks"], (6, H)), rtol=1e-6)
    _, lse, _ = by_pages(x, kernel, sinks=None, **nothing)
    assert jnp.isneginf(lse).all()
    without = by_pages(x, kernel, sinks=None)[:2]
    close(by_pages(x, kernel, sinks=jnp.full(H, -jnp.inf))[:2], without, 1e-6)
    out, lse, _ = by_pages(x, kernel, sinks=x["sinks"].at[1].set(jnp.nan))
    assert jnp.isnan(out[:6, 1]).all()
    assert jnp.isnan(lse[:6, 1]).all()
    assert jnp.isfinite(out[:6, jnp.asarray([0, 2, 3])]).all()


@pytest.mark.parametrize("sinks", [jnp.zeros(3), jnp.zeros((1, H))])
def test_sinks_are_one_for_each_head(unchecked, sinks):
    with pytest.raises(
        ValueError, match="must be one number for each of 4 query heads"
    ):
        by_pages(arguments(), None, sinks=sinks)


@NATIVE_FIRST
def test_memory_grows_with_the_pages_and_not_with_the_scores(kernel):
    """2048 rows and 2048 slots: their scores would take 64 MiB."""
    R, pages = 2048, 128
    q, kv = jnp.zeros((R, H, 16)), jnp.zeros((pages, K, 16, 16))

    def run(q, k, v):
        return paged_attention(
            q,
            k,
            v,
            table=jnp.arange(pages, dtype=jnp.int32)[None],
            lengths=jnp.asarray([R], jnp.int32),
            row_offsets=jnp.asarray([0, R], jnp.int32),
            kernel=kernel,
        ).sum()

    compiled = jax.jit(jax.grad(run, (0, 1, 2))).lower(q, kv, kv).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 2**20
