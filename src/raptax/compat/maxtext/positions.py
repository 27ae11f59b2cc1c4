"""MaxText's rotary embeddings, and which of them a layer gets.

Each is a value that rotates ``(batch, length, heads, size)``. All that rotates by a
multiple of a position is one class, `Rotary`; the two for images know where a patch lies.
Angles are reduced to one turn exactly (`raptax.rope.turns`) whatever the dtype of ``x``,
and no position is ever clamped.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ..._core.errors import choices
from ...rope import (
    Frequencies,
    Layout,
    frequencies,
    linear_scaling,
    llama3_scaling,
    yarn_attention_scale,
    yarn_scaling,
)
from ...rope.turns import cos_sin, turns, wide_dtype

DEFAULT_SECTIONS = 24, 20, 20
LLAMA_FACTORS = {"llama3.2": 32.0}  # the others are 8


def _pairs(x: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
    if layout == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    first, second = jnp.split(x, 2, axis=-1)
    return first, second


def rotate(
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    layout: Layout = "half",
    written: Layout = "half",
) -> jax.Array:
    """Rotates the first ``2 * F`` lanes of ``x``, the rest pass.

    Args:
        x: ``(batch, length, heads, size)``.
        cos: ``(batch, length, F)``, or with a batch of 1.
        sin: Likewise.
        layout: Which lanes form a pair: ``(i, i + F)`` or ``(2 i, 2 i + 1)``.
        written: Where the pair's results go; YaRN's default reads pairs and writes
            halves, a permutation that queries and keys share.
    """
    lanes, wide = 2 * cos.shape[-1], wide_dtype(x)
    turned, kept = x[..., :lanes], x[..., lanes:]
    first, second = _pairs(turned.astype(wide), layout)
    cos, sin = (table[:, :, None].astype(wide) for table in (cos, sin))
    new = first * cos - second * sin, second * cos + first * sin
    if written == "interleaved":
        turned = jnp.stack(new, axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate(new, axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), kept], axis=-1)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Pair ``i`` turns by ``inv_freq[i]`` radians a position.

    Attributes:
        inv_freq: Radians a position; 0 leaves a pair as it is.
        size: Head size. Lanes behind ``2 * len(inv_freq)`` pass.
        layout: See `rotate`.
        written: See `rotate`.
        scale: Multiplies what is rotated.
        axes: Which of the axes of a position (time, row, column) each pair follows;
            None where a position is one number.
    """

    inv_freq: tuple[float, ...]
    size: int
    layout: Layout = "half"
    written: Layout = "half"
    scale: float = 1.0
    axes: tuple[int, ...] | None = None

    def __call__(
        self, x: jax.Array, positions: jax.Array | np.ndarray | None = None
    ) -> jax.Array:
        """Rotates ``x (batch, length, heads, size)``.

        ``positions`` are ``(batch, length)``, from 0 on unless given; with ``axes`` also
        ``(batch, length, 3)``. Without the third axis all of them are equal.
        """
        if x.ndim != 4 or x.shape[-1] != self.size:
            raise ValueError(
                f"a rotary embedding of head size {self.size} takes (batch, length, "
                f"heads, {self.size}); got {x.shape}."
            )
        if positions is None:
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        if positions.ndim == 3 and positions.shape[2] == 3 and self.axes is not None:
            positions = positions[..., np.array(self.axes)]
        elif positions.ndim == 2:
            positions = positions[..., None]
        else:
            also = "" if self.axes is None else " or 3D (batch, seq, 3)"
            raise ValueError(
                f"Position IDs must be 2D (batch, seq){also}, got shape "
                f"{positions.shape}."
            )
        tables = cos_sin(positions, turns(np.array(self.inv_freq)), wide_dtype(x))
        scale = jnp.asarray(self.scale, wide_dtype(x))
        scaled = (table * scale for table in tables)
        return rotate(x, *scaled, layout=self.layout, written=self.written)


