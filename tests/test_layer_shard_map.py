"""A data-parallel step in `jax.shard_map`, with gradients and ``check_vma=True``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from raptax.compat.maxtext import MLA, Attention
from raptax.rope import (
    DynamicRotaryEmbedding,
    LongRoPERotaryEmbedding,
    MultiAxisRotaryEmbedding,
    RotaryEmbedding,
)

X = jax.random.normal(jax.random.key(0), (4, 6, 24))
NTK = DynamicRotaryEmbedding.create(8, factor=2.0, max_position=4)
LONG = LongRoPERotaryEmbedding.create(
    8,
    short_factor=[1.0] * 4,
    long_factor=[2.0] * 4,
    original_max_position=4,
    max_position=16,
)
ROPES = {
    "plain": RotaryEmbedding.create(8),
    "learned": RotaryEmbedding(jnp.full(4, 0.5)),
    "dynamic": NTK,
    "dynamic, a length": NTK.at(jnp.int32(6)),
    "longrope": LONG,
    "longrope, a length": LONG.at(jnp.int32(7)),
    "longrope, by position": LongRoPERotaryEmbedding(
        LONG.inv_freq,
        long_inv_freq=LONG.long_inv_freq,
        original_max_position=4,
        switch="position",
    ),
    "axes": MultiAxisRotaryEmbedding.create(8, sections=(2, 1, 1)),
}


def check(loss, weights):
    """That each device's share of the batch gives the gradients of all of it."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = jax.grad(loss, argnums=(0, 1))
    shared = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=(P(), P("data")),
        check_vma=True,
    )
    actual, expected = (jax.jit(f)(weights, X) for f in (shared, step))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", ROPES)
def test_rotary_embeddings(name):
    leaves, structure = jax.tree.flatten(ROPES[name])
    floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    rest = [x for x in leaves if not jnp.issubdtype(x.dtype, jnp.floating)]

    def loss(floats, x):
        embedding = jax.tree.unflatten(structure, floats + rest)
        at = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), x.shape[:2])
        return (embedding(x.reshape(*x.shape[:2], 3, 8), at) ** 3).sum()

    check(loss, floats)


SIZES = dict(
    num_query_heads=4,
    num_kv_heads=4,
    head_dim=8,
    max_target_length=16,
    inputs_q_shape=(4, 16, 24),
    inputs_kv_shape=(4, 16, 24),
    attention_kernel="dot_product",
)
LATENT = dict(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Attention, dict(use_qk_norm=True, config=dict(attention_sink=True))),
        (Attention, dict(config=dict(moba=True, moba_chunk_size=3, moba_topk=2))),
        (MLA, LATENT),
    ],
)
def test_maxtexts_layers(kind, options):
    graph, weights, rest = nnx.split(
        kind(**SIZES | options, rngs=nnx.Rngs(0)), nnx.Param, ...
    )

    def loss(weights, x):
        layer = nnx.merge(graph, weights, rest)
        return (layer(x, deterministic=True)[0] ** 2).sum()

    check(loss, weights)
