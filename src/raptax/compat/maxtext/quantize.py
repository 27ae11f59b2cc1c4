"""Products of quantized numbers for the projections, by qwix (an optional package)."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

Dims = Any


@dataclasses.dataclass(frozen=True)
class QwixQuantization:
    """A ``quant`` for `Attention`: weights, and inputs if asked, are rounded per call.

    A scale is shared along the contracted axes alone: one for each row of the input and
    each column of the weight. Gradients pass the rounding as if it were not there
    (straight-through), so layers train.

    Attributes:
        weight_qtype: As qwix names it: "int8", "int4", "float8_e4m3fn", "nf4"...
        act_qtype: Likewise, for inputs; None leaves them as they are.

    Raises:
        ModuleNotFoundError: qwix is not installed (``pip install 'raptax[quant]'``).
    """

    weight_qtype: str = "int8"
    act_qtype: str | None = "int8"

    def __post_init__(self) -> None:
        importlib.import_module("qwix")

    def dot_general_cls(self, mesh_axes: tuple[str | None, ...] = ()) -> Any:
        """What MaxText's projections ask for: makes a ``dot_general``.

        ``mesh_axes`` are the names of the kernel's axes, which qwix need not know.
        """
        return lambda: self.dot_general

    def dot_general(
        self, x: jax.Array, kernel: jax.Array, dims: Dims, precision: Any = None
    ) -> jax.Array:
        """``lax.dot_general`` of the rounded arrays."""
        (into, axes), _ = dims

        @jax.custom_vjp
        def product(x, kernel):
            # qwix multiplies integers by floats of another rank, which JAX may be
            # asked to refuse.
            with (
                jax.numpy_dtype_promotion("standard"),
                jax.numpy_rank_promotion("allow"),
            ):
                few = _rounded(x, self.act_qtype, into)
                weights = _rounded(kernel, self.weight_qtype, axes)
                return _qwix("dot_general")(few, weights, dims, precision=precision)

        def forward(x, kernel):
            return product(x, kernel), (x, kernel)

        def backward(saved, gradient):
            exact = lambda x, w: lax.dot_general(x, w, dims, precision=precision)
            return jax.vjp(exact, *saved)[1](gradient)

        product.defvjp(forward, backward)
        return product(x, kernel)


def _qwix(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module("qwix"), name)


def _rounded(x: jax.Array, qtype: str | None, contracted: Any) -> Any:
    if qtype is None:
        return x
    kept = [axis for axis in range(x.ndim) if axis not in contracted]
    return _qwix("quantize")(x, qtype, channelwise_axes=kept)