@dataclasses.dataclass(frozen=True)
class LlamaVisionRotary:
    """Llama 4's: the patches of a square image row by row, then one class token.

    Pairs are interleaved; the first half of them turns by ``(column + 1) * f``, the
    other by ``(row + 1) * f`` with ``f = theta ** (-4 i / size)``. The class token is
    left as it is.
    """

    size: int
    grid: int
    theta: float

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Rotates ``x (batch, grid ** 2 + 1, heads, size)``; takes no positions."""
        if positions is not None:
            raise ValueError("patches lie on a grid: positions must be None.")
        if x.ndim != 4 or x.shape[1] != self.grid**2 + 1 or x.shape[3] != self.size:
            raise ValueError(
                f"x {x.shape} must be (batch, {self.grid**2 + 1}, heads, {self.size}): "
                f"{self.grid} x {self.grid} patches and a class token."
            )
        freq = frequencies(self.size // 2, self.theta)
        row, column = np.divmod(np.arange(self.grid**2), self.grid)
        angles = np.concatenate(
            [(column[:, None] + 1) * freq, (row[:, None] + 1) * freq], axis=1
        )
        angles = np.concatenate([angles, np.zeros((1, angles.shape[1]))])
        tables = _tables(angles, x)
        return rotate(x, *tables, layout="interleaved", written="interleaved")


@dataclasses.dataclass(frozen=True)
class QwenVisionRotary:
    """Qwen3's: patches in blocks that are merged later, frame after frame.

    Within a frame blocks of ``merge`` x ``merge`` patches go row by row, and so do the
    patches within a block. In the half layout the first half of the pairs turns by
    ``row * f``, the other by ``column * f``, ``f = theta ** (-4 i / size)``.
    """

    size: int
    merge: int
    theta: float

    def angles(self, num_frames: int, height: int, width: int) -> np.ndarray:
        if height % self.merge or width % self.merge:
            raise ValueError(
                f"height={height} and width={width} must be multiples of "
                f"spatial_merge_size_for_vit={self.merge}."
            )
        blocks = height // self.merge, self.merge, width // self.merge, self.merge
        row, column = (
            index.reshape(blocks).transpose(0, 2, 1, 3).reshape(-1, 1)
            for index in np.indices((height, width))
        )
        freq = frequencies(self.size // 2, self.theta)
        return np.tile(np.concatenate([row * freq, column * freq], 1), (num_frames, 1))

    def __call__(
        self,
        x: jax.Array,
        num_frames: int,
        height: int,
        width: int,
        token_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Rotates ``x (batch, num_frames * height * width, heads, size)``.

        Rows where ``token_mask (batch, length)`` is False are left as they are.
        """
        if x.ndim != 4 or x.shape[1::2] != (num_frames * height * width, self.size):
            raise ValueError(
                f"x {x.shape} must be (batch, {num_frames * height * width}, heads, "
                f"{self.size}) for {num_frames} frames of {height} x {width} patches."
            )
        cos, sin = _tables(self.angles(num_frames, height, width), x)
        if token_mask is not None:
            cos = jnp.where(token_mask[..., None], cos, 1)
            sin = jnp.where(token_mask[..., None], sin, 0)
        return rotate(x, cos, sin)


