"""`jax.nn.dot_product_attention`: on NVIDIA GPUs, cuDNN's fused kernel."""

from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from .._core.errors import Unsupported, check_qkv
from .._core.types import Attended, DropoutKey, MaskMod, ScoreMod
from ..mods import Causal, SlidingWindow, as_mod
from ..mods.functions import TracedFunction, has_functions
from .softmax import accumulator, finite, poison


def jax_nn_unsupported_reason(
    query: jax.Array, key: jax.Array, value: jax.Array, **problem
):
    """One sentence on what of ``problem`` this kernel cannot do, or None."""
    if problem.get("score_mod") is not None:
        return "it knows no score_mod"
    if problem.get("mask") is not None:
        return "it gives a row that may see no key the mean of the values, not zeros"
    if problem.get("bias") is not None:
        return "it makes NaN of a row whose bias is -inf everywhere"
    if problem.get("sinks") is not None:
        return "it knows no sinks"
    if problem.get("return_lse"):
        return "its log-sum-exp has no derivative on every platform"
    rate, deterministic = (problem.get(n) for n in ("dropout_rate", "deterministic"))
    if deterministic is False and (isinstance(rate, jax.Array) or rate):
        return "it knows no dropout"
    mask_mod = problem.get("mask_mod")
    if mask_mod is not None and not isinstance(mask_mod, Causal | SlidingWindow):
        plain = has_functions(as_mod(mask_mod)) or isinstance(mask_mod, TracedFunction)
        name = "a function" if plain else type(mask_mod).__name__
        return f"of masks it knows Causal and SlidingWindow, not {name}"
    if mask_mod is not None and query.shape[2] != key.shape[2]:
        return "it lets the first query see the first key when lengths differ"
    if mask_mod is not None and problem.get("query_start") is not None:
        return "it knows no query_start"
    if isinstance(mask_mod, SlidingWindow) and not isinstance(mask_mod.size, int):
        return "its window is a number, not an array"
    if isinstance(problem.get("scale"), jax.Array):
        return "its scale is a number, not an array"
    if query.shape[3] != value.shape[3]:
        return "it needs one head size for keys and values"
    if query.size == 0 or key.size == 0:
        return "it needs at least one query and one key"
    return None


def jax_nn_attention(
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S E"],
    *,
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
) -> Attended:
    """See `AttentionFn`; `jax_nn_unsupported_reason` says what this one cannot do.

    On NVIDIA GPUs weights are rounded to the inputs' dtype before they meet the values.
    Elsewhere it works in float32 and stores all B * H * T * S scores. A NaN in a key
    that is masked does not reach the output, but does reach the query's gradient.
    """
    check_qkv(query, key, value)
    reason = jax_nn_unsupported_reason(
        query,
        key,
        value,
        mask=mask,
        mask_mod=mask_mod,
        score_mod=score_mod,
        bias=bias,
        sinks=sinks,
        scale=scale,
        query_start=query_start,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        return_lse=return_lse,
    )
    if reason is not None or isinstance(scale, jax.Array):
        raise Unsupported(f"jax_nn cannot run this: {reason}.")
    # jax.nn multiplies masked values by 0, and 0 * NaN is NaN: so values go in finite,
    # and a key whose value was not takes the NaN, which the mask does keep apart.
    key = key + poison(value, key.dtype)[..., None]
    dtype = query.dtype if jax.default_backend() == "gpu" else accumulator(query.dtype)
    q, k, v = (x.swapaxes(1, 2).astype(dtype) for x in (query, key, finite(value)))
    window: Any = None
    if isinstance(mask_mod, SlidingWindow):
        window = mask_mod.size - 1, 0
    causal = mask_mod is not None
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, local_window_size=window
    )
    return out.swapaxes(1, 2).astype(query.dtype)
