"""float8 and NVFP4: numbers of 8 and 4 bits with scales, and products of them.

A weight ``(O, C)`` is stored as float8 (``e4m3``, up to 448) with scales,

    tensor    ()                              one for all
    rowwise   (O, 1)                          one for each output
    block     (ceil(O / b0), ceil(C / b1))    one for each block of ``block_size``

and stands for ``weight * scale``. Inputs are brought to float8 before the product, with a
``static`` scale that came with the checkpoint or a ``dynamic`` one,

    scale = min(max |x|, activation_scale_ub) / 448
    x_q   = e4m3(clip(x / scale, -448, 448))

over everything (tensor), each row (colwise: the scales are a column), or each run of
``g`` lanes of a row (block ``(1, g)``). Then ``y = (x_q . w_q) * scales``, summed in
float32. A group of zeros has the scale 1, and so does one too small for float32's normal
numbers, which becomes zeros. NaN stays NaN. (Divisions by 448 and 6 are multiplications
by the float32 next to 1/448 and 1/6.)

NVFP4 has numbers of 4 bits (``e2m1``: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives),
two in a byte, the first in the low nibble; for each 16 of them a scale in ``e4m3``; and a
scale for the whole in float32, ``weight_scale_2`` of a weight and ``input_scale`` of an
input.

Sources: Micikevicius et al. 2022, arXiv:2209.05433 (e4m3); the OCP Microscaling
specification 1.0 (e2m1); the fields are those of MAX's ``Float8Config``.
"""

import dataclasses
import math
from collections.abc import Iterable, Set
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Shaped, UInt8

from .._core.errors import choices

Granularity = Literal["tensor", "rowwise", "colwise", "block"]
Origin = Literal["static", "dynamic"]
E4M3, E2M1_MAX = jnp.float8_e4m3fn, 6.0
E4M3_MAX = float(jnp.finfo(E4M3).max)
NVFP4_GROUP = 16


class _ScaleSpec:
    """What the two kinds of spec have in common."""

    granularity: Granularity
    dtype: DTypeLike
    block_size: tuple[int, int] | None

    def _check(self, name: str, allowed: tuple[str, ...], why: str) -> None:
        if self.granularity not in allowed:
            raise ValueError(
                f"{name}.granularity={self.granularity!r} is not one of "
                f"{choices(allowed)}{why}."
            )
        size = self.block_size
        if self.is_block and not (
            isinstance(size, tuple) and len(size) == 2 and min(size) > 0
        ):
            raise ValueError(
                f"{name}.block_size={size} must be a pair of positive sizes with "
                "granularity 'block'."
            )
        if not self.is_block and size is not None:
            raise ValueError(
                f"{name}.block_size={size} belongs to granularity 'block', not to "
                f"{self.granularity!r}."
            )
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"{name}.dtype={self.dtype} must be a float type.")

    @property
    def is_tensor(self) -> bool:
        return self.granularity == "tensor"

    @property
    def is_rowwise(self) -> bool:
        return self.granularity == "rowwise"

    @property
    def is_colwise(self) -> bool:
        return self.granularity == "colwise"

    @property
    def is_block(self) -> bool:
        return self.granularity == "block"


