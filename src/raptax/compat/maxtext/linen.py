"""The NNX classes as Linen modules, for models that are still Linen."""

from typing import Any

from flax import linen, nnx

from . import positions
from .attention import Attention, LayerOptions
from .dense import L2Norm
from .mla import MLA, MLAOptions
from .options import AttentionOptions, signature_of


def boxed(variable: nnx.Variable[Any]) -> Any:
    """A Linen leaf: boxed with its logical axis names where it has any."""
    names = variable.get_metadata().get("out_sharding")
    value = variable.get_value()
    return value if names is None else linen.LogicallyPartitioned(value, tuple(names))


def attention_as_linen(*, name: str | None = None, **kwargs: Any) -> linen.Module:
    """`Attention` as a Linen module; takes the fields of `AttentionOptions`.

    Parameters come as ``params``, caches as ``cache``; call ``apply`` with
    ``mutable=["cache"]`` to have the latter updated, and with ``rngs={"dropout": key}``
    for dropout.

    Raises:
        ValueError: As `Attention`, here already.
    """
    o = LayerOptions(**kwargs)  # fail here, with the caller on the stack
    positions.choose(o, o.head_dim)
    return nnx.bridge.to_linen(Attention, name=name, metadata_fn=boxed, **kwargs)


attention_as_linen.__signature__ = signature_of(AttentionOptions, name=None)  # type: ignore[attr-defined]


def mla_as_linen(*, name: str | None = None, **kwargs: Any) -> linen.Module:
    """`MLA` as a Linen module; takes the fields of `MLAOptions`."""
    MLAOptions(**kwargs)
    return nnx.bridge.to_linen(MLA, name=name, metadata_fn=boxed, **kwargs)


mla_as_linen.__signature__ = signature_of(MLAOptions, name=None)  # type: ignore[attr-defined]


def l2_norm_as_linen(self: Any = None, eps: float = 1e-6) -> linen.Module:
    """`L2Norm` as a Linen module, which has no variables.

    Args:
        self: Not looked at. The documented function has it, so calls by position keep
            their meaning.
        eps: Added to the mean.
    """
    return nnx.bridge.to_linen(L2Norm, eps=eps)
