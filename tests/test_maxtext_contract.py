"""The page's names and defaults, and what is refused at construction."""

import dataclasses
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from raptax import Unsupported
from raptax.compat.maxtext import (
    MLA,
    Attention,
    AttentionOptions,
    AttentionType,
    KVQuant,
    L2Norm,
    attention_as_linen,
    l2_norm_as_linen,
    ragged_paged_attention,
)
from raptax.compat.maxtext import positions as rope
from tests.maxtext_cases import BASE, MLA_SIZES, YARN, E, build

REQUIRED = object()
KV = "activation_kv_heads", "activation_kv_head_dim"
TRAIN = "activation_kv_batch", "activation_length_attn", *KV
PREFILL = "activation_prefill_kv_batch", "prefill_activation_length", *KV
OUT = "activation_heads", "activation_kv"
# What the page prints, in its order.
DOCUMENTED = dict(
    config=REQUIRED,
    num_query_heads=REQUIRED,
    num_kv_heads=REQUIRED,
    head_dim=REQUIRED,
    max_target_length=REQUIRED,
    mesh=REQUIRED,
    attention_kernel=REQUIRED,
    inputs_q_shape=REQUIRED,
    inputs_kv_shape=REQUIRED,
    dtype=jnp.float32,
    weight_dtype=jnp.float32,
    max_prefill_predict_length=-1,
    dropout_rate=0.0,
    kernel_init=REQUIRED,  # a function
    float32_qk_product=False,
    float32_logits=False,
    quant=None,
    kv_quant=None,
    attention_type=AttentionType.GLOBAL,
    attn_logits_soft_cap=None,
    sliding_window_size=None,
    use_ragged_attention=False,
    ragged_block_size=256,
    use_qk_norm=False,
    query_pre_attn_scalar=None,
    use_bias_in_projections=False,
    share_kv_projections=False,
    temperature_tuning=False,
    temperature_tuning_scale=0.1,
    temperature_tuning_floor_scale=8192.0,
    prefill_query_axis_names=PREFILL,
    prefill_key_axis_names=PREFILL,
    prefill_value_axis_names=PREFILL,
    query_axis_names=TRAIN,
    key_axis_names=TRAIN,
    value_axis_names=TRAIN,
    input_axis_names=(
        "activation_batch_attn", "activation_length_attn", "activation_embed_attn"
    ),
    out_axis_names=("activation_batch_attn", "activation_length_attn", *OUT),
    prefill_input_axis_names=(*PREFILL[:2], "activation_embed_attn"),
    decode_input_axis_names=("decode_batch", "decode_length", "activation_embed_attn"),
    prefill_out_axis_names=(*PREFILL[:2], *OUT),
    decode_out_axis_names=("decode_batch", "decode_length", *OUT),
    prefill_cache_axis_order=(1, 2, 0, 3),
    ar_cache_axis_order=(1, 2, 0, 3),
    compute_axis_order=(0, 1, 2, 3),
    reshape_q=False,
    is_nope_layer=False,
    is_vision=False,
    model_mode="train",
    use_mrope=False,
    mrope_section=None,
    name=None,
    rope_type=None,
)  # fmt: skip
METHODS = dict(
    init_query_w=["inputs_q_shape"],
    query_projection=["inputs_q", "out_sharding"],
    init_kv_w=["inputs_kv_shape"],
    kv_projection=["inputs_kv", "proj_name", "out_sharding"],
    init_qkv_w=["inputs_shape"],
    qkv_projection=["inputs", "proj_name", "out_sharding"],
    init_out_w=["output_dim"],
    out_projection=["out", "out_sharding"],
    convert_dense_general_inputs_shape=["inputs_shape", "axis"],
    init_rotary_embedding=[],
    apply_rotary_embedding=["inputs", "inputs_positions", "rope_kwargs"],
    init_kv_caches=["inputs_kv_shape"],
    update_kv_caches=[
        "key", "value", "decoder_segment_ids", "model_mode", "previous_chunk"
    ],
    forward_serve_vllm=["query", "key", "value", "rpa_kv_cache", "rpa_metadata"],
)  # fmt: skip