@dataclasses.dataclass(frozen=True)
class Float8InputScaleSpec(_ScaleSpec):
    """How inputs are scaled.

    Attributes:
        granularity: "tensor"; "colwise", a scale for each row of the input; or "block".
        origin: "static", the scale comes with the checkpoint; or "dynamic", it is taken
            from the input.
        dtype: What scales are stored as, and a dynamic one is rounded to.
            ``float8_e8m0fnu`` holds powers of two alone; to that it is rounded up.
        activation_scale_ub: With "dynamic", the largest magnitude that sets a scale;
            what lies above is clipped.
        block_size: With "block", ``(1, g)``: a scale for each ``g`` lanes of a row.
    """

    granularity: Granularity
    origin: Origin
    dtype: DTypeLike = jnp.float32
    activation_scale_ub: float | None = None
    block_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        why = " (a scale for each lane does not come out of the product's sum)"
        self._check("input_scale", ("tensor", "colwise", "block"), why)
        if self.origin not in get_args(Origin):
            raise ValueError(
                f"input_scale.origin={self.origin!r} is not one of "
                f"{choices(get_args(Origin))}."
            )
        bound = self.activation_scale_ub
        if bound is not None and (self.origin == "static" or not bound > 0):
            raise ValueError(
                f"activation_scale_ub={bound} must be above 0, and belongs to origin "
                f"'dynamic'; the origin is {self.origin!r}."
            )
        if self.block_size is not None and self.block_size[0] != 1:
            raise ValueError(
                f"input_scale.block_size={self.block_size} must be (1, g): rows of an "
                "input are scaled each for itself."
            )


@dataclasses.dataclass(frozen=True)
class Float8WeightScaleSpec(_ScaleSpec):
    """How weights are scaled.

    Attributes:
        granularity: "tensor"; "rowwise", a scale for each output; or "block".
        dtype: What the scales are stored as.
        block_size: With "block", outputs and inputs of one block.
    """

    granularity: Granularity
    dtype: DTypeLike = jnp.float32
    block_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        why = " (a scale for each input does not come out of the product's sum)"
        self._check("weight_scale", ("tensor", "rowwise", "block"), why)


@dataclasses.dataclass(frozen=True)
class Float8Config:
    """How a checkpoint's linear layers are scaled.

    Attributes:
        input_scale: Of the inputs.
        weight_scale: Of the weights.
        mlp_in_float8: The layers whose feed-forward projections are float8. For those
            who build models; a linear layer does not read it.
        attn_qkv_in_float8: The layers whose attention projections are. Likewise.
        embedding_output_dtype: What embeddings are. Likewise.
        bias_dtype: What biases are stored as.
        quant_method: The checkpoint's name for the method.
        quant_algo: "NVFP4" with ``quant_method="modelopt"`` means that format.

    Raises:
        ValueError: Specs that do not go together: a static scale is one for the tensor,
            and both sides must be cut alike along the inputs. NVFP4 is block ``(1, 16)``
            on both sides, with e4m3 scales of the weight and a static one of the input.
    """

    input_scale: Float8InputScaleSpec
    weight_scale: Float8WeightScaleSpec
    mlp_in_float8: Set[int] = frozenset()
    attn_qkv_in_float8: Set[int] = frozenset()
    embedding_output_dtype: DTypeLike | None = None
    bias_dtype: DTypeLike | None = None
    quant_method: str | None = None
    quant_algo: str | None = None

    def __post_init__(self) -> None:
        for name in ("mlp_in_float8", "attn_qkv_in_float8"):  # any set; it must hash
            object.__setattr__(self, name, frozenset(getattr(self, name)))
        inputs, weights = self.input_scale, self.weight_scale
        if self.quant_algo == "NVFP4":
            self._check_nvfp4()
        elif inputs.origin == "static" and not inputs.is_tensor:
            raise ValueError(
                f"input_scale.origin='static' with granularity {inputs.granularity!r}: "
                "a scale that is known beforehand is one for the tensor."
            )
        ours, theirs = inputs.block_size, weights.block_size
        if (ours and ours[1]) != (theirs and theirs[1]):
            raise ValueError(
                f"input_scale.block_size={ours} and weight_scale.block_size={theirs} "
                "must agree along the inputs, their second axis."
            )

    def _check_nvfp4(self) -> None:
        block = (1, NVFP4_GROUP)
        inputs, weights = self.input_scale, self.weight_scale
        good = (
            self.quant_method == "modelopt"
            and inputs.block_size == weights.block_size == block
            and inputs.origin == "static"
            and jnp.dtype(weights.dtype) == E4M3
        )
        if not good:
            raise ValueError(
                "quant_algo='NVFP4' needs quant_method='modelopt', a static input_scale "
                f"and a float8_e4m3fn weight_scale, both in blocks of {block}; got "
                f"{self}."
            )

    @property
    def is_static(self) -> bool:
        return self.input_scale.origin == "static"

    @property
    def is_dynamic(self) -> bool:
        return self.input_scale.origin == "dynamic"

    @property
    def is_nvfp4(self) -> bool:
        return self.quant_algo == "NVFP4"

    @property
    def scales_granularity_mnk(self) -> tuple[int, int, int]:
        """Rows, outputs and inputs that share a scale; -1 means all of them."""
        inputs, weights = self.input_scale, self.weight_scale
        m = {"tensor": -1, "colwise": 1, "block": 1}[inputs.granularity]
        n, k = -1 if weights.is_tensor else 1, -1
        if weights.block_size is not None:
            n, k = weights.block_size
        return m, n, k


