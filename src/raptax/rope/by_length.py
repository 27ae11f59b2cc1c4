"""Embeddings whose frequencies depend on how long the sequence is."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._core.errors import choices
from .._core.pytree import pytree, static
from .embedding import Layout, RotaryEmbedding, _keep_constant
from .scaling import Frequencies, frequencies, longrope_attention_scale
from .turns import Positions, Turns, turns, wide_turns

Switch = Literal["length", "position"]


@pytree
class _ByLength(RotaryEmbedding):
    """Frequencies that depend on the length of the whole sequence.

    `at` gives the embedding for a length. A length of Python's is a constant; one of JAX
    may be traced, and no value of it compiles anew. A call without it takes one more than
    the largest position of all its rows, as Hugging Face does. Keys in a cache then keep
    the rotation of the call they came in, so decode differs from one pass over
    everything; to have them agree, settle on a length beforehand and use ``at(length)``.

    Attributes:
        length: The length that `at` was given, or None.
    """

    length: Int[Array, ""] | None = dataclasses.field(kw_only=True, default=None)

    def at(self, length: int | Int[Array, ""]) -> RotaryEmbedding:
        """The embedding for sequences of this length."""
        if isinstance(length, int | np.integer):
            inv_freq = self._inv_freq(int(length))
            return RotaryEmbedding(inv_freq, self.layout, self.attention_scale)
        return dataclasses.replace(self, length=length)

    def _inv_freq(self, length: int) -> Any:
        """The frequencies for a length that is known."""
        raise NotImplementedError

    def _turns_up_to(self, last: Int[Array, ""]) -> Turns:
        """The frequencies for a largest position that may be traced."""
        raise NotImplementedError

    def _turns(self, positions: Positions) -> Turns:
        if self.length is not None:
            return self._turns_up_to(self.length - 1)
        return self._turns_up_to(jnp.max(jnp.asarray(positions), initial=0))


@pytree
class DynamicRotaryEmbedding(_ByLength):
    """Dynamic NTK: beyond ``max_position`` the base grows with the length.

    ``theta * (factor * length / max_position - (factor - 1)) ** (D / (D - 2))`` takes the
    place of ``theta``, where ``D`` are the rotary lanes: the fastest pair keeps its
    frequency and the slowest is divided by the bracket. Up to ``max_position`` nothing
    changes. Definition of Hugging Face's ``rope_type="dynamic"``; bloc97 2023.
    """

    factor: float = static(kw_only=True)
    max_position: int = static(kw_only=True)

    @classmethod
    def create(  # type: ignore[override]
        cls,
        rotary_size: int,
        theta: float = 10000.0,
        *,
        factor: float,
        max_position: int,
        layout: Layout = "half",
        attention_scale: float = 1.0,
    ) -> "DynamicRotaryEmbedding":
        """From the base ``theta`` that holds up to ``max_position``."""
        if rotary_size < 4:
            raise ValueError(f"rotary_size={rotary_size} must be at least 4.")
        if not factor >= 1:
            raise ValueError(f"factor={factor} must be at least 1.")
        if max_position < 1:
            raise ValueError(f"max_position={max_position} must be at least 1.")
        return cls(
            frequencies(rotary_size, theta),
            layout,
            attention_scale,
            factor=factor,
            max_position=max_position,
        )

    def _inv_freq(self, length: int) -> Any:
        slower = self._slower(max(length / self.max_position, 1.0))
        if isinstance(self.inv_freq, np.ndarray):
            return self.inv_freq * slower
        return self.inv_freq * jnp.asarray(slower, self.inv_freq.dtype)

    def _slower(self, ratio: Any) -> Any:
        """What frequencies are multiplied by at this multiple of ``max_position``."""
        stretch = self.factor * ratio - (self.factor - 1)
        pairs = self.inv_freq.shape[0]
        return stretch ** (np.arange(pairs) / (1 - pairs))

    def _turns_up_to(self, last: Int[Array, ""]) -> Turns:
        with jax.enable_x64(True):  # a power is to be right to 2 ** -50
            ratio = (last.astype(jnp.float64) + 1) / self.max_position
            slower = self._slower(jnp.maximum(ratio, 1))
            plain = jax.lax.stop_gradient(jnp.asarray(self.inv_freq))
            words = wide_turns(plain.astype(jnp.float64) * slower)
            slower = slower.astype(jnp.float32)
        radians = turns(self.inv_freq).radians
        return Turns(*words, radians * slower.astype(radians.dtype))


@pytree
class LongRoPERotaryEmbedding(_ByLength):
    """LongRoPE: sequences longer than the original have frequencies of their own.

    Pair ``i`` turns by ``theta ** (-i / F)`` over ``short_factor[i]`` or, beyond
    ``original_max_position``, over ``long_factor[i]``. What decides is ``switch``:

        length    how long the sequence is, for all its positions, as Hugging Face's
                  ``rope_type="longrope"`` has it
        position  each position for itself, from ``original_max_position`` on, as MAX
                  and vLLM have it: nothing depends on the length then, and decode agrees
                  with one pass. (MAX leaves cosines and sines alone, an
                  ``attention_scale`` of 1, and multiplies the scores by
                  `longrope_attention_scale` instead, which is once where here it is
                  squared.)

    Ding et al. 2024, arXiv:2402.13753.
    """

    long_inv_freq: Frequencies | Float[Array, " F"] = dataclasses.field(kw_only=True)
    original_max_position: int = static(kw_only=True)
    switch: Switch = static(kw_only=True, default="length")

    def __post_init__(self) -> None:
        super().__post_init__()
        _keep_constant(self, "long_inv_freq")
        if self.switch not in get_args(Switch):
            raise ValueError(
                f"switch={self.switch!r} is not one of {choices(get_args(Switch))}."
            )

    @classmethod
    def create(  # type: ignore[override]
        cls,
        rotary_size: int,
        theta: float = 10000.0,
        *,
        short_factor: Sequence[float],
        long_factor: Sequence[float],
        original_max_position: int,
        max_position: int,
        switch: Switch = "length",
        layout: Layout = "half",
        attention_scale: float | None = None,
    ) -> "LongRoPERotaryEmbedding":
        """From the lists of a checkpoint, one entry a pair of lanes.

        Unless given, ``attention_scale`` is `longrope_attention_scale` of
        ``max_position / original_max_position``.
        """
        if original_max_position < 2:
            raise ValueError(
                f"original_max_position={original_max_position} must be at least 2."
            )
        plain = frequencies(rotary_size, theta)
        tables = []
        for name, by in (("short_factor", short_factor), ("long_factor", long_factor)):
            if len(by) != len(plain):
                raise ValueError(
                    f"{name} must have {len(plain)} entries for rotary_size="
                    f"{rotary_size}; got {len(by)}."
                )
            tables.append(plain / np.asarray(by, np.float64))
        if attention_scale is None:
            factor = max_position / original_max_position
            attention_scale = longrope_attention_scale(factor, original_max_position)
        return cls(
            tables[0],
            layout,
            attention_scale,
            long_inv_freq=tables[1],
            original_max_position=original_max_position,
            switch=switch,
        )

    def at(self, length: int | Int[Array, ""]) -> RotaryEmbedding:
        """The embedding for sequences of this length."""
        return self if self.switch == "position" else super().at(length)

    def _inv_freq(self, length: int) -> Any:
        return self.long_inv_freq if self._is_long(length - 1) else self.inv_freq

    def _is_long(self, position: Any) -> Any:
        return position >= self.original_max_position

    def _turns_up_to(self, last: Int[Array, ""]) -> Turns:
        return self._chosen(self._is_long(last))

    def _turns(self, positions: Positions) -> Turns:
        if self.switch == "position":
            return self._chosen(jnp.asarray(self._is_long(positions))[..., None])
        return super()._turns(positions)

    def _chosen(self, long: jax.Array) -> Turns:
        row = (1,) * max(long.ndim - 1, 0) + (-1,)
        tables = turns(self.long_inv_freq), turns(self.inv_freq)
        by_long, by_short = (t.map(lambda x: x.reshape(row)) for t in tables)
        return jax.tree.map(lambda a, b: jnp.where(long, a, b), by_long, by_short)
