"""A tiny Llama as a GGUF file, and the same model once more in float64 numpy.

`write` makes the file with the gguf package. `logits` reads it back with that package and
runs the model with plain loops, so that nothing here shares a line with raptax.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind


@dataclasses.dataclass(frozen=True)
class Typed:
    """A field's value with the type that the file gives it, and that of its items."""

    value: Any
    kind: gguf.GGUFValueType
    of: gguf.GGUFValueType | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    width: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head: int = 16
    ffn: int = 96
    context: int = 256


SMALL = Sizes()
WIDE = Sizes(width=256, heads=8, head=32, ffn=256)  # whole K-quant blocks of 256

# A vocabulary: 256 bytes, what some words are merged from, three control tokens.
_PRINTS = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTS]
BYTES = [
    *map(chr, _PRINTS),
    *(chr(256 + n) for n in range(len(_OTHERS))),  # "Ġ" is the space
]
SPECIAL = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.content }}"
    "<|im_end|>{% endfor %}"
)


def _merges() -> list[str]:
    merges: dict[str, None] = {}
    for word in ("Ġthe", "Ġthat", "Ġand", "Ġof", "Ġto", "Ġin", "Ġis", "ing", "ation"):
        left = word[0]
        for letter in word[1:]:
            merges[f"{left} {letter}"] = None
            left += letter
    return list(merges)


MERGES = _merges()
TOKENS = [*BYTES, *(pair.replace(" ", "") for pair in MERGES), *SPECIAL]
BEGIN, _, END = range(len(TOKENS) - 3, len(TOKENS))


def fields_of(sizes: Sizes) -> dict[str, Any]:
    """What the file says about itself, but its architecture."""
    return {
        "general.name": "Tiny",
        "llama.context_length": sizes.context,
        "llama.embedding_length": sizes.width,
        "llama.block_count": sizes.layers,
        "llama.feed_forward_length": sizes.ffn,
        "llama.attention.head_count": sizes.heads,
        "llama.attention.head_count_kv": sizes.kv_heads,
        "llama.attention.key_length": sizes.head,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": sizes.head,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * (len(TOKENS) - 3) + [3] * 3,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": BEGIN,
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.chat_template": TEMPLATE,
    }


def tensors_of(
    sizes: Sizes, *, head: bool = True, biases: bool = False
) -> dict[str, np.ndarray]:
    """Random weights under their names; ``head`` is one of its own, for the logits."""
    rng = np.random.default_rng(0)
    C, q, kv = sizes.width, sizes.heads * sizes.head, sizes.kv_heads * sizes.head
    shapes = {
        "attn_q": (q, C),
        "attn_k": (kv, C),
        "attn_v": (kv, C),
        "attn_output": (C, q),
        "ffn_gate": (sizes.ffn, C),
        "ffn_up": (sizes.ffn, C),
        "ffn_down": (C, sizes.ffn),
    }

    def normal(*shape, scale=1.0):
        return (rng.normal(size=shape) * scale).astype(np.float32)

    tensors = {"token_embd.weight": normal(len(TOKENS), C)}
    for layer in range(sizes.layers):
        at = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            tensors[f"{at}{norm}.weight"] = 1 + normal(C, scale=0.1)
        for name, shape in shapes.items():
            # Above 1 / sqrt(width), so that attention is sharp and layers matter.
            tensors[f"{at}{name}.weight"] = normal(*shape, scale=1.5 * shape[1] ** -0.5)
        if biases:
            for name in ("attn_q", "attn_k", "attn_v"):
                tensors[f"{at}{name}.bias"] = normal(shapes[name][0], scale=0.5)
    tensors["output_norm.weight"] = 1 + normal(C, scale=0.1)
    if head:
        tensors["output.weight"] = normal(len(TOKENS), C, scale=0.5)
    return tensors


