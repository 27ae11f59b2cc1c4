"""What masks share: the operators, the combinators and how they read arrays."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from .._core.pytree import pytree, static
from .._core.types import MaskMod
from .checks import Mod, check_callable


class Mask(Mod):
    """What every mask value shares: the operators, and the checks of `Mod`."""

    def __and__(self, other: MaskMod) -> "And":
        return And(as_mod(self), as_mod(other))

    def __rand__(self, other: MaskMod) -> "And":
        return And(as_mod(other), as_mod(self))

    def __or__(self, other: MaskMod) -> "Or":
        return Or(as_mod(self), as_mod(other))

    def __ror__(self, other: MaskMod) -> "Or":
        return Or(as_mod(other), as_mod(self))

    def __xor__(self, other: MaskMod) -> "Xor":
        return Xor(as_mod(self), as_mod(other))

    def __rxor__(self, other: MaskMod) -> "Xor":
        return Xor(as_mod(other), as_mod(self))

    def __invert__(self) -> "Not":
        return Not(as_mod(self))


@pytree
class FunctionMod(Mask):
    """A plain function as a value; equal when it is the same function."""

    function: Any = static()

    def __call__(self, *args: jax.Array) -> jax.Array:
        return self.function(*args)


def as_mod(mod: Any) -> Any:
    """``mod`` itself if JAX can look inside it or it is None; else a `FunctionMod`."""
    if mod is None or not jax.tree_util.all_leaves([mod]):
        return mod
    if not callable(mod):
        raise ValueError(f"a mask_mod or score_mod must be callable; got {mod!r}.")
    return FunctionMod(mod)


def apply_mask(mask_mod: MaskMod, *at: jax.Array) -> jax.Array:
    """``mask_mod(*at)``, after a check that it says yes or no."""
    allowed = mask_mod(*at)
    if isinstance(allowed, bool | np.bool_ | np.ndarray):
        allowed = jnp.asarray(allowed)
    dtype = getattr(allowed, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.bool_):
        raise ValueError(
            f"mask_mod={mask_mod} must return booleans, True where a query may attend; "
            f"it returned {type(allowed).__name__ if dtype is None else dtype}."
        )
    return allowed if allowed.ndim else jnp.broadcast_to(allowed, (1, 1, 1, 1))


@pytree
class And(Mask):
    """Allowed by both; written ``first & second``."""

    first: Any
    second: Any

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        at = b_idx, h_idx, q_idx, kv_idx
        return apply_mask(self.first, *at) & apply_mask(self.second, *at)


@pytree
class Or(Mask):
    """Allowed by either; written ``first | second``."""

    first: Any
    second: Any

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        at = b_idx, h_idx, q_idx, kv_idx
        return apply_mask(self.first, *at) | apply_mask(self.second, *at)


@pytree
class Xor(Mask):
    """Allowed by one and not by the other; written ``first ^ second``."""

    first: Any
    second: Any

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        at = b_idx, h_idx, q_idx, kv_idx
        return apply_mask(self.first, *at) ^ apply_mask(self.second, *at)


@pytree
class Not(Mask):
    """Allowed where ``mask`` is not; written ``~mask``."""

    mask: Any

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        return ~apply_mask(self.mask, b_idx, h_idx, q_idx, kv_idx)


def and_masks(*masks: MaskMod) -> MaskMod:
    """Allowed by every one of ``masks``; ValueError without any."""
    return functools.reduce(And, _given("and_masks", masks))


def or_masks(*masks: MaskMod) -> MaskMod:
    """Allowed by any one of ``masks``; ValueError without any."""
    return functools.reduce(Or, _given("or_masks", masks))


def _given(name: str, masks: tuple[MaskMod, ...]) -> list[Any]:
    if not masks or any(mask is None for mask in masks):
        raise ValueError(
            f"{name} must be given masks, at least one of them and none that is None; "
            f"got {masks}."
        )
    for mask in masks:
        check_callable(mask)
    return list(map(as_mod, masks))


@pytree
class Offset(Mask):
    """``mod`` with ``q`` added to query positions and ``kv`` to key positions.

    Each is one number, or one per sequence. ``Offset(Causal(), q=T - S)`` aligns the
    first query with the first key, as ``query_start=0`` does for every mod at once.
    Takes score_mods as well as masks.
    """

    mod: Any
    q: int | Int[Array, ""] | Int[Array, " #B"] = 0
    kv: int | Int[Array, ""] | Int[Array, " #B"] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "mod", as_mod(self.mod))

    def __call__(self, *at):
        *before, q_idx, kv_idx = at
        q, kv = (per_sequence(shift, before[-2]) for shift in (self.q, self.kv))
        return self.mod(*before, q_idx + q, kv_idx + kv)


@pytree
class PerHead(Mask):
    """Head ``h`` follows ``masks[which[h]]``."""

    masks: tuple[Any, ...]
    which: Int[Array, " H"]

    def __post_init__(self) -> None:
        if not self.masks:
            raise ValueError("masks=() must hold at least one mask.")
        super().__post_init__()
        object.__setattr__(self, "masks", tuple(map(as_mod, self.masks)))
        if isinstance(self.which, jax.core.Tracer) or not np.size(self.which):
            return
        chosen, last = np.asarray(self.which), len(self.masks) - 1
        if chosen.min() < 0 or chosen.max() > last:
            raise ValueError(
                f"which={chosen.tolist()} must be between 0 and {last}, the numbers of "
                "the masks."
            )

    def __call__(self, b_idx, h_idx, q_idx, kv_idx):
        which = jnp.asarray(self.which)[h_idx]
        first, *others = (
            apply_mask(mask, b_idx, h_idx, q_idx, kv_idx) for mask in self.masks
        )
        for number, allowed in enumerate(others, 1):
            first = jnp.where(which == number, allowed, first)
        return first


# ------------------------------------------------------------------------------- arrays


def per_sequence(numbers: Any, b_idx: jax.Array) -> jax.Array:
    """One whole number per sequence, or one for all, to stand beside the indices."""
    numbers = jnp.asarray(numbers).astype(jnp.int32)
    if numbers.size == 0:  # of no sequences
        return jnp.zeros((), jnp.int32)
    return numbers.reshape(()) if numbers.size == 1 else numbers[b_idx]


def within(index: jax.Array, length: int | jax.Array) -> jax.Array:
    """Whether an axis of ``length`` has such an entry."""
    return (index >= 0) & (index < length)


def entries(array: jax.Array, *indices: jax.Array) -> jax.Array:
    """``array[indices]``, where an axis of length 1 serves every index.

    An index beyond the end of a longer axis reads its last entry, and one below 0 the
    first. An empty array gives 0.
    """
    if array.size == 0:
        return jnp.zeros((), array.dtype)
    at = zip(indices, array.shape, strict=True)
    return array[tuple(0 if n == 1 else jnp.clip(i, 0, n - 1) for i, n in at)]
