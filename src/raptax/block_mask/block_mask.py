"""Which tiles of the scores a mask leaves empty, full or partial.

`create_block_mask` decides all tiles at once, inside jit and without the (T, S) mask:
the mask is evaluated in interval arithmetic (`interval_analysis`), with the first to
last query and the first to last key of each tile in place of positions. That takes
O(T + S) for the arrays a mask reads and O(1) per tile. A tile that interval arithmetic
leaves open only because it has no rule for an operation of the mask is looked at score
by score, one tile after another.

The promise: a tile called empty has no allowed score, and a full one no other. A
partial tile may be empty or full in truth, where conditions depend on each other in a
way that intervals do not see. Causal masks, windows, chunks, lengths, documents in
order, and documents in causal windows are decided exactly; so is every mask that has to
be looked at.

Positions, lengths and ids may be traced. New values of them compile nothing anew.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jaxtyping import Array, Int, Int8

from .._core.errors import check_start
from .._core.pytree import pytree, static
from .._core.types import Indices, MaskMod, position_indices
from ..mods import apply_mask, as_mod, check_mods
from ..mods.functions import trace_functions
from .interval_analysis import Interval, analyse, exactly

EMPTY, PARTIAL, FULL = 0, 1, 2


@pytree
class BlockMask:
    """A mask, and what it leaves of each tile of the scores.

    ``kinds[b, h, i, j]`` is 0, 1 or 2 where tile ``(i, j)`` is empty, partial or full.
    Tile ``(i, j)`` starts at query ``i * block[0]`` and key ``j * block[1]``, and the
    last tiles may be cut short. ``mask_mod`` decides within partial tiles, for queries
    from ``query_start`` on. ``lengths`` are those of queries and keys; ``batch`` or
    ``heads`` is None where one row of kinds serves any number of them.
    """

    kinds: Int8[Array, "#B #H QT KT"]
    mask_mod: Any
    query_start: Int[Array, " #B"]
    block: tuple[int, int] = static()
    lengths: tuple[int, int] = static()
    batch: int | None = static(default=None)
    heads: int | None = static(default=None)

    def sparsity(self) -> float:
        """Percentage of tiles that are empty; 100 if there are no tiles."""
        kinds = np.asarray(self.kinds)
        return 100.0 * float((kinds == EMPTY).mean()) if kinds.size else 100.0

    def check(
        self,
        seq_q: int,
        seq_kv: int,
        *,
        batch: int | None = None,
        heads: int | None = None,
    ) -> None:
        """Raises ValueError unless this was made for scores of such a shape.

        A batch or number of heads that is not given is not checked.
        """
        asked = dict(seq_q=seq_q, seq_kv=seq_kv, batch=batch, heads=heads)
        made = (*self.lengths, self.batch, self.heads)
        for (name, wanted), size in zip(asked.items(), made, strict=True):
            if None not in (wanted, size) and wanted != size:
                raise ValueError(
                    f"the block mask was made for {name}={size}; got {wanted}. Make "
                    f"one with create_block_mask(..., {name}={wanted})."
                )

    def check_sizes(self, batch: int, heads: int) -> None:
        """Raises ValueError unless the mask fits them; for tiles see `check`."""
        check_mods([self.mask_mod], batch, heads)

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        """Who may attend, as any mask says; see `MaskMod`."""
        return self.mask_mod(b_idx, h_idx, q_idx, kv_idx)

    def __str__(self) -> str:
        """What it is, and a picture of the first sequence's first head."""
        B, H = self.kinds.shape[:2]
        (T, S), (rows, keys) = self.lengths, self.block
        head = f"BlockMask(B={B}, H={H}, T={T}, S={S}, block={rows}x{keys}"
        if isinstance(self.kinds, jax.core.Tracer):
            return f"{head}, traced)"
        picture = _draw(np.asarray(self.kinds)[:1, :1].reshape(self.kinds.shape[2:]))
        return "\n".join([f"{head}, {self.sparsity():.2f}% empty)", *picture])


def first_position(
    mask_mod: MaskMod | None,
    query_start: int | jax.Array | None,
    shape: tuple[int, int, int, int],
) -> int | jax.Array:
    """Where queries start in scores of shape (B, H, T, S): where a block mask says.

    Raises:
        ValueError: A block mask for another shape, or two answers to the question.
    """
    B, H, T, S = shape
    check_start(query_start, B)
    if not isinstance(mask_mod, BlockMask):
        return S - T if query_start is None else query_start
    mask_mod.check(T, S, batch=B, heads=H)
    if query_start is not None:
        raise ValueError(
            f"query_start={query_start} belongs to create_block_mask here: the tiles of "
            "a block mask are decided for one."
        )
    return mask_mod.query_start