def write(
    path: pathlib.Path,
    sizes: Sizes = SMALL,
    *,
    architecture: str = "llama",
    head: bool = True,
    biases: bool = False,
    encodings: Mapping[str, str] | str = "F32",
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> pathlib.Path:
    """Writes a tiny model.

    Args:
        path: Of the file.
        sizes: Of the model.
        architecture: What it says it is.
        head: Whether logits have a weight of their own or use the embedding.
        biases: Whether q, k and v have any.
        encodings: Of all matrices, or by parts of their names: the last part that
            occurs in a name decides, and those without any stay F32.
        fields: Changes of the fields; None leaves one out.
        tensors: Changes of the tensors; None leaves one out.
    """
    if isinstance(encodings, str):
        encodings = {"": encodings}
    # The sizes' own name and ours must agree, so that only the name is wrong.
    own = {
        name.replace("llama.", f"{architecture}."): value
        for name, value in fields_of(sizes).items()
    }
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in (own | dict(fields or {})).items():
        if value is not None:
            _add_field(writer, name, value)
    weights = tensors_of(sizes, head=head, biases=biases)
    for name, weight in (weights | dict(tensors or {})).items():
        if weight is None:
            continue
        found = [e for part, e in encodings.items() if part in name]
        kind = Kind[found[-1]] if found and weight.ndim == 2 else Kind.F32
        writer.add_tensor(name, encoded(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_field(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    match value:
        case Typed():
            writer.add_key_value(name, value.value, value.kind, value.of)
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case _:
            writer.add_array(name, value)


def encoded(weight: np.ndarray, kind: Kind) -> np.ndarray:
    """The bytes of a weight; of some like it, where gguf cannot quantize."""
    if kind not in (Kind.Q4_K, Kind.Q6_K):
        return gguf.quants.quantize(weight, kind)
    rng = np.random.default_rng(weight.size)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    rows, cols = weight.shape
    blocks = rng.integers(0, 256, (rows, cols // values, size), np.uint8)
    if kind == Kind.Q4_K:  # d * s * code - dmin * m deviates by about 270 d, around 0
        d = weight.std() / 270
        blocks[..., :4] = np.array([d, 7.5 * d], "<f2").view(np.uint8)
    else:  # d * s * (code - 32) deviates by about 1360 d
        blocks[..., -2:] = np.array([weight.std() / 1360], "<f2").view(np.uint8)
    return blocks.reshape(rows, -1)


# The model once more


def logits(path: pathlib.Path, tokens: Sequence[int]) -> np.ndarray:
    """Float64 logits after each token of one sequence: (T, V)."""
    reader = gguf.GGUFReader(path)
    field = {key: f.contents() for key, f in reader.fields.items()}
    weight = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
        for t in reader.tensors
    }
    eps = field["llama.attention.layer_norm_rms_epsilon"]
    turn = rotation(field, weight.get("rope_freqs.weight"), len(tokens))

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight[name]

    def project(x, name):
        return x @ weight[f"{name}.weight"].T + weight.get(f"{name}.bias", 0)

    x = weight["token_embd.weight"][list(tokens)]
    for layer in range(field["llama.block_count"]):
        at = f"blk.{layer}."
        y = norm(x, f"{at}attn_norm.weight")
        q, k, v = (project(y, f"{at}attn_{name}") for name in "qkv")
        x = x + project(attended(q, k, v, field, turn), f"{at}attn_output")
        y = norm(x, f"{at}ffn_norm.weight")
        gate, up = project(y, f"{at}ffn_gate"), project(y, f"{at}ffn_up")
        x = x + project(gate / (1 + np.exp(-gate)) * up, f"{at}ffn_down")
    head = weight.get("output.weight", weight["token_embd.weight"])
    return norm(x, "output_norm.weight") @ head.T


def attended(q, k, v, field, turn):
    """Head by head and query by query."""
    size = field["llama.attention.key_length"]
    group = (
        field["llama.attention.head_count"] // field["llama.attention.head_count_kv"]
    )
    window = field.get("llama.attention.sliding_window", len(q))
    out = np.zeros_like(q)
    for head in range(field["llama.attention.head_count"]):
        mine = slice(head * size, (head + 1) * size)
        theirs = slice(head // group * size, (head // group + 1) * size)
        queries, keys = rotated(q[:, mine], turn), rotated(k[:, theirs], turn)
        for t, query in enumerate(queries):
            seen = slice(max(0, t + 1 - window), t + 1)
            scores = keys[seen] @ query / math.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[t, mine] = weights @ v[seen, theirs] / weights.sum()
    return out


def rotated(x, turn):
    """Neighbouring lanes are the real and imaginary part of a number that turns."""
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * turn
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def rotation(field, divisors, length):
    """Complex (T, size / 2): by how much each pair of lanes turns at each position."""
    size, base = field["llama.rope.dimension_count"], field["llama.rope.freq_base"]
    pairs = size // 2
    divisors = np.ones(pairs) if divisors is None else divisors
    speeds = [base ** (-2 * i / size) / divisors[i] for i in range(pairs)]
    kind = field.get("llama.rope.scaling.type", "linear")
    factor, longer = field.get("llama.rope.scaling.factor", 1.0), 1.0
    if kind == "linear":
        speeds = [speed / factor for speed in speeds]
    if kind == "yarn":
        original = field["llama.rope.scaling.original_context_length"]

        def pair_with(turns):  # which pair turns so often in the original context
            return pairs * math.log(original / (2 * math.pi * turns)) / math.log(base)

        low = max(0, math.floor(pair_with(32)))
        high = min(size - 1, math.ceil(pair_with(1)))
        for i in range(pairs):
            slowed = min(1, max(0, (i - low) / max(0.001, high - low)))
            speeds[i] *= (1 - slowed) + slowed / factor
        longer = 1 + 0.1 * math.log(factor)
    return longer * np.exp(1j * np.outer(np.arange(length), speeds))
