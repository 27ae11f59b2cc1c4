"""`raptax.compat.maxtext` computes what MaxText computes; see tests/data/README.md."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.maxtext_cases import CASES, D, L, P, answers, build, call, decoded, load

# Angles of positions up to 16123, which MaxText works out from rounded frequencies.
FAR = {"rope_llama31": 5e-4, "rope_yarn_interleave": 5e-4}
ATOL = FAR | {"mha_bf16": 3e-2}


QUICK = {"bidirectional_mask", "gqa_causal", "packed_segments"}


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES],
)
def test_the_rows_are_maxtexts(name):
    data = answers(name)
    layer = load(build(**CASES[name]), data)
    atol = ATOL.get(name, 2e-5)
    x = jnp.asarray(data["x"])
    x_kv = jnp.asarray(data["x_kv"]) if "x_kv" in data else None
    positions = jnp.asarray(data["positions"])
    ids = jnp.asarray(data["segment_ids"]) if "segment_ids" in data else None
    options = {}
    if "bidirectional_mask" in data:
        options["bidirectional_mask"] = jnp.asarray(data["bidirectional_mask"])
    y = call(layer, x, x_kv, positions, ids, **options)
    close = lambda a, b: np.testing.assert_allclose(
        np.asarray(a, np.float32), b, rtol=0, atol=atol
    )
    close(y, data["out_train"])
    if "out_prefill" not in data:
        return
    if "segment_ids_prefill" in data:  # eleven tokens and five of padding
        given = jnp.asarray(data["segment_ids_prefill"])
        prompt = call(
            layer, x[:, :P], x[:, :P], positions[:, :P], given, model_mode="prefill"
        )
        close(prompt[:, :11], data["out_prefill"][:, :11])
        row = lambda t: (x[:, t : t + 1], None, positions[:, t : t + 1])
        steps = [
            call(layer, *row(t), model_mode="autoregressive") for t in range(11, 19)
        ]
        close(jnp.concatenate(steps, 1), data["out_ar"])
        return
    if "bidirectional_mask" in data:
        mask = options["bidirectional_mask"][:, :P]
        y = call(
            layer,
            x[:, :P],
            x[:, :P],
            positions[:, :P],
            ids[:, :P],
            model_mode="prefill",
            bidirectional_mask=mask,
        )
        close(y, data["out_prefill"])
        return
    y = decoded(layer, x, prompt=P, positions=positions)
    close(y[:, :P], data["out_prefill"])
    # MaxText's decode forgets what a window still sees: there a row of training counts.
    close(y[:, P:], data.get("out_ar", data["out_train"][:, P:]))
    if "cache_after_ar/cached_prefill_key" in data:
        kept = layer.MlaKVCache_0 if "kv_lora_rank" in CASES[name] else layer.KVCache_0
        for key, value in data.items():
            if key.startswith("cache_after_ar/") and not key.endswith("cache_ar_index"):
                mine = getattr(kept, key.removeprefix("cache_after_ar/"))[...]
                assert mine.shape == value.shape, key
                close(mine, value)
    assert y.shape[1] == L
    assert layer.out_head_dim in (D, 12)
