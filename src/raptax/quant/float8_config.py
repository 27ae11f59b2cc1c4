"""What checkpoints say about their float8 weights, as a `Float8Config`.

One function a dialect of ``quantization_config`` in ``config.json``:

    compressed-tensors   strategies tensor, channel, block by tensor, token, group
    fbgemm_fp8           a scale a row on both sides, with activation_scale_ub
    fp8                  DeepSeek's and Qwen's blocks, or one scale a weight
    modelopt             FP8 and NVFP4

Anything else raises a sentence that names the key, its value and what is known. What they
say of the KV cache is a matter of the cache and is not read here.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from .._core.errors import choices
from .float8 import E4M3, NVFP4_GROUP, Float8Config, Float8InputScaleSpec, Granularity
from .float8 import Float8WeightScaleSpec as WeightSpec

Config = Mapping[str, Any]
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def float8_config_from_dict(
    quantization_config: Config, *, num_layers: int = 0
) -> Float8Config:
    """The config of a checkpoint in one of the known dialects.

    Args:
        quantization_config: The value of that key in ``config.json``, or the whole of
            modelopt's ``hf_quant_config.json``.
        num_layers: Layers of the model, so that `Float8Config.mlp_in_float8` and
            ``attn_qkv_in_float8`` can say which of them are float8: those whose
            projections the checkpoint does not leave out. 0 leaves both empty.

    Raises:
        ValueError: The dialect or one of its values is unknown, or the projections of
            one layer's attention or MLP are float8 in part.
    """
    config = quantization_config
    if "quantization" in config:
        config = {"quant_method": "modelopt", **config["quantization"]}
    method = _known(config, "quant_method", _DIALECTS)
    inputs, weights, algorithm, left_out = _DIALECTS[method](config)
    return Float8Config(
        inputs,
        weights,
        mlp_in_float8=_layers(MLP, left_out, num_layers),
        attn_qkv_in_float8=_layers(ATTENTION, left_out, num_layers),
        quant_method=method,
        quant_algo=algorithm,
    )


Parsed = tuple[Float8InputScaleSpec, WeightSpec, str | None, Iterable[str]]


def _known(
    config: Config, key: str, allowed: Iterable[Any], default: Any = None
) -> Any:
    value = config.get(key, default)
    if value not in allowed:
        raise ValueError(f"{key}={value!r} is not one of {choices(allowed)}.")
    return value


def _compressed_tensors(config: Config) -> Parsed:
    _known(config, "format", ("float-quantized", "naive-quantized"), "float-quantized")
    groups = config.get("config_groups", {})
    if len(groups) != 1:
        raise ValueError(
            f"config_groups={sorted(groups)} must be one group: layers are quantized "
            "alike or not at all."
        )
    (group,) = groups.values()
    _known(group, "targets", (["Linear"],), ["Linear"])
    _known(group, "output_activations", (None,))
    weights, inputs = group.get("weights"), group.get("input_activations")
    for name, side in (("weights", weights), ("input_activations", inputs)):
        if side is None:
            raise ValueError(f"{name}=None: both sides of the product must be float8.")
        _known(side, "type", ("float",))
        _known(side, "num_bits", (8,))
        _known(side, "symmetric", (True,), True)
    strategy = _known(weights, "strategy", ("tensor", "channel", "block"))
    block = tuple(weights.get("block_structure") or ()) if strategy == "block" else None
    granularity = {"channel": "rowwise"}.get(strategy, strategy)
    by = _known(inputs, "strategy", ("tensor", "token", "group"))
    size = (1, inputs.get("group_size")) if by == "group" else None
    kinds: dict[str, Granularity]
    kinds = {"tensor": "tensor", "token": "colwise", "group": "block"}
    spec = Float8InputScaleSpec(
        kinds[by],
        "dynamic" if inputs.get("dynamic") else "static",
        block_size=size,
    )
    return spec, WeightSpec(granularity, block_size=block), None, _out(config, "ignore")


def _fbgemm(config: Config) -> Parsed:
    bound = config.get("activation_scale_ub")
    spec = Float8InputScaleSpec("colwise", "dynamic", activation_scale_ub=bound)
    return spec, WeightSpec("rowwise"), None, _out(config, "modules_to_not_convert")


def _fp8(config: Config) -> Parsed:
    _known(config, "fmt", ("e4m3",), "e4m3")
    scale_type = _known(config, "scale_fmt", (None, "float", "ue8m0"))
    dtype = jnp.float8_e8m0fnu if scale_type == "ue8m0" else jnp.float32
    origin = _known(config, "activation_scheme", ("static", "dynamic"), "dynamic")
    left_out = [
        *_out(config, "modules_to_not_convert"),
        *_out(config, "ignored_layers"),
    ]
    block = config.get("weight_block_size")
    if block is not None:
        block = tuple(block)
        spec = Float8InputScaleSpec("block", origin, dtype, block_size=(1, block[-1]))
        return spec, WeightSpec("block", block_size=block), None, left_out
    granularity: Granularity = "tensor" if origin == "static" else "colwise"
    return (
        Float8InputScaleSpec(granularity, origin, dtype),
        WeightSpec("tensor"),
        None,
        left_out,
    )


def _modelopt(config: Config) -> Parsed:
    algorithm = _known(config, "quant_algo", ("FP8", "NVFP4"))
    left_out = [*_out(config, "exclude_modules"), *_out(config, "ignore")]
    if algorithm == "FP8":
        spec = Float8InputScaleSpec("tensor", "static")
        return spec, WeightSpec("tensor"), algorithm, left_out
    _known(config, "group_size", (NVFP4_GROUP,), NVFP4_GROUP)
    block = (1, NVFP4_GROUP)
    spec = Float8InputScaleSpec("block", "static", block_size=block)
    return spec, WeightSpec("block", E4M3, block), algorithm, left_out


_DIALECTS: dict[str, Callable[[Config], Parsed]] = {
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fbgemm,
    "fp8": _fp8,
    "modelopt": _modelopt,
}


def _out(config: Config, key: str) -> list[str]:
    """Patterns of the modules left out, as regular expressions of parts of a name."""
    patterns = []
    for name in config.get(key) or ():
        if name.startswith("re:"):  # compressed-tensors
            patterns.append(name[3:])
        else:  # a module and all below it; modelopt has asterisks
            patterns.append(re.escape(name).replace(r"\*", ".*") + r"(\..*)?$")
    return patterns


def _layers(names: list[str], left_out: Iterable[str], count: int) -> frozenset[int]:
    """The layers in which none of these projections is left out."""
    patterns = [re.compile(pattern) for pattern in left_out]
    found = set()
    for layer in range(count):
        modules = [f"model.layers.{layer}.{name}" for name in names]
        out = [m for m in modules if any(p.match(m) for p in patterns)]
        if out and len(out) < len(modules):
            raise ValueError(
                f"{out} are not float8 and the others of {modules} are; a layer must be "
                "quantized uniformly."
            )
        if not out:
            found.add(layer)
    return frozenset(found)