def test_the_documented_parameters_and_defaults():
    mine = inspect.signature(attention_as_linen).parameters
    assert set(mine) == set(DOCUMENTED)
    for name, default in DOCUMENTED.items():
        assert mine[name].kind is inspect.Parameter.KEYWORD_ONLY
        if default is not REQUIRED:
            assert mine[name].default == default, name
    assert repr(AttentionType.GLOBAL) == "AttentionType.GLOBAL"
    fields = {f.name for f in dataclasses.fields(AttentionOptions)}
    assert fields == set(DOCUMENTED) - {"name"}
    taken = inspect.signature(Attention).parameters
    assert fields <= set(taken)
    assert "rngs" in taken
    assert list(inspect.signature(l2_norm_as_linen).parameters) == ["self", "eps"]
    assert inspect.signature(l2_norm_as_linen).parameters["eps"].default == 1e-6
    assert L2Norm().rngs is None


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("cls", [Attention, MLA])
def test_the_documented_methods(cls, name):
    assert list(inspect.signature(getattr(cls, name)).parameters)[1:] == METHODS[
        name
    ] or (cls is MLA and name == "forward_serve_vllm")
    assert isinstance(cls.out_head_dim, property)
    assert inspect.getdoc(getattr(cls, name))


def test_a_config_is_an_object_a_mapping_or_nothing():
    class Named:  # MaxText's own raises on names that it does not know
        def get_keys(self):
            return dict(rope_max_timescale=7, attention_type=None)

        def __getattr__(self, name):
            raise ValueError(name)

    found = dict(rope_max_timescale=7)
    for config in (found, types.SimpleNamespace(**found), Named()):
        assert build(config=config).options.settings.rope_max_timescale == 7
    layer = build()
    assert layer.options.settings.rope_max_timescale == 10000
    assert layer.num_query_heads == 4
    assert layer.config is None
    with pytest.raises(AttributeError, match="no attribute 'heads'"):
        _ = layer.heads


def test_projections_and_their_initial_weights():
    layer = build(inputs_q_shape=(2, 24, 256), inputs_kv_shape=(2, 24, 256))
    D = 16
    for name, scale in (("query", 1 / 256 / D), ("key", 1 / 256), ("out", 1 / 64)):
        kernel = getattr(layer, name).kernel
        assert abs(kernel[...].std() / scale**0.5 - 1) < 0.05, name
    whole = build(query_pre_attn_scalar=0.25, inputs_q_shape=(2, 24, 256))
    assert abs(whole.query.kernel[...].std() * 16 - 1) < 0.05
    fused = build(config=dict(fused_qkv=True), inputs_q_shape=(2, 24, 256))
    assert fused.qkv_proj.kernel.shape == (256, 8, D)
    assert abs(fused.qkv_proj.kernel[...].std() * 16 - 1) < 0.05
    names = layer.query.kernel.get_metadata()["out_sharding"]
    assert names == ("embed", "q_heads", "kv")
    x = jnp.ones((2, 3, 256))
    q = layer.query_projection(x)
    assert q.shape == (2, 3, 4, D)
    assert layer.kv_projection(x, "value").shape == (2, 3, 2, D)
    assert [a.shape[2] for a in fused.qkv_projection(x, "qkv_proj")] == [4, 2, 2]
    assert layer.out_projection(q).shape == (2, 3, 256)
    assert layer.convert_dense_general_inputs_shape((2, 3, 5)) == (5,)
    assert layer.convert_dense_general_inputs_shape((2, 3, 5), (-1, 0)) == (5, 2)
    assert layer.init_query_w((1, 1, 8)).kernel.shape == (8, 4, D)
    shared = build(share_kv_projections=True)
    assert not hasattr(shared, "value")


# ---------------------------------------------------------------------------- positions


def rotary(**options):
    return build(**options).rotary_embedding


def test_which_rotary_embedding_a_layer_gets():
    plain = rotary()
    assert rotary(rope_type="DEFAULT") == plain
    assert rotary(rope_max_timescale=500.0) == rotary(
        config=dict(rope_max_timescale=500)
    )
    wide = dict(llama_rope_factor=32.0)
    assert rotary(rope_type="llama3.2") == rotary(rope_type="llama3.1", config=wide)
    assert rotary(config=dict(model_name="llama3.1-8b")) == rotary(rope_type="llama3.1")
    unscaled = rotary(rope_type="llama3.1", config=dict(rope_use_scale=False))
    assert (unscaled.inv_freq, unscaled.layout) == (plain.inv_freq, "interleaved")
    assert rotary(rope_type="yarn", config=YARN).scale == 1
    local = dict(attention_type="local_sliding", sliding_window_size=3)
    near = dict(local_rope_max_timescale=100.0, rope_linear_scaling_factor=8.0)
    stretched = rotary(**local, config=near)
    assert stretched.inv_freq[1] == pytest.approx(100 ** (-1 / 8) / 8)
    gemma = rotary(**local, config=near | dict(decoder_block="gemma3"))
    assert gemma.inv_freq[1] == pytest.approx(100 ** (-1 / 8))
    old = rotary(
        use_mrope=True, mrope_section=(3, 3, 2), config=dict(mrope_layout="contiguous")
    )
    assert old.axes == (0, 0, 0, 1, 1, 1, 2, 2)
    shortest = rotary(config=dict(rope_min_timescale=10, rope_max_timescale=1000))
    assert shortest.inv_freq[0] == 0.1
    assert shortest.inv_freq[4] == pytest.approx(0.01)
    vision = dict(is_vision=True, head_dim=16)
    llama = dict(model_name="llama4-17b", image_size_for_vit=8, patch_size_for_vit=2)
    assert rotary(**vision, config=llama).grid == 4
    layer = build(**vision, config=dict(model_name="qwen3-omni"), attention_type="full")
    assert isinstance(layer.rotary_embedding, rope.QwenVisionRotary)
    x = jnp.ones((2, 24, E))
    grid = dict(num_frames=1, height=4, width=6)
    assert layer(x, rope_kwargs=grid)[0].shape == x.shape
    with pytest.raises(ValueError, match="multiples of spatial_merge_size_for_vit=2"):
        layer(x, rope_kwargs=dict(num_frames=1, height=3, width=8))


