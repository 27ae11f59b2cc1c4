"""Projections whose products are rounded: `quant`, by qwix and by AQT."""

import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from raptax.compat.maxtext import QwixQuantization
from tests.maxtext_cases import MLA_SIZES, E, build, call, decoded

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, E)), jnp.float32)


def error(quant, **options):
    pytest.importorskip("qwix")
    exact, rounded = build(**options), build(quant=quant, **options)
    nnx.update(rounded, nnx.state(exact, nnx.Param))
    y, expected = call(rounded, X), call(exact, X)
    return float(jnp.abs(y - expected).mean() / jnp.abs(expected).mean())


def test_int8_products_are_close():
    pytest.importorskip("qwix")
    assert 1e-4 < error(QwixQuantization()) < 0.02


@pytest.mark.slow
def test_rounded_layers_train_and_decode():
    pytest.importorskip("qwix")
    layer = build(quant=QwixQuantization())
    loss = lambda m: (m(X)[0] ** 2).sum()
    gradients = nnx.jit(nnx.grad(loss))(layer)
    for name in ("query", "key", "value", "out"):
        gradient = getattr(gradients, name).kernel[...]
        assert jnp.isfinite(gradient).all()
        assert (gradient != 0).any()
    np.testing.assert_allclose(decoded(layer, X, prompt=4), call(layer, X), atol=5e-2)


@pytest.mark.slow
def test_rounded_weights_alone():
    pytest.importorskip("qwix")
    assert 1e-4 < error(QwixQuantization(act_qtype=None)) < 0.02


@pytest.mark.slow
def test_rounded_latents_decode():
    pytest.importorskip("qwix")
    layer = build(quant=QwixQuantization(), **MLA_SIZES)
    np.testing.assert_allclose(decoded(layer, X, prompt=4), call(layer, X), atol=5e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_aqt_objects_are_taken():
    flax_ = pytest.importorskip("aqt.jax.v2.flax.aqt_flax", exc_type=Exception)
    config = pytest.importorskip("aqt.jax.v2.config", exc_type=Exception)
    cls = functools.partial(flax_.AqtDotGeneral, config.config_v4())
    quant = types.SimpleNamespace(dot_general_cls=lambda mesh_axes: cls)
    assert 1e-4 < error(quant) < 0.05
