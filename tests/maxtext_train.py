"""Trains two layers of `raptax.compat.maxtext` on a text and prints the losses as JSON.

Run:  python -m tests.maxtext_train TEXT STEPS
On 4 forced CPU devices: once as NNX and once as Linen on one of them, then on a 2 x 2
mesh of data and heads.
"""

import functools
import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from raptax.compat.maxtext import Attention, attention_as_linen

B, T, E, VOCABULARY = 8, 32, 32, 128
RULES = [
    ("activation_kv_batch", "data"),
    ("activation_batch_attn", "data"),
    ("activation_kv_heads", "tensor"),
    ("activation_heads", "tensor"),
    ("q_heads", "tensor"),
    ("kv_heads", "tensor"),
    ("heads", "tensor"),
]
COMMON = dict(
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_target_length=T,
    inputs_q_shape=(B, T, E),
    inputs_kv_shape=(B, T, E),
    config=dict(logical_axis_rules=RULES, attention_sink=True),
)
LAYERS = (
    dict(attention_type="local_sliding", sliding_window_size=8, use_qk_norm=True),
    dict(attn_logits_soft_cap=20.0, query_pre_attn_scalar=8**-0.5),
)


def nnx_layers(mesh):
    calls, params = [], []
    for number, options in enumerate(LAYERS):
        layer = Attention(**COMMON | options, mesh=mesh, rngs=nnx.Rngs(number))
        graph, state, rest = nnx.split(layer, nnx.Param, ...)

        def call(pure, x, graph=graph, state=state, rest=rest):
            filled = nnx.clone(state)
            nnx.replace_by_pure_dict(filled, pure)
            return nnx.merge(graph, filled, rest)(x)[0]

        calls.append(call)
        params.append(nnx.to_pure_dict(state))
    return calls, params


def linen_layers():
    modules = [attention_as_linen(**COMMON | options) for options in LAYERS]
    return [lambda p, x, m=m: m.apply({"params": p}, x, x)[0] for m in modules]


def rest_of_the_model():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.1, jnp.float32)
    mlp = [dict(up=draw(E, 4 * E), down=draw(4 * E, E)) for _ in LAYERS]
    return dict(embed=draw(VOCABULARY, E), mlp=mlp, head=draw(E, VOCABULARY))


def norm(x):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def loss(params, ids, calls):
    x = params["embed"][ids[:, :-1]]
    for call, own, mlp in zip(calls, params["layers"], params["mlp"], strict=True):
        x = x + call(own, norm(x))
        x = x + jax.nn.gelu(norm(x) @ mlp["up"]) @ mlp["down"]
    scores = norm(x) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, ids[:, 1:]).mean()


def train(calls, layers, text, steps):
    params = rest_of_the_model() | dict(layers=layers)
    optimiser = optax.adam(3e-3)

    @jax.jit
    def step(params, state, ids):
        value, gradients = jax.value_and_grad(functools.partial(loss, calls=calls))(
            params, ids
        )
        finite = jnp.array([jnp.isfinite(g).all() for g in jax.tree.leaves(gradients)])
        updates, state = optimiser.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value, finite.all()

    state, rng, losses = optimiser.init(params), np.random.default_rng(1), []
    for _ in range(steps):
        starts = rng.integers(0, len(text) - T - 1, B)
        ids = jnp.asarray(np.stack([text[s : s + T + 1] for s in starts]), jnp.int32)
        params, state, value, finite = step(params, state, ids)
        assert finite
        losses.append(float(value))
    return losses


def main(path: str, steps: int) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    text = np.frombuffer(Path(path).read_bytes(), np.uint8) % VOCABULARY
    calls, layers = nnx_layers(None)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "tensor"))
    spread, placed = nnx_layers(mesh)
    kernel = placed[0]["query"]["kernel"]
    out = dict(
        nnx=train(calls, layers, text, steps),
        linen=train(linen_layers(), layers, text, steps),
        mesh=train(spread, placed, text, steps),
        devices=len(kernel.sharding.device_set),
    )
    print(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
