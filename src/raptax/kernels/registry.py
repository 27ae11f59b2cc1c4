"""The table of attention kernels, best first: what can run, and in what order."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from .._core.types import AttentionFn
from .blockwise import blockwise_attention
from .cpu.forward import native_attention, native_unsupported_reason
from .cudnn import jax_nn_attention, jax_nn_unsupported_reason
from .reference import reference_attention


class Kernel(NamedTuple):
    """A way to compute attention.

    ``unsupported_reason(query, key, value, **problem)`` says in one sentence what it
    cannot do; ``not_default_reason``, why it should run only when it is named. Both are
    None otherwise.
    """

    name: str
    run: AttentionFn
    unsupported_reason: Callable[..., str | None]
    not_default_reason: Callable[..., str | None]


def _never(*_: object, **__: object) -> None:
    return None


def _off_gpu(*_: object, **__: object) -> str | None:
    if jax.default_backend() == "gpu":
        return None
    return "only on a GPU does it keep from storing all scores"


def _stores_scores(*_: object, **__: object) -> str:
    return "it stores all scores; it is there to define what the others compute"


KERNELS = (
    Kernel("native", native_attention, native_unsupported_reason, _never),
    Kernel("jax_nn", jax_nn_attention, jax_nn_unsupported_reason, _off_gpu),
    Kernel("blockwise", blockwise_attention, _never, _never),
    Kernel("reference", reference_attention, _never, _stores_scores),
)
