"""Attention over keys and values that lie in pages, for ragged batches.

A pool holds pages of ``P`` tokens for every layer; ``table[b, m]`` names the page with
tokens ``m * P`` to ``m * P + P - 1`` of sequence ``b``, or none: -1, or any number
outside the pool. New tokens are packed (ragged): one sequence after another,
``row_offsets`` apart, so that prefill chunks and single decode steps mix freely. Kwon et
al. 2023, arXiv:2309.06180.

One function appends and attends, because XLA updates the pool in place only if nothing
reads the old one afterwards. Writes without a place are dropped (scatter mode "drop"):
there is no scratch page that a later read could see.

Two kernels do it: ``"native"``, in C++ on CPUs, and ``"jax"``. They differ by rounding.
What cannot be done is refused by both where the table, the lengths, the offsets and the
layer are known: a sequence longer than its table, a row whose page is not in the pool, a
page that is not there although the mask lets a row see it. Inside jit the native kernel
raises when it runs, before it touches any memory. Plain JAX cannot raise there:

* a row without a place (no page for its own token, a position beyond the table, a layer
  that does not exist) is padding: not written, 0, with a log-sum-exp of -inf;
* keys in a page that is not there are masked.

A page may be missing where the mask lets no row see it, as behind a sliding window.

Derivatives of both kernels are those of `gradient`: first and higher, forward and
reverse. They reach the query, new keys and values, pages of floats, an array scale, the
sinks, and all arrays of floats that the score_mod carries or captures. Numbers stored as
codes are constants.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..._core.errors import Unsupported, check_sinks, choices
from ..._core.types import MaskMod, ScoreMod
from ..cpu import paged as native_paged
from ..per_platform import per_platform
from ..softmax import accumulator
from ..tiles import NonDiffArrays, TiledProblem
from . import checks, gradient, jax_kernel
from .problem import Batch, ScoreSettings, Where
from .problem import Pool as Pool
from .problem import places as places

KERNELS = ("native", "jax")  # best first

Attended = Any
"""The output ``(R, H, E)``, or with ``return_lse`` the pair of it and the log-sum-exp."""


def append_and_attend(
    query: Float[Array, "R H D"],
    key: Float[Array, "R K D"],
    value: Float[Array, "R K E"],
    pool: Pool,
    *,
    table: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    row_offsets: Int[Array, " B+1"],
    layer: int | Int[Array, ""],
    mask_mod: MaskMod | None,
    score_mod: ScoreMod | None = None,
    scale: float | Float[Array, ""] | None = None,
    sinks: Float[Array, " H"] | None = None,
    return_lse: bool = False,
    kernel: str | None = None,
) -> tuple[Attended, Pool]:
    """Writes new keys and values after each sequence's last, then attends to all.

    Row ``r`` of sequence ``b`` stands at ``lengths[b] + r - row_offsets[b]`` and sees
    the keys up to the sequence's last new one that ``mask_mod`` allows. Donate the
    pool to have it updated in place. A ``kernel`` of `KERNELS` may be named.

    ``sinks`` and ``return_lse`` are as in `AttentionFn`; the log-sum-exp is ``(R, H)``,
    -inf in padding rows.

    Returns:
        The attended values, zeros in rows from ``row_offsets[B]`` on, and the pool.

    Raises:
        ValueError: No kernel has this name, or sinks are not one for each head.
        Unsupported: The kernel named cannot do what is asked.
        jax.errors.JaxRuntimeError, ValueError: A sequence is longer than its pages, or a
            page it needs is not in the pool. Inside jit from the native kernel only,
            when it runs; the module says what the other one does.
    """
    where = Where(table, lengths, row_offsets, layer)
    batch = Batch(query, (key, value), pool, where)
    settings = ScoreSettings.create(query, mask_mod, score_mod, scale, sinks)
    out, lse, pool = _run(batch, settings, kernel)
    return ((out, lse) if return_lse else out), pool


def attend(
    query: Float[Array, "R H D"],
    pool: Pool,
    *,
    table: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    row_offsets: Int[Array, " B+1"],
    layer: int | Int[Array, ""],
    mask_mod: MaskMod | None,
    score_mod: ScoreMod | None = None,
    scale: float | Float[Array, ""] | None = None,
    sinks: Float[Array, " H"] | None = None,
    return_lse: bool = False,
    kernel: str | None = None,
) -> Attended:
    """Attends to what the pages hold; ``lengths`` counts the keys of each sequence.

    The last row of a sequence stands at its last key. Otherwise as `append_and_attend`.
    """
    where = Where(table, lengths, row_offsets, layer)
    settings = ScoreSettings.create(query, mask_mod, score_mod, scale, sinks)
    out, lse, _ = _run(Batch(query, None, pool, where), settings, kernel)
    return (out, lse) if return_lse else out


def native_unsupported_reason(
    query: Float[Array, "R H D"],
    pool: Pool,
    *,
    mask_mod: MaskMod | None,
    score_mod: ScoreMod | None = None,
) -> str | None:
    """Why the C++ kernel cannot do this, in one sentence; None if it can."""
    settings = ScoreSettings.create(query, mask_mod, score_mod, None, None)
    return native_paged.unsupported_reason(
        query, pool, settings.mask_mod, settings.score_mod
    )


def append(
    pool: Pool,
    key: Float[Array, "R K D"],
    value: Float[Array, "R K E"],
    *,
    table: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    row_offsets: Int[Array, " B+1"],
    layer: int | Int[Array, ""],
) -> Pool:
    """Writes each row of ``key`` and ``value`` at its place, in plain JAX.

    Raises:
        ValueError: A row has no place, and all numbers are known. Inside jit such rows
            are dropped.
    """
    if not key.size or not table.size:
        return pool
    batch = Batch(key, (key, value), pool, Where(table, lengths, row_offsets, layer))
    checks.check_places(batch)
    return jax.jit(jax_kernel.append)(batch)


def _run(
    batch: Batch, settings: ScoreSettings, kernel: str | None
) -> tuple[jax.Array, jax.Array, Pool]:
    """By the first kernel that can, or the one named."""
    if kernel not in (None, *KERNELS):
        raise ValueError(f"kernel={kernel!r} is not one of {choices(KERNELS)}.")
    check_sinks(settings.sinks, batch.query.shape[1])
    if not batch.query.size or not batch.where.table.size:
        return _nothing(batch, settings)
    reason = None
    if kernel != "jax":
        reason = native_paged.unsupported_reason(
            batch.query, batch.pool, settings.mask_mod, settings.score_mod, batch.new
        )
    if kernel == "native" and reason is not None:
        raise Unsupported(f"kernel={kernel!r} cannot run this: {reason}.")
    native = kernel != "jax" and reason is None
    if not native:
        checks.check(batch, settings)
    return _compute(batch, settings, native)


def _nothing(
    batch: Batch, settings: ScoreSettings
) -> tuple[jax.Array, jax.Array, Pool]:
    """No rows, no sequences or no pages: every row is padding or sees no key."""
    query, offsets = batch.query, batch.where.row_offsets
    out = jnp.zeros((*query.shape[:2], batch.pool.values.shape[4]), query.dtype)
    lse = jnp.full(query.shape[:2], -jnp.inf, accumulator(query.dtype))
    if settings.sinks is not None and batch.new is None:
        real = jnp.arange(query.shape[0], dtype=jnp.int32) < offsets[-1]
        lse = jnp.where(real[:, None], settings.sinks.astype(lse.dtype)[None], lse)
    return out, lse, batch.pool


class _Static(NamedTuple):
    """The static half of a call: C++ or None, plain JAX, and the derivatives."""

    native: native_paged.Call | None
    plain: jax_kernel.Call
    gradient: TiledProblem


class _Constants(NamedTuple):
    """The arrays that derivatives do not reach."""

    where: Where
    captured: Any  # what the mods carry or capture, for C++ and for plain JAX
    gradient: NonDiffArrays


class _Moved(NamedTuple):
    """The arrays that derivatives reach. The kernels themselves read no ``learned``."""

    query: jax.Array
    new: tuple[jax.Array, jax.Array] | None
    pool: Pool
    sinks: jax.Array | None
    learned: list[jax.Array]

    def batch(self, where: Where) -> Batch:
        return Batch(self.query, self.new, self.pool, where)


@functools.partial(jax.jit, static_argnums=2)
def _compute(batch: Batch, settings: ScoreSettings, native: bool):
    call: Any = None
    in_c: Any = None
    if native:
        call, in_c = native_paged.prepare(settings)
    plain, in_jax = jax_kernel.prepare(batch, settings)
    captured = in_c, in_jax
    problem, fixed, learned = gradient.prepare(batch, settings)
    # Derivatives reach the mods' arrays by `learned` alone.
    constants = _Constants(batch.where, lax.stop_gradient(captured), fixed)
    moved = _Moved(batch.query, batch.new, batch.pool, settings.sinks, learned)
    out, lse, after = _attend(_Static(call, plain, problem), constants, moved)
    return out, lse, batch.pool if after is None else after


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(static: _Static, constants: _Constants, moved: _Moved):
    """``(out, lse, pool)``; None for a pool to which nothing was appended."""
    in_c, in_jax = constants.captured
    plain = functools.partial(_run_plain, static.plain)
    if static.native is None:
        return plain(in_c, in_jax, constants.where, moved)
    native = functools.partial(_run_native, static.native)
    return per_platform(native, plain, in_c, in_jax, constants.where, moved)


def _run_native(call: native_paged.Call, in_c, in_jax, where: Where, moved: _Moved):
    batch = moved.batch(where)
    out, lse, pool = native_paged.run(call, in_c, batch, moved.sinks)
    return out, lse, None if batch.new is None else pool


def _run_plain(call: jax_kernel.Call, in_c, in_jax, where: Where, moved: _Moved):
    batch = moved.batch(where)
    out, lse, pool = jax_kernel.run(call, in_jax, batch, moved.sinks)
    return out, lse, None if batch.new is None else pool


@_attend.defjvp
def _attend_jvp(static: _Static, primals, tangents):
    constants, moved = primals

    def run(moved: _Moved):
        out, lse, pool = gradient.run(
            static.gradient,
            constants.gradient,
            moved.batch(constants.where),
            moved.sinks,
            moved.learned,
        )
        return out, lse, None if moved.new is None else pool

    return jax.jvp(run, (moved,), (tangents[1],))
