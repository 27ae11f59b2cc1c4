"""Checks of shapes, dtypes and arguments; each error is one sentence."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Unsupported(NotImplementedError):
    """This kernel cannot do what is asked; another one may. Raised before any work."""


def choices(names: Iterable[Any]) -> str:
    """``'a', 'b', 'c'`` for the end of a sentence."""
    return ", ".join(repr(name) for name in names)


def check_groups(query_heads: int, kv_heads: int) -> None:
    """Raises ValueError unless every kv head serves the same number of query heads."""
    if kv_heads < 1:
        raise ValueError(f"kv_heads={kv_heads} must be at least 1.")
    if query_heads % kv_heads:
        raise ValueError(
            f"query_heads={query_heads} must be a multiple of kv_heads={kv_heads}, so "
            "that every kv head serves the same number of query heads."
        )


def check_qkv(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    """Raises ValueError unless q, k and v fit together as ``(B, H, T, D)`` arrays."""
    dtypes = query.dtype, key.dtype, value.dtype
    _check_shapes(query.shape, key.shape, value.shape, *dtypes)


@functools.lru_cache(maxsize=1024)  # eager calls mostly repeat
def _check_shapes(*shapes_and_dtypes: Any) -> None:
    query, key, value = map(
        jax.ShapeDtypeStruct, shapes_and_dtypes[:3], shapes_and_dtypes[3:]
    )
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4:
            raise ValueError(
                f"{name} must be (batch, heads, length, head size); got {array.shape}."
            )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key must share a head size; got {query.shape[-1]} and "
            f"{key.shape[-1]}. Is one of them still (batch, length, heads, size)?"
        )
    swapped = _swapped_axes(query.shape, key.shape)
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            "key and value must agree in batch, heads and length; got "
            f"{key.shape} and {value.shape}."
        )
    if query.shape[0] != key.shape[0]:
        raise ValueError(
            "query and key must share a batch size; got "
            f"{query.shape[0]} and {key.shape[0]}."
        )
    try:
        check_groups(query.shape[1], key.shape[1])
    except ValueError as error:
        raise ValueError(f"{error}{swapped}") from None
    for name, array in (("query", query), ("key", key), ("value", value)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"query, key and value must be of floats; {name} is {array.dtype}."
            )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            "query, key and value must share a dtype; got "
            f"{query.dtype}, {key.dtype} and {value.dtype}."
        )


def _swapped_axes(query: Sequence[Any], key: Sequence[Any]) -> str:
    """A question, if heads and lengths look swapped: few of what should be many."""
    if not all(isinstance(n, int) for n in (*query, *key)):
        return ""  # symbolic
    lengths = [shape[2] for shape in (query, key)]
    heads = [shape[1] for shape in (query, key)]
    if max(lengths) <= MOST_HEADS and max(heads) >= 2 * max(lengths) > 0:
        return (
            " Are these (batch, length, heads, size)? Here heads come first: give "
            "x.swapaxes(1, 2)."
        )
    return ""


MOST_HEADS = 128  # of models that are published


def check_mask(mask: jax.Array | None, shape: tuple[int, int, int, int]) -> None:
    """Raises ValueError unless ``mask`` is boolean and broadcasts to ``shape``."""
    if mask is None:
        return
    if mask.dtype != bool:
        raise ValueError(
            f"mask must be boolean, True where a query may attend; got {mask.dtype}. "
            "Numbers to add to the scores are a bias."
        )
    _check_broadcast("mask", mask, shape)


def check_bias(bias: jax.Array | None, shape: tuple[int, int, int, int]) -> None:
    """Raises ValueError unless ``bias`` is of floats and broadcasts to ``shape``."""
    if bias is None:
        return
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(
            f"bias must be of floats, which are added to the scores; got {bias.dtype}. "
            "Booleans that say who may attend are a mask."
        )
    _check_broadcast("bias", bias, shape)


def _check_broadcast(name: str, x: jax.Array, shape: tuple[int, int, int, int]) -> None:
    fits = x.ndim == 4 and all(m in (1, s) for m, s in zip(x.shape, shape, strict=True))
    if not fits:
        raise ValueError(
            f"{name} {x.shape} must broadcast to (batch, heads, queries, keys) = "
            f"{shape}, one axis each.{_swapped_axes(shape[:3], (0, shape[1], shape[3]))}"
        )


def with_four_axes(
    name: str, x: jax.Array | None, shape: tuple[int, int, int, int]
) -> jax.Array | None:
    """``x`` for scores of ``shape``, with the leading axes of length 1 that it lacks.

    Raises:
        ValueError: It fits as well with its first axis as that of sequences, and that
            means something else; or only so.
    """
    if x is None or x.ndim > 3:
        return x
    by_head = (1,) * (4 - x.ndim) + x.shape
    if x.ndim < 2 or x.shape[0] == 1:
        return x.reshape(by_head)
    by_sequence = (x.shape[0], *(1,) * (4 - x.ndim), *x.shape[1:])
    fits, also = (
        all(n in (1, size) for n, size in zip(reading, shape, strict=True))
        for reading in (by_head, by_sequence)
    )
    if not also:
        return x.reshape(by_head)
    new = ", ".join(["None"] * (4 - x.ndim))
    sequence = f"{name}[:, {new}] for one per sequence"
    other = f"{name}[{new}] for " + ("one per head" if x.ndim == 3 else "all sequences")
    raise ValueError(
        f"{name} {x.shape} has fewer axes than (batch, heads, queries, keys) = {shape}, "
        f"and its first one {'may be' if fits else 'fits only as'} that of the "
        f"sequences: write {sequence}{f', or {other}' if fits else ''}."
    )


def check_sinks(sinks: jax.Array | None, heads: int) -> None:
    """Raises ValueError unless there is one sink for each query head."""
    if sinks is None:
        return
    if sinks.shape != (heads,):
        raise ValueError(
            f"sinks {sinks.shape} must be one number for each of {heads} query heads."
        )
    if not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(
            f"sinks must be of floats, as the scores are; got {sinks.dtype}."
        )


def check_scale(scale: Any) -> None:
    """Raises ValueError unless ``scale`` is one real number; None is the default one."""
    if scale is not None and not _is_one_real(scale):
        raise ValueError(
            "scale must be one real number, or an array of rank 0; got "
            f"{_described(scale)}. For one number per head, give "
            "score_mod=Temperature(numbers)."
        )


def _is_one_real(x: Any) -> bool:
    if isinstance(x, int | float):
        return not isinstance(x, bool)
    kinds = jnp.floating, jnp.integer
    return (
        hasattr(x, "dtype")
        and x.ndim == 0
        and any(jnp.issubdtype(x.dtype, kind) for kind in kinds)
    )


def _described(x: Any) -> str:
    return f"{x.dtype} {x.shape}" if hasattr(x, "dtype") else repr(x)


def check_start(start: Any, batch: int) -> None:
    """Raises ValueError unless ``start`` is one whole number, or one per sequence."""
    if start is None:
        return
    _check_whole("query_start", start)
    if jnp.shape(start) not in ((), (1,), (batch,)):
        raise ValueError(
            f"query_start {jnp.shape(start)} must be one number, or one for each of "
            f"{batch} sequences."
        )


def check_lengths(name: str, lengths: Any, batch: int, longest: int) -> None:
    """Raises ValueError unless there is one length, up to ``longest``, per sequence.

    Lengths that are traced are not known here, and are taken on trust.
    """
    if lengths is None:
        return
    _check_whole(name, lengths)
    if jnp.shape(lengths) != (batch,):
        raise ValueError(
            f"{name} {jnp.shape(lengths)} must be one number for each of {batch} "
            "sequences."
        )
    if not isinstance(lengths, jax.core.Tracer):
        numbers = np.asarray(lengths)
        if (numbers < 0).any() or (numbers > longest).any():
            raise ValueError(
                f"{name}={numbers.tolist()} must lie between 0 and {longest}, the length "
                "of the arrays."
            )


def _check_whole(name: str, numbers: Any) -> None:
    if isinstance(numbers, int) and not isinstance(numbers, bool):
        return
    dtype = getattr(numbers, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name} must be of whole numbers; got {_described(numbers)}.")


def check_dropout(rng: Any, rate: Any, deterministic: bool) -> None:
    """Raises ValueError unless dropout can be applied as asked.

    A traced rate is taken on trust, and taken not to be 0.
    """
    if not _is_one_real(rate):
        raise ValueError(
            f"dropout_rate must be one real number; got {_described(rate)}."
        )
    traced = isinstance(rate, jax.core.Tracer)
    if not traced and not 0 <= rate < 1:
        raise ValueError(f"dropout_rate={rate} must lie in [0, 1).")
    if not deterministic and rng is None and (traced or rate):
        raise ValueError(
            f"dropout_rate={rate} with deterministic=False needs a dropout_rng."
        )
