"""A projection around packed weights, alone or in a stack of layers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from .._core.errors import choices
from ..kernels.cpu.packed_linear import Precision, packed_linear
from ..quant.packed import Packed
from .linear import along_last, held


class Stacked(nnx.Variable[jax.Array]):
    """An array whose first axis is a stack of layers, of which one is read by number.

    A loop over layers hands these over whole: cut out one by one they would be copied,
    and a product of one row would read its weight three times.
    """


class LayerNumber(nnx.Variable[jax.Array]):
    """Which of a stack a layer reads."""


class PackedLinear(nnx.Module):
    """One projection, or several of the same input, in one call of the C++ kernel.

    Outputs follow one another in the order of the weights, whose encodings may differ.

    Attributes:
        parts: `quant.packed.Packed` weights, each a stack.
        number: Which of each stack this layer reads.
        bias: For all outputs, or None.
        precision: See `kernels.cpu.packed_linear`.
    """

    def __init__(
        self,
        parts: Sequence[Packed],
        bias: Float[Array, " O"] | None = None,
        *,
        precision: Precision = "float32",
    ):
        self.parts = held(jax.tree.map(Stacked, tuple(parts)))
        self.number = LayerNumber(jnp.int32(0))
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.precision = precision

    @classmethod
    def joined(cls, projections: Sequence["PackedLinear"]) -> "PackedLinear":
        """Projections of one input as one.

        Raises:
            ValueError: They differ in precision, or read other weights of their stacks
                than the first.
        """
        precisions = {p.precision for p in projections}
        if len(precisions) > 1:
            raise ValueError(
                f"precisions {choices(sorted(precisions))} cannot be joined."
            )
        if any(int(p.number[...]) for p in projections):
            raise ValueError("only first layers of stacks can be joined.")
        parts = [part for p in projections for part in p.weights]
        bias = None
        if any(p.bias is not None for p in projections):
            bias = jnp.concatenate([p._bias() for p in projections])
        return cls(parts, bias, precision=projections[0].precision)

    def _bias(self) -> jax.Array:
        return jnp.zeros(self.out_features) if self.bias is None else self.bias[...]

    @property
    def weights(self) -> tuple[Packed, ...]:
        unwrap = lambda x: x[...]
        is_variable = lambda x: isinstance(x, nnx.Variable)
        weights: Any = jax.tree.map(unwrap, self.parts, is_leaf=is_variable)
        return tuple(weights)

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.weights)

    @property
    def weight(self) -> Float[Array, "O C"]:
        number = self.number[...]
        return jnp.concatenate([part.dequantize(number) for part in self.weights])

    def __call__(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows O"]:
        y = packed_linear(
            x, self.weights, index=self.number[...], precision=self.precision
        )
        return y if self.bias is None else y + along_last(self.bias[...], y)

    def rows(self, ids: Int[Array, "*ids"]) -> Float[Array, "*ids C"]:
        (weight,) = self.weights
        rows = weight.rows(ids.reshape(-1), self.number[...])
        return rows.reshape(*ids.shape, rows.shape[-1])
