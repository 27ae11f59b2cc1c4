"""Shape letters, layouts, and the protocols of kernels, masks and score_mods.

Every annotation and every shape comment uses the same letters.

    B  sequences in a batch         T  query length
    H  query heads                  S  key length
    K  key/value heads (H % K == 0) D  head size of q and k
    N  pages in the pool            E  head size of v
    P  tokens per page              M  pages per sequence
    F  rotary frequencies           C  width of a layer's input and output
    L  layers                       R  packed (ragged) tokens: sequence after sequence

Arrays are head-major, ``(B, H, T, D)``. A kernel that needs another layout transposes
where they enter, so no caller ever does. Ragged batches are rows ``(R, ...)`` with
``row_offsets`` of ``B + 1`` entries: sequence ``b`` owns rows ``row_offsets[b]`` to
``row_offsets[b + 1] - 1``, and rows from ``row_offsets[B]`` on are padding.

Positions are absolute. Query ``t`` stands at ``query_start + t``, and ``query_start``
is ``S - T`` unless given: the last query sees the last key. Masks and score_mods are
functions of these positions, so they mean the same in training, prefill and decode.
"""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

Indices = tuple[
    Int[Array, "B 1 1 1"],
    Int[Array, "1 H 1 1"],
    Int[Array, "#B 1 T 1"],
    Int[Array, "1 1 1 S"],
]
"""``(b_idx, h_idx, q_idx, kv_idx)`` as arrays that broadcast to ``(B, H, T, S)``."""

DropoutKey = PRNGKeyArray | UInt32[Array, "2"]
"""A key from ``jax.random.key``, or the older pair of words from ``PRNGKey``."""


if TYPE_CHECKING:  # callers know which of the two they asked for
    Attended = Any
else:
    _Output, _LogSumExp = Float[Array, "B H T E"], Float[Array, "B H T"]
    Attended = _Output | tuple[_Output, _LogSumExp]
"""What a kernel returns: the output, or with ``return_lse`` a pair; see `AttentionFn`."""


@runtime_checkable
class ScoreMod(Protocol):
    """Changes scores before the softmax, knowing where they stand.

    Args:
        scores: ``scale * q @ k.T``, ``(B, H, T, S)`` or a tile of it.
        b_idx: Sequence indices, ``(B, 1, 1, 1)``.
        h_idx: Query head indices, ``(1, H, 1, 1)``.
        q_idx: Absolute query positions, ``(1, 1, T, 1)``, or ``(B, 1, T, 1)`` when
            each sequence starts elsewhere.
        kv_idx: Key positions, ``(1, 1, 1, S)``.

    Returns:
        The changed scores, of the same shape.
    """

    def __call__(
        self,
        scores: jax.Array,
        b_idx: jax.Array,
        h_idx: jax.Array,
        q_idx: jax.Array,
        kv_idx: jax.Array,
    ) -> jax.Array: ...


@runtime_checkable
class MaskMod(Protocol):
    """Says which query may attend to which key; True means "may attend".

    Takes the position indices of `ScoreMod` and returns booleans that broadcast to
    ``(B, H, T, S)``.
    """

    def __call__(
        self,
        b_idx: jax.Array,
        h_idx: jax.Array,
        q_idx: jax.Array,
        kv_idx: jax.Array,
    ) -> jax.Array: ...


@runtime_checkable
class AttentionFn(Protocol):
    """A kernel: projected q, k, v in, attended values out, no parameters.

    Computes ``softmax(score_mod(scale * q @ k.T + bias)) @ v`` over the keys that both
    ``mask`` and ``mask_mod`` allow. Query head ``h`` reads kv head ``h // (H // K)``.
    A query that may see no key returns zeros, never NaN, and its gradients are zero.
    A NaN or Inf in a key or value that a query may not see never reaches its output; a
    visible value that is not finite makes the whole row NaN.

    Args:
        query: Accumulation is float32, or wider if this dtype is.
        mask: True means "may attend". Combined with ``mask_mod`` by "and".
        mask_mod: A function of positions; see `MaskMod`. A `BlockMask` too, made for
            these lengths: its tiles save a kernel the search for empty ones.
        score_mod: A change of the scaled and biased scores; see `ScoreMod`.
        bias: Added to the scaled scores.
        sinks: For each query head, the score of one more key whose value is zero. It
            takes its share of every row's softmax. Xiao et al. 2023, arXiv:2309.17453,
            appendix; learned as in gpt-oss.
        scale: Defaults to ``D ** -0.5``.
        query_start: Absolute position of the first query. Defaults to ``S - T``.
        dropout_rng: Key for dropout on the attention weights.
        dropout_rate: Probability that a weight is dropped, in ``[0, 1)``.
        deterministic: True, the default, turns dropout off, whatever its rate: a layer
            passes on what it is told, as in Flax.
        return_lse: Also return the natural logarithm of each row's sum of exponentials,
            its sink's included, in the dtype of accumulation. -inf for a row that sees
            nothing. `merge` puts partial results together by it.

    Returns:
        The output, in the query's dtype and with the value's head size; with
        ``return_lse`` the pair of it and the log-sum-exp. Derivatives reach the query,
        key, value, bias, sinks, an array scale, and all arrays of floats that the
        score_mod carries or captures.

    Raises:
        Unsupported: This kernel cannot do what is asked. Raised before any work, and
            only for that; a bug inside a mod surfaces as itself.
    """

    def __call__(
        self,
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
        query_start: int | Int[Array, ""] | Int[Array, "B"] | None = None,
        dropout_rng: DropoutKey | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        return_lse: bool = False,
    ) -> Attended: ...


def as_array(x: Any) -> Any:
    """NumPy's arrays and lists of numbers as JAX's; anything else as it is.

    NumPy's numbers of 64 bits become those of 32 unless JAX is set to keep them.
    """
    return jnp.asarray(x) if isinstance(x, np.ndarray | list) else x


def position_indices(
    batch: int, heads: int, q_idx: Int[Array, "#B T"], kv_idx: Int[Array, " S"]
) -> Indices:
    """Index arrays for mods, each along its own axis of ``(B, H, T, S)``."""
    b_idx = jnp.arange(batch, dtype=jnp.int32)[:, None, None, None]
    h_idx = jnp.arange(heads, dtype=jnp.int32)[None, :, None, None]
    return b_idx, h_idx, q_idx[:, None, :, None], kv_idx[None, None, None, :]


def query_positions(
    query_start: int | Int[Array, ""] | Int[Array, " B"] | None, length: int, keys: int
) -> Int[Array, "#B {length}"]:
    """Absolute positions of ``length`` queries; see the module's last paragraph."""
    start = keys - length if query_start is None else query_start
    start = jnp.asarray(start, jnp.int32).reshape(-1, 1)
    return start + jnp.arange(length, dtype=jnp.int32)[None]
