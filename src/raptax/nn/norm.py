"""Normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .linear import along_last


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x ** 2) + eps) * weight`` over the last axis.

    Zhang & Sennrich 2019, arXiv:1910.07467. Worked out in float32, or float64 if ``x`` is
    that; the result has the dtype of ``x``.
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float = 1e-6,
        dtype: DTypeLike = jnp.float32,
        weight: Float[Array, " size"] | None = None,
    ):
        self.weight = nnx.Param(jnp.ones(size, dtype) if weight is None else weight)
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
        square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(square + self.eps)
        return (wide * along_last(self.weight[...], wide)).astype(x.dtype)
