"""Frequencies in radians a position, their scalings, and what goes with these.

Worked out in float64 on the host, once.
"""

import math

import numpy as np
from jaxtyping import Float64

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


def deepseek_yarn_attention_scale(
    factor: float, mscale: float = 1.0, mscale_all_dim: float = 0.0
) -> float:
    """``m(mscale) / m(mscale_all_dim)``, on cosines and sines.

    ``m`` is `yarn_attention_scale` with that multiplier. DeepSeek's checkpoints split
    YaRN's factor in two: this, and `deepseek_yarn_softmax_factor`, which reaches the
    lanes without positions too. Their frequencies are those of `yarn_scaling`.
    DeepSeek-AI 2024, arXiv:2405.04434.
    """
    over = yarn_attention_scale(factor, mscale_all_dim)
    return yarn_attention_scale(factor, mscale) / over


def deepseek_yarn_softmax_factor(factor: float, mscale_all_dim: float = 0.0) -> float:
    """``m(mscale_all_dim) ** 2``: the scale of the scores is to be multiplied by it."""
    return yarn_attention_scale(factor, mscale_all_dim) ** 2


def longrope_attention_scale(factor: float, original_max_position: int) -> float:
    """``sqrt(1 + ln(factor) / ln(original_max_position))``, on cosines and sines.

    ``factor`` is by how much the model's longest sequence exceeds the original one.
    Ding et al. 2024, arXiv:2402.13753, as in Phi-3.
    """
    if factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original_max_position))
