"""`attention` picks a kernel and runs it; `explain` says how it picks."""

import inspect
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from .._core.errors import (
    Unsupported,
    check_bias,
    check_dropout,
    check_lengths,
    check_mask,
    check_qkv,
    check_scale,
    check_sinks,
    check_start,
    choices,
    with_four_axes,
)
from .._core.types import Attended, DropoutKey, MaskMod, ScoreMod, as_array
from ..block_mask import BlockMask, create_block_mask
from ..kernels import KERNELS, Kernel
from ..kernels.problem import traced_mods
from ..kernels.softmax import accumulator
from ..mods import (
    KeyLengths,
    QueryLengths,
    Segments,
    Window,
    and_masks,
    check_mods,
    split_mask,
)

SegmentIds = Int[Array, "B S"] | tuple[Int[Array, "B T"], Int[Array, "B S"]]
"""Ids of keys and queries alike, or of queries and keys apart."""


def attention(
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S E"],
    *,
    mask: Bool[Array, "..."] | None = None,
    mask_mod: MaskMod | None = None,
    score_mod: ScoreMod | None = None,
    bias: Float[Array, "..."] | None = None,
    sinks: Float[Array, " H"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    segment_ids: SegmentIds | None = None,
    query_lengths: Int[Array, " B"] | None = None,
    key_lengths: Int[Array, " B"] | None = None,
    query_start: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    dropout_rng: DropoutKey | None = None,
    dropout_rate: float | Float[Array, ""] = 0.0,
    deterministic: bool = True,
    return_lse: bool = False,
    kernel: str | None = None,
) -> Attended:
    """Attends with the first kernel in `KERNELS` that can, or with the one named.

    See `AttentionFn` for what is computed and for the arguments that are not described
    here. The choice of a kernel changes how fast, never what. `explain` says what each
    kernel answers.

    Args:
        mask: As in `AttentionFn`, of any rank that broadcasts to (B, H, T, S). Leading
            axes may be missing, unless what is left could be per sequence as well.
        bias: Likewise.
        segment_ids: For packed sequences; a query sees the keys with its own id. One
            array (B, S) where there are as many queries as keys, or a pair for queries
            (B, T) and keys (B, S).
        query_lengths: Sequence ``b`` has so many queries; later rows are padding, whose
            output is zero. At most T.
        key_lengths: Sequence ``b`` has so many keys, at most S; no query sees later
            ones. Lengths may be lists, and every array may be NumPy's.
        query_start: Defaults to ``key_lengths - query_lengths``: the last query of each
            sequence stands at its last key, padding left aside.
        kernel: A name from `KERNELS`. Naming one turns "cannot" into an error.

    Raises:
        ValueError: Shapes or dtypes do not fit, or no kernel has this name.
        Unsupported: The kernel named cannot do what is asked.
    """
    options = dict(
        mask=mask,
        mask_mod=mask_mod,
        score_mod=score_mod,
        bias=bias,
        sinks=sinks,
        scale=scale,
        segment_ids=segment_ids,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        query_start=query_start,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        return_lse=return_lse,
    )
    (query, key, value), problem = _as_problem(query, key, value, options)
    problem = _traced(query, key, problem)
    chosen = _choose(kernel, query, key, value, problem)
    return chosen.run(query, key, value, **problem)


def attention_in_tiles(
    query: jax.Array, key: jax.Array, value: jax.Array, size: Any, **options: Any
) -> Attended:
    """`attention` by ``blockwise``, in tiles of ``size`` queries and keys.

    The other kernels have tiles of their own. Sizes change how fast, never what.
    """
    _check_names(options)
    if options.pop("kernel", None) not in (None, "blockwise"):
        raise ValueError(
            f"block_size={size} is a size of tiles, which only kernel='blockwise' takes."
        )
    (query, key, value), problem = _as_problem(query, key, value, options)
    mask_mod, start = problem.get("mask_mod"), problem.pop("query_start", None)
    if isinstance(mask_mod, BlockMask):
        raise ValueError(
            f"block_size={size} contradicts a block mask, which has tiles of its own."
        )
    tiles = create_block_mask(
        Window(None, None) if mask_mod is None else mask_mod,
        batch=query.shape[0],
        heads=query.shape[1],
        seq_q=query.shape[2],
        seq_kv=key.shape[2],
        block=size,
        query_start=start,
    )
    (kernel,) = _candidates("blockwise")
    return kernel.run(query, key, value, **problem | dict(mask_mod=tiles))


def _check_names(options: dict[str, Any]) -> None:
    if unknown := options.keys() - inspect.signature(attention).parameters:
        raise TypeError(f"attention() takes no {choices(sorted(unknown))}.")


def _as_problem(
    query: Any, key: Any, value: Any, options: dict[str, Any]
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], dict[str, Any]]:
    """Arrays, and the options of `attention` as those that every kernel takes."""
    query, key, value = (as_array(x) for x in (query, key, value))
    check_qkv(query, key, value)
    (B, H, T, _), S = query.shape, key.shape[2]
    problem = {
        name: option if name.endswith("_mod") else as_array(option)
        for name, option in options.items()
    }
    for name in ("mask", "bias"):
        problem[name] = with_four_axes(name, problem.get(name), (B, H, T, S))
    _check_options(problem, (B, H, T, S))
    return (query, key, value), _with_masks(problem, (B, T, S))


