"""Layers of `raptax.compat.maxtext` by name, and the answers that MaxText gave for them.

`CASES` are the cases of tests/data/maxtext.npz: keyword arguments and config of each.
`build` makes a layer of these sizes, `load` gives it MaxText's weights under MaxText's
names, `decoded` runs a prompt and then one token after another.
"""

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from raptax.compat.maxtext import MLA, Attention

DATA = Path(__file__).parent / "data"
B, L, P, E, N, K, D = 2, 24, 16, 32, 4, 2, 16
BASE = dict(
    num_query_heads=N,
    num_kv_heads=K,
    head_dim=D,
    max_target_length=L,
    max_prefill_predict_length=P,
    inputs_q_shape=(B, L, E),
    inputs_kv_shape=(B, L, E),
    attention_kernel="dot_product",
    model_mode="prefill",
)
YARN = dict(
    max_position_embeddings=20000,
    original_max_position_embeddings=64,
    rope_factor=4.0,
    beta_fast=4,
    beta_slow=1,
)
MLA_SIZES = dict(
    num_kv_heads=N,
    kv_lora_rank=10,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
)
CASES = {
    "attention_sink": dict(config=dict(attention_sink=True)),
    "bias": dict(use_bias_in_projections=True),
    "bidirectional_mask": {},
    "chunk_8": dict(attention_type="chunk", config=dict(chunk_attn_window_size=8)),
    "full_cross": dict(attention_type="full", is_nope_layer=True),
    "fused_qkv": dict(config=dict(fused_qkv=True)),
    "gqa_causal": {},
    "layout_cache_0213": dict(
        prefill_cache_axis_order=(0, 2, 1, 3), ar_cache_axis_order=(0, 2, 1, 3)
    ),
    "mha_bf16": dict(dtype=jnp.bfloat16),
    "mla_latent_cache": dict(MLA_SIZES),
    "mqa_causal": dict(num_kv_heads=1),
    "mrope_3d": dict(use_mrope=True, mrope_section=(4, 2, 2)),
    "nope_temperature_tuning": dict(
        is_nope_layer=True, temperature_tuning=True, temperature_tuning_floor_scale=4.0
    ),
    "packed_segments": {},
    "padded_prefill_11": {},
    "qk_norm_l2_llama4": dict(
        use_qk_norm=True,
        query_pre_attn_scalar=0.25,
        config=dict(decoder_block="llama4"),
    ),
    "qk_norm_rms": dict(use_qk_norm=True),
    "query_pre_attn_scalar": dict(query_pre_attn_scalar=0.37),
    "rope_linear_scaling_8": dict(config=dict(rope_linear_scaling_factor=8.0)),
    "rope_llama31": dict(rope_type="llama3.1", config=dict(rope_max_timescale=500000)),
    "rope_partial_0p5": dict(partial_rotary_factor=0.5),
    "rope_yarn_interleave": dict(rope_type="yarn", config=YARN),
    "share_kv_projections": dict(share_kv_projections=True, use_qk_norm=True),
    "sliding_window_5": dict(attention_type="local_sliding", sliding_window_size=5),
    "softcap_2": dict(attn_logits_soft_cap=2.0),
}


@functools.partial(nnx.jit, static_argnames=("model_mode", "deterministic"))
def call(layer: Attention, *args, **options):
    """What the layer returns, compiled: op by op it would take ten times as long."""
    return layer(*args, **options)[0]


def answers(name: str) -> dict[str, np.ndarray]:
    """What MaxText computed: inputs, weights ``w/...`` and outputs."""
    with np.load(DATA / "maxtext.npz") as data:
        found = {k: data[k] for k in data.files if k.startswith(f"{name}/")}
        for key, other in json.loads(str(data["same_as"])).items():
            if key.startswith(f"{name}/"):
                found[key] = data[other]
    return {key.removeprefix(f"{name}/"): value for key, value in found.items()}


def build(**options) -> Attention:
    options = BASE | options
    cls = MLA if "kv_lora_rank" in options else Attention
    return cls(**options, rngs=nnx.Rngs(0))


def load(layer: Attention, data: dict[str, np.ndarray]) -> Attention:
    """Puts weights under their names; every parameter there is must be given."""
    state = nnx.state(layer, nnx.Param)
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}
    given = {key.removeprefix("w/") for key in data if key.startswith("w/")}
    assert paths == given
    for path, variable in nnx.to_flat_state(state):
        value = data["w/" + "/".join(map(str, path))]
        assert variable.shape == value.shape, path
        variable[...] = jnp.asarray(value)
    nnx.update(layer, state)
    return layer


def randomise(layer: Attention, seed: int = 0) -> Attention:
    """Draws biases, norms and sinks as well, so that wrong handling of them shows."""
    rng = np.random.default_rng(seed)
    state = nnx.state(layer, nnx.Param)
    for path, variable in nnx.to_flat_state(state):
        if path[-1] != "kernel":
            drawn = rng.normal(0.5, 0.5, variable.shape)
            variable[...] = jnp.asarray(drawn, variable.dtype)
    nnx.update(layer, state)
    return layer


def decoded(
    layer, x, *, prompt, positions=None, ids=None, chunks=None, pad=0, **options
):
    """Rows of a prompt, then of single tokens, and what the layer then holds.

    ``chunks`` cuts the prompt; ``pad`` rows of other numbers stand behind it.
    """
    if pad:
        filler = jnp.full((x.shape[0], pad, x.shape[2]), 7.0, x.dtype)
        padded = jnp.concatenate([x[:, :prompt], filler], axis=1)
        ids = jnp.repeat((jnp.arange(prompt + pad) < prompt)[None], x.shape[0], 0)
        ids = ids.astype(jnp.int32)
    else:
        padded = x[:, :prompt]
    at = lambda a, b: None if positions is None else positions[:, a:b]
    out, start = [], 0
    for stop in [*(chunks or []), padded.shape[1]]:
        part = padded[:, start:stop]
        y = call(
            layer,
            part,
            None,
            at(start, stop),
            None if ids is None else ids[:, start:stop],
            model_mode="prefill",
            previous_chunk=padded[:, :start] if start else None,
            **options,
        )
        out.append(y)
        start = stop
    out = [jnp.concatenate(out, axis=1)[:, :prompt]]
    for t in range(prompt, x.shape[1]):
        row = x[:, t : t + 1]
        y = call(layer, row, None, at(t, t + 1), model_mode="autoregressive", **options)
        out.append(y)
    return jnp.concatenate(out, axis=1)