def create_block_mask(
    mask_mod: MaskMod,
    *,
    batch: int | None = 1,
    heads: int | None = 1,
    seq_q: int,
    seq_kv: int,
    block: int | tuple[int, int] = (128, 128),
    query_start: int | Int[Array, ""] | Int[Array, " B"] | None = None,
) -> BlockMask:
    """Decides every tile of ``block[0]`` queries and ``block[1]`` keys.

    Query ``t`` stands at ``query_start + t``, which is ``seq_kv - seq_q`` unless given,
    and may be one number per sequence. Sequences or heads that all see the same share
    an axis of length 1. Tiles are decided for what a plain function captures now; when
    that changes, a new block mask is needed.

    Args:
        batch: Number of sequences, or None for any, which all see the same.
        heads: Likewise.
        block: One number for square tiles.

    Raises:
        ValueError: The mask has arrays for other sizes, or sees a difference between
            sequences or heads, of which there may be any number.
    """
    any_of = [n for n, size in (("batch", batch), ("heads", heads)) if size is None]
    batch, heads = (1 if size is None else size for size in (batch, heads))
    sizes = dict(batch=batch, heads=heads, seq_q=seq_q, seq_kv=seq_kv)
    tile = _tile(block)
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{name}={size} must not be negative.")
    start = seq_kv - seq_q if query_start is None else query_start
    start = jnp.asarray(start, jnp.int32).reshape(-1)
    if start.size not in (1, batch):
        raise ValueError(
            f"query_start has {start.size} numbers; it needs one, or one for each of "
            f"batch={batch} sequences."
        )
    check_mods([mask_mod], batch, heads)
    grid, mask_mod = Grid(tile, (seq_q, seq_kv)), as_mod(mask_mod)
    if 0 in sizes.values():
        kinds = jnp.zeros((1, 1, *grid.shape), jnp.int8)
        served = (None if n in any_of else sizes[n] for n in ("batch", "heads"))
        return BlockMask(kinds, mask_mod, start, tile, grid.lengths, *served)
    at = jax.eval_shape(lambda: _one_score(start, batch, heads))
    made = _create(trace_functions(mask_mod, *at), start, grid, batch, heads)
    for name in any_of:
        if getattr(made, name) is not None:
            raise ValueError(
                f"mask_mod={mask_mod} depends on the index of {name}, so {name}=None, "
                "which is any number, must be a number."
            )
    return dataclasses.replace(made, mask_mod=mask_mod)  # with its numbers, not arrays


def _tile(block: int | Sequence[int]) -> tuple[int, int]:
    sizes = (block, block) if isinstance(block, int | np.integer) else tuple(block)
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"block={block} must be (queries, keys), each at least 1.")
    return int(sizes[0]), int(sizes[1])


