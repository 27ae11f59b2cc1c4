"""MAX's two attention pages as a table: every name, every parameter, every default."""

import abc
import inspect

import jax.numpy as jnp
import pytest

import raptax
from raptax import KVCacheParams, KVCacheStrategy, Linear
from raptax.compat import max as max_names
from raptax.compat.max import interfaces

REQUIRED, CLASS = object(), object()  # CLASS: the page names a class of its own

ROPE = dict(
    rope=REQUIRED,
    num_attention_heads=REQUIRED,
    num_key_value_heads=REQUIRED,
    hidden_size=REQUIRED,
    kv_params=REQUIRED,
)
FLOAT = dict(devices=None, dtype=jnp.float32, linear_cls=CLASS)
WHOLE = dict(
    **ROPE,
    **FLOAT,
    stacked_qkv=False,
    scale=None,
    has_bias=False,
    float8_config=None,
    clip_qkv=None,
    use_qk_norm=False,
    rms_norm_eps=1e-06,
)
PAGES = {
    "AttentionWithRope": dict(sharding_strategy=None, **WHOLE),
    "AttentionWithRopeNoOpaque": dict(**ROPE, **FLOAT, scale=None),
    "DataParallelAttentionWithRope": WHOLE,
    "GGUFQAttentionWithRope": dict(
        **ROPE,
        dtype=REQUIRED,
        quantization_encoding=REQUIRED,
        devices=None,
        linear_cls=CLASS,
        scale=None,
        has_bias=False,
        clip_qkv=None,
    ),
    "GPTQAttentionWithRope": dict(
        quantization_config=REQUIRED, **ROPE, **FLOAT, scale=None
    ),
    "TensorParallelAttentionWithRope": WHOLE,
    "AttentionImpl": dict.fromkeys(
        ("n_heads", "kv_params", "wqkv", "wo", "scale"), REQUIRED
    ),
    "AttentionImplQKV": dict.fromkeys(
        ("n_heads", "kv_params", "wq", "wk", "wv", "wo", "scale"), REQUIRED
    ),
}
MEMBERS = {
    "AttentionWithRope": (
        "qkv_input_scale",
        "qkv_weight_scale",
        "qkv_weight_scale_2",
        "shard",
        "sharding_strategy",
        "wqkv",
        "wqkv_bias",
    ),
    "GGUFQAttentionWithRope": ("wqkv", "wqkv_bias"),
    "GPTQAttentionWithRope": ("wqkv",),
    "AttentionImpl": ("wqkv", "wo"),
    "AttentionImplQKV": ("wq", "wk", "wv", "wo"),
}
# How weights are drawn, or brought; and what MAX's layers do not have.
OURS = {"rngs", "weights", "use_sinks", "dropout_rate"}
POSITIONAL = {"GPTQAttentionWithRope": 7, "AttentionImpl": 5, "AttentionImplQKV": 7}
# dtype can only be uint8; sizes follow from weights, if these are given.
LENIENT = {"GGUFQAttentionWithRope": {"hidden_size", "dtype", "quantization_encoding"}}


def named(name):
    return getattr(max_names if hasattr(max_names, name) else raptax, name)


def parameters_of(name):
    parameters = dict(inspect.signature(named(name).__init__).parameters)
    del parameters["self"]
    return parameters


@pytest.mark.parametrize("name", PAGES)
def test_constructor_takes_what_the_page_lists(name):
    documented = PAGES[name]
    parameters = parameters_of(name)
    assert set(parameters) - OURS == set(documented)
    for parameter, default in documented.items():
        ours = parameters[parameter].default
        if default is REQUIRED:
            lenient = parameter in LENIENT.get(name, ())
            assert (ours is inspect.Parameter.empty) != lenient, parameter
        elif default is CLASS:
            assert callable(ours), parameter
        else:
            assert ours == default, parameter
            assert type(ours) is type(default), parameter
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(documented)[: POSITIONAL.get(name, 0)]


@pytest.mark.parametrize("name", MEMBERS)
def test_members_of_the_page(name):
    for member in MEMBERS[name]:
        assert member in vars(named(name)), member
        assert inspect.getdoc(getattr(named(name), member)), member


def test_linear_cls_of_the_float_classes_is_linear():
    for name in PAGES:
        parameters = parameters_of(name)
        if "linear_cls" in parameters and not name.startswith("G"):
            assert parameters["linear_cls"].default is Linear


def test_interfaces_and_their_variants():
    for base, suffix in (("AttentionImpl", ""), ("AttentionImplQKV", "QKV")):
        interface = getattr(interfaces, base)
        assert issubclass(interface, abc.ABC)
        assert inspect.isabstract(interface)
        for variant in ("WithRope", "WithAlibi"):
            made = getattr(interfaces, f"Attention{variant}{suffix}")
            assert issubclass(made, interface)
            assert not inspect.isabstract(made)
        made = getattr(interfaces, f"VanillaAttentionWithCausalMask{suffix}")
        assert issubclass(made, interface)
        call = list(inspect.signature(made.__call__).parameters)
        assert call == ["self", "x", "kv_collection", "valid_lengths", "kwargs"]
    assert inspect.isabstract(interfaces.DistributedAttentionImpl)
    assert issubclass(raptax.DistributedAttention, interfaces.DistributedAttentionImpl)


def test_cache_params_have_the_documented_fields():
    documented = dict(
        dtype=REQUIRED,
        n_kv_heads=REQUIRED,
        head_dim=REQUIRED,
        devices=None,
        enable_prefix_caching=False,
        enable_kvcache_swapping_to_host=False,
        host_kvcache_swap_space_gb=None,
        cache_strategy=KVCacheStrategy.PAGED,
        page_size=128,
        is_mla=False,
        data_parallel_degree=1,
    )
    ours = inspect.signature(KVCacheParams).parameters
    for name, default in documented.items():
        expected = inspect.Parameter.empty if default is REQUIRED else default
        assert ours[name].default == expected, name
    assert ours["num_layers"].default == 1  # required there; ours knows of one layer
