"""Named strategies of cutting a weight, or a layer, into parts."""

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ..._core.errors import choices
from .heads import HEADS, Heads, head_layout, lanes_of, split_range

Kind = Literal[
    "rowwise",
    "columnwise",
    "axiswise",
    "replicate",
    "stacked_qkv",
    "head_aware_columnwise",
    "tensor_parallel",
]


@dataclasses.dataclass(frozen=True)
class ShardingStrategy:
    """How one weight is cut, or with `tensor_parallel` a whole layer.

    Build it with the class methods of those names. Weights are (out, in); uneven
    lengths follow `split_range`. `shard` cuts, `spec` is the same for a mesh axis.

    Attributes:
        num_devices: Parts.
        kind: Which of them.
        axis: The axis that is cut, for the kinds that cut one.
        heads: (query heads, kv heads, head size), for the kinds that know of heads.
    """

    num_devices: int
    kind: Kind
    axis: int | None = None
    heads: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"kind={self.kind!r} is not one of {choices(get_args(Kind))}."
            )
        if self.num_devices < 1:
            raise ValueError(f"num_devices={self.num_devices} must be at least 1.")
        if self.heads is not None:
            head_layout(*self.heads[:2], self.num_devices)  # raises what does not fit

    @classmethod
    def rowwise(cls, num_devices: int) -> "ShardingStrategy":
        """Axis 0: outputs of a projection."""
        return cls(num_devices, "rowwise", 0)

    @classmethod
    def columnwise(cls, num_devices: int) -> "ShardingStrategy":
        """Axis 1: inputs of a projection."""
        return cls(num_devices, "columnwise", 1)

    @classmethod
    def axiswise(cls, axis: int, num_devices: int) -> "ShardingStrategy":
        """Any axis."""
        return cls(num_devices, "axiswise", axis)

    @classmethod
    def replicate(cls, num_devices: int) -> "ShardingStrategy":
        """A whole copy for every device."""
        return cls(num_devices, "replicate")

    @classmethod
    def stacked_qkv(
        cls,
        num_devices: int,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
    ) -> "ShardingStrategy":
        """Rows q, k, v one after another, cut by head; any number of kv heads."""
        heads = num_heads, num_kv_heads or num_heads, head_dim
        return cls(num_devices, "stacked_qkv", 0, heads)

    @classmethod
    def head_aware_columnwise(
        cls,
        num_devices: int,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
    ) -> "ShardingStrategy":
        """Axis 1, cut by query head: the output projection.

        ``num_kv_heads`` keeps queries with their kv heads, as `stacked_qkv` does.
        """
        heads = num_heads, num_kv_heads or num_heads, head_dim
        return cls(num_devices, "head_aware_columnwise", 1, heads)

    @classmethod
    def tensor_parallel(cls, num_devices: int) -> "ShardingStrategy":
        """Of a layer, not of a weight: its projections are cut by head."""
        return cls(num_devices, "tensor_parallel")

    @property
    def is_rowwise(self) -> bool:
        return self.kind == "rowwise"

    @property
    def is_columnwise(self) -> bool:
        return self.kind == "columnwise"

    @property
    def is_axiswise(self) -> bool:
        return self.kind == "axiswise"

    @property
    def is_replicate(self) -> bool:
        return self.kind == "replicate"

    @property
    def is_stacked_qkv(self) -> bool:
        return self.kind == "stacked_qkv"

    @property
    def is_head_aware_columnwise(self) -> bool:
        return self.kind == "head_aware_columnwise"

    @property
    def is_tensor_parallel(self) -> bool:
        return self.kind == "tensor_parallel"

    def shard(self, weight: Any, index: int) -> Any:
        """Device ``index``'s part of a weight.

        Raises:
            ValueError: An index, axis or width that does not fit.
            NotImplementedError: `tensor_parallel` says nothing about a single weight.
        """
        if not 0 <= index < self.num_devices:
            raise ValueError(f"index={index} must lie in [0, {self.num_devices}).")
        if self.is_tensor_parallel:
            raise NotImplementedError(
                "tensor_parallel is a strategy of a layer; cut a weight by rowwise, "
                "columnwise, stacked_qkv or head_aware_columnwise."
            )
        if self.is_replicate:
            return weight
        axis = self._axis(weight.ndim)
        if self.heads is None:
            part = split_range(weight.shape[axis], self.num_devices)[index]
            return weight[(slice(None),) * axis + (slice(part.start, part.stop),)]
        lanes = self._lanes(weight.shape[axis], index)
        return jnp.take(weight, lanes, axis=axis)

    def spec(self, ndim: int, axis_name: str = HEADS) -> P:
        """The `PartitionSpec` of a weight whose axis comes out even."""
        if self.is_replicate or self.is_tensor_parallel:
            return P()
        return P(*[None] * self._axis(ndim), axis_name)

    def _axis(self, ndim: int) -> int:
        if self.axis is None or not -ndim <= self.axis < ndim:
            raise ValueError(f"axis={self.axis} is not an axis of {ndim}.")
        return self.axis % ndim

    def _lanes(self, width: int, index: int) -> Heads:
        assert self.heads is not None
        H, K, D = self.heads
        parts = (H, K, K) if self.is_stacked_qkv else (H,)
        if width != sum(parts) * D:
            raise ValueError(
                f"{self.kind} of heads {parts} x {D} cuts {sum(parts) * D} places; the "
                f"weight has {width}."
            )
        layout = head_layout(H, K, self.num_devices)
        mine = [layout.q[index], layout.kv[index], layout.kv[index]][: len(parts)]
        firsts = np.cumsum([0, *parts])
        heads = [m[m >= 0] + at for m, at in zip(mine, firsts, strict=False)]
        return lanes_of(np.concatenate(heads), D)