class Grid(NamedTuple):
    """Tiles of ``block`` over ``lengths``, both (queries, keys)."""

    block: tuple[int, int]
    lengths: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = map(lambda n, size: -(-n // size), self.lengths, self.block)
        return rows, columns

    def ranges(self, axis: int) -> tuple[jax.Array, jax.Array]:
        """First and last entry of each tile along an axis."""
        size, length = self.block[axis], self.lengths[axis]
        first = size * jnp.arange(self.shape[axis], dtype=jnp.int32)
        return first, jnp.minimum(first + size, length) - 1

    def entries(self, axis: int, tile: jax.Array) -> jax.Array:
        """All entries of one tile, the last one repeated where the tile is cut short."""
        size, length = self.block[axis], self.lengths[axis]
        return jnp.minimum(tile * size + jnp.arange(size, dtype=jnp.int32), length - 1)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _create(mask_mod, start, grid, batch, heads):
    """`create_block_mask` where there is something to decide."""
    differ = _axes_that_matter(mask_mod, start, batch, heads)
    rows = tuple(size or 1 for size in differ)
    kinds, unsure = _kinds_by_intervals(mask_mod, start[: rows[0]], grid, rows)
    if unsure:
        kinds = _look_at_partial(mask_mod, start[: rows[0]], grid, kinds)
    kinds = kinds.transpose(2, 3, 0, 1)
    return BlockMask(kinds, mask_mod, start, grid.block, grid.lengths, *differ)


def block_kinds(
    mask_mod: MaskMod, start: Int[Array, " #B"], grid: Grid, batch: int, heads: int
) -> Int8[Array, "#B #H QT KT"]:
    """The kinds of a `BlockMask`, as far as they can be told without a look at scores."""
    rows = tuple(size or 1 for size in _axes_that_matter(mask_mod, start, batch, heads))
    kinds, _ = _kinds_by_intervals(mask_mod, start[: rows[0]], grid, rows)
    return kinds.transpose(2, 3, 0, 1)


def _kinds_by_intervals(
    mask_mod: MaskMod, start: jax.Array, grid: Grid, rows: tuple[int, ...]
) -> tuple[jax.Array, bool]:
    """Kinds (QT, KT, B, H), and whether a look at partial tiles could tell more."""
    found = _by_intervals(mask_mod, start, grid, rows)
    if found.lo is None:
        kinds = jnp.full((*grid.shape, *rows), PARTIAL, jnp.int8)
    else:
        kinds = found.lo.astype(jnp.int8) + found.hi.astype(jnp.int8)
    return kinds, bool(found.unsure)


def _one_score(start: jax.Array, batch: int, heads: int) -> Indices:
    """Indices of one query and one key, to trace a mask with."""
    return position_indices(batch, heads, start[:, None], jnp.zeros(1, jnp.int32))


def _axes_that_matter(
    mask_mod: MaskMod, start: jax.Array, batch: int, heads: int
) -> tuple[int | None, int | None]:
    """``(batch, heads)``, with None where the mask is the same for all of them."""
    closed = jax.make_jaxpr(functools.partial(apply_mask, mask_mod))(
        *_one_score(start[:1], 1, 1)
    )
    (out,) = closed.out_avals
    shape = (1,) * (4 - out.ndim) + out.shape
    fits = len(shape) == 4 and shape[2:] == (1, 1)
    if not (fits and shape[0] in (1, batch) and shape[1] in (1, heads)):
        raise ValueError(
            f"mask_mod={mask_mod} must return booleans that broadcast to its indices; "
            f"for one query and one key of batch={batch} sequences and heads={heads} it "
            f"returned {out.shape}. Index the arrays it captures by q_idx and kv_idx."
        )
    reached = {atom for atom in closed.jaxpr.outvars if isinstance(atom, core.Var)}
    for eqn in reversed(closed.jaxpr.eqns):
        if reached.intersection(eqn.outvars):
            reached.update(x for x in eqn.invars if isinstance(x, core.Var))
    b_idx, h_idx, q_idx, _ = (var in reached for var in closed.jaxpr.invars)
    by_sequence = b_idx or shape[0] > 1 or (q_idx and start.size > 1)
    by_head = h_idx or shape[1] > 1
    return batch if by_sequence else None, heads if by_head else None


def _by_intervals(
    mask_mod: MaskMod, start: jax.Array, grid: Grid, rows: tuple[int, ...]
) -> Interval:
    """Whether the scores of a tile are all allowed (lo) and whether any may be (hi).

    Both are (QT, KT, B, H), or None where the mask as a whole has no bounds.
    """
    b_idx, h_idx, q_idx, kv_idx = _one_score(start, *rows)
    evaluate = functools.partial(apply_mask, mask_mod)
    closed = jax.make_jaxpr(evaluate)(b_idx, h_idx, q_idx, kv_idx)

    def tile(queries: Interval, keys: Interval) -> Interval:
        q = Interval(q_idx + queries.lo, q_idx + queries.hi)
        kv = Interval(kv_idx + keys.lo, kv_idx + keys.hi)
        at = exactly(b_idx), exactly(h_idx), q, kv
        (out,) = analyse(closed, at, grid.block)
        if out.lo is None:
            return out
        lo, hi = (
            jnp.broadcast_to(x, (*rows, 1, 1))[..., 0, 0] for x in (out.lo, out.hi)
        )
        return Interval(lo, hi, out.unsure)

    over_keys = jax.vmap(tile, in_axes=(None, 0))
    over_tiles = jax.vmap(over_keys, in_axes=(0, None))
    return over_tiles(Interval(*grid.ranges(0)), Interval(*grid.ranges(1)))


def _look_at_partial(
    mask_mod: MaskMod, start: jax.Array, grid: Grid, kinds: jax.Array
) -> jax.Array:
    """``kinds`` (QT, KT, B, H), with its partial tiles decided score by score."""
    batch, heads = kinds.shape[2:]

    def look(tile: tuple[jax.Array, jax.Array]) -> jax.Array:
        number, kind = tile
        i, j = number // grid.shape[1], number % grid.shape[1]

        def evaluate() -> jax.Array:
            q_idx = start[:, None] + grid.entries(0, i)[None]
            at = position_indices(batch, heads, q_idx, grid.entries(1, j))
            allowed = apply_mask(mask_mod, *at)
            allowed = jnp.broadcast_to(allowed, (batch, heads, *grid.block))
            some, every = allowed.any((2, 3)), allowed.all((2, 3))
            seen = some.astype(jnp.int8) + every.astype(jnp.int8)
            return jnp.where(kind == PARTIAL, seen, kind)

        return lax.cond((kind == PARTIAL).any(), evaluate, lambda: kind)

    tiles = math.prod(grid.shape)
    numbers = jnp.arange(tiles, dtype=jnp.int32)
    return lax.map(look, (numbers, kinds.reshape(tiles, batch, heads))).reshape(
        kinds.shape
    )


def _draw(kinds: np.ndarray, width: int = 60, height: int = 30) -> list[str]:
    """One character for each tile, or for a group of tiles where there are many."""
    rows, columns = kinds.shape
    if not kinds.size:
        return []
    down = np.arange(0, rows, -(-rows // height))
    across = np.arange(0, columns, -(-columns // width))

    def grouped(reduce: np.ufunc) -> np.ndarray:
        return reduce.reduceat(reduce.reduceat(kinds, down, 0), across, 1)

    least, most = grouped(np.minimum), grouped(np.maximum)
    cells = np.where(least == FULL, "█", np.where(most == EMPTY, " ", "░"))
    return ["".join(row) for row in cells]
