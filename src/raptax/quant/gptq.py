"""GPTQ's checkpoint layout: packed integers to numbers, and back.

A projection from ``C`` inputs to ``O`` outputs is four tensors,

    qweight  int32 (C * bits / 32, O)     codes, packed along the inputs
    qzeros   int32 (G, O * bits / 32)     zero points, packed along the outputs
    scales   float (G, O)
    g_idx    int32 (C,)                   the group of each input

and stands for ``W[k, n] = (code[k, n] - zero[g, n]) * scale[g, n]`` where ``g`` is
``g_idx[k]``: the transpose of the ``(O, C)`` weight that layers speak of. Without
``desc_act`` input ``k`` is in group ``k // group_size``, and the last one may be short.

Values lie in the words as one stream of bits, lowest first: value ``i`` at bits
``bits * i`` to ``bits * i + bits - 1``. Three bits straddle: 32 values in 3 words.

All of it is exact in float32: a float16 scale has 11 significant bits and a difference of
codes at most 9.

Source: Frantar et al. 2022, arXiv:2210.17323; the layout is AutoGPTQ's and GPTQModel's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8

from .._core.errors import choices

Bits = Literal[2, 3, 4, 8]
CheckpointFormat = Literal["gptq", "gptq_v2"]


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """How a GPTQ checkpoint is packed.

    Attributes:
        quant_method: "gptq".
        bits: Of one code: 2, 3, 4 or 8.
        group_size: Inputs that share a scale; -1 for all of them.
        desc_act: Groups were formed in order of activation size: an input's group is
            that of ``g_idx``.
        sym: Codes are symmetric about ``2 ** (bits - 1)``, which is the zero point
            wherever a projection comes without ``qzeros``.
        checkpoint_format: What ``qzeros`` hold: "gptq" the zero points less one,
            "gptq_v2" the zero points.

    Raises:
        ValueError: A value outside these.
    """

    quant_method: str
    bits: int
    group_size: int
    desc_act: bool = False
    sym: bool = False
    checkpoint_format: str = "gptq"

    def __post_init__(self) -> None:
        known = {
            "quant_method": ("gptq",),
            "bits": get_args(Bits),
            "checkpoint_format": get_args(CheckpointFormat),
        }
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {choices(allowed)}."
                )
        if self.group_size < 1 and self.group_size != -1:
            raise ValueError(
                f"group_size={self.group_size} must be at least 1, or -1 for one group."
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "QuantizationConfig":
        """From the ``quantization_config`` of a checkpoint's ``config.json``.

        Keys that tell how the codes were found (``damp_percent``, ``true_sequential``
        and the like) do not change what they mean and are passed over.

        Raises:
            ValueError: A key is missing or has a value that cannot be read, or layers
                differ (``dynamic``).
        """
        if missing := {"bits", "group_size"} - config.keys():
            raise ValueError(
                f"a GPTQ config lacks {sorted(missing)}; got {sorted(config)}."
            )
        if config.get("dynamic"):
            raise ValueError(
                f"dynamic={config['dynamic']} gives modules formats of their own; make "
                "a QuantizationConfig for each of them."
            )
        if config.get("pack_dtype", "int32") != "int32":
            raise ValueError(f"pack_dtype={config['pack_dtype']!r} is not 'int32'.")
        if config.get("is_marlin_format"):
            raise ValueError("is_marlin_format=True: codes in another order, not read.")
        return cls(
            config.get("quant_method", "gptq"),
            config["bits"],
            config["group_size"],
            config.get("desc_act", False),
            config.get("sym", False),
            config.get("checkpoint_format", config.get("format", "gptq")),
        )

    def groups(self, in_features: int) -> int:
        """Groups of a projection from this many inputs, the short last one included."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    def words(self, values: int) -> int:
        """32-bit words that hold this many values."""
        return 3 * -(-values // 32) if self.bits == 3 else -(-values * self.bits // 32)


def unpack(words: Int32[Array, "words N"], bits: int) -> UInt8[Array, "values N"]:
    """The ``32 * words / bits`` values of each column, in order.

    Raises:
        ValueError: Three bits in a number of words that is no multiple of 3.
    """
    stream = jax.lax.bitcast_convert_type(words, jnp.uint32)
    count, N = words.shape
    if bits == 3:
        if count % 3:
            raise ValueError(
                f"{count} words are no multiple of 3, which hold 32 values."
            )
        fields = _threes(stream.reshape(count // 3, 3, N))
    else:
        shifts = jnp.arange(0, 32, bits, dtype=jnp.uint32).reshape(1, -1, 1)
        fields = stream[:, None] >> shifts
    return (fields & jnp.uint32(2**bits - 1)).astype(jnp.uint8).reshape(-1, N)


def _threes(words):
    """32 values of three bits in their lowest bits, from three words."""
    first, second, third = (words[:, i : i + 1] for i in range(3))

    def ten(word, start):
        shifts = start + 3 * jnp.arange(10, dtype=jnp.uint32)
        return word >> shifts.reshape(1, -1, 1)

    pieces = [
        ten(first, 0),
        first >> 30 | second << 2,
        ten(second, 1),
        second >> 31 | third << 1,
        ten(third, 2),
    ]
    return jnp.concatenate(pieces, axis=1)


def unpack_zeros(
    qzeros: Int32[Array, "G words"], config: QuantizationConfig, columns: int
) -> UInt8[Array, "G {columns}"]:
    """The zero points of each group.

    In "gptq" a zero point of 0 is stored as -1. GPTQModel subtracts 1 from every field of
    a word at once, so that this borrows from the next field; adding 1 to every field of
    the word undoes it, and is the same where nothing is borrowed. Three bits straddle
    words, so there it counts each field for itself, modulo 8.
    """
    raw = qzeros
    stored_less_one = config.checkpoint_format == "gptq"
    if stored_less_one and config.bits != 3:
        raw = raw + jnp.int32(_ones(config.bits))
    zeros = unpack(raw.T, config.bits).T[:, :columns]
    if stored_less_one and config.bits == 3:
        zeros = zeros + jnp.uint8(1) & jnp.uint8(7)
    return zeros


def dequantize(
    qweight: Int32[Array, "words O"],
    scales: Float[Array, "G O"],
    config: QuantizationConfig,
    *,
    qzeros: Int32[Array, "G zero_words"] | None = None,
    g_idx: Int[Array, " C"] | None = None,
    in_features: int | None = None,
    columns: Int[Array, " n"] | None = None,
) -> Float32[Array, "inputs outputs"]:
    """``W[k, n] = (code[k, n] - zero[g, n]) * scale[g, n]``, of shape ``(C, O)``.

    Args:
        qzeros: Without them the zero point is ``2 ** (bits - 1)``.
        g_idx: The group of each input, for ``desc_act``. Without it groups follow one
            another.
        in_features: ``C``; unless given what ``g_idx`` says or ``qweight`` holds.
        columns: Only these outputs, in this order.
    """
    zeros: jax.Array
    if qzeros is None:
        zeros = jnp.full(scales.shape, 2 ** (config.bits - 1), jnp.uint8)
    else:
        zeros = unpack_zeros(qzeros, config, scales.shape[1])
    if columns is not None:
        qweight, scales, zeros = (a[:, columns] for a in (qweight, scales, zeros))
    if in_features is None and g_idx is not None:
        in_features = len(g_idx)
    codes = unpack(qweight, config.bits)[:in_features]
    zeros, scales = zeros.astype(jnp.float32), scales.astype(jnp.float32)
    if g_idx is not None:
        zeros, scales = zeros[g_idx], scales[g_idx]
    elif len(scales) > 1:
        repeat = lambda a: jnp.repeat(a, config.group_size, axis=0)[: len(codes)]
        zeros, scales = repeat(zeros), repeat(scales)
    return (codes.astype(jnp.float32) - zeros) * scales


def contiguous_groups(
    in_features: int, config: QuantizationConfig
) -> Int32[np.ndarray, " C"]:
    """``g_idx`` without ``desc_act``: input ``k`` is in group ``k // group_size``."""
    size = in_features if config.group_size == -1 else config.group_size
    return (np.arange(in_features) // max(size, 1)).astype(np.int32)


# ------------------------------------------------------------------- packing, in NumPy


def pack(codes: Int[np.ndarray, "values N"], bits: int) -> Int32[np.ndarray, "words N"]:
    """The inverse of `unpack`; what a last word lacks is filled up with zeros."""
    per = 32 if bits == 3 else 32 // bits
    count, N = codes.shape
    padded = np.zeros((-(-count // per) * per, N), np.uint64)
    padded[:count] = codes
    # Words are sums of fields, as no two fields overlap: (groups, per, N).
    fields = padded.reshape(-1, per, N)
    words = np.zeros((len(fields), per * bits // 32, N), np.uint64)
    for i in range(per):
        word, shift = divmod(i * bits, 32)
        wide = fields[:, i] << np.uint64(shift)
        words[:, word] |= wide & np.uint64(0xFFFFFFFF)
        if shift + bits > 32:
            words[:, word + 1] |= wide >> np.uint64(32)
    return words.astype(np.uint32).view(np.int32).reshape(-1, N)


def pack_zeros(
    zeros: Int[np.ndarray, "G O"], config: QuantizationConfig
) -> Int32[np.ndarray, "G words"]:
    """The inverse of `unpack_zeros`."""
    stored_less_one = config.checkpoint_format == "gptq"
    if stored_less_one and config.bits == 3:
        zeros = (zeros - 1) % 8
    words = pack(zeros.T, config.bits).T
    if stored_less_one and config.bits != 3:
        less = words.view(np.uint32) - np.uint32(_ones(config.bits))
        words = less.view(np.int32)
    return np.ascontiguousarray(words)


def quantize(
    weight: Float[np.ndarray, "O C"],
    config: QuantizationConfig,
    g_idx: Int[np.ndarray, " C"] | None = None,
) -> dict[str, np.ndarray]:
    """The four tensors of a weight, each number rounded to the nearest code.

    This is plain rounding, not the GPTQ algorithm, which also moves the errors of one
    input into the next. Scales are float16, as in checkpoints. Symmetric groups span
    ``[-m, m]`` with ``m`` the largest magnitude in ``2 ** bits - 1`` steps, others what
    they hold and 0. A group of zeros has the scale 1.

    Args:
        weight: Finite numbers.
        g_idx: The group of each input, for ``desc_act``.

    Raises:
        ValueError: ``g_idx`` is missing with ``desc_act``, or there without; or a
            group's scale does not fit float16.
    """
    out_features, in_features = weight.shape
    if config.desc_act != (g_idx is not None):
        given = "None" if g_idx is None else f"of shape {g_idx.shape}"
        raise ValueError(
            f"desc_act={config.desc_act} with g_idx {given}: a g_idx belongs to "
            "desc_act=True, and to that alone."
        )
    index = contiguous_groups(in_features, config) if g_idx is None else g_idx
    numbers = weight.T.astype(np.float64)
    shape = (config.groups(in_features), out_features)
    scales, zeros = np.ones(shape, np.float16), np.zeros(shape, np.int64)
    for group in range(shape[0]):
        members = numbers[index == group]
        scales[group], zeros[group] = _grid(members, config)
    steps = np.rint(numbers / scales[index].astype(np.float64)).astype(np.int64)
    codes = np.clip(steps + zeros[index], 0, 2**config.bits - 1)
    return {
        "qweight": pack(codes, config.bits),
        "qzeros": pack_zeros(zeros, config),
        "scales": scales,
        "g_idx": index.astype(np.int32),
    }


def _grid(members, config) -> Any:
    """Scale and zero point of each column of one group."""
    top = 2**config.bits - 1
    low, high = members.min(0, initial=0.0), members.max(0, initial=0.0)
    if config.sym:
        high = np.maximum(-low, high)
        low = -high
    if not ((high - low) / top <= np.finfo(np.float16).max).all():
        raise ValueError("a group's scale is not finite in float16.")
    scale = ((high - low) / top).astype(np.float16)
    scale = np.where(scale == 0, np.float16(1), scale)
    zero = np.rint(-low / scale.astype(np.float64))
    return scale, 2 ** (config.bits - 1) if config.sym else np.clip(zero, 0, top)


def _ones(bits: int) -> int:
    """A word with 1 in every field."""
    return sum(1 << i for i in range(0, 32, bits))
