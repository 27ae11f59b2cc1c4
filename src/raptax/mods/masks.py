"""Masks: which query may see which key, by absolute positions."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from .._core.pytree import pytree, static
from .checks import LARGEST, set_whole, whole
from .combine import Mask, entries, per_sequence, within

Number = int | Int[Array, ""]

# --------------------------------------------------------------------------- by distance


@pytree
class Causal(Mask):
    """A query sees the keys up to its own position.

    The last query stands at the last key. To align the first ones instead (top-left),
    attend with ``query_start=0``.
    """

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        return kv_idx <= q_idx


@pytree
class SlidingWindow(Mask):
    """A query sees the last ``size`` keys, its own position included."""

    size: Number

    def __post_init__(self) -> None:
        set_whole(self, 1, "size")

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < whole(self.size))


@pytree
class Window(Mask):
    """A query sees itself, ``left`` keys before it and ``right`` after it.

    With ``dilation=d`` these are every ``d``-th key: ``-left*d <= k - q <= right*d`` and
    ``(q - k) % d == 0``. None is no limit. ``Window(n - 1)`` is ``SlidingWindow(n)``.
    Beltagy et al. 2020, arXiv:2004.05150.
    """

    left: Number | None
    right: Number | None = 0
    dilation: int = static(default=1)

    def __post_init__(self) -> None:
        given = [name for name in ("left", "right") if getattr(self, name) is not None]
        set_whole(self, 0, *given)
        set_whole(self, 1, "dilation")
        if isinstance(self.dilation, jax.Array):
            raise ValueError(
                "dilation must be a Python number: programs are compiled for each."
            )

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        back = q_idx - kv_idx
        allowed = back % self.dilation == 0
        if self.left is not None:
            allowed &= back <= self._reach(self.left)
        if self.right is not None:
            allowed &= back >= -self._reach(self.right)
        return allowed

    def _reach(self, keys: Number) -> Number:
        """``keys * dilation``, or the largest multiple that no position exceeds."""
        most = LARGEST // self.dilation
        least = min if isinstance(keys, int) else jnp.minimum
        return least(whole(keys), most) * self.dilation


@pytree
class SinkWindow(Mask):
    """A query sees the first ``sinks`` keys and the last ``size``, none after itself.

    Xiao et al. 2023 (StreamingLLM), arXiv:2309.17453.
    """

    sinks: Number
    size: Number

    def __post_init__(self) -> None:
        set_whole(self, 0, "sinks")
        set_whole(self, 1, "size")

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        near = (q_idx - kv_idx < whole(self.size)) | (kv_idx < whole(self.sinks))
        return (kv_idx <= q_idx) & near


@pytree
class Strided(Mask):
    """A query sees the last ``local`` keys, and every ``stride``-th one before them.

    ``q - k < local`` or ``(q - k) % stride == 0``, for ``k <= q``. Child et al. 2019
    (Sparse Transformer), arXiv:1904.10509, has ``local == stride``.
    """

    stride: Number
    local: Number

    def __post_init__(self) -> None:
        set_whole(self, 1, "stride", "local")

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        back = q_idx - kv_idx
        strided = back % whole(self.stride) == 0
        return (back >= 0) & ((back < whole(self.local)) | strided)


@pytree
class Chunked(Mask):
    """A query sees the keys of its own chunk of ``size``, up to itself. Llama 4."""

    size: Number

    def __post_init__(self) -> None:
        set_whole(self, 1, "size")

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        size = whole(self.size)
        return (q_idx // size == kv_idx // size) & (kv_idx <= q_idx)


@pytree
class BlockCausal(Mask):
    """A query sees its own block of ``size``, all of it, and the blocks before."""

    size: Number

    def __post_init__(self) -> None:
        set_whole(self, 1, "size")

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        size = whole(self.size)
        return kv_idx // size <= q_idx // size


@pytree
class Natten2D(Mask):
    """A pixel sees the ``window`` x ``window`` pixels around it, in row-major order.

    At a border the window is moved inwards until it fits, so every pixel sees as many.
    Positions beyond ``height * width`` see nothing and are not seen. Hassani et al.
    2023 (neighborhood attention), arXiv:2204.07143.
    """

    height: Number
    width: Number
    window: Number

    def __post_init__(self) -> None:
        set_whole(self, 1, "height", "width", "window")
        if any(
            isinstance(n, jax.Array) for n in (self.height, self.width, self.window)
        ):
            return
        if self.window % 2 == 0 or not 0 < self.window <= min(self.height, self.width):
            raise ValueError(
                f"window={self.window} must be odd, to have a middle, and fit into "
                f"height={self.height} and width={self.width}."
            )

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        height, width = whole(self.height), whole(self.width)
        half, pixels = whole(self.window) // 2, height * width

        def near(q, k, size):
            return jnp.abs(jnp.clip(q, half, size - 1 - half) - k) <= half

        rows = near(q_idx // width, kv_idx // width, height)
        columns = near(q_idx % width, kv_idx % width, width)
        return rows & columns & within(q_idx, pixels) & within(kv_idx, pixels)


# ---------------------------------------------------------------------------- by length


@pytree
class KeyLengths(Mask):
    """Sequence ``b`` has ``lengths[b]`` keys; later ones are padding and masked."""

    lengths: int | Int[Array, ""] | Int[Array, " #B"]

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        return kv_idx < per_sequence(self.lengths, b_idx)


@pytree
class QueryLengths(Mask):
    """Queries at positions from ``lengths[b]`` on are padding and see nothing."""

    lengths: int | Int[Array, ""] | Int[Array, " #B"]

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        return q_idx < per_sequence(self.lengths, b_idx)


@pytree
class PrefixLM(Mask):
    """Everybody sees the first ``lengths[b]`` keys, the rest is causal.

    Raffel et al. 2020, arXiv:1910.10683, section 3.2.1.
    """

    lengths: int | Int[Array, ""] | Int[Array, " #B"]

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        return (kv_idx <= q_idx) | (kv_idx < per_sequence(self.lengths, b_idx))


# ------------------------------------------------------------------------ by what is said


@pytree
class Documents(Mask):
    """A query sees the keys of its own document, in sequences packed with several.

    ``ids[b, i]`` names the document that position ``i`` belongs to. A single row serves
    every sequence of the batch. Positions outside ``ids`` see nothing and are not seen.
    """

    ids: Int[Array, "#B S"]

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        length = self.ids.shape[1]
        alike = entries(self.ids, b_idx, q_idx) == entries(self.ids, b_idx, kv_idx)
        return alike & within(q_idx, length) & within(kv_idx, length)


@pytree
class Segments(Mask):
    """Query row ``t`` sees the keys ``s`` with ``query_ids[b, t] == key_ids[b, s]``.

    Rows count from ``query_start``, and positions outside the ids see nothing and are
    not seen. A single row of ids serves every sequence.
    """

    query_ids: Int[Array, "#B T"]
    key_ids: Int[Array, "#B S"]
    query_start: int | Int[Array, ""] | Int[Array, " #B"] = 0

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        row = q_idx - per_sequence(self.query_start, b_idx)
        alike = entries(self.query_ids, b_idx, row) == entries(
            self.key_ids, b_idx, kv_idx
        )
        inside = within(row, self.query_ids.shape[1])
        return alike & inside & within(kv_idx, self.key_ids.shape[1])


@pytree
class KeyRanges(Mask):
    """A query at position ``i`` sees the keys ``starts[b, i] <= k < stops[b, i]``.

    A single row serves every sequence. Positions outside the rows see nothing.
    """

    starts: Int[Array, "#B S"]
    stops: Int[Array, "#B S"]

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        after = entries(self.starts, b_idx, q_idx) <= kv_idx
        before = kv_idx < entries(self.stops, b_idx, q_idx)
        return after & before & within(q_idx, self.starts.shape[1])


def documents_from_lengths(
    lengths: Int[Array, "#B N"] | Int[Array, " N"], *, seq: int
) -> KeyRanges:
    """`Documents` of the given lengths, one after another, in ``seq`` positions.

    Positions after the last document see nothing and are not seen. This form asks for
    a range of keys instead of comparing names, so tiles are decided tightly.
    """
    if not isinstance(lengths, jax.core.Tracer):
        given = np.asarray(lengths)
        if (given < 0).any() or (given.sum(-1) > seq).any():
            raise ValueError(
                f"lengths={given.tolist()} must not be negative, nor add up to more "
                f"than seq={seq} positions."
            )
    rows = jnp.atleast_2d(jnp.asarray(lengths, jnp.int32))
    # What is left over is a last document, whose range of keys ends before it starts.
    rows = jnp.pad(rows, [(0, 0), (0, 1)])
    ends = jnp.cumsum(rows, axis=1)
    starts = (ends - rows).at[:, -1].set(seq)
    find = jax.vmap(lambda row, at: jnp.searchsorted(row, at, side="right"), (0, None))
    number = find(ends[:, :-1], jnp.arange(seq, dtype=jnp.int32))
    return KeyRanges(*(jnp.take_along_axis(x, number, axis=1) for x in (starts, ends)))


@pytree
class BidirectionalSpans(Mask):
    """Causal, and tokens of one span see each other: images inside text.

    ``ids[b, i]`` names the span of position ``i``; a negative number is no span. A
    single row serves every sequence. Zhou et al. 2024 (Transfusion), arXiv:2408.11039.
    """

    ids: Int[Array, "#B S"]

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        length = self.ids.shape[1]
        own, other = entries(self.ids, b_idx, q_idx), entries(self.ids, b_idx, kv_idx)
        inside = within(q_idx, length) & within(kv_idx, length)
        return (kv_idx <= q_idx) | ((own == other) & (own >= 0) & inside)


@pytree
class Tree(Mask):
    """A draft token sees its ancestors, itself and all keys before the tree.

    Token ``n`` of the tree stands at position ``start[b] + n``; ``ancestors[b, n, m]``
    says that ``m`` lies on its path to a root. Queries before the tree are causal.
    Speculative decoding: Miao et al. 2023 (SpecInfer), arXiv:2305.09781.
    """

    ancestors: Bool[Array, "#B N N"]
    start: int | Int[Array, ""] | Int[Array, " #B"] = 0

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        nodes, start = self.ancestors.shape[1], per_sequence(self.start, b_idx)
        q, kv = q_idx - start, kv_idx - start
        kin = entries(self.ancestors, b_idx, q, kv)
        return ((kv < 0) & (kv <= q)) | (within(q, nodes) & within(kv, nodes) & kin)


def tree_from_parents(
    parents: Sequence[int], *, start: int | Int[Array, ""] | Int[Array, " #B"] = 0
) -> Tree:
    """The `Tree` in which ``parents[n] < n`` is the parent of ``n``, or -1 for a root.

    Worked out on the host.
    """
    ancestors = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise ValueError(
                f"parents[{node}]={parent} must name an earlier token, or be -1 for a "
                "root."
            )
        if parent >= 0:
            ancestors[node] |= ancestors[parent]
    return Tree(jnp.asarray(ancestors)[None], start)


@pytree
class Dense(Mask):
    """An array says who sees whom: ``allowed[b, h, q, k]``, by absolute positions.

    Axes of sequences and heads of length 1 serve all. Positions outside see nothing and
    are not seen. Rows of queries that start at position ``s`` are moved there by
    ``Offset(Dense(allowed), q=-s)``.
    """

    allowed: Bool[Array, "#B #H T S"]

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        T, S = self.allowed.shape[2:]
        allowed: Any = entries(self.allowed, b_idx, h_idx, q_idx, kv_idx)
        return allowed & within(q_idx, T) & within(kv_idx, S)
