"""Projections of quantized checkpoints: GPTQ's packed integers, float8 and NVFP4.

They hold a checkpoint's tensors under its names, packed as they are; each call unpacks
them beside the multiply. None of it is trained but the bias, and derivatives reach the
input. Build one from a checkpoint's tensors, ``GPTQLinear(config, **tensors)``, or with
random weights where a layer wants a ``linear_cls``::

    AttentionWithRope(..., linear_cls=partial(GPTQLinear.create, config=config))
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from ..quant import float8, gptq
from ..quant.float8 import Float8Config
from ..quant.gptq import QuantizationConfig
from .linear import LECUN_NORMAL, along_last

Tensor = jax.Array | np.ndarray


def _held(tensor: Tensor | None) -> Any:
    """A tensor that is not trained."""
    return None if tensor is None else nnx.Variable(jnp.asarray(tensor))


def _bias(tensor: Tensor | None) -> Any:
    return None if tensor is None else nnx.Param(jnp.asarray(tensor))


def _value(variable: Any) -> jax.Array | None:
    return None if variable is None else variable[...]


def _bad_shape(name: str, shape: tuple[int, ...], wanted: object) -> ValueError:
    return ValueError(f"{name} has the shape {shape}, not {wanted}.")


class GPTQLinear(nnx.Module):
    """``y = x @ W + bias`` with the ``W`` of `raptax.quant.gptq`, unpacked at each call.

    ``W`` is worked out in float32 and rounded to the dtype of ``x`` where that is less.

    Args:
        config: How the tensors are packed.
        qweight: Codes, int32 ``(words, O)``.
        scales: ``(G, O)``.
        qzeros: Zero points, int32 ``(G, words)``. May be left out if ``config.sym``.
        g_idx: The group of each input, int32 ``(C,)``. May be left out without
            ``config.desc_act``; ``C`` is then what ``qweight`` holds.
        bias: ``(O,)``, or None.

    Raises:
        ValueError: A tensor is missing, or does not fit the others or ``config``.
    """

    def __init__(
        self,
        config: QuantizationConfig,
        *,
        qweight: Tensor,
        scales: Tensor,
        qzeros: Tensor | None = None,
        g_idx: Tensor | None = None,
        bias: Tensor | None = None,
    ):
        capacity = qweight.shape[0] * 32 // config.bits
        self.config = config
        self.in_features = capacity if g_idx is None else g_idx.shape[0]
        self.qweight, self.scales = _held(qweight), _held(scales)
        self.qzeros, self.g_idx = nnx.data(_held(qzeros)), nnx.data(_held(g_idx))
        self.bias = nnx.data(_bias(bias))
        self._check()

    @classmethod
    def create(
        cls,
        in_features: int,
        out_features: int,
        *,
        config: QuantizationConfig,
        has_bias: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "GPTQLinear":
        """Random codes with the variance of `Linear`; scales and bias of ``dtype``."""
        groups = config.groups(in_features)
        words = config.words(in_features), out_features
        # Codes drawn evenly from 2 ** bits of them have this standard deviation.
        spread = ((4**config.bits - 1) / 12) ** 0.5
        scale = jnp.asarray(in_features**-0.5 / spread, dtype)
        middle = np.full((groups, out_features), 2 ** (config.bits - 1))
        index = gptq.contiguous_groups(in_features, config)
        return cls(
            config,
            qweight=jax.random.bits(rngs.params(), words, jnp.uint32).view(jnp.int32),
            scales=jnp.full((groups, out_features), scale, dtype),
            qzeros=gptq.pack_zeros(middle, config),
            g_idx=index,
            bias=jnp.zeros(out_features, dtype) if has_bias else None,
        )

    def _check(self) -> None:
        config, C, O = self.config, self.in_features, self.out_features
        groups = config.groups(C)
        wanted = {
            "qweight": (config.words(C), O),
            "scales": (groups, O),
            "qzeros": (groups, config.words(O)),
            "g_idx": (C,),
            "bias": (O,),
        }
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise _bad_shape(name, tensor.shape, f"{shape} as {config} wants it")
        if self.qzeros is None and not config.sym:
            raise ValueError("qzeros=None needs sym=True, which says what they are.")
        if self.g_idx is None:
            if config.desc_act:
                raise ValueError(
                    "desc_act=True needs a g_idx: the order of its groups."
                )
            return
        if isinstance(self.g_idx[...], jax.core.Tracer):  # nothing to look at yet
            return
        index = np.asarray(self.g_idx[...])
        if index.size and not (index.min() >= 0 and index.max() < groups):
            raise ValueError(
                f"g_idx has groups from {index.min()} to {index.max()}, not from 0 "
                f"to {groups - 1}."
            )
        straight = gptq.contiguous_groups(C, config)
        if not config.desc_act and not np.array_equal(index, straight):
            raise ValueError("g_idx is out of order, and desc_act=False.")

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]

    @property
    def weight(self) -> Float32[Array, "O C"]:
        return self._dequantize().T

    def _dequantize(self, columns: jax.Array | None = None) -> jax.Array:
        return gptq.dequantize(
            self.qweight[...],
            self.scales[...],
            self.config,
            qzeros=_value(self.qzeros),
            g_idx=_value(self.g_idx) if self.config.desc_act else None,
            in_features=self.in_features,
            columns=columns,
        )

    def __call__(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows O"]:
        y = x @ self._dequantize().astype(x.dtype)
        return y if self.bias is None else y + along_last(self.bias[...], y)

    def rows(self, ids: Int[Array, "*ids"]) -> Float[Array, "*ids C"]:
        return self._dequantize(ids.reshape(-1)).T.reshape(*ids.shape, -1)


class Float8Linear(nnx.Module):
    """``y = x_q @ w.T + bias`` with few bits on both sides; see `raptax.quant.float8`.

    Inside ``shard_map`` the lanes of ``x`` may be spread over an axis of the mesh;
    the caller that spreads them names it in ``input_axis``.

    The product and the bias are added up in float32, then rounded to the dtype of ``x``.

    Args:
        config: How both sides are scaled.
        weight: float8_e4m3fn ``(O, C)``; of NVFP4 uint8 ``(O, C / 2)``.
        weight_scale: Of the shape in `raptax.quant.float8`; one number in any shape.
        input_scale: One number if inputs are scaled statically, else None.
        weight_scale_2: One number if this is NVFP4, else None.
        bias: ``(O,)``, or None.

    Raises:
        ValueError: A tensor is missing or unasked for, or does not fit the others or
            ``config``.
    """

    def __init__(
        self,
        config: Float8Config,
        *,
        weight: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor | None = None,
        weight_scale_2: Tensor | None = None,
        bias: Tensor | None = None,
    ):
        self.config = config
        self.input_axis: str | None = None
        self.in_features = weight.shape[1] * (2 if config.is_nvfp4 else 1)
        single = config.weight_scale.is_tensor
        scale = _single("weight_scale", weight_scale) if single else weight_scale
        self.weight, self.weight_scale = _held(weight), _held(scale)
        self.input_scale = nnx.data(_held(_single("input_scale", input_scale)))
        self.weight_scale_2 = nnx.data(_held(_single("weight_scale_2", weight_scale_2)))
        self.bias = nnx.data(_bias(bias))
        self._check()

    @classmethod
    def create(
        cls,
        in_features: int,
        out_features: int,
        *,
        config: Float8Config,
        has_bias: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "Float8Linear":
        """Random weights of the variance of `Linear`.

        A static ``input_scale`` is made for inputs up to 8 in size. The bias has the
        dtype that ``config`` says, else ``dtype``.
        """
        shape = (out_features, in_features)
        tensors = float8.quantize_weight(
            LECUN_NORMAL(rngs.params(), shape, jnp.float32), config
        )
        if config.is_static:
            top = float8.E4M3_MAX * (float8.E2M1_MAX if config.is_nvfp4 else 1)
            tensors["input_scale"] = jnp.float32(8 / top)
        if has_bias:
            tensors["bias"] = jnp.zeros(out_features, config.bias_dtype or dtype)
        return cls(config, **tensors)

    def _check(self) -> None:
        config, O, C = self.config, self.out_features, self.in_features
        kind = jnp.uint8 if config.is_nvfp4 else float8.E4M3
        if self.weight.dtype != kind:
            raise ValueError(f"weight is {self.weight.dtype}, not {jnp.dtype(kind)}.")
        if config.is_nvfp4:
            float8.check_nvfp4_width(C)
        shape = float8.weight_scale_shape(config, O, C)
        if self.weight_scale.shape != shape:
            wanted = f"{shape}, that of {config.weight_scale}"
            raise _bad_shape("weight_scale", self.weight_scale.shape, wanted)
        if self.bias is not None and self.bias.shape != (O,):
            raise _bad_shape("bias", self.bias.shape, (O,))
        needs = {"input_scale": config.is_static, "weight_scale_2": config.is_nvfp4}
        for name, needed in needs.items():
            if (getattr(self, name) is not None) != needed:
                verb = "needs" if needed else "takes no"
                raise ValueError(f"{config} {verb} {name}.")

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def dequantized_weight(self) -> Float32[Array, "O C"]:
        """The numbers that the weight stands for."""
        return self._dequantize()

    def _dequantize(self, rows: jax.Array | None = None) -> jax.Array:
        return float8.dequantize(
            self.weight[...],
            self.weight_scale[...],
            self.config,
            weight_scale_2=_value(self.weight_scale_2),
            rows=rows,
        )

    def __call__(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows O"]:
        y = float8.matmul(
            x,
            self.weight[...],
            self.weight_scale[...],
            self.config,
            input_scale=_value(self.input_scale),
            weight_scale_2=_value(self.weight_scale_2),
            input_axis=self.input_axis,
        )
        if self.bias is not None:
            y = y + along_last(self.bias[...], y)
        return y.astype(x.dtype)

    def rows(self, ids: Int[Array, "*ids"]) -> Float[Array, "*ids C"]:
        return self._dequantize(ids.reshape(-1)).reshape(*ids.shape, -1)


def _single(name: str, tensor: Tensor | None) -> Any:
    """One number: checkpoints write it as ``()``, ``(1,)`` or ``(1, 1)``."""
    if tensor is None:
        return None
    if tensor.size != 1:
        raise _bad_shape(name, tensor.shape, "that of one number")
    return jnp.asarray(tensor).reshape(())
