"""Embeddings whose frequencies depend on how long the sequence is."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._errors import choices
from .._pytree import pytree, static
from .embedding import Layout, RotaryEmbedding
from .scaling import frequencies, longrope_attention_scale

Switch = Literal["length", "position"]


class _ByLength(RotaryEmbedding):
    """Frequencies that depend on the length of the whole sequence.

    `at` gives the embedding for a length, which may be traced: no length compiles anew.
    A call without it takes one more than the largest position of all its rows, as
    Hugging Face does. Keys in a cache then keep the rotation of the call they came in,
    so decode differs from one pass over everything; to have them agree, settle on a
    length beforehand and use ``at(length)``.
    """

    def at(self, length: int | Int[Array, ""]) -> RotaryEmbedding:
        raise NotImplementedError

    def cos_sin(
        self, positions: Int[Array, "*rows"]
    ) -> tuple[Float[Array, "*rows F"], Float[Array, "*rows F"]]:
        """Those of ``at(1 + largest position)``."""
        return self.at(jnp.max(positions, initial=0) + 1).cos_sin(positions)


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
        table = jnp.asarray(frequencies(rotary_size, theta).astype(np.float32))
        return cls(
            table, layout, attention_scale, factor=factor, max_position=max_position
        )

    def at(self, length: int | Int[Array, ""]) -> RotaryEmbedding:
        """The embedding for sequences of this length."""
        ratio = jnp.asarray(length).astype(jnp.float32) / self.max_position
        stretch = self.factor * jnp.maximum(ratio, 1) - (self.factor - 1)
        pairs = self.inv_freq.shape[0]
        exponent = np.arange(pairs, dtype=np.float32) / (pairs - 1)
        inv_freq = self.inv_freq * stretch.reshape(1) ** -exponent
        return RotaryEmbedding(inv_freq, self.layout, self.attention_scale)


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

    long_inv_freq: Float[Array, " F"] = dataclasses.field(kw_only=True)
    original_max_position: int = static(kw_only=True)
    switch: Switch = static(kw_only=True, default="length")

    def __post_init__(self) -> None:
        super().__post_init__()
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
            scaled = plain / np.asarray(by, np.float64)
            tables.append(jnp.asarray(scaled.astype(np.float32)))
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
        if self.switch == "position":
            return self  # which serves all of them
        long = jnp.asarray(length) > self.original_max_position
        inv_freq = jnp.where(long, self.long_inv_freq, self.inv_freq)
        return RotaryEmbedding(inv_freq, self.layout, self.attention_scale)

    def cos_sin(
        self, positions: Int[Array, "*rows"]
    ) -> tuple[Float[Array, "*rows F"], Float[Array, "*rows F"]]:
        """Cosines and sines by the table that the length or each position asks for."""
        if self.switch == "length":
            return super().cos_sin(positions)
        long = (positions >= self.original_max_position)[..., None]
        row = (1,) * positions.ndim + (-1,)
        short_table, long_table = self.inv_freq, self.long_inv_freq
        inv_freq = jnp.where(long, long_table.reshape(row), short_table.reshape(row))
        return self._cos_sin(positions.astype(jnp.float32)[..., None] * inv_freq)
