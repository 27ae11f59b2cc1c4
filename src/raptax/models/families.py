"""Models of the Llama family from GGUF files.

Every tensor of a file is used, and every field of its architecture is used, has the one
value that changes nothing, or is on the list of those that do not matter; anything else
is refused by name. Fields and tensors mean what llama.cpp takes them for
(``src/models/llama.cpp`` and ``src/llama-model.cpp``).
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .._core.errors import choices
from ..io.fields import REQUIRED, Fields, errors_of
from ..io.gguf import GGUFFile
from ..io.tensors import Matrix, Tensors, Vector
from ..kernels.cpu.library import available
from ..kernels.cpu.packed_linear import Precision
from ..nn.attention import AttentionAround
from ..nn.linear import (
    CodesLinear,
    GGUFLinear,
    Linear,
    Projection,
    SeparateQKV,
    StackedQKV,
)
from ..nn.norm import RMSNorm
from ..nn.packed_linear import PackedLinear
from ..quant import gguf
from ..quant.packed import pack
from ..rope import (
    Frequencies,
    RotaryEmbedding,
    frequencies,
    linear_scaling,
    yarn_attention_scale,
    yarn_scaling,
)
from .decoder import Decoder, DecoderConfig, DecoderLayer, GatedMLP

Weights = Literal["packed", "blocks", "codes", "float32"]
"""How weights lie in memory: as the CPU's kernels read them; packed as in the file; one
byte a number and a scale per group of them; or unpacked. The numbers are the same, only
speed and memory differ."""

ARCHITECTURES = ("llama",)

# Whole numbers a file may state. Outside these the file is damaged or made to do harm;
# what a number in range would allocate is compared with the tensors' shapes first.
_COUNTS = {
    "block_count": (1, 2**16),
    "context_length": (1, 2**31 - 1),  # positions are int32
    "embedding_length": (1, 2**20),
    "feed_forward_length": (1, 2**24),
    "attention.head_count": (1, 2**16),
    "attention.head_count_kv": (1, 2**16),
    "attention.key_length": (2, 2**16),
    "attention.value_length": (2, 2**16),
    "attention.sliding_window": (1, 2**31 - 1),
    "rope.dimension_count": (2, 2**16),
    "rope.scaling.original_context_length": (1, 2**31 - 1),
}
_NUMBERS = {
    "attention.layer_norm_rms_epsilon": (1e-12, 0.1),
    "rope.freq_base": (1.0, 1e12),
    "rope.scaling.factor": (1e-3, 1e6),
    "rope.scale_linear": (1e-3, 1e6),  # the same, as files of 2023 call it
    "rope.scaling.yarn_beta_fast": (1e-3, 1e6),
    "rope.scaling.yarn_beta_slow": (1e-3, 1e6),
}
# Fields whose default is all that raptax does.
_NEUTRAL = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "tensor_data_layout": ("Meta AI original pth",),  # how q and k are permuted
}
# Fields that change no number, and why.
_IGNORED = {
    "vocab_size": "the rows of the embedding say it, and are compared with the tokens",
    "rope.scaling.finetuned": "whether the model was trained on after scaling: a remark",
}


def config_from_gguf(file: GGUFFile) -> DecoderConfig:
    """The sizes that a file states.

    Raises:
        ValueError: An architecture that is not in `ARCHITECTURES`, a field that is
            missing or has no sense, or another number of layers than the file holds.
    """
    with errors_of(file.path):
        return _config(file, _fields(file))


def decoder_from_gguf(
    file: GGUFFile,
    weights: Weights | None = None,
    progress: Callable[[int], None] | None = None,
    *,
    precision: Precision = "float32",
    kv_dtype: DTypeLike | None = None,
) -> Decoder:
    """The decoder of a file.

    Args:
        file: An open GGUF file.
        weights: How they lie in memory; see `Weights`. By default packed where the C++
            kernels are there to read them, else codes.
        precision: What inputs of packed weights are rounded to; see
            `kernels.cpu.packed_linear`.
        progress: Called with the bytes of each tensor when it has been read.

    Raises:
        ValueError: See `config_from_gguf`; a tensor is missing, of another shape or in
            an encoding that raptax does not read; or the file has a tensor or a field
            whose meaning is unknown here. All of it before any weight is read.
    """
    weights = weights_for(weights, precision)
    with errors_of(file.path):
        fields, tensors = _fields(file), Tensors(file)
        config = _config(file, fields)
        plan = _plan(tensors, config)
        rope = _rope(fields, config, plan.rope_divisors)
        fields.refuse_the_rest()
        tensors.refuse_the_rest()
    build = _Builder(config, weights, precision, progress or (lambda _: None))
    if plan.rope_divisors is not None:
        build.progress(plan.rope_divisors.bytes)
    projections = {name: build.projections(m) for name, m in plan.projections.items()}
    return Decoder(
        config,
        embed=build.projections([plan.embed])[0],
        layers=[
            _layer(config, rope, {k: v[n] for k, v in projections.items()}, norms)
            for n, norms in enumerate(zip(*map(build.norms, plan.norms), strict=True))
        ],
        norm=build.norms([plan.norm])[0],
        head=None if plan.head is None else build.projections([plan.head])[0],
        kv_dtype=_kv_dtype(precision) if kv_dtype is None else kv_dtype,
    )


def _kv_dtype(precision: Precision) -> DTypeLike:
    return jnp.float16 if precision == "int8" else jnp.float32


def weights_for(weights: str | None, precision: str) -> Weights:
    """One of `Weights`, the default for None.

    Raises:
        ValueError: There is none of that name, or none with that precision.
    """
    if weights is None:
        weights = "packed" if available() else "codes"
    if weights not in get_args(Weights):
        raise ValueError(
            f"weights={weights!r} is not one of {choices(get_args(Weights))}."
        )
    if precision not in get_args(Precision):
        raise ValueError(
            f"precision={precision!r} is not one of {choices(get_args(Precision))}."
        )
    if precision != "float32" and weights != "packed":
        raise ValueError(
            f"precision={precision!r} needs weights='packed', not {weights!r}."
        )
    return cast(Weights, weights)


# Fields


def _fields(file: GGUFFile) -> Fields:
    name = Fields(file.fields, "general.").text("architecture")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"it holds a model of architecture {name!r}; raptax runs "
            f"{choices(ARCHITECTURES)}."
        )
    parts = Fields(file.fields, "split.").integer("count", 0, 2**16 - 1, 1)
    if parts > 1:
        raise ValueError(
            f"this is one of {parts} parts of a model; raptax reads whole files: join "
            "them with llama.cpp's `llama-gguf-split --merge`."
        )
    fields = Fields(file.fields, f"{name}.")
    fields.ignore(*_IGNORED)
    for field, allowed in _NEUTRAL.items():
        fields.neutral(field, allowed)
    return fields


def _count(fields: Fields, name: str, default: Any = REQUIRED) -> Any:
    return fields.integer(name, *_COUNTS[name], default)


def _number(fields: Fields, name: str, default: Any = REQUIRED) -> Any:
    return fields.number(name, *_NUMBERS[name], default)


def _config(file: GGUFFile, fields: Fields) -> DecoderConfig:
    heads, width = (
        _count(fields, "attention.head_count"),
        _count(fields, "embedding_length"),
    )
    head_dim = _count(fields, "attention.key_length", width // heads)
    if (value := _count(fields, "attention.value_length", head_dim)) != head_dim:
        raise ValueError(
            f"attention.value_length={value} must equal the head size {head_dim}."
        )
    kv_heads = _count(fields, "attention.head_count_kv", heads)
    if heads % kv_heads:
        raise ValueError(
            f"attention.head_count={heads} must be a multiple of "
            f"attention.head_count_kv={kv_heads}."
        )
    layers = _count(fields, "block_count")
    if layers != (held := _layers_in(file)):
        raise ValueError(
            f"block_count={layers} must be the number of layers that the file holds, "
            f"{held}."
        )
    return DecoderConfig(
        vocab_size=Tensors(file).take("token_embd.weight", (None, width)).shape[0],
        hidden_size=width,
        num_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_count(fields, "feed_forward_length"),
        rms_norm_eps=_number(fields, "attention.layer_norm_rms_epsilon"),
        max_position=_count(fields, "context_length"),
        sliding_window=_count(fields, "attention.sliding_window", None),
    )


def _layers_in(file: GGUFFile) -> int:
    names = (
        re.match(r"blk\.(\d+)\.", name) for name in (*file.tensors, *file.unreadable)
    )
    return len({name[1] for name in names if name})


def _rope(
    fields: Fields, config: DecoderConfig, divisors: Vector | None
) -> RotaryEmbedding:
    """Rotary positions: Llama files pair neighbouring lanes, scaled as they say."""
    size = _count(fields, "rope.dimension_count", config.head_dim)
    if size != config.head_dim:
        raise ValueError(
            f"rope.dimension_count={size} must equal the head size {config.head_dim}."
        )
    theta = _number(fields, "rope.freq_base", 10000.0)
    inv_freq = frequencies(size, theta)
    if divisors is not None:  # Llama 3's scaling
        inv_freq = inv_freq / divisors.numbers.astype(np.float64)
    kind = fields.text("rope.scaling.type", "linear")  # as llama.cpp takes it
    # What llama.cpp makes of -1, its "not stated", is all that raptax does.
    mixed = 1.0 if kind == "yarn" else 0.0
    fields.neutral("rope.scaling.yarn_ext_factor", (-1.0, mixed))
    inv_freq, attention_scale = _scaled(fields, config, kind, inv_freq)
    return RotaryEmbedding.create(
        size, layout="interleaved", inv_freq=inv_freq, attention_scale=attention_scale
    )


def _scaled(
    fields: Fields, config: DecoderConfig, kind: str, inv_freq: Frequencies
) -> tuple[Frequencies, float]:
    """Frequencies scaled as the fields say, and by how much longer q and k get."""
    factor = _number(fields, "rope.scaling.factor", None)
    older = _number(fields, "rope.scale_linear", 1.0)
    factor = older if factor is None else factor
    yarn = dict(
        original_max_position=_count(
            fields, "rope.scaling.original_context_length", config.max_position
        ),
        beta_fast=_number(fields, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=_number(fields, "rope.scaling.yarn_beta_slow", 1.0),
    )
    match kind:
        case "none":
            return inv_freq, 1.0
        case "linear":
            return linear_scaling(inv_freq, factor), 1.0
        case "yarn":
            theta = _number(fields, "rope.freq_base", 10000.0)
            scaled = yarn_scaling(inv_freq, factor=factor, theta=theta, **yarn)
            return scaled, yarn_attention_scale(factor)
        case _:
            raise ValueError(
                f"rope.scaling.type={kind!r} is not one of "
                f"{choices(('none', 'linear', 'yarn'))}."
            )


# Tensors


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The file's tensors in their places, still unread."""

    embed: Matrix
    projections: dict[str, list[Matrix]]  # of every layer
    norms: tuple[list[Vector], list[Vector]]  # before attention, before the MLP
    norm: Vector
    head: Matrix | None
    rope_divisors: Vector | None