# ----------------------------------------------------------------------------- numbers


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rounded(x: jax.Array, to: Any) -> jax.Array:
    """The nearest e4m3 in float32, the largest for all beyond it."""
    return jnp.clip(x, -E4M3_MAX, E4M3_MAX).astype(to).astype(x.dtype)


@_rounded.defjvp
def _rounded_jvp(to, primals, tangents):
    # The slope of no rounding. From half a step of 32 above the largest on it is clipped,
    # not rounded; the largest of a row must not be, though it may come out above 448.
    kept = jnp.abs(primals[0]) < E4M3_MAX + 16
    return _rounded(primals[0], to), jnp.where(kept, tangents[0], 0)


@jax.custom_jvp
def _rounded_e2m1(x: jax.Array) -> jax.Array:
    """The nearest e2m1, the largest for all beyond it; ties go to an even last bit."""
    x = jnp.clip(x, -E2M1_MAX, E2M1_MAX)
    size = jnp.abs(x)
    step = jnp.where(size < 2, 0.5, jnp.where(size < 4, 1.0, 2.0)).astype(x.dtype)
    return jnp.round(x / step) * step


@_rounded_e2m1.defjvp
def _rounded_e2m1_jvp(primals, tangents):
    kept = jnp.abs(primals[0]) < E2M1_MAX + 1  # half a step of 2
    return _rounded_e2m1(*primals), jnp.where(kept, tangents[0], 0)


def decode_e2m1(packed: UInt8[Array, "*rows bytes"]) -> Float32[Array, "*rows numbers"]:
    """The numbers of NVFP4's bytes, two each, the low nibble first."""
    shifts = jnp.arange(0, 8, 4, dtype=jnp.uint8).reshape((1,) * packed.ndim + (2,))
    nibbles = (packed[..., None] >> shifts).astype(jnp.int32) & 15
    exponent, last = nibbles >> 1 & 3, nibbles & 1
    # Halves: 0 and 1 where the exponent is 0, else (2 + last bit) << (exponent - 1).
    normal = (2 | last) << jnp.maximum(exponent - 1, 0)
    halves = jnp.where(exponent == 0, last, normal).astype(jnp.float32)
    numbers = jnp.where(nibbles >> 3 == 0, halves, -halves) / 2
    return numbers.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def encode_e2m1(numbers: Float[Array, "*rows numbers"]) -> UInt8[Array, "*rows bytes"]:
    """The bytes of the nearest e2m1 numbers; the last axis must be even.

    What lies beyond 6 becomes 6. NaN has no code and becomes 0.
    """
    if numbers.shape[-1] % 2:
        raise ValueError(f"{numbers.shape[-1]} numbers do not fill bytes of two.")
    x = jnp.nan_to_num(numbers.astype(jnp.float32), posinf=E2M1_MAX, neginf=-E2M1_MAX)
    halves = jnp.abs(_rounded_e2m1(x)) * 2
    halves = halves.astype(jnp.uint8)
    # 0, 1, 2, 3, 4, 6, 8 and 12 halves have the codes 0 to 7.
    large = jnp.where(halves == 6, 5, jnp.where(halves == 8, 6, 7)).astype(jnp.uint8)
    code = jnp.where(halves <= 4, halves, large)
    code = code | jnp.signbit(x).astype(jnp.uint8) << 3
    return code[..., 0::2] | code[..., 1::2] << 4


