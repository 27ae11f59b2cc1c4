"""MaxText's options: names and defaults as it documents them, checked in one place.

`AttentionOptions` is what the documented constructors take; `Settings` is what is read of
a `config`. Nothing else looks at a config.
"""

import dataclasses
import enum
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..._core.errors import choices
from ...kv_cache.quantization import KVQuantization
from .checks import check_caches, check_features, check_kind, check_mesh, check_numbers
from .dense import nd_dense_init

Names = tuple[str, ...]
Number = int | float


class AttentionType(enum.Enum):
    """Which query may see which key; see `raptax.compat.maxtext.masks`."""

    GLOBAL = "global"
    LOCAL_SLIDING = "local_sliding"
    CHUNK = "chunk"
    MLA = "mla"
    FULL = "full"
    BLOCK_DIFFUSION = "block_diffusion"

    def __repr__(self) -> str:
        return f"AttentionType.{self.name}"


MODES = "train", "prefill", "autoregressive"
# What each name runs: a kernel of `raptax.kernels`, or None for the first that can.
KERNELS = {
    "autoselected": None,
    "dot_product": "reference",
    "flash": None,
    "cudnn_flash_te": "jax_nn",
    "cudnn_flash_jax": "jax_nn",
    "ragged": None,
    "paged": None,
    "vllm_rpa": None,
    "vllm_batched_rpa": None,
}
ROPE_TYPES = "default", "llama3", "llama3.1", "llama3.2", "llama3.3", "yarn"
DENSE_INIT = nd_dense_init(1.0, "fan_in", "normal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is read of a config, and what holds where it says nothing.

    MaxText's keys, and a few of our own (the last group).
    """

    attention: str = "autoselected"
    attention_type: Any = "global"
    matmul_precision: str = "default"
    logical_axis_rules: Sequence[Any] = ()
    # Projections and norms
    fused_qkv: bool = False
    use_qk_norm: bool = False
    qk_norm_with_scale: bool = True
    v_norm_with_scale: bool = True
    normalization_layer_epsilon: float = 1e-5
    model_name: str = ""
    decoder_block: Any = ""
    # Who sees whom
    sliding_window_size: int = 0
    chunk_attn_window_size: int = 0
    causal_block_size: int = 0
    attention_sink: bool = False
    moba: bool = False
    moba_chunk_size: int = 1024
    moba_topk: int = 8
    # Positions
    rope_type: str = "default"
    rope_max_timescale: float = 10000.0
    rope_min_timescale: float = 1.0
    local_rope_max_timescale: float = -1.0
    rope_linear_scaling_factor: float = 1.0
    partial_rotary_factor: float = 1.0
    rope_use_scale: bool = True
    rope_factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    rope_truncate: bool = True
    rope_interleave: bool = True
    rope_attention_scaling: bool = False
    rope_pairwise: bool = False
    rope_theta_for_vit: float = 10000.0
    image_size_for_vit: int = 896
    patch_size_for_vit: int = 14
    spatial_merge_size_for_vit: int = 2
    # Caches
    quantize_kvcache: bool = False
    kv_quant_axis: str = "heads_and_dkv"
    kv_quant_dtype: str = "int8"
    mla_naive_kvcache: bool = False
    # Ours. Llama 3's rope was written into MaxText as the numbers of 3.1.
    llama_rope_factor: float = 0.0
    llama_rope_low_freq_factor: float = 1.0
    llama_rope_high_freq_factor: float = 4.0
    llama_rope_original_max_position: int = 8192
    mrope_layout: str = "interleaved"
    ring_kv_cache: bool = False

    @classmethod
    def read(cls, config: Any) -> "Settings":
        """From an object with attributes, a mapping, or None for all defaults."""
        if hasattr(type(config), "get_keys"):  # MaxText's own raises on unknown names
            config = config.get_keys()
        found: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if isinstance(config, Mapping):
                value = config.get(field.name)
            else:
                value = getattr(config, field.name, None)
            if value is not None:
                whole = isinstance(field.default, float)
                found[field.name] = float(value) if whole else value
        return cls(**found)

    @property
    def block(self) -> str:
        """The decoder block's name, whether it came as text or as MaxText's enum."""
        return str(getattr(self.decoder_block, "value", self.decoder_block)).lower()

    def is_model(self, name: str) -> bool:
        """Whether model_name begins so, which MaxText asks, or the decoder block does."""
        return self.model_name.startswith(name) or self.block.startswith(name)


def _names(first: str, second: str) -> Names:
    return first, second, "activation_kv_heads", "activation_kv_head_dim"


_TRAIN = _names("activation_kv_batch", "activation_length_attn")
_PREFILL = _names("activation_prefill_kv_batch", "prefill_activation_length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What MaxText's attention takes, with its defaults.

    Raises:
        ValueError: A value that cannot be, with the choices there are.
    """

    config: Any = None
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    max_target_length: int
    mesh: jax.sharding.Mesh | None = None
    attention_kernel: str = "autoselected"
    inputs_q_shape: tuple[int, ...]
    inputs_kv_shape: tuple[int, ...]
    dtype: DTypeLike = jnp.float32
    weight_dtype: DTypeLike = jnp.float32
    max_prefill_predict_length: int = -1
    dropout_rate: Number = 0.0
    kernel_init: Callable[..., Any] = DENSE_INIT
    float32_qk_product: bool = False
    float32_logits: bool = False
    quant: Any = None
    kv_quant: Any = None
    attention_type: Any = AttentionType.GLOBAL
    attn_logits_soft_cap: Number | None = None
    sliding_window_size: int | None = None
    use_ragged_attention: bool = False
    ragged_block_size: int = 256
    use_qk_norm: bool = False
    query_pre_attn_scalar: Number | None = None
    use_bias_in_projections: bool = False
    share_kv_projections: bool = False
    temperature_tuning: bool = False
    temperature_tuning_scale: Number = 0.1
    temperature_tuning_floor_scale: Number = 8192.0
    prefill_query_axis_names: Names = _PREFILL
    prefill_key_axis_names: Names = _PREFILL
    prefill_value_axis_names: Names = _PREFILL
    query_axis_names: Names = _TRAIN
    key_axis_names: Names = _TRAIN
    value_axis_names: Names = _TRAIN
    input_axis_names: Names = (
        "activation_batch_attn",
        "activation_length_attn",
        "activation_embed_attn",
    )
    out_axis_names: Names = (
        "activation_batch_attn",
        "activation_length_attn",
        "activation_heads",
        "activation_kv",
    )
    prefill_input_axis_names: Names = (
        "activation_prefill_kv_batch",
        "prefill_activation_length",
        "activation_embed_attn",
    )
    decode_input_axis_names: Names = (
        "decode_batch",
        "decode_length",
        "activation_embed_attn",
    )
    prefill_out_axis_names: Names = (
        "activation_prefill_kv_batch",
        "prefill_activation_length",
        "activation_heads",
        "activation_kv",
    )
    decode_out_axis_names: Names = (
        "decode_batch",
        "decode_length",
        "activation_heads",
        "activation_kv",
    )
    prefill_cache_axis_order: tuple[int, ...] = (1, 2, 0, 3)
    ar_cache_axis_order: tuple[int, ...] = (1, 2, 0, 3)
    compute_axis_order: tuple[int, ...] = (0, 1, 2, 3)
    reshape_q: bool = False
    is_nope_layer: bool = False
    is_vision: bool = False
    model_mode: str = "train"
    use_mrope: bool = False
    mrope_section: tuple[int, int, int] | None = None
    rope_type: str | None = None

    def __post_init__(self) -> None:
        _choice("model_mode", self.model_mode, MODES)
        _choice("attention_kernel", self.attention_kernel, KERNELS)
        _choice("config.attention", self.settings.attention, KERNELS)
        _choice("rope_type", self.rope, ROPE_TYPES)
        check_numbers(self)
        check_kind(self)
        check_features(self)
        check_caches(self)
        check_mesh(self)

    @functools.cached_property
    def settings(self) -> Settings:
        return Settings.read(self.config)

    @functools.cached_property
    def kind(self) -> str:
        """The attention type; a config of "block_diffusion" makes "global" that."""
        asked = _value(self.settings.attention_type)
        kind = asked if self.attention_type is None else _value(self.attention_type)
        _choice("attention_type", kind, [known.value for known in AttentionType])
        return asked if (kind, asked) == ("global", "block_diffusion") else kind

    @functools.cached_property
    def rope(self) -> str:
        return str(self.rope_type or self.settings.rope_type).lower()

    def __hash__(self) -> int:  # a config need not hash
        return hash((self.num_query_heads, self.num_kv_heads, self.head_dim, self.rope))

    @property
    def serves_vllm(self) -> bool:
        names = self.attention_kernel, self.settings.attention
        return any(name.startswith("vllm_") for name in names)

    @property
    def kernel(self) -> str | None:
        """The kernel that is named, in our words."""
        return KERNELS[self.attention_kernel]

    @property
    def window(self) -> int | None:
        """How far back a layer looks that forgets the rest; None for all the way."""
        if self.kind == "local_sliding":
            if self.sliding_window_size is not None:
                return self.sliding_window_size
            return self.settings.sliding_window_size
        return self.settings.chunk_attn_window_size if self.kind == "chunk" else None

    @property
    def quantization(self) -> KVQuantization | None:
        """How a cache stores numbers; None for as they are."""
        return None if self.kv_quant is None else self.kv_quant.quantization


def _value(name: Any) -> str:
    """``name``, or what a member of an enum stands for."""
    return str(getattr(name, "value", name))


def _choice(name: str, value: Any, known: Iterable[str]) -> None:
    if value not in (known := list(known)):
        raise ValueError(f"{name}={value!r} is not one of {choices(known)}.")


def signature_of(*options: type, **first: Any) -> inspect.Signature:
    """Keyword-only: the fields of these dataclasses, and what comes before them."""
    kind = inspect.Parameter.KEYWORD_ONLY
    found = {
        name: parameter
        for cls in options
        for name, parameter in inspect.signature(cls).parameters.items()
    }
    for name, default in first.items():
        found[name] = inspect.Parameter(name, kind, default=default)
    return inspect.Signature(list(found.values()))
