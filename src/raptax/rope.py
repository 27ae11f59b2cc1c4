"""Rotary position embedding: frequencies, their scalings, and the rotation.

Su et al. 2021, arXiv:2104.09864. Frequency ``i`` of ``F`` turns by
``theta ** (-i / F)`` radians a position. Pairs of lanes are rotated together, in one of
two layouts that hold the same numbers in another order:

    half         lanes (i, i + F)      safetensors checkpoints of Hugging Face
    interleaved  lanes (2i, 2i + 1)    Llama GGUF files, the original paper

A scaling is a function of the frequencies; `RotaryEmbedding` is the value that layers
hold. Tables are float32; frequencies are worked out in float64 on the host.
"""

import math
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from ._errors import choices
from ._pytree import pytree, static

Layout = Literal["half", "interleaved"]
Frequencies = Float64[np.ndarray, " F"]


def frequencies(rotary_size: int, theta: float = 10000.0) -> Frequencies:
    """``theta ** (-2i / rotary_size)`` radians a position, for i < rotary_size / 2."""
    if rotary_size < 2 or rotary_size % 2:
        raise ValueError(f"rotary_size={rotary_size} must be even and at least 2.")
    if not theta > 1:
        raise ValueError(f"theta={theta} must be above 1: later pairs turn slower.")
    return theta ** (-np.arange(0, rotary_size, 2, dtype=np.float64) / rotary_size)


def linear_scaling(inv_freq: Frequencies, factor: float) -> Frequencies:
    """Stretches every position by ``factor``. Chen et al. 2023, arXiv:2306.15595."""
    return inv_freq / factor


def llama3_scaling(
    inv_freq: Frequencies,
    *,
    factor: float = 8.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_position: int = 8192,
) -> Frequencies:
    """Llama 3.1's rule: long waves are slowed by ``factor``, short ones kept.

    With ``w`` the wavelength in positions and ``r = original_max_position / w``, waves
    with ``r > high_freq_factor`` are kept, those with ``r < low_freq_factor`` divided,
    and in between the two are blended linearly in ``r``.
    """
    if high_freq_factor < low_freq_factor:
        raise ValueError(
            f"high_freq_factor={high_freq_factor} must not be below "
            f"low_freq_factor={low_freq_factor}."
        )
    turns = original_max_position * inv_freq / (2 * math.pi)
    span = max(high_freq_factor - low_freq_factor, 1e-12)  # equal: a step, not a blend
    keep = np.clip((turns - low_freq_factor) / span, 0.0, 1.0)
    return keep * inv_freq + (1 - keep) * inv_freq / factor


def yarn_scaling(
    inv_freq: Frequencies,
    *,
    factor: float,
    theta: float = 10000.0,
    original_max_position: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Frequencies:
    """YaRN's blend by parts. Peng et al. 2023, arXiv:2309.00071, section 3.2.

    Frequencies that turn more than ``beta_fast`` times over the original length are
    kept, those below ``beta_slow`` turns are divided by ``factor``, with a ramp between
    them over the frequency index. ``truncate`` rounds the ramp's ends outwards to whole
    indices. Combine with `yarn_attention_scale`.
    """
    pairs = len(inv_freq)

    def index(turns: float) -> float:
        ratio = original_max_position / (turns * 2 * math.pi)
        return pairs * math.log(ratio) / math.log(theta)

    low, high = index(beta_fast), index(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = np.clip((np.arange(pairs) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return inv_freq * (1 - ramp) + inv_freq / factor * ramp


def yarn_attention_scale(factor: float, multiplier: float = 1.0) -> float:
    """``0.1 * multiplier * ln(factor) + 1``, on both cosines and sines."""
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


@pytree
class RotaryEmbedding:
    """Rotates queries and keys by their absolute positions.

    Build it with `RotaryEmbedding.create`, or hand it any frequencies. Head sizes above
    the rotary size are rotated in part: the first lanes in the half layout, the last
    ones in the interleaved layout (as DeepSeek's checkpoints need); the rest pass.

    Attributes:
        inv_freq: Radians a position, for each pair of lanes.
        layout: Which lanes form a pair: "half" or "interleaved".
        attention_scale: Multiplies cosines and sines; YaRN uses it.
    """

    inv_freq: Float[Array, " F"]
    layout: Layout = static(default="half")
    attention_scale: float = static(default=1.0)

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise ValueError(
                f"layout={self.layout!r} is not one of {choices(get_args(Layout))}."
            )

    @classmethod
    def create(
        cls,
        rotary_size: int,
        theta: float = 10000.0,
        *,
        layout: Layout = "half",
        inv_freq: Frequencies | None = None,
        attention_scale: float = 1.0,
    ) -> "RotaryEmbedding":
        """From a base ``theta``, or from ``inv_freq`` that a scaling has changed."""
        if inv_freq is None:
            inv_freq = frequencies(rotary_size, theta)
        if len(inv_freq) * 2 != rotary_size:
            raise ValueError(
                f"rotary_size={rotary_size} needs {rotary_size // 2} frequencies; got "
                f"{len(inv_freq)}."
            )
        table = jnp.asarray(inv_freq.astype(np.float32))
        return cls(table, layout, attention_scale)

    @property
    def interleaved(self) -> bool:
        return self.layout == "interleaved"

    def cos_sin(
        self, positions: Int[Array, "*rows"]
    ) -> tuple[Float[Array, "*rows F"], Float[Array, "*rows F"]]:
        """Cosines and sines of ``positions * inv_freq``, in float32."""
        inv_freq = self.inv_freq.reshape((1,) * positions.ndim + (-1,))
        angles = positions.astype(jnp.float32)[..., None] * inv_freq
        scale = jnp.float32(self.attention_scale)
        return jnp.cos(angles) * scale, jnp.sin(angles) * scale

    def __call__(
        self, x: Float[Array, "*rows heads D"], positions: Int[Array, "*rows"]
    ) -> Float[Array, "*rows heads D"]:
        """Rotates every head of each row by the row's position, in float32."""
        pairs, size = self.inv_freq.shape[0], x.shape[-1]
        if 2 * pairs > size:
            raise ValueError(
                f"{2 * pairs} rotary lanes do not fit a head size of {size}."
            )
        cos, sin = (a[..., None, :] for a in self.cos_sin(positions))
        rest = size - 2 * pairs
        if self.interleaved:
            kept, turned = x[..., :rest], x[..., rest:]
            turned = turned.reshape(*turned.shape[:-1], pairs, 2)
            first, second = turned[..., 0], turned[..., 1]
        else:
            turned, kept = x[..., : 2 * pairs], x[..., 2 * pairs :]
            first, second = turned[..., :pairs], turned[..., pairs:]
        first, second = first.astype(jnp.float32), second.astype(jnp.float32)
        new = first * cos - second * sin, first * sin + second * cos
        if self.interleaved:
            out = jnp.stack(new, axis=-1).reshape(*x.shape[:-1], 2 * pairs)
            return jnp.concatenate([kept, out.astype(x.dtype)], axis=-1)
        return jnp.concatenate([*(a.astype(x.dtype) for a in new), kept], axis=-1)
