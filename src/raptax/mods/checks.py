"""Checks of what mods hold: numbers when they are given, sizes when they are used."""

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import AbstractArray


class Mod:
    """What every mask_mod and score_mod of ours shares: arrays, and their sizes."""

    def __post_init__(self) -> None:
        """NumPy arrays and lists become arrays: traced positions index them."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray | list) and _array_types(field.type):
                object.__setattr__(self, field.name, jnp.asarray(value))

    def check_sizes(self, batch: int, heads: int) -> None:
        """Raises ValueError unless this fits so many sequences and query heads.

        Arrays are compared with their annotations: an axis ``B`` or ``H`` must have
        that length, ``#B`` or ``#H`` may also have length 1, and another letter stands
        for one length throughout the mod. Mods that this one holds are checked too.
        """
        sizes = {"B": batch, "H": heads}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray | jax.Array):
                name = f"{type(self).__name__}.{field.name}"
                _check_shape(name, np.shape(value), _array_types(field.type), sizes)
            for held in value if isinstance(value, tuple) else (value,):
                _check_one(held, batch, heads)


def check_mods(mods: Iterable[Any], batch: int, heads: int) -> None:
    """Raises ValueError unless every one of ``mods`` fits ``batch`` and ``heads``.

    A mod says so by a method ``check_sizes(batch, heads)``, as `Mod` does; one without
    it, such as a plain function, fits everything. ``heads`` are query heads. None is
    no mod.
    """
    for mod in mods:
        if mod is not None:
            check_callable(mod)
            _check_one(mod, batch, heads)


def check_callable(mod: Any) -> None:
    """Raises ValueError for what is no mod at all."""
    if isinstance(mod, np.ndarray | jax.Array):
        raise ValueError(
            "a mask_mod or score_mod must be a function or a value of raptax.mods; got "
            f"an array of shape {mod.shape}. Give it as mask or bias, or, with four "
            "axes, as Dense(array) or DenseBias(array)."
        )
    if not callable(mod):
        raise ValueError(f"a mask_mod or score_mod must be callable; got {mod!r}.")


def _check_one(mod: Any, batch: int, heads: int) -> None:
    if (check := getattr(mod, "check_sizes", None)) is not None:
        check(batch, heads)


def _array_types(annotation: Any) -> list[str]:
    """The axes of each array type in an annotation such as ``int | Int[Array, " B"]``."""
    kinds = typing.get_args(annotation) or (annotation,)
    return [
        kind.dim_str
        for kind in kinds
        if isinstance(kind, type) and issubclass(kind, AbstractArray)
    ]


def _check_shape(
    name: str, shape: tuple[int, ...], kinds: list[str], sizes: dict[str, int]
) -> None:
    if not kinds or any(_fits(shape, kind, sizes) for kind in kinds):
        return
    wanted = " or ".join("(" + ", ".join(kind.split()) + ")" for kind in kinds)
    turned = any(_fits(shape[::-1], kind, dict(sizes)) for kind in kinds)
    known = " and ".join(f"{letter}={size}" for letter, size in sizes.items())
    raise ValueError(
        f"{name} has shape {shape} and must have {wanted}, where {known} (B sequences, "
        f"H query heads{'; # may be 1' if '#' in wanted else ''})."
        f"{' Is it transposed?' if turned else ''}"
    )


def _fits(shape: tuple[int, ...], kind: str, sizes: dict[str, int]) -> bool:
    """Is it of this kind? If so, what its letters mean is noted in ``sizes``."""
    letters, found = kind.split(), dict(sizes)
    if len(letters) != len(shape):
        return False
    for letter, length in zip(letters, shape, strict=True):
        name = letter.removeprefix("#")
        serves_all = name != letter and (length == 1 or name not in sizes)
        if "*" in name:  # 2*R+1
            if length % 2 == 0:
                return False
        elif not serves_all and found.setdefault(name, length) != length:
            return False
    sizes |= found
    return True


# ------------------------------------------------------------------------------- numbers

LARGEST = 2**31 - 1  # positions are int32


def set_whole(mod: Any, least: int, *names: str) -> None:
    """Checks fields of ``mod`` that are whole numbers, and stores NumPy's as Python's.

    Raises:
        ValueError: A Python or NumPy number that is not whole, or not within ``least``
            and 2**31 - 1, or an array that is not a rank-0 array of such numbers.
    """
    for name in names:
        object.__setattr__(mod, name, _whole(name, getattr(mod, name), least))


def _whole(name: str, number: Any, least: int) -> Any:
    if isinstance(number, jax.Array):
        _check_scalar(name, number, jnp.integer)
        if isinstance(number, jax.core.Tracer):
            return number
    value = number.item() if is_numpy(number) else number
    if isinstance(value, jax.Array):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={number!r} must be a whole number.")
    if not least <= value <= LARGEST:
        most = "" if value < least else ", and at most 2**31 - 1"
        raise ValueError(f"{name}={value} must be at least {least}{most}.")
    return number if isinstance(number, jax.Array) else value


def set_positive(mod: Any, name: str) -> None:
    """Checks a field of ``mod`` that is a positive number, and stores it as a float.

    An array stays one; it must be of floats and of rank 0.
    """
    number = getattr(mod, name)
    if isinstance(number, jax.Array):
        _check_scalar(name, number, jnp.floating)
        if isinstance(number, jax.core.Tracer):
            return
    value = (
        number.item() if is_numpy(number) or isinstance(number, jax.Array) else number
    )
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not 0 < value < float("inf"):
        raise ValueError(f"{name}={number!r} must be a positive and finite number.")
    if not isinstance(number, jax.Array):
        object.__setattr__(mod, name, float(value))


def is_numpy(number: Any) -> bool:
    """Is it one number of NumPy's?"""
    return isinstance(number, np.generic | np.ndarray) and number.ndim == 0


def _check_scalar(name: str, number: jax.Array, kind: Any) -> None:
    if number.ndim or not jnp.issubdtype(number.dtype, kind):
        raise ValueError(
            f"{name} must be one number of dtype {kind.__name__}; got {number.dtype} "
            f"{number.shape}. For one per sequence or head, map with jax.vmap."
        )


def whole(number: Any) -> Any:
    """A checked whole number to compute positions with: Python's, or an int32 array."""
    return number if isinstance(number, int) else jnp.asarray(number).astype(jnp.int32)
