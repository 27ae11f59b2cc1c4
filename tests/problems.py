"""One table of attention problems, for the tests and for the benchmarks.

Lengths around and beyond one tile of the blockwise kernel (256), sizes that are no
multiple of anything, and everything that `attention` can be asked for.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import raptax
from raptax import Causal, Documents, KeyLengths, SlidingWindow, SoftCap

Options = Callable[["Problem"], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes, and the options that go with them. Numbers follow from the name alone."""

    name: str
    B: int = 2
    H: int = 4
    K: int = 2
    T: int = 70
    S: int = 70
    D: int = 16
    E: int = 16
    options: Options = lambda p: {}
    scale_of_logits: float = 1.0

    def random(self, *shape: int, seed: int = 0) -> np.ndarray:
        words = [*self.name.encode(), seed]
        return np.random.default_rng(words).normal(size=shape)

    def arrays(self, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query, key and value, rounded to float32 and then to ``dtype``."""
        shapes = (
            (self.B, self.H, self.T, self.D),
            (self.B, self.K, self.S, self.D),
            (self.B, self.K, self.S, self.E),
        )
        q, k, v = (self.random(*s, seed=n) for n, s in enumerate(shapes))
        q = q * self.scale_of_logits
        return tuple(jnp.asarray(x.astype(np.float32)).astype(dtype) for x in (q, k, v))

    def cotangent(self, dtype: Any) -> jax.Array:
        x = self.random(self.B, self.H, self.T, self.E, seed=3).astype(np.float32)
        return jnp.asarray(x).astype(dtype)

    def kwargs(self) -> dict[str, Any]:
        return self.options(self)


def slopes(p: Problem) -> jax.Array:
    return raptax.alibi_slopes(p.H)


def mask(p: Problem, *shape: int) -> jax.Array:
    return jnp.asarray(p.random(*shape, seed=9) > 0)


def document_ids(p: Problem) -> jax.Array:
    return jnp.asarray(np.arange(p.S)[None] // 29 + np.arange(p.B)[:, None], jnp.int32)


def numbers(p: Problem, *shape: int) -> jax.Array:
    return jnp.asarray(p.random(*shape, seed=4), jnp.float32)


def lopsided(p: Problem) -> jax.Array:
    """A bias of keys that leaves the second sequence only one of them."""
    bias = numbers(p, p.B, 1, 1, p.S)
    return bias.at[1, :, :, 1:].set(-jnp.inf)


def tiles(p: Problem, mask_mod: Any) -> raptax.BlockMask:
    return raptax.create_block_mask(
        mask_mod & Causal(),
        batch=p.B,
        heads=p.H,
        seq_q=p.T,
        seq_kv=p.S,
        block=(48, 32),
    )


def every_third(b_idx, h_idx, q_idx, kv_idx):
    return (q_idx + kv_idx + h_idx) % 3 == 0


def dropped(p: Problem) -> dict[str, Any]:
    rng = jax.random.key(7)
    return dict(dropout_rng=rng, dropout_rate=0.25, deterministic=False)


def capped_alibi(p: Problem) -> Any:
    return raptax.compose_score_mods(SoftCap(3.0), None, raptax.ALiBi(slopes(p)))


TABLE = (
    Problem("plain"),
    Problem("one of each", B=1, H=1, K=1, T=1, S=1, D=1, E=1),
    Problem("decode", T=1, S=300, options=lambda p: dict(mask_mod=Causal())),
    Problem("mha", K=4, options=lambda p: dict(mask_mod=Causal())),
    Problem("mqa", K=1, options=lambda p: dict(mask_mod=Causal())),
    Problem("gqa 7", B=1, H=7, K=1, D=8, E=8),
    Problem("causal tiles", T=520, S=520, options=lambda p: dict(mask_mod=Causal())),
    Problem("causal chunk", T=65, S=300, options=lambda p: dict(mask_mod=Causal())),
    Problem("more queries", T=300, S=65, options=lambda p: dict(mask_mod=Causal())),
    Problem("window", T=300, S=300, options=lambda p: dict(mask_mod=SlidingWindow(40))),
    Problem(
        "documents",
        T=257,
        S=257,
        options=lambda p: dict(mask_mod=Documents(document_ids(p)) & Causal()),
    ),
    Problem(
        "lengths",
        S=300,
        options=lambda p: dict(mask_mod=KeyLengths(jnp.array([0, 270], jnp.int32))),
    ),
    Problem("not causal", options=lambda p: dict(mask_mod=~Causal())),
    Problem("function", T=90, S=257, options=lambda p: dict(mask_mod=every_third)),
    Problem("mask", S=300, options=lambda p: dict(mask=mask(p, p.B, p.H, p.T, p.S))),
    Problem("key mask", S=300, options=lambda p: dict(mask=mask(p, p.B, 1, 1, p.S))),
    Problem("row mask", S=300, options=lambda p: dict(mask=mask(p, 1, p.H, p.T, 1))),
    Problem(
        "mask and mod",
        T=260,
        S=260,
        options=lambda p: dict(mask=mask(p, 1, 1, p.T, p.S), mask_mod=Causal()),
    ),
    Problem("nothing", options=lambda p: dict(mask=jnp.zeros((1, 1, 1, 1), bool))),
    Problem("soft cap", options=lambda p: dict(score_mod=SoftCap(2.0))),
    Problem(
        "alibi",
        S=300,
        options=lambda p: dict(
            score_mod=raptax.ALiBi(slopes(p)), mask_mod=Causal() | every_third
        ),
    ),
    Problem("composed", options=lambda p: dict(score_mod=capped_alibi(p))),
    Problem(
        "bias",
        S=300,
        options=lambda p: dict(bias=numbers(p, 1, p.H, p.T, p.S), score_mod=SoftCap(2)),
    ),
    Problem(
        "row bias",
        T=260,
        S=260,
        options=lambda p: dict(bias=numbers(p, p.B, 1, p.T, 1), mask_mod=Causal()),
    ),
    Problem("key bias", S=300, options=lambda p: dict(bias=lopsided(p))),
    Problem(
        "sinks",  # the first 235 queries see nothing else
        T=300,
        S=65,
        options=lambda p: dict(
            sinks=numbers(p, p.H), mask_mod=Causal(), return_lse=True
        ),
    ),
    Problem(
        "log-sum-exp",  # the first 235 queries have none
        T=300,
        S=65,
        options=lambda p: dict(mask_mod=SlidingWindow(40), return_lse=True),
    ),
    Problem(
        "block mask",  # tiles of its own size, cut short at both ends
        T=257,
        S=257,
        options=lambda p: dict(mask_mod=tiles(p, Documents(document_ids(p)))),
    ),
    Problem(
        "block mask of a chunk",
        T=70,
        S=257,
        options=lambda p: dict(mask_mod=tiles(p, SlidingWindow(40)), return_lse=True),
    ),
    Problem("own scale", options=lambda p: dict(scale=0.7)),
    Problem("array scale", options=lambda p: dict(scale=jnp.float32(0.7))),
    Problem("value size", D=24, E=40, options=lambda p: dict(mask_mod=Causal())),
    Problem("odd sizes", H=3, K=1, T=63, S=129, D=5, E=3),
    Problem("large head", T=33, S=33, D=192, E=128),
    Problem("large logits", scale_of_logits=30.0),
    Problem("first key", options=lambda p: dict(query_start=0, mask_mod=Causal())),
    Problem(
        "own starts",
        S=300,
        options=lambda p: dict(
            query_start=jnp.array([3, 150], jnp.int32), mask_mod=Causal()
        ),
    ),
    Problem("dropout", T=40, S=300, options=dropped),
    Problem("no queries", T=0),
    Problem("no keys", S=0),
    Problem("no sequences", B=0),
)
PROBLEMS = {problem.name: problem for problem in TABLE}
assert len(PROBLEMS) == len(TABLE), "two problems share a name"
