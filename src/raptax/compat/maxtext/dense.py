"""Projections and norms with MaxText's parameter names."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import lax
from jax.typing import DTypeLike

from ...nn.linear import along_last
from ...rope.turns import wide_dtype

Initializer = Callable[..., jax.Array]


def nd_dense_init(scale: float, mode: str, distribution: str) -> Initializer:
    """Variance scaling for kernels of any rank.

    Returns ``init(key, shape, dtype, in_axis, out_axis)``; a fan counts all axes named.
    """

    def init_fn(key, shape, dtype, in_axis, out_axis):
        scaling = jax.nn.initializers.variance_scaling
        init = scaling(scale, mode, distribution, in_axis, out_axis)  # type: ignore[arg-type]
        return init(key, shape, dtype)

    return init_fn


def divided(init: Initializer, by: float) -> Initializer:
    """``init`` with its numbers divided: where MaxText keeps ``1 / sqrt(head_dim)``."""
    return lambda *args: init(*args) / by


def param(value: jax.Array, names: Sequence[str | None]) -> nnx.Param[jax.Array]:
    """A parameter that knows the logical names of its axes."""
    return nnx.Param(value, out_sharding=tuple(names), eager_sharding=False)


class DenseGeneral(nnx.Module):
    """``y = x @ kernel + bias`` over the last axes of ``x``.

    Attributes:
        kernel: ``(*in_features, *out_features)``.
        bias: ``(*out_features)``, zeros at first, or None.
    """

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: Sequence[int],
        *,
        names: Sequence[str | None],
        kernel_init: Initializer,
        dtype: DTypeLike = jnp.float32,
        weight_dtype: DTypeLike = jnp.float32,
        use_bias: bool = False,
        quant: Any = None,
        precision: str | None = None,
        place: Callable[..., jax.Array] = lambda x, names: x,
        rngs: nnx.Rngs,
    ):
        into, out = tuple(in_features), tuple(out_features)
        axes = tuple(range(len(into)))
        others = tuple(range(len(into), len(into + out)))
        kernel = kernel_init(rngs.params(), (*into, *out), weight_dtype, axes, others)
        self.kernel = param(place(kernel, names), names)
        bias = place(jnp.zeros(out, weight_dtype), names[len(into) :])
        self.bias = param(bias, names[len(into) :]) if use_bias else None
        self.axes, self.dtype, self.precision = len(into), dtype, precision
        made = None
        if quant is not None:
            made = quant.dot_general_cls(tuple(names))()
            if isinstance(made, linen.Module):  # as AQT's are
                made = nnx.bridge.ToNNX(made, rngs=rngs)
                dims = self._dims(len(into))
                nnx.bridge.lazy_init(
                    made, jnp.ones((1, *into), dtype), kernel, dims, None
                )
        self.product = nnx.data(made) if isinstance(made, nnx.Module) else made

    def _dims(self, rank: int) -> Any:
        last = tuple(range(rank - self.axes + 1, rank + 1))
        return (last, tuple(range(self.axes))), ((), ())

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(self.dtype)
        product = lax.dot_general if self.product is None else self.product
        dims = self._dims(x.ndim - 1)
        y = product(x.astype(self.dtype), kernel, dims, precision=self.precision)
        y = y.astype(self.dtype)
        if self.bias is not None:
            bias = self.bias[...]
            y += bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape).astype(y.dtype)
        return y


def _normalised(x: jax.Array, eps: float) -> jax.Array:
    """``x / sqrt(mean(x ** 2) + eps)`` over the last axis, in float32 or float64."""
    wide = x.astype(wide_dtype(x))
    square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return wide * lax.rsqrt(square + eps)


class L2Norm(nnx.Module):
    """``x / sqrt(mean(x ** 2) + eps)`` over the last axis: no parameters.

    MaxText's name: the mean makes it an RMS norm, not one of unit length. Computed in
    float32, or float64 if ``x`` is that; the result has the dtype of ``x``, and zeros
    stay zeros.

    Attributes:
        eps: Added to the mean.
        rngs: Kept, not used: every NNX module of MaxText is given some.
    """

    def __init__(self, eps: float = 1e-6, rngs: nnx.Rngs | None = None):
        self.eps, self.rngs = eps, nnx.data(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _normalised(x, self.eps).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`L2Norm` times a learned ``scale``, over the last axis or the last two.

    Attributes:
        scale: Ones at first; None for none.
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float,
        dtype: DTypeLike,
        weight_dtype: DTypeLike,
        has_scale: bool = True,
        all_heads: bool = False,
    ):
        scale = param(jnp.ones(size, weight_dtype), ("norm",))
        self.scale = scale if has_scale else None
        self.eps, self.dtype, self.all_heads = eps, dtype, all_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        flat = x.reshape(*x.shape[:-2], -1) if self.all_heads else x
        y = _normalised(flat, self.eps).astype(self.dtype)
        if self.scale is not None:
            y *= along_last(self.scale[...], y)
        return y.reshape(x.shape)
