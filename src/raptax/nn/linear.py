"""Projections: what weights are made of, and how q, k and v are laid out.

Every projection is ``y = x @ weight.T + bias`` with ``weight (out, in)``, the order in
which checkpoints store it. The ones here differ in what they hold: numbers, GGUF
blocks, or blocks taken apart into codes. Layers never ask which.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from ..quant import gguf

LECUN_NORMAL = nnx.initializers.lecun_normal(in_axis=1, out_axis=0)


@runtime_checkable
class Projection(Protocol):
    """A linear layer, whatever its weight is made of."""

    @property
    def out_features(self) -> int: ...

    def __call__(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows O"]: ...

    def rows(self, ids: Int[Array, "*ids"]) -> Float[Array, "*ids C"]:
        """The weight's rows of these numbers: the lookup of an embedding."""
        ...


class Linear(nnx.Module):
    """A weight of plain numbers.

    Products are taken in the dtype of ``x``; a weight of another one is converted next
    to the multiply (XLA fuses that for a single row, so a bfloat16 weight is read as
    such).

    Attributes:
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)``, zeros at first, or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        has_bias: bool = False,
        dtype: DTypeLike = jnp.float32,
        weight_init: nnx.Initializer = LECUN_NORMAL,
        rngs: nnx.Rngs,
    ):
        shape = (out_features, in_features)
        self.weight = nnx.Param(weight_init(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, dtype)) if has_bias else None

    @classmethod
    def from_weight(
        cls, weight: Float[Array, "O C"], bias: Float[Array, " O"] | None = None
    ) -> "Linear":
        """Around a weight that is there already."""
        layer = cls(
            *weight.shape[::-1], weight_init=lambda *_: weight, rngs=nnx.Rngs(0)
        )
        layer.bias = nnx.data(None if bias is None else nnx.Param(bias))
        return layer

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def __call__(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows O"]:
        y = x @ self.weight[...].T.astype(x.dtype)
        return y if self.bias is None else y + along_last(self.bias[...], y)

    def rows(self, ids: Int[Array, "*ids"]) -> Float[Array, "*ids C"]:
        return self.weight[...][ids]


class GGUFLinear(nnx.Module):
    """A weight that stays in its GGUF blocks; each call unpacks it beside the multiply.

    Smallest in memory. `CodesLinear` is the same weight, faster and larger.
    """

    def __init__(
        self,
        blocks: UInt8[Array, "O blocks bytes"],
        encoding: gguf.Encoding,
        bias: Float[Array, " O"] | None = None,
    ):
        self.blocks = nnx.Variable(jnp.asarray(blocks))  # not a Param: not trained
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.encoding = encoding

    @property
    def out_features(self) -> int:
        return self.blocks.shape[0]

    @property
    def weight(self) -> Float[Array, "O C"]:
        return gguf.dequantize(self.blocks[...], self.encoding)

    def __call__(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows O"]:
        y = x @ self.weight.T.astype(x.dtype)
        return y if self.bias is None else y + along_last(self.bias[...], y)

    def rows(self, ids: Int[Array, "*ids"]) -> Float[Array, "*ids C"]:
        blocks = self.blocks[...][ids.reshape(-1)]
        return gguf.dequantize(blocks, self.encoding).reshape(*ids.shape, -1)


class CodesLinear(nnx.Module):
    """A quantized weight as one byte per number and a scale per group of them.

    The numbers are those of `GGUFLinear`, to the bit. See `gguf.Codes` for why this
    form is the one to multiply by.
    """

    def __init__(self, codes: gguf.Codes, bias: Float[Array, " O"] | None = None):
        self.packed = held(codes)  # not a Param: not trained
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))

    @property
    def codes(self) -> gguf.Codes:
        return jax.tree.map(lambda x: x[...], self.packed, is_leaf=_is_variable)

    @property
    def out_features(self) -> int:
        return self.codes.codes.shape[0]

    @property
    def weight(self) -> Float[Array, "O C"]:
        return self.codes.dequantize()

    def __call__(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows O"]:
        y = x @ self.weight.T.astype(x.dtype)
        return y if self.bias is None else y + along_last(self.bias[...], y)

    def rows(self, ids: Int[Array, "*ids"]) -> Float[Array, "*ids C"]:
        flat = ids.reshape(-1)
        chosen: gguf.Codes = jax.tree.map(lambda leaf: leaf[flat], self.codes)
        return chosen.dequantize().reshape(*ids.shape, -1)


def along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """``vector`` with the rank and dtype of ``like``, for rank promotion that raises."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape).astype(like.dtype)


def held(tree: Any) -> Any:
    """``tree`` with its arrays as variables, so that a module keeps them as its state.

    A module's bare arrays are lost in abstract copies of it (`flax.nnx.eval_shape`), the
    targets that checkpoints are restored into. Variables stay as they are.
    """
    wrap = lambda x: x if _is_variable(x) else nnx.Variable(x)
    return nnx.data(jax.tree.map(wrap, tree, is_leaf=_is_variable))


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


class SeparateQKV(nnx.Module):
    """Three projections; each may be made of something else."""

    def __init__(self, q: Projection, k: Projection, v: Projection):
        self.q, self.k, self.v = q, k, v

    @property
    def widths(self) -> tuple[int, int, int]:
        """Outputs of q, k and v."""
        return self.q.out_features, self.k.out_features, self.v.out_features

    def __call__(
        self, x: Float[Array, "*rows C"], kv: Float[Array, "*others C"] | None = None
    ) -> tuple[Any, Any, Any]:
        """Projects ``x`` to q, and ``kv``, or ``x`` without it, to k and v."""
        kv = x if kv is None else kv
        return self.q(x), self.k(kv), self.v(kv)


class StackedQKV(nnx.Module):
    """One projection with q, k and v one after another, ``sizes`` wide.

    It may hold several such runs, each with heads of its own: they are the parts that
    devices hold, and each device's part is again a stacked projection.
    """

    def __init__(self, qkv: Projection, sizes: tuple[int, int, int]):
        if qkv.out_features % sum(sizes):
            raise ValueError(
                f"a stacked projection of width {qkv.out_features} does not hold q, k "
                f"and v of widths {sizes}."
            )
        self.qkv, self.sizes = qkv, sizes

    @property
    def out_features(self) -> int:
        return self.qkv.out_features

    @property
    def widths(self) -> tuple[int, int, int]:
        """Outputs of q, k and v."""
        parts = self.qkv.out_features // sum(self.sizes)
        q, k, v = (parts * size for size in self.sizes)
        return q, k, v

    def __call__(
        self, x: Float[Array, "*rows C"], kv: Float[Array, "*others C"] | None = None
    ) -> tuple[Any, Any, Any]:
        """Projects ``x`` to q, and ``kv``, or ``x`` without it, to k and v."""
        if kv is not None:
            return self(x)[0], *self(kv)[1:]
        y = self.qkv(x)
        rows, parts = y.shape[:-1], y.shape[-1] // sum(self.sizes)
        y = y.reshape(*rows, parts, sum(self.sizes))
        first, second = self.sizes[0], sum(self.sizes[:2])
        split = y[..., :first], y[..., first:second], y[..., second:]
        q, k, v = (a.reshape(*rows, parts * a.shape[-1]) for a in split)
        return q, k, v
