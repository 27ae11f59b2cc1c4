"""Gradients of learned arrays of 16 bits: summed in float32 and rounded once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raptax import ALiBi, T5Bias, Temperature, alibi_slopes, attention
from raptax.kernels.cpu.library import available

H, K, T, D = 4, 2, 512, 8
KERNELS = [*(["native"] if available() else []), "blockwise"]
ROUNDING = {jnp.bfloat16: 4e-3, jnp.float16: 1e-3}
"""A gradient's distance from the float32 one, relative to its largest entry."""


def numbers(*shape: int, seed: int = 0) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x, jnp.float32)


def captured(x):
    return dict(score_mod=lambda s, b, h, i, j: s + x[h, j % 8].astype(s.dtype))


LEARNED = {
    "t5": (lambda x: dict(score_mod=T5Bias(x)), numbers(32, H)),
    "alibi": (lambda x: dict(score_mod=ALiBi(x)), alibi_slopes(H) / 8),
    "scale": (lambda x: dict(scale=x), jnp.float32(0.35)),
    "temperature": (lambda x: dict(score_mod=Temperature(x)), 1 + numbers(H) / 4),
    "bias": (lambda x: dict(bias=x), numbers(1, H, 1, T)),
    "row bias": (lambda x: dict(bias=x), numbers(1, 1, T, T)),
    "sinks": (lambda x: dict(sinks=x), 4 + numbers(H)),
    "captured": (captured, numbers(H, 8)),
}


@pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)],
    ids=lambda x: x.__name__,
)
@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gradient_is_rounded_once(kernel, name, dtype):
    """Cotangents are positive, so that sums grow beyond what 16 bits can count."""
    options, array = LEARNED[name]
    q, k, v = (numbers(1, n, T, D, seed=i) for i, n in enumerate((H, K, K)))
    d_out = jnp.abs(numbers(1, H, T, D, seed=3))

    def gradient(x, kernel):
        loss = lambda x: (
            attention(q, k, v + 1, kernel=kernel, **options(x)) * d_out
        ).sum()
        return jax.jit(jax.grad(loss))(x)

    narrow = array.astype(dtype)
    actual = gradient(narrow, kernel)
    expected = np.asarray(gradient(narrow.astype(jnp.float32), "reference"))
    assert actual.dtype == dtype
    atol = ROUNDING[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(actual.astype(jnp.float32), expected, rtol=0, atol=atol)