def _check_options(problem: dict[str, Any], shape: tuple[int, int, int, int]) -> None:
    B, H, T, S = shape
    check_mask(problem.get("mask"), shape)
    check_bias(problem.get("bias"), shape)
    check_sinks(problem.get("sinks"), H)
    check_scale(problem.get("scale"))
    check_start(problem.get("query_start"), B)
    check_lengths("query_lengths", problem.get("query_lengths"), B, T)
    check_lengths("key_lengths", problem.get("key_lengths"), B, S)
    check_mods([problem.get("mask_mod"), problem.get("score_mod")], B, H)
    check_dropout(
        problem.get("dropout_rng"),
        problem.get("dropout_rate", 0.0),
        problem.get("deterministic", True),
    )


def _with_masks(problem: dict[str, Any], shape: tuple[int, int, int]) -> dict[str, Any]:
    """``problem`` with its ids and lengths as parts of its mask."""
    _, T, S = shape
    names = "segment_ids", "query_lengths", "key_lengths"
    ids, queries, keys = (problem.pop(name, None) for name in names)
    plain = ids is queries is keys is None
    mask_mod, start = problem.get("mask_mod"), problem.get("query_start")
    if isinstance(mask_mod, BlockMask):
        if plain:
            return problem
        raise ValueError(
            "segment_ids, query_lengths and key_lengths belong into the block mask here, "
            "as Segments, QueryLengths and KeyLengths: its tiles are decided once."
        )
    score_mod, masks = split_mask(problem.get("score_mod"))
    if mask_mod is not None:
        masks.append(mask_mod)
    if start is None and not plain:
        start = (S if keys is None else keys) - (T if queries is None else queries)
    if ids is not None:
        masks.append(_segments(ids, start, shape))
    if keys is not None:
        masks.append(KeyLengths(keys))
    if queries is not None:
        masks.append(QueryLengths(start + queries))
    mask_mod = and_masks(*masks) if masks else None
    return problem | dict(mask_mod=mask_mod, score_mod=score_mod, query_start=start)


def _traced(
    query: jax.Array, key: jax.Array, problem: dict[str, Any]
) -> dict[str, Any]:
    """``problem`` with its functions traced, once for all kernels that are asked."""
    (B, H, T, _), S = query.shape, key.shape[2]
    mask_mod, score_mod = traced_mods(
        problem.get("mask_mod"),
        problem.get("score_mod"),
        (B, H, T, S),
        accumulator(query.dtype),
        problem.get("query_start"),
    )
    return problem | dict(mask_mod=mask_mod, score_mod=score_mod)


def _segments(ids: SegmentIds, start: Any, shape: tuple[int, int, int]) -> Segments:
    B, T, S = shape
    query_ids, key_ids = map(as_array, ids if isinstance(ids, tuple) else (ids, ids))
    if (query_ids.shape, key_ids.shape) != ((B, T), (B, S)):
        raise ValueError(
            f"segment_ids {query_ids.shape} for queries and {key_ids.shape} for keys "
            f"must be {(B, T)} and {(B, S)}; give a pair where these differ."
        )
    return Segments(query_ids, key_ids, start)


def _candidates(name: str | None) -> tuple[Kernel, ...]:
    """Every kernel, or the one of this name."""
    named = tuple(kernel for kernel in KERNELS if name in (None, kernel.name))
    if not named:
        names = choices(kernel.name for kernel in KERNELS)
        raise ValueError(f"kernel={name!r} is not one of {names}.")
    return named


def _choose(name: str | None, query, key, value, problem: dict[str, Any]) -> Kernel:
    """The kernel that runs; see `attention`."""
    for kernel in _candidates(name):
        reason = kernel.unsupported_reason(query, key, value, **problem)
        if name is not None and reason is not None:
            raise Unsupported(f"kernel={name!r} cannot run this: {reason}.")
        later = name is None and kernel.not_default_reason(query, key, value, **problem)
        if reason is None and not later:
            return kernel
    raise Unsupported(
        f"no kernel can run this:\n{explain(query, key, value, **problem)}"
    )


def explain(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    kernel: str | None = None,
    **options: Any,
) -> str:
    """What each kernel says to this problem, in the order they are tried.

    Takes the arguments of `attention` and raises what it does. One line for each
    kernel; at most one of them says "runs".
    """
    _check_names(options)
    (query, key, value), problem = _as_problem(query, key, value, options)
    problem = _traced(query, key, problem)
    candidates, lines, taken = _candidates(kernel), [], False
    for candidate in KERNELS:
        reason = candidate.unsupported_reason(query, key, value, **problem)
        later = candidate.not_default_reason(query, key, value, **problem)
        runs = candidate in candidates and not taken and reason is None
        if reason is not None:
            verdict = f"cannot: {reason}"
        elif runs and (kernel is not None or later is None):
            verdict, taken = "runs", True
        else:
            verdict = "can run" if later is None else f"only when named: {later}"
        lines.append(f"{candidate.name:10} {verdict}")
    return "\n".join(lines)