def _tables(angles: np.ndarray, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines ``(1, length, F)`` of angles that are known."""
    cos, sin = (jnp.asarray(f(angles)[None], wide_dtype(x)) for f in (np.cos, np.sin))
    return cos, sin


# ----------------------------------------------------------------- which one a layer gets


def mrope(
    size: int,
    theta: float,
    sections: tuple[int, ...] = DEFAULT_SECTIONS,
    *,
    arrangement: str = "interleaved",
    factor: float = 1.0,
    s: Any = None,
) -> Rotary:
    """Positions of three axes: time, row and column.

    Args:
        size: Head size; the first ``int(size * factor)`` lanes are rotated.
        theta: The base.
        sections: How many pairs follow each axis.
        arrangement: "interleaved", as in Qwen3: pairs 1, 4, 7... follow the row, pairs
            2, 5, 8... the column, as many as their sections say, and all others the
            time. Or "contiguous", as in Qwen2-VL: one section after another.
        factor: The share of the lanes that is rotated.
        s: Settings, of which rope_min_timescale is read; None for 1.
    """
    rotary = _rotary_size(size, factor)
    if len(sections) != 3 or sum(sections) != rotary // 2:
        raise ValueError(
            f"mrope_section={tuple(sections)} must be three numbers that add up to "
            f"rotary_dim / 2 = {rotary // 2}."
        )
    if arrangement == "contiguous":
        axes = np.repeat(np.arange(3), sections)
    elif arrangement == "interleaved":
        axes = np.zeros(rotary // 2, np.int64)
        for axis in (1, 2):
            axes[axis : 3 * sections[axis] : 3] = axis
    else:
        known = choices(("interleaved", "contiguous"))
        raise ValueError(f"mrope_layout={arrangement!r} is not one of {known}.")
    plain = frequencies(rotary, theta) if s is None else _plain(rotary, theta, s)
    inv_freq = tuple(plain.tolist())
    return Rotary(inv_freq, size, axes=tuple(int(axis) for axis in axes))


def _plain(size: int, theta: float, s: Any) -> Frequencies:
    """From config.rope_min_timescale radians' inverse to nearly ``1 / theta``."""
    first = s.rope_min_timescale
    return frequencies(size, theta / first) / first


def _rotary_size(size: int, factor: float) -> int:
    if not 0 < factor <= 1:
        raise ValueError(f"partial_rotary_factor={factor} must lie in (0, 1].")
    rotary = int(size * factor)
    if rotary < 2 or rotary % 2:
        raise ValueError(
            "Embedding dim for rotary position embedding must be a multiple of 2. Got "
            f"{rotary} lanes of a head size of {size}."
        )
    return rotary


def yarn(
    size: int, theta: float, s: Any, factors: tuple[float, int] | None = None
) -> Rotary:
    """YaRN with MaxText's switches, read of the settings ``s``.

    ``factors`` are the stretch and the original length, if not those of the settings.
    """
    stretch, original = factors or (s.rope_factor, s.original_max_position_embeddings)
    if s.rope_pairwise and not s.rope_interleave:
        raise ValueError("rope_pairwise=True requires rope_interleave=True.")
    inv_freq = yarn_scaling(
        frequencies(size, theta),
        factor=stretch,
        theta=theta,
        original_max_position=original,
        beta_fast=s.beta_fast,
        beta_slow=s.beta_slow,
        truncate=s.rope_truncate,
    )
    layout: Literal["half", "interleaved"] = (
        "interleaved" if s.rope_interleave else "half"
    )
    return Rotary(
        tuple(inv_freq.tolist()),
        size,
        layout=layout,
        written="interleaved" if s.rope_pairwise else "half",
        scale=yarn_attention_scale(stretch) if s.rope_attention_scaling else 1.0,
    )


def llama3(size: int, theta: float, rope_type: str, s: Any) -> Rotary:
    """Llama 3's, in pairs; with config.rope_use_scale long waves are slowed."""
    inv_freq = _plain(size, theta, s)
    if s.rope_use_scale:
        inv_freq = llama3_scaling(
            inv_freq,
            factor=s.llama_rope_factor or LLAMA_FACTORS.get(rope_type, 8.0),
            low_freq_factor=s.llama_rope_low_freq_factor,
            high_freq_factor=s.llama_rope_high_freq_factor,
            original_max_position=s.llama_rope_original_max_position,
        )
    pairs: Literal["interleaved"] = "interleaved"
    return Rotary(tuple(inv_freq.tolist()), size, layout=pairs, written=pairs)


def partial(size: int, theta: float, factor: float, s: Any) -> Rotary:
    """The first ``int(size * factor)`` lanes in the half layout, the rest pass.

    Gemma 4 pairs lanes over the whole head instead, with the frequencies of the whole
    head, and lets the later pairs stand still.
    """
    rotary = _rotary_size(size, factor)
    if s.is_model("gemma4"):
        turning = _plain(size, theta, s)[: rotary // 2]
        still = np.zeros(size // 2 - rotary // 2)
        return Rotary(tuple(np.concatenate([turning, still]).tolist()), size)
    inv_freq = _plain(rotary, theta, s)
    return Rotary(tuple(linear_scaling(inv_freq, s.rope_linear_scaling_factor)), size)


def vision(size: int, s: Any) -> LlamaVisionRotary | QwenVisionRotary:
    """By the model's name; see the classes."""
    if s.model_name.startswith("qwen3"):
        return QwenVisionRotary(
            size, s.spatial_merge_size_for_vit, s.rope_theta_for_vit
        )
    if s.model_name.startswith("llama4"):
        grid = s.image_size_for_vit // s.patch_size_for_vit
        return LlamaVisionRotary(size, grid, s.rope_theta_for_vit)
    raise ValueError(
        f"Unsupported model type for vision rotary embedding: {s.model_name}; "
        "config.model_name must begin with 'qwen3' or 'llama4'."
    )


def choose(
    o: Any,
    size: int,
    *,
    theta: float | int | None = None,
    factor: float | int | None = None,
    factors: tuple[float, int] | None = None,
) -> Rotary | LlamaVisionRotary | QwenVisionRotary:
    """The rotary embedding of a layer with these options, for heads of ``size``.

    In this order: images, axes (``use_mrope``), Llama 3, YaRN, partial, plain.
    ``theta`` and ``factor`` replace config.rope_max_timescale and
    config.partial_rotary_factor; ``factors`` are for `yarn`. Of plain ones that slide,
    config.local_rope_max_timescale is the base if it is positive.
    """
    s = o.settings
    if size % 2:
        raise ValueError(
            "Embedding dim for rotary position embedding must be a multiple of 2. Got "
            f"{size}."
        )
    theta = float(s.rope_max_timescale if theta is None else theta)
    factor = float(s.partial_rotary_factor if factor is None else factor)
    if o.is_vision:
        return vision(size, s)
    if o.use_mrope:
        sections = o.mrope_section or DEFAULT_SECTIONS
        arrangement = s.mrope_layout
        return mrope(size, theta, sections, arrangement=arrangement, factor=factor, s=s)
    if o.rope.startswith("llama3") or s.model_name.startswith("llama3.1"):
        return llama3(size, theta, o.rope, s)
    if o.rope == "yarn":
        return yarn(size, theta, s, factors)
    if factor != 1:
        return partial(size, theta, factor, s)
    local = o.kind == "local_sliding"
    if local and s.local_rope_max_timescale > 0:
        theta = s.local_rope_max_timescale
    inv_freq = _plain(size, theta, s)
    if not (local and s.is_model("gemma3")):
        inv_freq = linear_scaling(inv_freq, s.rope_linear_scaling_factor)
    return Rotary(tuple(inv_freq.tolist()), size)