def _scale(largest: jax.Array, top: float, dtype: DTypeLike) -> jax.Array:
    """``largest / top`` as ``dtype`` holds it, in float32; 1 where that is too small.

    Powers of two (e8m0) are rounded up, so that nothing is clipped.
    """
    if jnp.dtype(dtype) == jnp.float8_e8m0fnu:
        # largest = f * 2 ** e and top = g * 2 ** t, with f and g in [0.5, 1)
        (f, e), (g, t) = jnp.frexp(largest), math.frexp(top)
        scale = jnp.ldexp(jnp.ones_like(largest), e - t + (f > g).astype(e.dtype))
    else:
        # By the reciprocal: under jit XLA does that to a division by a constant.
        scale = largest * jnp.float32(1 / top)
    scale = scale.astype(dtype).astype(jnp.float32)
    too_small = (scale < jnp.finfo(jnp.float32).tiny) | (largest == 0)
    return jnp.where(too_small, jnp.float32(1), scale)  # NaN stays


def _largest(x: jax.Array, axes: Iterable[int]) -> jax.Array:
    """The largest magnitude over some axes, which stay with length 1."""
    return jnp.max(jnp.abs(x), axis=tuple(axes), keepdims=True, initial=0)


def _in_runs(x: jax.Array, axis: int, size: int) -> jax.Array:
    """One axis cut into runs of ``size``, the last one filled up with zeros."""
    axis %= x.ndim
    runs = -(-x.shape[axis] // size)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, runs * size - x.shape[axis])
    shape = (*x.shape[:axis], runs, size, *x.shape[axis + 1 :])
    return jnp.pad(x, widths).reshape(shape)


def _spread(scale: jax.Array, axis: int, size: int, length: int) -> jax.Array:
    """Scales of runs of ``size`` as scales of ``length`` single places."""
    return jax.lax.slice_in_dim(jnp.repeat(scale, size, axis), 0, length, axis=axis)


# ------------------------------------------------------------------------------ inputs


def quantize_input(
    x: Float[Array, "*rows C"],
    config: Float8Config,
    input_scale: Float[Array, ""] | None = None,
) -> tuple[Shaped[Array, "*rows C"], Float32[Array, "..."]]:
    """The input as the product sees it: small numbers, and the scales they stand in.

    Returns:
        float8 numbers, or for NVFP4 float32 ones that e2m1 holds; and their scales in
        float32, of the rank of ``x`` and with a last axis of 1, or of
        ``ceil(C / g)``. The scales of NVFP4 include ``input_scale``.

    Raises:
        ValueError: ``input_scale`` is missing where it is static, or there where not.
    """
    numbers, scale, whole = _input(x, config, input_scale)
    if config.is_nvfp4:
        return numbers, scale * whole
    return numbers.astype(E4M3), scale


def _input(x, config, input_scale, axis=None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`quantize_input` in float32, with the scale of the whole apart."""
    if config.is_static != (input_scale is not None):
        raise ValueError(
            f"an input scale of origin {config.input_scale.origin!r} "
            + ("needs an input_scale." if config.is_static else "takes no input_scale.")
        )
    x, one = x.astype(jnp.float32), jnp.ones((), jnp.float32)
    still = jax.lax.stop_gradient(x)
    if config.is_nvfp4:
        whole = input_scale.astype(jnp.float32).reshape(())
        scale = _nvfp4_scale(still, whole)
        wide = _spread(scale * whole, x.ndim - 1, NVFP4_GROUP, x.shape[-1])
        # A group whose scale is 0 in e4m3 is zeros.
        x = jnp.where(wide == 0, 0, x / jnp.where(wide == 0, 1, wide))
        return _rounded_e2m1(x), scale, whole
    if input_scale is not None:
        scale = input_scale.astype(jnp.float32).reshape((1,) * x.ndim)
        wide = scale
    else:
        scale = _dynamic_scale(still, config.input_scale, axis)
        wide = scale
        if (size := config.input_scale.block_size) is not None:
            wide = _spread(scale, x.ndim - 1, size[1], x.shape[-1])
    return _rounded(x / wide, E4M3), scale, one


def _nvfp4_scale(x, whole) -> jax.Array:
    """Scales of 16 lanes each, as e4m3 holds them, on top of the scale of the whole."""
    largest = _largest(_in_runs(x, -1, NVFP4_GROUP), (-1,))[..., 0]
    scale = jnp.clip(largest * jnp.float32(1 / E2M1_MAX) / whole, 0, E4M3_MAX)
    return _rounded(scale, E4M3)


def _dynamic_scale(x, spec, axis) -> jax.Array:
    if spec.block_size is not None:
        largest = _largest(_in_runs(x, -1, spec.block_size[1]), (-1,))[..., 0]
    else:
        largest = _largest(x, range(x.ndim) if spec.is_tensor else (-1,))
        if axis is not None:
            largest = jax.lax.pmax(largest, axis)
    if spec.activation_scale_ub is not None:
        largest = jnp.minimum(largest, jnp.float32(spec.activation_scale_ub))
    return _scale(largest, E4M3_MAX, spec.dtype)


# ----------------------------------------------------------------------------- weights


def weight_scale_shape(
    config: Float8Config, out_features: int, in_features: int
) -> tuple[int, ...]:
    """What ``weight_scale`` of such a weight looks like; see the module."""
    spec = config.weight_scale
    if spec.block_size is not None:
        b0, b1 = spec.block_size
        return -(-out_features // b0), -(-in_features // b1)
    return () if spec.is_tensor else (out_features, 1)


def quantize_weight(
    weight: Float[Array, "O C"], config: Float8Config
) -> dict[str, jax.Array]:
    """The tensors of a weight: ``weight``, ``weight_scale``, of NVFP4 ``weight_scale_2``.

    Each block's largest magnitude becomes the largest number of the format.

    Raises:
        ValueError: NVFP4 and a number of inputs that is no multiple of 16.
    """
    weight = weight.astype(jnp.float32)
    O, C = weight.shape
    if config.is_nvfp4:
        check_nvfp4_width(C)
        top = E2M1_MAX * E4M3_MAX
        whole = _scale(jnp.max(jnp.abs(weight), initial=0), top, jnp.float32)
        scale = _nvfp4_scale(weight, whole)
        wide = _spread(scale * whole, 1, NVFP4_GROUP, C)
        packed = encode_e2m1(jnp.where(wide == 0, 0, weight / wide))
        scale = scale.astype(E4M3)
        return {"weight": packed, "weight_scale": scale, "weight_scale_2": whole}
    spec = config.weight_scale
    b0, b1 = spec.block_size or (O if spec.is_tensor else 1, C)
    runs = _in_runs(_in_runs(weight, 1, max(b1, 1)), 0, max(b0, 1))
    scale = _scale(_largest(runs, (1, 3))[:, 0, :, 0], E4M3_MAX, spec.dtype)
    wide = _spread(_spread(scale, 0, b0, O), 1, b1, C)
    numbers = jnp.clip(weight / wide, -E4M3_MAX, E4M3_MAX).astype(E4M3)
    shape = weight_scale_shape(config, O, C)
    return {"weight": numbers, "weight_scale": scale.astype(spec.dtype).reshape(shape)}


def check_nvfp4_width(in_features: int) -> None:
    """Raises ValueError unless groups of 16 fill the inputs."""
    if in_features % NVFP4_GROUP:
        raise ValueError(
            f"NVFP4 takes inputs in groups of {NVFP4_GROUP}; {in_features} is no "
            "multiple of it."
        )


def _weight(weight, weight_scale, config, rows) -> tuple[jax.Array, jax.Array]:
    """Numbers ``(O, C)`` and scales ``(O or 1, 1 or groups)`` in float32.

    ``rows`` picks some of the outputs, None takes all.
    """
    O = weight.shape[0]
    spec = config.weight_scale
    scale = weight_scale.astype(jnp.float32)
    scale = scale.reshape(1, 1) if spec.is_tensor else scale
    if spec.block_size is not None:
        scale = _spread(scale, 0, spec.block_size[0], O)
    if rows is not None:
        weight = weight[rows]
        scale = scale if spec.is_tensor else scale[rows]
    numbers = decode_e2m1(weight) if config.is_nvfp4 else weight.astype(jnp.float32)
    return numbers, scale


def dequantize(
    weight: Shaped[Array, "O stored"],
    weight_scale: Shaped[Array, "..."],  # jaxtyping's Float does not know e8m0
    config: Float8Config,
    *,
    weight_scale_2: Float[Array, ""] | None = None,
    rows: Shaped[Array, " n"] | None = None,
) -> Float32[Array, "outputs C"]:
    """``weight * weight_scale`` (``* weight_scale_2``) in float32.

    Args:
        rows: Only these outputs, in this order.
    """
    numbers, scale = _weight(weight, weight_scale, config, rows)
    if config.weight_scale.block_size is not None:
        size = config.weight_scale.block_size[1]
        scale = _spread(scale, 1, size, numbers.shape[1])
    if weight_scale_2 is not None:
        scale = scale * weight_scale_2.astype(jnp.float32).reshape(1, 1)
    return numbers * scale


# ----------------------------------------------------------------------------- product


def matmul(
    x: Float[Array, "*rows C"],
    weight: Shaped[Array, "O stored"],
    weight_scale: Shaped[Array, "..."],  # jaxtyping's Float does not know e8m0
    config: Float8Config,
    *,
    input_scale: Float[Array, ""] | None = None,
    weight_scale_2: Float[Array, ""] | None = None,
    input_axis: str | None = None,
) -> Float32[Array, "*rows O"]:
    """``x @ w.T`` of the input brought to few bits and the weight as it is stored.

    Where one scale holds along the whole sum, the sum is over float8 numbers, whose
    products are exact, and the scales come after it. Blocks along the sum are scaled
    ahead of it, which rounds each number once more to float32.

    ``input_axis`` names an axis of a mesh over which the lanes of ``x`` are spread: a
    dynamic scale is then that of all of them.

    The derivative by ``x`` is that of ``x`` itself times the stored weight: rounding is
    passed over. What was clipped has none, nor has a group that became zeros.
    """
    values, scale, whole = _input(x, config, input_scale, input_axis)
    numbers, weight_scale = _weight(weight, weight_scale, config, None)
    if config.weight_scale.block_size is None:
        y = jnp.matmul(values, numbers.T)
        return y * scale * weight_scale.reshape((1,) * (y.ndim - 1) + (-1,))
    size, C = config.weight_scale.block_size[1], values.shape[-1]
    values = values * _spread(scale, values.ndim - 1, size, C)
    numbers = numbers * _spread(weight_scale, 1, size, C)
    # float8 and scaled e2m1 fit what matrix units multiply by default (bfloat16, TF32).
    # float8 times a float32 scale does not.
    exact = None if config.is_nvfp4 else jax.lax.Precision.HIGHEST
    y = jnp.matmul(values, numbers.T, precision=exact)
    if weight_scale_2 is not None:
        y = y * (whole * weight_scale_2.astype(jnp.float32)).reshape((1,) * y.ndim)
    return y
