"""What a call outside jit costs at sizes where there is nothing to compute.

    python -m benchmarks.bench_eager

Medians of calls in turns: `attention` with the masks and score_mods that people use, a
plain function, which is traced on every call, and `jax.nn.dot_product_attention` on its
own and under jit. Exits with 1 if a result is wrong.
"""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import raptax
from benchmarks.machine import seconds
from raptax import Causal, Documents, SlidingWindow, SoftCap, attention

REPEATS = 101
B, H, T, D = 1, 4, 8, 16


def options() -> dict[str, dict]:
    slopes = raptax.alibi_slopes(H)
    three = raptax.compose_score_mods(
        SoftCap(3.0), raptax.ALiBi(slopes), raptax.Temperature(jnp.float32(2))
    )
    ids = jnp.zeros((B, T), jnp.int32)
    return {
        "no options": {},
        "Causal": dict(mask_mod=Causal()),
        "SlidingWindow": dict(mask_mod=SlidingWindow(3)),
        "ALiBi": dict(score_mod=raptax.ALiBi(slopes)),
        "Documents & Causal": dict(mask_mod=Documents(ids) & Causal()),
        "three score_mods": dict(score_mod=three),
        "key_lengths": dict(key_lengths=jnp.array([5], jnp.int32)),
        "a function": dict(mask_mod=lambda b, h, q, k: (q + k) % 2 == 0),
    }


def main() -> int:
    q, k, v = (jax.random.normal(jax.random.key(n), (B, H, T, D)) for n in range(3))
    calls: dict[str, Callable[[], jax.Array]] = {}
    wrong = []
    for name, given in options().items():
        calls[name] = lambda given=given: attention(q, k, v, **given)
        expected = attention(q, k, v, kernel="reference", **given)
        if not np.allclose(calls[name](), expected, rtol=0, atol=1e-5):
            wrong.append(name)
    query, keys = (jnp.ones((1, 8, n, 64)) for n in (1, 128))
    calls["decode, S=128"] = lambda: attention(query, keys, keys)
    theirs = [x.swapaxes(1, 2) for x in (query, keys, keys)]
    calls["jax.nn, S=128"] = lambda: jax.nn.dot_product_attention(*theirs)
    jitted = jax.jit(jax.nn.dot_product_attention)
    calls["jax.nn in jit, S=128"] = lambda: jitted(*theirs)
    print("call                      median     p10     p90")
    for name, times in seconds(calls, REPEATS).items():
        low, median, high = np.quantile(times, [0.1, 0.5, 0.9]) * 1e3
        print(f"{name:22}{median:7.3f} ms {low:7.3f} {high:7.3f}")
    print("\n".join(f"wrong: {name}" for name in wrong) or "all results are right")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
