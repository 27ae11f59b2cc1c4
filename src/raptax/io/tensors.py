"""Tensors of a model file, taken by name and shape.

`Tensors` keeps account as `raptax.io.fields` does: each tensor that is taken is
marked, and `refuse_the_rest` raises on what is left over.
"""

import dataclasses

import numpy as np

from ..quant.gguf import Encoding
from .gguf import GGUFFile, Tensor


@dataclasses.dataclass(frozen=True)
class Vector:
    """A norm's weight or a bias: finite float32 numbers."""

    numbers: np.ndarray
    bytes: int  # in the file


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A projection: a weight that is still in the file, and its bias."""

    weight: Tensor
    bias: Vector | None


class Tensors:
    """A file's tensors, each marked as it is taken.

    Raises:
        ValueError: A tensor is missing, of another shape, or in an encoding that is not
            read. The message names the tensor.
    """

    def __init__(self, file: GGUFFile):
        self.file = file
        self._left = dict.fromkeys([*file.tensors, *file.unreadable])

    def take(self, name: str, shape: tuple[int | None, ...]) -> Tensor:
        """The tensor of this name; None in the shape stands for any size."""
        if name in self.file.unreadable:
            raise ValueError(
                f"{name} is stored as {self.file.unreadable[name]}, which raptax does "
                f"not read; it reads {', '.join(Encoding.__members__)}."
            )
        if name not in self.file.tensors:
            raise ValueError(f"it lacks the tensor {name!r}.")
        tensor = self.file.tensors[name]
        if len(tensor.shape) != len(shape) or any(
            wanted not in (None, size)
            for size, wanted in zip(tensor.shape, shape, strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(
                f"{name} must be ({wanted}{',' * (len(shape) == 1)}) by the file's own "
                f"sizes; it is {tensor.shape}."
            )
        self._left.pop(name, None)
        return tensor

    def has(self, name: str) -> bool:
        """Whether it is there, readable or not."""
        return name in self.file.tensors or name in self.file.unreadable

    def vector(self, name: str, size: int) -> Vector:
        """A tensor of one axis as numbers."""
        tensor = self.take(name, (size,))
        numbers = tensor.floats.astype(np.float32)
        if not np.isfinite(numbers).all():
            raise ValueError(f"{name} holds numbers that are not finite.")
        return Vector(numbers, tensor.raw.nbytes)

    def matrix(self, name: str, shape: tuple[int, int], bias: bool = True) -> Matrix:
        """A projection's weight, and its bias if there is one."""
        weight, named = self.take(f"{name}.weight", shape), f"{name}.bias"
        biased = bias and self.has(named)
        return Matrix(weight, self.vector(named, shape[0]) if biased else None)

    def refuse_the_rest(self) -> None:
        """Raises ValueError unless every tensor has been taken."""
        if self._left:
            names = ", ".join(map(repr, list(self._left)[:3]))
            raise ValueError(
                f"it has {len(self._left)} tensors that raptax does not use, and leaving "
                f"them out would make another model: {names}"
                f"{', ...' * (len(self._left) > 3)}."
            )