def _plan(tensors: Tensors, config: DecoderConfig) -> _Plan:
    layers, C = range(config.num_layers), config.hidden_size
    table = config.vocab_size, C

    def norms(name: str) -> list[Vector]:
        return [tensors.vector(f"blk.{n}.{name}_norm.weight", C) for n in layers]

    return _Plan(
        # llama.cpp knows no bias here; a tied head would add it as well.
        embed=tensors.matrix("token_embd", table, bias=False),
        projections={
            name: [tensors.matrix(f"blk.{n}.{name}", shape) for n in layers]
            for name, shape in _projection_shapes(config).items()
        },
        norms=(norms("attn"), norms("ffn")),
        norm=tensors.vector("output_norm.weight", C),
        head=tensors.matrix("output", table) if tensors.has("output.weight") else None,
        rope_divisors=_rope_divisors(tensors, config.head_dim // 2),
    )


def _rope_divisors(tensors: Tensors, size: int) -> Vector | None:
    name = "rope_freqs.weight"
    if not tensors.has(name):
        return None
    divisors = tensors.vector(name, size)
    if not (divisors.numbers > 0).all():
        least = divisors.numbers.min()
        raise ValueError(f"{name} must hold divisors above 0; it has {least}.")
    return divisors


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


# Layers


def _layer(
    config: DecoderConfig,
    rope: RotaryEmbedding,
    made: dict[str, Projection],
    norms: tuple[RMSNorm, RMSNorm],
) -> DecoderLayer:
    q, k, v = (made[f"attn_{name}"] for name in "qkv")
    gate, up = made["ffn_gate"], made["ffn_up"]
    qkv: SeparateQKV | StackedQKV = SeparateQKV(q, k, v)
    mlp = GatedMLP(gate, up, made["ffn_down"])
    if packed := _all_packed(q, k, v):
        sizes = q.out_features, k.out_features, v.out_features
        qkv = StackedQKV(PackedLinear.joined(packed), sizes)
    if packed := _all_packed(gate, up):
        mlp = GatedMLP(PackedLinear.joined(packed), None, made["ffn_down"])
    out, head_size = made["attn_output"], config.head_dim
    attention = AttentionAround(qkv, out, head_size, None, rope)
    return DecoderLayer(norms[0], attention, norms[1], mlp)


def _all_packed(*projections: Projection) -> list[PackedLinear]:
    """The projections, if all of them are packed."""
    packed = [p for p in projections if isinstance(p, PackedLinear)]
    return packed if len(packed) == len(projections) else []


_pack = jax.jit(pack, static_argnums=1)
_unpack = jax.jit(gguf.unpack, static_argnums=1)
_dequantize = jax.jit(gguf.dequantize, static_argnums=1)


class _Builder:
    """Turns a file's tensors into layers, in the form asked for."""

    def __init__(self, config, weights, precision, progress):
        self.config, self.weights, self.progress = config, weights, progress
        self.precision = precision

    def norms(self, vectors: Sequence[Vector]) -> list[RMSNorm]:
        C, eps = self.config.hidden_size, self.config.rms_norm_eps
        return [RMSNorm(C, eps=eps, weight=self._array(vector)) for vector in vectors]

    def projections(self, matrices: Sequence[Matrix]) -> list[Projection]:
        """The same projection of every layer, all in one form if that can be."""
        tensors = [matrix.weight for matrix in matrices]
        biases = [m.bias if m.bias is None else self._array(m.bias) for m in matrices]
        form = self.weights
        if form in ("codes", "packed") and any(
            tensor.encoding.is_plain for tensor in tensors
        ):
            form = "float32"  # plain numbers have no codes
        blocks = [(jnp.asarray(tensor.blocks), tensor.encoding) for tensor in tensors]
        self.progress(sum(tensor.raw.nbytes for tensor in tensors))
        match form:
            case "packed":
                packed = [_pack(*b) for b in blocks]
                return [
                    PackedLinear([w], b, precision=self.precision)
                    for w, b in zip(packed, biases, strict=True)
                ]
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

    def _array(self, vector: Vector) -> jax.Array:
        self.progress(vector.bytes)
        return jnp.asarray(vector.numbers)
