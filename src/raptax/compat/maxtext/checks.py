"""What is refused at construction, and the sentence that says why."""

import math
from typing import Any

import jax

from ..._core.errors import choices
from .sharding import mesh_axes

COMPUTE_ORDERS = (0, 1, 2, 3), (0, 2, 1, 3)


def _positive(**numbers: Any) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1.")


def check_numbers(o: Any) -> None:
    """Sizes, head counts and rates."""
    if o.num_kv_heads == -1:
        raise ValueError("num_kv_heads is not defined.")
    _positive(
        num_query_heads=o.num_query_heads,
        num_kv_heads=o.num_kv_heads,
        head_dim=o.head_dim,
        max_target_length=o.max_target_length,
        ragged_block_size=o.ragged_block_size,
    )
    if o.num_query_heads % o.num_kv_heads:
        raise ValueError(
            f"Invalid num_kv_heads for GQA. num_query_heads={o.num_query_heads} must be "
            f"a multiple of num_kv_heads={o.num_kv_heads}."
        )
    for name in ("inputs_q_shape", "inputs_kv_shape"):
        if len(shape := getattr(o, name)) != 3:
            raise ValueError(f"{name}={shape} must be (batch, length, width).")
    if not 0 <= o.dropout_rate < 1:
        raise ValueError(f"dropout_rate={o.dropout_rate} must lie in [0, 1).")
    if (cap := o.attn_logits_soft_cap) is not None and cap < 0:
        raise ValueError(f"attn_logits_soft_cap={cap} must not be negative; 0 is off.")
    if not o.temperature_tuning_floor_scale > 0:
        raise ValueError(
            f"temperature_tuning_floor_scale={o.temperature_tuning_floor_scale} must be "
            "positive."
        )


def check_kind(o: Any) -> None:
    """That the attention type has the number it needs."""
    s = o.settings
    if o.kind == "local_sliding":
        if o.sliding_window_size is None and not s.sliding_window_size:
            raise ValueError(
                "Sliding_window_size must be set if Local Sliding attention type: "
                f"sliding_window_size={o.sliding_window_size}."
            )
        _positive(sliding_window_size=o.window)
    if o.kind == "chunk" and s.chunk_attn_window_size < 1:
        raise ValueError(
            "chunk_size must be positive: config.chunk_attn_window_size="
            f"{s.chunk_attn_window_size}."
        )
    if o.kind == "block_diffusion" and s.causal_block_size < 1:
        raise ValueError(
            "attention_type='block_diffusion' needs a positive config.causal_block_size; "
            f"got {s.causal_block_size}."
        )
    if s.moba:
        _positive(moba_chunk_size=s.moba_chunk_size, moba_topk=s.moba_topk)


def check_features(o: Any) -> None:
    """Options that exclude each other, and what this machine cannot run."""
    s = o.settings
    if s.block in ("qwen3_next", "qwen3_5") and not o.is_vision:
        raise ValueError(
            f"config.decoder_block={s.block!r} gates the output of attention by a second "
            "half of the query projection, which is not here; 'qwen3' has no gate."
        )
    if s.fused_qkv and o.share_kv_projections:
        raise ValueError(
            "share_kv_projections=True leaves no value projection to fuse: it does not "
            "go with config.fused_qkv."
        )
    if o.quant is not None and not callable(getattr(o.quant, "dot_general_cls", None)):
        raise ValueError(
            f"quant={o.quant!r} must have a dot_general_cls(mesh_axes), as "
            "raptax.compat.maxtext.QwixQuantization and MaxText's AqtQuantization do."
        )
    if o.attention_kernel.startswith("cudnn") and jax.default_backend() != "gpu":
        raise ValueError(
            f"attention_kernel={o.attention_kernel!r} is cuDNN and runs on NVIDIA GPUs; "
            f"this is {jax.default_backend()!r}. 'autoselected' runs everywhere."
        )


def check_caches(o: Any) -> None:
    """Lengths, orders of axes and how numbers are stored."""
    for name in ("prefill_cache_axis_order", "ar_cache_axis_order"):
        if sorted(order := tuple(getattr(o, name))) != [0, 1, 2, 3]:
            raise ValueError(f"{name}={order} must be an order of 0, 1, 2, 3.")
    if tuple(o.compute_axis_order) not in COMPUTE_ORDERS:
        raise ValueError(
            f"compute_axis_order={tuple(o.compute_axis_order)} is not one of "
            f"{choices(COMPUTE_ORDERS)}."
        )
    if o.settings.quantize_kvcache and o.kv_quant is None:
        raise ValueError(
            "config.quantize_kvcache=True needs kv_quant=KVQuant(config): half of a "
            "setting is none."
        )
    if o.kv_quant is not None and not hasattr(o.kv_quant, "quantization"):
        raise ValueError(
            f"kv_quant={o.kv_quant!r} must be a raptax.compat.maxtext.KVQuant."
        )
    if o.model_mode == "train" or o.serves_vllm:
        return
    P, L = o.max_prefill_predict_length, o.max_target_length
    if P < 1:
        raise ValueError(
            f"max_prefill_predict_length={P} must be at least 1 for "
            f"model_mode={o.model_mode!r}: a cache is made of that length."
        )
    if L <= P:
        raise ValueError(
            f"max_target_length: {L} should be greater than max_prefill_length: {P}!"
        )
    if o.settings.ring_kv_cache and o.window is None:
        raise ValueError(
            "config.ring_kv_cache=True keeps the last tokens alone, which "
            f"attention_type={o.kind!r} cannot do with: it is for 'local_sliding' and "
            "'chunk'."
        )


def check_mesh(o: Any) -> None:
    """That kv heads can be dealt out to the mesh axes that they are mapped to."""
    if o.mesh is None:
        return
    axes = mesh_axes("kv_heads", o.settings.logical_axis_rules, o.mesh)
    parts = math.prod(o.mesh.shape[axis] for axis in axes)
    if o.num_kv_heads % parts:
        raise ValueError(
            f"num_kv_heads={o.num_kv_heads} must be divisible by {parts}, the size of "
            f"the mesh axes {axes} that 'kv_heads' is mapped to."
        )
