"""Numbers that mods hold: array leaves, checked where they are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import raptax
from raptax.kernels.blockwise import blockwise_attention
from raptax.kernels.cpu.library import missing_reason
from raptax.kernels.reference import reference_attention

B, H, T, D = 2, 2, 9, 4
Q = jnp.asarray(np.random.default_rng(0).normal(size=(B, H, T, D)), jnp.float32)

MASKS = {
    "sliding": (raptax.SlidingWindow, (3,), (5,)),
    "window": (raptax.Window, (3, 1), (2, 4)),
    "dilated": (lambda *n: raptax.Window(*n, dilation=2), (1, 1), (2, 0)),
    "left": (lambda n: raptax.Window(n, None), (3,), (1,)),
    "right": (lambda n: raptax.Window(None, n), (3,), (1,)),
    "sinks": (raptax.SinkWindow, (1, 2), (2, 4)),
    "strided": (raptax.Strided, (3, 2), (2, 1)),
    "chunked": (raptax.Chunked, (3,), (4,)),
    "blocks": (raptax.BlockCausal, (3,), (4,)),
    "natten": (raptax.Natten2D, (3, 3, 1), (3, 3, 3)),
    "banded": (lambda n: raptax.Causal() & raptax.Window(n, None), (3,), (1,)),
}
SCORES = {
    "cap": (raptax.SoftCap, (1.5,), (0.75,)),
    "logn": (raptax.LogN, (3,), (5,)),
}
MODS = MASKS | SCORES
KERNELS = ["blockwise", "reference", *([] if missing_reason() else ["native"])]


def attend(mod, kernel, **options):
    kind = "mask_mod" if callable(getattr(mod, "__and__", None)) else "score_mod"
    options = {kind: mod, "kernel": kernel, **options}
    return raptax.attention(2 * Q, Q, Q, **options)


def definition(mod):
    kind = "mask_mod" if callable(getattr(mod, "__and__", None)) else "score_mod"
    return reference_attention(2 * Q, Q, Q, **{kind: mod})


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", MODS)
def test_new_numbers_run_the_same_program(name, kernel):
    build, first, second = MODS[name]
    traces = []

    @jax.jit
    def run(mod):
        traces.append(None)
        return attend(mod, kernel)

    @jax.jit
    def made_inside(*numbers):
        return attend(build(*numbers), kernel)

    run(build(*first))
    expected = definition(build(*second))
    for got in (
        attend(build(*second), kernel),
        run(build(*second)),
        made_inside(*second),
    ):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
    assert len(traces) == 1


def test_no_kernel_in_plain_jax_compiles_for_each_number():
    before = None
    for cap, size in ((1.5, 3), (2.5, 4), (30.0, 5)):
        mods = dict(score_mod=raptax.SoftCap(cap), mask_mod=raptax.Chunked(size))
        blockwise_attention(Q, Q, Q, **mods)
        count = raptax.kernels.blockwise._blockwise._cache_size()
        assert before in (None, count)
        before = count


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["sliding", "chunked", "cap"])
def test_vmap_over_numbers(name, kernel):
    build, first, second = MODS[name]
    stacked = [jnp.asarray(pair) for pair in zip(first, second, strict=True)]
    got = jax.vmap(lambda *numbers: attend(build(*numbers), kernel))(*stacked)
    for out, numbers in zip(got, (first, second), strict=True):
        expected = definition(build(*numbers))
        np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_cap_is_learned(kernel):
    def loss(mod):
        return (attend(mod, kernel) ** 2).sum()

    step = 1e-2
    slope = (loss(raptax.SoftCap(1 + step)) - loss(raptax.SoftCap(1 - step))) / step / 2
    got = jax.grad(loss)(raptax.SoftCap(1.0)).cap
    np.testing.assert_allclose(got, slope, rtol=2e-2)
    assert abs(got) > 1e-2
    under_jit = jax.jit(jax.grad(loss))(raptax.SoftCap(1.0)).cap
    np.testing.assert_allclose(got, under_jit, rtol=1e-5)


def test_a_scanned_window_and_the_lengths_of_many_tiles():
    q = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, 1100, 4)), jnp.float32)

    def step(_, size):
        return None, raptax.attention(q, q, q, mask_mod=raptax.SlidingWindow(size))

    got = lax.scan(step, None, jnp.array([40, 900], jnp.int32))[1]
    for out, size in zip(got, (40, 900), strict=True):
        expected = reference_attention(q, q, q, mask_mod=raptax.SlidingWindow(size))
        np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", MASKS)
def test_block_masks_keep_the_numbers_they_were_given(name):
    build, numbers, _ = MASKS[name]
    made = raptax.create_block_mask(build(*numbers), seq_q=T, seq_kv=T, block=(4, 4))
    assert made.mask_mod == build(*numbers)
    assert jax.tree.structure(made.mask_mod) == jax.tree.structure(build(*numbers))
    np.testing.assert_allclose(
        raptax.attention(2 * Q, Q, Q, mask_mod=made),
        definition(build(*numbers)),
        rtol=2e-5,
        atol=2e-6,
    )


def test_numbers_of_64_bits():
    with jax.enable_x64(True):
        q = jnp.asarray(np.random.default_rng(2).normal(size=(1, 2, T, D)), jnp.float64)
        expected = raptax.attention(
            q,
            q,
            q,
            mask_mod=raptax.SlidingWindow(3),
            score_mod=raptax.SoftCap(1.5),
            kernel="reference",
        )
        for cap in (1.5, np.float32(1.5), jnp.asarray(1.5, jnp.float32)):
            run = jax.jit(
                lambda mask_mod, score_mod: raptax.attention(
                    q, q, q, mask_mod=mask_mod, score_mod=score_mod
                )
            )
            got = run(raptax.SlidingWindow(jnp.asarray(3)), raptax.SoftCap(cap))
            np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_equal_numbers_make_equal_mods():
    assert raptax.SlidingWindow(np.int8(4)) == raptax.SlidingWindow(4)
    assert raptax.SlidingWindow(np.array(4)) == raptax.SlidingWindow(4)
    assert type(raptax.SlidingWindow(np.uint64(4)).size) is int
    assert raptax.SlidingWindow(4) != raptax.SlidingWindow(5)
    assert raptax.SoftCap(30) == raptax.SoftCap(np.float32(30)) == raptax.SoftCap(30.0)
    assert repr(raptax.SlidingWindow(np.int32(4))) == "SlidingWindow(size=4)"
    assert len({raptax.SlidingWindow(4), raptax.SlidingWindow(np.int64(4))}) == 1
    run = jax.jit(lambda mod: attend(mod, None), static_argnums=0)
    np.testing.assert_allclose(
        run(raptax.SlidingWindow(4)), attend(raptax.SlidingWindow(4), None), rtol=1e-5
    )


WHOLE = {
    "SlidingWindow.size": (raptax.SlidingWindow, 0),
    "Window.left": (raptax.Window, -1),
    "Window.right": (lambda n: raptax.Window(1, n), -1),
    "Window.dilation": (lambda n: raptax.Window(1, 1, n), 0),
    "SinkWindow.sinks": (lambda n: raptax.SinkWindow(n, 1), -1),
    "SinkWindow.size": (lambda n: raptax.SinkWindow(1, n), 0),
    "Strided.stride": (lambda n: raptax.Strided(n, 1), 0),
    "Strided.local": (lambda n: raptax.Strided(1, n), 0),
    "Chunked.size": (raptax.Chunked, 0),
    "BlockCausal.size": (raptax.BlockCausal, 0),
    "Natten2D.height": (lambda n: raptax.Natten2D(n, 4, 1), 0),
    "Natten2D.width": (lambda n: raptax.Natten2D(4, n, 1), 0),
    "Natten2D.window": (lambda n: raptax.Natten2D(4, 4, n), 0),
    "LogN.train_length": (raptax.LogN, 1),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_number_that_is_not_whole_is_refused(name, unchecked):
    build, too_small = WHOLE[name]
    field = name.partition(".")[2]
    for number in (3.5, 3.0, True, "4", np.True_, np.float64(3), np.array(3.5), [3]):
        with pytest.raises(ValueError, match=rf"{field}=.* must be a whole number"):
            build(number)
    for number in (too_small, -3, np.int8(-3), jnp.asarray(-3)):
        with pytest.raises(ValueError, match=rf"{field}=-?[0-9]* must be at least"):
            build(number)
    with pytest.raises(ValueError, match=r"at most 2\*\*31 - 1"):
        build(2**31)
    for array in (jnp.ones(2, jnp.int32), jnp.asarray(3.0), jnp.asarray(True)):
        with pytest.raises(
            ValueError, match=f"{field} must be one number of dtype int"
        ):
            build(array)
        with pytest.raises(
            ValueError, match=f"{field} must be one number of dtype int"
        ):
            jax.jit(build)(array)


def test_a_number_that_is_none_is_refused(unchecked):
    with pytest.raises(ValueError, match="size=None must be a whole number"):
        raptax.SlidingWindow(None)


@pytest.mark.parametrize(
    "cap",
    [0, 0.0, -1.0, float("nan"), float("inf"), True, "4", None, np.float32("nan")],
)
def test_a_cap_that_is_no_positive_number_is_refused(cap, unchecked):
    with pytest.raises(
        ValueError, match=r"cap=.* must be a positive and finite number"
    ):
        raptax.SoftCap(cap)


def test_an_array_cap_is_one_float(unchecked):
    for cap in (jnp.ones(2), jnp.asarray(3), jnp.asarray(True)):
        with pytest.raises(ValueError, match="cap must be one number of dtype float"):
            raptax.SoftCap(cap)
    with pytest.raises(ValueError, match="must be a positive"):
        raptax.SoftCap(jnp.asarray(-1.0))