# ------------------------------------------------------------------------------- errors

LOCAL = dict(attention_type="local_sliding")
QUANT = dict(quantize_kvcache=True)
MESH = lambda: jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tensor",))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(num_kv_heads=-1), "num_kv_heads is not defined"),
        (dict(num_kv_heads=3), "Invalid num_kv_heads for GQA"),
        (dict(compute_axis_order=(1, 0, 2, 3)), "compute_axis_order=.* is not one of"),
        (dict(prefill_cache_axis_order=(0, 1, 2, 2)), "must be an order of 0, 1, 2, 3"),
        (dict(attention_kernel="fast"), "attention_kernel='fast' is not one of 'auto"),
        (dict(config=dict(attention="fast")), "config.attention='fast'"),
        (dict(rope_type="rope"), "rope_type='rope' is not one of 'default'"),
        (dict(attention_type="nearby"), "attention_type='nearby' is not one of 'glo"),
        (dict(model_mode="test"), "model_mode='test' is not one of 'train'"),
        (LOCAL, "Sliding_window_size must be set"),
        (dict(sliding_window_size=0, **LOCAL), "sliding_window_size=0 must be at least"),
        (dict(attention_type="chunk"), "chunk_size must be positive"),
        (dict(attention_type="block_diffusion"), "needs a positive config.causal_block"),
        (dict(config=dict(moba=True, moba_topk=0)), "moba_topk=0 must be at least 1"),
        (dict(use_mrope=True, mrope_section=(1, 2, 3)), r"mrope_section=\(1, 2, 3\)"),
        (dict(use_mrope=True, mrope_section=(4, 2, 2), config=dict(mrope_layout="x")),
         "mrope_layout='x' is not one of"),
        (dict(max_target_length=16), "max_target_length: 16 should be greater than max"),
        (dict(max_prefill_predict_length=-1), "max_prefill_predict_length=-1 must be"),
        (dict(head_dim=15), "must be a multiple of 2"),
        (dict(partial_rotary_factor=1.5), "partial_rotary_factor=1.5 must lie in"),
        (dict(rope_type="yarn", config=dict(rope_pairwise=True, rope_interleave=False)),
         "rope_pairwise=True requires rope_interleave=True"),
        (dict(is_vision=True), "Unsupported model type for vision rotary embedding"),
        (dict(inputs_q_shape=(2, 32)), r"inputs_q_shape=\(2, 32\) must be"),
        (dict(dropout_rate=1.0), "dropout_rate=1.0 must lie in"),
        (dict(attn_logits_soft_cap=-1), "attn_logits_soft_cap=-1 must not be negative"),
        (dict(ragged_block_size=0), "ragged_block_size=0"),
        (dict(temperature_tuning_floor_scale=0), "floor_scale=0 must be positive"),
        (dict(quant="int8"), "quant='int8' must have a dot_general_cls"),
        (dict(config=QUANT), "needs kv_quant"),
        (dict(kv_quant="int8"), "'int8' must be a raptax.compat.maxtext.KVQuant"),
        (dict(share_kv_projections=True, config=dict(fused_qkv=True)), "leaves no value"),
        (dict(config=dict(ring_kv_cache=True)), "which attention_type='global' cannot"),
        (dict(attention_kernel="cudnn_flash_te"), "cuDNN and runs on NVIDIA GPUs"),
        (dict(num_kv_heads=1, mesh=MESH, config=dict(
            logical_axis_rules=[("kv_heads", "tensor")])), "divisible by 2, the size of"),
        (dict(MLA_SIZES, num_kv_heads=2), "num_kv_heads=2 must equal num_query_heads=4"),
        (dict(MLA_SIZES, attention_type="global"), "is the class Attention"),
        (dict(MLA_SIZES, use_qk_norm=True), "are not for latent attention"),
        (dict(MLA_SIZES, config=dict(fused_qkv=True)), "does not have"),
        (dict(attention_type="mla"), "is the class MLA"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_at_construction(options, said):
    if callable(options.get("mesh")):
        options = options | dict(mesh=options["mesh"]())
    with pytest.raises(ValueError, match=said):
        build(**options)
    if "kv_lora_rank" not in options and "partial_rotary_factor" not in options:
        options = dict(num_query_heads=4, num_kv_heads=2, head_dim=16) | options
        known = {n for n in DOCUMENTED if n in options}
        assert known == set(options)


X = jnp.ones((2, 3, E))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda a: a.kv_projection(X, "query"), "proj_name must be 'key' or 'value'"),
        (lambda a: a(X[:, :2], model_mode="autoregressive"), "got sequence=2"),
        (lambda a: a(X, model_mode="serve"), "Model Mode isn't supported"),
        (lambda a: a(X[0]), "must be .batch, length, width"),
        (
            lambda a: a(jnp.ones((2, 17, E)), model_mode="prefill"),
            "17 tokens does not fit",
        ),
        (
            lambda a: a(X, model_mode="prefill", previous_chunk=jnp.ones((2, 14))),
            "a prompt of 17 tokens",
        ),
        (lambda a: a(X, previous_chunk=X), "previous_chunk is for prefill"),
        (lambda a: a(X, X, jnp.zeros((2, 3, 3), jnp.int32)), "must be 2D .batch, seq"),
        (
            lambda a: a(X, X, None, jnp.ones((2, 2), jnp.int32)),
            "decoder_segment_ids .2, 2. must be",
        ),
        (lambda a: a(X[:, :2], X), "share their positions"),
        (
            lambda a: build(is_nope_layer=True)(
                X[:, :2], X, None, jnp.ones((2, 3), jnp.int32)
            ),
            "there must be as many",
        ),
        (lambda a: a(X, rope_kwargs=dict(height=1)), "takes no .'height'."),
        (
            lambda a: build(model_mode="train")(X, model_mode="prefill"),
            "this layer has no cache",
        ),
        (
            lambda a: build(use_mrope=True, mrope_section=(4, 2, 2))(
                X, X, jnp.zeros((2, 3, 2), jnp.int32)
            ),
            "2D .batch, seq. or 3D .batch, seq, 3., got shape",
        ),
        (lambda a: KVQuant({}), "needs config.quantize_kvcache=True"),
        (
            lambda a: KVQuant(dict(QUANT, kv_quant_dtype="int5")),
            "format='int5' is not one of 'int8', 'int4', 'fp8'",
        ),
        (lambda a: KVQuant(dict(QUANT, kv_quant_axis="d")), "axes='d' is not one of"),
        (
            lambda a: build(config=dict(fused_qkv=True)).qkv_projection(X, "q"),
            "proj_name",
        ),
        (
            lambda a: ragged_paged_attention(
                jnp.ones((3, 4, 8)),
                jnp.ones((2, 4, 3, 8)),
                jnp.ones(1, jnp.int32),
                jnp.ones((1, 2), jnp.int32),
                jnp.array([0, 3], jnp.int32),
                jnp.ones(1, jnp.int32),
            ),
            "keys and values in turn",
        ),
    ],
)
def test_what_cannot_be_called(call, said):
    with pytest.raises(ValueError, match=said):
        call(build())


