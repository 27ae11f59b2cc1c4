"""Linear attention: no softmax, so that the past is a sum of fixed size.

Katharopoulos et al. 2020, arXiv:2006.16236. With a feature map ``phi`` in place of the
exponential, ``phi(q_t) . phi(k_s)`` weighs value ``s`` for query ``t``:

    out_t = (phi(q_t) @ sums) / (phi(q_t) @ total),
    sums = sum_s phi(k_s) v_s^T,  total = sum_s phi(k_s),  over the keys that t may see.

Where every query sees every key, the sums are made once. Causal attention goes chunk by
chunk (Hua et al. 2022, arXiv:2202.10447): the scores of a chunk with itself, masked, and
the sums of the chunks before. Time and memory are O(S). In reverse the chunks are worked
out again from the sums before each, which are kept.

Products run on `finite` numbers; ``total`` alone carries the NaN of keys and values, to
exactly the rows that see them.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from .._core.errors import Unsupported, check_dropout, check_mask, check_qkv
from .._core.pytree import pytree
from .._core.types import DropoutKey, MaskMod, ScoreMod
from ..mods import Causal, as_mod
from ..mods.functions import trace_functions
from .softmax import accumulator, finite, poison
from .tiles import by_group

CHUNK = 64  # tokens at most; more of them means more scores, fewer means more sums

FeatureMap = Callable[[jax.Array], jax.Array]
"""Maps the last axis, ``(..., D)`` to ``(..., F)``, token by token, keeping the dtype."""


@pytree
class LinearState:
    """What `linear_attention` keeps of the keys seen so far; it never grows.

    Attributes:
        sums: ``sum_s phi(k_s) v_s^T``, float32, or float64 for float64 inputs. ``D`` is
            the number of features, which `elu_plus_one` leaves at the head size.
        total: ``sum_s phi(k_s)``; NaN once a key or value was not finite.
    """

    sums: Float[Array, "B K D E"]
    total: Float[Array, "B K D"]

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        key_size: int,
        value_size: int,
        dtype: DTypeLike = jnp.float32,
    ) -> "LinearState":
        """No key seen yet. ``dtype`` is that of accumulation."""
        total = jnp.zeros((batch, kv_heads, key_size), dtype)
        return cls(jnp.zeros((*total.shape, value_size), dtype), total)


if TYPE_CHECKING:  # callers know which of the two they asked for
    LinearAttended = Any
else:
    _Output = Float[Array, "B H T E"]
    LinearAttended = _Output | tuple[_Output, LinearState]


def elu_plus_one(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``elu(x) + 1``: ``x + 1`` above 0, ``exp(x)`` below, without cancellation."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


def linear_attention(
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S E"],
    *,
    causal: bool = False,
    state: LinearState | None = None,
    return_state: bool = False,
    feature_map: FeatureMap = elu_plus_one,
    mask: Bool[Array, "#B #H #T #S"] | None = None,
    mask_mod: MaskMod | None = None,
    score_mod: ScoreMod | None = None,
    bias: Float[Array, "#B #H #T #S"] | None = None,
    sinks: Float[Array, " H"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    query_start: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    dropout_rng: DropoutKey | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    return_lse: bool = False,
    chunk_size: int = CHUNK,
) -> LinearAttended:
    """``out_t = sum_s phi(q_t).phi(k_s) v_s / sum_s phi(q_t).phi(k_s)``, in O(S).

    Katharopoulos et al. 2020, arXiv:2006.16236. Called like an `AttentionFn`, and what
    that says of heads, dtypes, rows that see no key, and NaN holds here too, but what
    needs scores or a softmax is declined. All derivatives are JAX's own.

    Args:
        causal: Query ``t`` sees the keys up to ``t``, of which there must be as many as
            queries. Same as ``mask_mod=Causal()``.
        state: What came before: every query sees the keys in it too. Attention in
            parts, each with the state that the one before returned, is attention in
            one pass. Without causal, ``S`` may be 0: queries then read the state alone.
        return_state: Also return the state after all keys.
        feature_map: ``phi``, from the head size to any number of features; see
            `FeatureMap`. A function, or any callable. It is traced on every call, and
            arrays that it carries or captures have gradients. Its values should be
            positive: a row whose weights sum to exactly 0 is 0.
        mask: Of keys, (#B, 1, 1, #S). A masked key adds nothing, to the state neither.
        mask_mod: `Causal` or None.
        chunk_size: Tokens of a causal chunk, at most: larger ones make more scores,
            smaller ones more sums. It changes how fast, never what.

    Returns:
        The output, in the query's dtype and with the value's head size; with
        ``return_state`` the pair of it and the new `LinearState`.

    Raises:
        ValueError: Shapes or dtypes do not fit.
        Unsupported: A mask that is not of keys alone, another mask_mod, causal with
            ``T != S``, score_mod, bias, sinks, scale, query_start, dropout, return_lse.
    """
    check_qkv(query, key, value)
    (B, H, T, _), S = query.shape, key.shape[2]
    check_mask(mask, (B, H, T, S))
    check_dropout(dropout_rng, dropout_rate, deterministic)
    causal = causal or isinstance(mask_mod, Causal)
    reason = _why_not(
        score_mod=score_mod,
        bias=bias,
        sinks=sinks,
        scale=scale,
        query_start=query_start,
        dropout=(dropout_rate > 0 and not deterministic) or None,
        return_lse=return_lse or None,
    ) or _mask_unsupported_reason(mask, mask_mod, causal, T, S)
    if reason is not None:
        raise Unsupported(f"linear_attention cannot run this: {reason}.")
    if not callable(feature_map):
        raise ValueError(f"feature_map must be callable; got {feature_map!r}.")
    if (
        isinstance(chunk_size, bool)
        or not isinstance(chunk_size, int)
        or chunk_size < 1
    ):
        raise ValueError(f"chunk_size={chunk_size!r} must be a whole number from 1 on.")
    arrays = query, key, value, mask, state
    like = jax.ShapeDtypeStruct(key.shape, accumulator(key.dtype))
    feature_map = trace_functions(as_mod(feature_map), like)
    chunk = chunk_size if causal else None
    out, state = _linear_attention(*arrays, feature_map, chunk=chunk)
    return (out, state) if return_state else out


_WITHOUT_SCORES = {
    "score_mod": "it has no scores that a score_mod could change",
    "bias": "it has no scores to add a bias to",
    "sinks": "it has no softmax in which sinks could take their share",
    "scale": "it has no scores to scale",
    "query_start": "it knows no positions; keys that came before are its state",
    "dropout": "it makes no attention weights that dropout could drop",
    "return_lse": "it has no softmax, and so no log-sum-exp",
}


def _why_not(**options: object) -> str | None:
    """One sentence on an option that needs scores, or None."""
    reasons = (_WITHOUT_SCORES[name] for name, x in options.items() if x is not None)
    return next(reasons, None)


def _mask_unsupported_reason(
    mask: jax.Array | None, mask_mod: Any, causal: bool, T: int, S: int
) -> str | None:
    if mask is not None and mask.shape[1:3] != (1, 1):
        return (
            f"its mask is one of keys, (batch, 1, 1, keys), as all queries and heads "
            f"share their sums; got {mask.shape}"
        )
    if mask_mod is not None and not isinstance(mask_mod, Causal):
        return f"of masks it knows Causal, not {type(mask_mod).__name__}"
    if causal and T != S:
        return (
            f"causal takes as many keys as queries, got {S} and {T}; keys that came "
            "before are its state"
        )
    return None


@functools.partial(jax.jit, static_argnames="chunk")
def _linear_attention(query, key, value, mask, state, feature_map, *, chunk):
    """The output, and the state after all keys."""
    B, _, S, _ = key.shape
    seen = jnp.ones((1, 1, S), bool) if mask is None else mask[:, :, 0]
    seen = jnp.broadcast_to(seen, (B, 1, S))
    # Sums over no key are 0, with the sizes and, in a shard_map, the axes they need.
    no_keys = _Keys.create(feature_map, *(x[:, :, :0] for x in (key, value, seen)))
    state = _start(state, no_keys.sums())
    if chunk is not None:
        return _causal(feature_map, state, chunk, query, key, value, seen)
    state = _add(state, _Keys.create(feature_map, key, value, seen).sums())
    return _divide(query, *_weigh(_features(feature_map, query, key), state)), state


def _causal(feature_map, state, most, query, key, value, seen):
    """Chunk by chunk, as even as they can be, so that few tokens are padding."""
    T = query.shape[2]
    number = max(1, -(-T // most))
    size = -(-T // number)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # or each keeps its scores
    def chunk(state, parts):
        query, *rest = parts
        keys = _Keys.create(feature_map, *rest)
        features = _features(feature_map, query, rest[0])
        out, total = _weigh(features, state)
        scores = jnp.einsum("bkgtd,bksd->bkgts", features, keys.features)
        past = jnp.tri(size, dtype=bool)[None, None, None]
        weights = jnp.where(past, scores, 0)
        out += jnp.einsum("bkgts,bkse->bkgte", weights, keys.values)
        seen = scores + keys.nan[:, :, None, None]
        total += jnp.where(past, seen, 0).sum(-1)
        return _add(state, keys.sums()), _divide(query, out, total)

    def cut(x):  # (B, H, T, ...) to (number, B, H, size, ...)
        rest = x.shape[3:]
        x = jnp.pad(x, [(0, 0), (0, 0), (0, number * size - T), *[(0, 0)] * len(rest)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], number, size, *rest), 2, 0)

    state, out = lax.scan(chunk, state, tuple(map(cut, (query, key, value, seen))))
    out = jnp.moveaxis(out, 0, 2)
    out = out.reshape(*query.shape[:2], number * size, out.shape[-1])
    return out[:, :, :T], state


class _Keys(NamedTuple):
    """Keys and values as they are summed: 0 where masked, finite, their NaN apart."""

    features: Float[Array, "B K S F"]
    values: Float[Array, "B K S E"]
    nan: Float[Array, "B K S"]

    @classmethod
    def create(cls, feature_map, key, value, seen) -> "_Keys":
        dtype = accumulator(key.dtype)
        features = _map(feature_map, key)
        nan = poison(key, dtype) + poison(value, dtype)
        return cls(
            jnp.where(seen[..., None], features, 0),
            finite(value).astype(dtype),
            jnp.where(seen, nan, 0),
        )

    def sums(self) -> LinearState:
        """The state after these keys alone."""
        return LinearState(
            jnp.einsum("bksd,bkse->bkde", self.features, self.values),
            self.features.sum(2) + self.nan.sum(2)[..., None],
        )


def _map(feature_map: FeatureMap, x: jax.Array) -> jax.Array:
    """``feature_map(x)``, wide and without NaN, after a check of what came back."""
    x = finite(x).astype(accumulator(x.dtype))
    features = feature_map(x)
    if (features.shape[:-1], features.dtype) != (x.shape[:-1], x.dtype):
        raise ValueError(
            f"feature_map={feature_map} must change the last axis of {x.dtype} "
            f"{x.shape} alone; it returned {features.dtype} {features.shape}."
        )
    return features


def _features(feature_map: FeatureMap, query: jax.Array, key: jax.Array) -> jax.Array:
    """Those of the queries, beside the kv head they read: (B, K, G, T, F)."""
    return by_group(_map(feature_map, query), key.shape[1])


def _start(state: LinearState | None, zeros: LinearState) -> LinearState:
    if state is None:
        return zeros
    for name in ("sums", "total"):
        x, like = getattr(state, name), getattr(zeros, name)
        if (x.shape, x.dtype) != (like.shape, like.dtype):
            raise ValueError(
                f"state.{name} must be {like.dtype} {like.shape} for these keys and "
                f"values; got {x.dtype} {x.shape}."
            )
    return _add(state, zeros)


def _add(state: LinearState, more: LinearState) -> LinearState:
    return LinearState(state.sums + more.sums, state.total + more.total)


def _weigh(features: jax.Array, state: LinearState) -> tuple[jax.Array, jax.Array]:
    """Each query's sum of weighted values, and of weights, over the keys in ``state``."""
    out = jnp.einsum("bkgtd,bkde->bkgte", features, state.sums)
    return out, jnp.einsum("bkgtd,bkd->bkgt", features, state.total)


def _divide(query: jax.Array, out: jax.Array, total: jax.Array) -> jax.Array:
    """``out / total`` (B, H, T, E): 0 where no key was seen, NaN where the query is."""
    B, H, T, _ = query.shape
    out, total = out.reshape(B, H, T, out.shape[-1]), total.reshape(B, H, T)
    nothing = total == 0
    total = jnp.where(nothing, 1, total + poison(query, total.dtype))[..., None]
    return jnp.where(nothing[..., None], 0, out / total).astype(query.dtype)
