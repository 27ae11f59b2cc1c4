"""An attention layer's arrays under the names that checkpoints give them.

{q,k,v,o}_proj or qkv_proj . weight, bias              plain numbers, GGUF blocks
. weight_scale, input_scale, weight_scale_2     float8
. qweight, qzeros, scales, g_idx                GPTQ
q_norm, k_norm             . weight
sinks
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..io import safetensors
from .attention import AbstractAttention
from .linear import CodesLinear, GGUFLinear, StackedQKV
from .quantized_linear import GPTQLinear
from .sharding.distributed import DistributedAttention

Tensors = Mapping[str, Any]


def state_dict(layer: AbstractAttention | DistributedAttention) -> dict[str, jax.Array]:
    """The layer's arrays by name. One on several devices is brought together first.

    GGUF blocks are given as rows of bytes. Raises ValueError for weights in a form that
    no checkpoint has (`CodesLinear`).
    """
    if isinstance(layer, DistributedAttention):
        layer = layer.gather()
    found = {}
    for name, module in _modules(layer):
        for leaf, variable in _leaves(name, module):
            value = variable[...]
            if isinstance(module, GGUFLinear) and leaf == "weight":
                value = value.reshape(value.shape[0], -1)
            found[f"{name}.{leaf}"] = value
    if layer.sinks is not None:
        found["sinks"] = layer.sinks[...]
    return found


def load_state(
    layer: AbstractAttention | DistributedAttention, tensors: Tensors, prefix: str = ""
) -> None:
    """Puts a checkpoint's tensors into a layer, in place.

    Floats are brought to the dtype that the layer has; anything else must be as it is.
    A checkpoint with q, k and v apart fills a layer with a stacked projection, and the
    other way round. GPTQ's ``qzeros`` may be missing where the config says ``sym``, and
    ``g_idx`` without ``desc_act``; its biases are taken as they come.

    Args:
        layer: Any attention layer.
        tensors: Arrays by name.
        prefix: What stands before the names, such as ``"model.layers.0.self_attn."``.
            Tensors without it are left aside.

    Raises:
        ValueError: Names that are missing or unknown to the layer, or a shape or dtype
            that does not fit. The layer is unchanged then.
    """
    if isinstance(layer, DistributedAttention):
        one = layer.gather()
        load_state(one, tensors, prefix)
        layer.base = DistributedAttention(one, layer.mesh).base
        return
    given = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    modules = dict(_modules(layer))
    given = _as_stacked(layer, given)
    changes: list[tuple[Any, str, Any]] = []
    for name, module in modules.items():
        wanted = dict(_leaves(name, module))
        if isinstance(module, GPTQLinear) and f"{name}.bias" in given:
            bias = jnp.asarray(given.pop(f"{name}.bias"))
            _fits(f"{name}.bias", bias.shape, (module.out_features,))
            changes.append((module, "bias", nnx.data(nnx.Param(bias))))
            wanted.pop("bias", None)
        for leaf, variable in wanted.items():
            if (full := f"{name}.{leaf}") in given:
                value = _fitted(full, given.pop(full), variable[...], module, leaf)
                changes.append((variable, "", value))
            elif not _optional(module, leaf):
                raise ValueError(f"the tensors lack {full!r}; got {sorted(tensors)}.")
    if layer.sinks is not None:
        if "sinks" not in given:
            raise ValueError(f"the tensors lack 'sinks'; got {sorted(tensors)}.")
        value = _fitted("sinks", given.pop("sinks"), layer.sinks[...], layer, "sinks")
        changes.append((layer.sinks, "", value))
    if given:
        raise ValueError(f"the layer has no {sorted(given)}; it has {sorted(modules)}.")
    for target, attribute, value in changes:
        if attribute:
            setattr(target, attribute, value)
        else:
            target[...] = value


def save_safetensors(
    path: str | os.PathLike[str],
    layer: AbstractAttention | DistributedAttention,
    prefix: str = "",
) -> None:
    """Writes `state_dict` to a file, ``prefix`` before every name."""
    tensors = {prefix + name: value for name, value in state_dict(layer).items()}
    safetensors.write(path, tensors)


def load_safetensors(
    path: str | os.PathLike[str],
    layer: AbstractAttention | DistributedAttention,
    prefix: str = "",
) -> None:
    """`load_state` from a file."""
    load_state(layer, safetensors.read(path, prefix))


def _modules(layer: AbstractAttention) -> Iterator[tuple[str, Any]]:
    if isinstance(layer.qkv, StackedQKV):
        yield "qkv_proj", layer.qkv.qkv
    else:
        for name in "qkv":
            yield f"{name}_proj", getattr(layer.qkv, name)
    yield "o_proj", layer.out
    for name in ("q_norm", "k_norm"):
        if (norm := getattr(layer, name)) is not None:
            yield name, norm


def _leaves(name: str, module: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(module, CodesLinear):
        raise ValueError(
            f"{name} holds codes, which no checkpoint does; use a GGUFLinear."
        )
    for leaf, variable in vars(module).items():
        if isinstance(variable, nnx.Variable):
            yield "weight" if leaf == "blocks" else leaf, variable


def _optional(module: Any, leaf: str) -> bool:
    if not isinstance(module, GPTQLinear):
        return False
    config = module.config
    return (leaf == "g_idx" and not config.desc_act) or (
        leaf == "qzeros" and config.sym
    )


def _fitted(name: str, tensor: Any, old: jax.Array, module: Any, leaf: str) -> Any:
    tensor = jnp.asarray(tensor)
    if isinstance(module, GGUFLinear) and leaf == "weight" and tensor.ndim == 2:
        rows, width = tensor.shape
        _fits(name, (rows, width), (old.shape[0], old.shape[1] * old.shape[2]))
        tensor = tensor.reshape(old.shape)
    if old.ndim == 0 and tensor.size == 1:
        tensor = tensor.reshape(())
    _fits(name, tensor.shape, old.shape)
    plain = all(
        jnp.issubdtype(d, jnp.floating) and jnp.dtype(d).itemsize > 1
        for d in (tensor.dtype, old.dtype)
    )
    if tensor.dtype != old.dtype and not plain:
        raise ValueError(f"{name} is {tensor.dtype}; the layer's is {old.dtype}.")
    return tensor.astype(old.dtype)


def _fits(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ValueError(f"{name} has the shape {shape}; the layer's is {wanted}.")


def _as_stacked(layer: AbstractAttention, given: dict[str, Any]) -> dict[str, Any]:
    """The tensors with q, k and v together or apart, as the layer has them.

    Only what has a row for each output can change: weights and biases of numbers, and
    float8 scales of rows.
    """
    given = dict(given)
    stacked, widths = isinstance(layer.qkv, StackedQKV), layer.qkv.widths
    for leaf in ("weight", "bias", "weight_scale"):
        parts = [f"{name}_proj.{leaf}" for name in "qkv"]
        whole = f"qkv_proj.{leaf}"
        if stacked and all(name in given for name in parts):
            arrays = [np.asarray(given.pop(name)) for name in parts]
            if all(a.shape[:1] == (w,) for a, w in zip(arrays, widths, strict=True)):
                given[whole] = np.concatenate(arrays)
            else:
                given |= dict(zip(parts, arrays, strict=True))  # named as unknown
        elif (
            not stacked and whole in given and given[whole].shape[:1] == (sum(widths),)
        ):
            cuts = np.cumsum(widths)[:-1]
            pieces = np.split(np.asarray(given.pop(whole)), cuts)
            given |= dict(zip(parts, pieces, strict=True))
    return given
