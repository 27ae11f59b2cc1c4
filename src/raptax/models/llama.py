"""Models of the Llama family from GGUF files."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import choices
from ..layers.linear import CodesLinear, GGUFLinear, Linear, Projection
from ..layers.norm import RMSNorm
from ..layers.packed import GGUFQAttentionWithRope
from ..quant import gguf
from ..rope import (
    Frequencies,
    RotaryEmbedding,
    frequencies,
    linear_scaling,
    yarn_attention_scale,
    yarn_scaling,
)
from .decoder import Decoder, DecoderConfig, DecoderLayer, GatedMLP
from .gguf_file import GGUFFile

Weights = Literal["blocks", "codes", "float32"]
"""How weights lie in memory: packed as in the file; one byte a number and a scale per
group of them; or unpacked. The numbers are the same, only speed and memory differ."""

ARCHITECTURES = ("llama",)

# Known to llama.cpp, but not to this loader: refused rather than ignored.
UNKNOWN_ROPE_FIELDS = (
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_log_multiplier",
)


def config_from_gguf(file: GGUFFile) -> DecoderConfig:
    """The sizes that a file states.

    Raises:
        ValueError: An architecture that is not in `ARCHITECTURES`, a field that is
            missing or has no sense, or mixtures of experts, which this decoder lacks.
    """
    name = file.fields.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{file.path} holds a model of architecture {name!r}; raptax runs "
            f"{choices(ARCHITECTURES)}."
        )
    if experts := file.fields.get(f"{name}.expert_count", 0):
        raise ValueError(
            f"{file.path} has {experts} experts; raptax runs dense models."
        )
    heads, width = (
        _count(file, "attention.head_count"),
        _count(file, "embedding_length"),
    )
    head_dim = _count(file, "attention.key_length", width // heads)
    if (value := _count(file, "attention.value_length", head_dim)) != head_dim:
        raise ValueError(
            f"{file.path}: attention.value_length={value} must equal the head size "
            f"{head_dim}."
        )
    layers = _count(file, "block_count")
    if f"blk.{layers}.attn_norm.weight" in file.tensors:
        raise ValueError(f"{file.path} holds more layers than block_count={layers}.")
    return DecoderConfig(
        vocab_size=_tensor(file, "token_embd.weight").shape[0],
        hidden_size=width,
        num_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_count(file, "attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=_count(file, "feed_forward_length"),
        rms_norm_eps=_number(file, "attention.layer_norm_rms_epsilon"),
        max_position=_count(file, "context_length"),
        sliding_window=_count(file, "attention.sliding_window", None),
    )


def decoder_from_gguf(
    file: GGUFFile,
    weights: Weights = "codes",
    progress: Callable[[int], None] | None = None,
) -> Decoder:
    """The decoder of a file.

    Args:
        file: An open GGUF file.
        weights: How they lie in memory; see `Weights`.
        progress: Called with the bytes of each tensor when it has been read.

    Raises:
        ValueError: See `config_from_gguf`; or a tensor is missing or of another shape.
    """
    if weights not in get_args(Weights):
        raise ValueError(
            f"weights={weights!r} is not one of {choices(get_args(Weights))}."
        )
    config = config_from_gguf(file)
    read = _Reader(file, config, weights, progress or (lambda _: None))
    layers = range(config.num_layers)
    projections = {
        name: read.projections([f"blk.{n}.{name}" for n in layers], shape)
        for name, shape in _projection_shapes(config).items()
    }
    rope = rope_from_gguf(file, config)
    return Decoder(
        config,
        embed=read.projection("token_embd", (config.vocab_size, config.hidden_size)),
        layers=[
            _layer(config, rope, read, n, {k: v[n] for k, v in projections.items()})
            for n in layers
        ],
        norm=read.norm("output_norm"),
        head=read.projection("output", (config.vocab_size, config.hidden_size))
        if "output.weight" in file.tensors
        else None,
    )


def _projection_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    C, D = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
    return {
        "attn_q": (q, C),
        "attn_k": (kv, C),
        "attn_v": (kv, C),
        "attn_output": (C, q),
        "ffn_gate": (config.intermediate_size, C),
        "ffn_up": (config.intermediate_size, C),
        "ffn_down": (C, config.intermediate_size),
    }


def _layer(
    config: DecoderConfig,
    rope: RotaryEmbedding,
    read: "_Reader",
    number: int,
    made: dict[str, Projection],
) -> DecoderLayer:
    attention = GGUFQAttentionWithRope(
        rope=rope,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        kv_params=config.kv_params(jnp.float32),
        weights={
            "q": made["attn_q"],
            "k": made["attn_k"],
            "v": made["attn_v"],
            "o": made["attn_output"],
        },
    )
    mlp = GatedMLP(made["ffn_gate"], made["ffn_up"], made["ffn_down"])
    norms = (read.norm(f"blk.{number}.{name}_norm") for name in ("attn", "ffn"))
    return DecoderLayer(next(norms), attention, next(norms), mlp)


def rope_from_gguf(file: GGUFFile, config: DecoderConfig) -> RotaryEmbedding:
    """Rotary positions: Llama files pair neighbouring lanes, scaled as they say."""
    size = _count(file, "rope.dimension_count", config.head_dim)
    if size != config.head_dim:
        raise ValueError(
            f"{file.path}: rope.dimension_count={size} must equal the head size "
            f"{config.head_dim}."
        )
    for name in UNKNOWN_ROPE_FIELDS:
        if f"llama.{name}" in file.fields:
            raise ValueError(f"{file.path} has the field llama.{name}, unknown here.")
    theta = _number(file, "rope.freq_base", 10000.0)
    inv_freq, attention_scale = frequencies(size, theta), 1.0
    if "rope_freqs.weight" in file.tensors:  # Llama 3's scaling, as divisors
        divisors = file.tensors["rope_freqs.weight"].floats.astype(np.float64)
        inv_freq = _divided(file, inv_freq, divisors)
    kind = file.fields.get("llama.rope.scaling.type", "linear")  # as llama.cpp takes it
    factor = _number(file, "rope.scaling.factor", 1.0)
    match kind:
        case "none":
            pass
        case "linear":
            inv_freq = linear_scaling(inv_freq, factor)
        case "yarn":
            inv_freq = yarn_scaling(
                inv_freq,
                factor=factor,
                theta=theta,
                original_max_position=_count(
                    file, "rope.scaling.original_context_length", config.max_position
                ),
                beta_fast=_number(file, "rope.scaling.yarn_beta_fast", 32.0),
                beta_slow=_number(file, "rope.scaling.yarn_beta_slow", 1.0),
            )
            attention_scale = yarn_attention_scale(factor)
        case _:
            raise ValueError(
                f"{file.path}: rope.scaling.type={kind!r} is not one of "
                f"{choices(('none', 'linear', 'yarn'))}."
            )
    return RotaryEmbedding.create(
        size, layout="interleaved", inv_freq=inv_freq, attention_scale=attention_scale
    )


def _divided(
    file: GGUFFile, inv_freq: Frequencies, divisors: np.ndarray
) -> Frequencies:
    if divisors.shape != inv_freq.shape:
        raise ValueError(
            f"{file.path}: rope_freqs.weight {divisors.shape} must hold one divisor for "
            f"each of {len(inv_freq)} frequencies."
        )
    return inv_freq / divisors


_REQUIRED: Any = object()


def _field(file: GGUFFile, name: str, types: tuple[type, ...], default: Any) -> Any:
    """A positive number of the model's architecture, or the default if it is lacking."""
    full = f"{file.fields['general.architecture']}.{name}"
    if (value := file.fields.get(full, default)) is _REQUIRED:
        raise ValueError(f"{file.path} lacks the field {full!r}.")
    if value is default:
        return value
    if isinstance(value, list):
        raise ValueError(
            f"{file.path} has another {name} in each layer; raptax runs models whose "
            "layers are alike."
        )
    if type(value) not in types or not 0 < value < math.inf:
        kind = "a whole number" if float not in types else "a number"
        raise ValueError(f"{file.path}: {name}={value!r} must be {kind} above 0.")
    return value