def test_what_a_layer_cannot_do_with_a_ring_or_latents():
    ring = build(sliding_window_size=3, **LOCAL, config=dict(ring_kv_cache=True))
    runs = jnp.ones((2, 3), jnp.int32)
    with pytest.raises(Unsupported, match="a ring keeps the last keys alone"):
        ring(X, model_mode="prefill", bidirectional_mask=runs)
    with pytest.raises(Unsupported, match="pages hold keys and values of heads"):
        build(**MLA_SIZES).forward_serve_vllm(X, X, X)
    with pytest.raises(Unsupported, match="MaxText's page manager"):
        build()(X, slot=0)
    with pytest.raises(ValueError, match="is the class MLA"):
        attention_as_linen(**BASE | dict(attention_type="mla"))
    with pytest.raises(ValueError, match="add up to"):
        attention_as_linen(**BASE | dict(use_mrope=True))
    served = build(attention_kernel="vllm_rpa", attention_type="full")
    q = served.query_projection(X)
    with pytest.raises(Unsupported, match="pages serve attention_type 'global'"):
        served.forward_serve_vllm(q, q, q, jnp.ones(1), {})


def test_options_compare_by_value():
    one, other = build().options, build().options
    assert one == other
    assert hash(one) == hash(other)
    assert one != build(reshape_q=True).options
    assert nnx.graphdef(build()) == nnx.graphdef(build())