def _count(file: GGUFFile, name: str, default: Any = _REQUIRED) -> Any:
    return _field(file, name, (int,), default)


def _number(file: GGUFFile, name: str, default: Any = _REQUIRED) -> Any:
    return _field(file, name, (int, float), default)


def _tensor(file: GGUFFile, name: str, shape: tuple[int, ...] | None = None) -> Any:
    if name not in file.tensors:
        raise ValueError(f"{file.path} lacks the tensor {name!r}.")
    tensor = file.tensors[name]
    if shape is not None and tensor.shape != shape:
        raise ValueError(
            f"{file.path}: {name} must be {shape} by the file's own sizes; it is "
            f"{tensor.shape}."
        )
    return tensor


_unpack = jax.jit(gguf.unpack, static_argnums=1)
_dequantize = jax.jit(gguf.dequantize, static_argnums=1)


class _Reader:
    """Turns a file's tensors into layers, in the form asked for."""

    def __init__(self, file, config, weights, progress):
        self.file, self.config = file, config
        self.weights, self.progress = weights, progress

    def norm(self, name: str) -> RMSNorm:
        C = self.config.hidden_size
        weight = jnp.asarray(self._floats(f"{name}.weight", (C,)))
        return RMSNorm(C, eps=self.config.rms_norm_eps, weight=weight)

    def projection(self, name: str, shape: tuple[int, int]) -> Projection:
        return self.projections([name], shape)[0]

    def projections(
        self, names: Sequence[str], shape: tuple[int, int]
    ) -> list[Projection]:
        """The same projection of every layer, all in one form if that can be."""
        tensors = [_tensor(self.file, f"{name}.weight", shape) for name in names]
        biases = [self._bias(f"{name}.bias", shape[0]) for name in names]
        form = self.weights
        if form == "codes" and any(tensor.encoding.is_plain for tensor in tensors):
            form = "float32"  # plain numbers have no codes
        blocks = [(jnp.asarray(tensor.blocks), tensor.encoding) for tensor in tensors]
        self.progress(sum(tensor.raw.nbytes for tensor in tensors))
        match form:
            case "blocks":
                return [
                    GGUFLinear(*b, bias) for b, bias in zip(blocks, biases, strict=True)
                ]
            case "float32":
                numbers = (_dequantize(*b) for b in blocks)
                return [
                    Linear.from_weight(w, b)
                    for w, b in zip(numbers, biases, strict=True)
                ]
            case _:
                codes = gguf.alike([_unpack(*b) for b in blocks])
                return [
                    CodesLinear(c, bias) for c, bias in zip(codes, biases, strict=True)
                ]

    def _bias(self, name: str, size: int) -> jax.Array | None:
        if name not in self.file.tensors:
            return None
        return jnp.asarray(self._floats(name, (size,)))

    def _floats(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        tensor = _tensor(self.file, name, shape)
        self.progress(tensor.raw.nbytes)
        return tensor.floats.astype(np.float32)
