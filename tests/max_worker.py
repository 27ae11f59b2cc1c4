"""Attention on four devices, or in two processes, against one: run by test_max_parallel.

python -m tests.max_worker matrix NAME ...
python -m tests.max_worker process NUMBER PORT
"""

# ruff: noqa: E402  JAX is told of its devices before anything is made

import sys

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
MATRIX = sys.argv[1] == "matrix"
jax.config.update("jax_num_cpu_devices", 4 if MATRIX else 1)
if not MATRIX:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", 2, int(sys.argv[2]))

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from raptax import (
    AttentionWithRope,
    DistributedAttention,
    KVCacheParams,
    PagedKVCache,
    QuantizationConfig,
    RotaryEmbedding,
)
from raptax.compat.max import (
    DataParallelAttentionWithRope,
    GGUFQAttentionWithRope,
    GPTQAttentionWithRope,
    TensorParallelAttentionWithRope,
)
from raptax.nn.sharding.placement import make_mesh
from raptax.quant.float8 import (
    Float8Config,
    Float8InputScaleSpec,
    Float8WeightScaleSpec,
)

H, K, D, C = 6, 3, 16, 64
KV = KVCacheParams(dtype=jnp.float32, n_kv_heads=K, head_dim=D, page_size=4)
COMMON = dict(
    rope=RotaryEmbedding.create(D),
    num_attention_heads=H,
    num_key_value_heads=K,
    hidden_size=C,
    kv_params=KV,
)


def float8(inputs, weights, **options):
    return dict(
        float8_config=Float8Config(
            Float8InputScaleSpec(**inputs), Float8WeightScaleSpec(**weights), **options
        )
    )


TENSOR, ROWWISE = dict(granularity="tensor"), dict(granularity="rowwise")
STATIC = dict(granularity="tensor", origin="static")
TOKEN = dict(granularity="colwise", origin="dynamic")
BLOCK = dict(granularity="block", origin="dynamic", block_size=(1, 16))
NVFP4 = dict(granularity="block", block_size=(1, 16))
FORMATS = {
    "float": {},
    "static": float8(STATIC, TENSOR),
    "static rows": float8(STATIC, ROWWISE),
    "token": float8(TOKEN, TENSOR),
    "token rows": float8(TOKEN, ROWWISE),
    "dynamic": float8(TENSOR | dict(origin="dynamic"), TENSOR),
    "block": float8(BLOCK, dict(granularity="block", block_size=(32, 16))),
    "nvfp4": float8(
        NVFP4 | dict(origin="static"),
        NVFP4 | dict(dtype=jnp.float8_e4m3fn),
        quant_method="modelopt",
        quant_algo="NVFP4",
    ),
}
OPTIONS = {
    "separate": {},
    "stacked": dict(stacked_qkv=True),
    "bias": dict(has_bias=True),
    "clip": dict(clip_qkv=0.4),
    "norms": dict(use_qk_norm=True),
    "all": dict(stacked_qkv=True, has_bias=True, clip_qkv=0.4, use_qk_norm=True),
    "separate all": dict(has_bias=True, clip_qkv=0.4, use_qk_norm=True),
}
PACKED = {  # formats whose classes have options of their own
    "gguf": lambda: gguf("Q8_0"),
    "gguf bias clip": lambda: gguf("Q4_1", has_bias=True, clip_qkv=0.4),
    "gptq": lambda: gptq(4, 16),
    "gptq 8 whole": lambda: gptq(8, -1, sym=True),
    "gptq 2 act": lambda: gptq(2, 32, desc_act=True),
}


def gguf(encoding, **options):
    """Random codes between scales that are small floats."""
    # Four kv heads: an output projection of 4 * 2 * 16 inputs is whole blocks.
    sizes = dict(num_attention_heads=8, num_key_value_heads=4)
    kv = KVCacheParams(dtype=jnp.float32, n_kv_heads=4, head_dim=D, page_size=4)
    layer = GGUFQAttentionWithRope(
        **COMMON | sizes | dict(kv_params=kv), quantization_encoding=encoding, **options
    )
    rng = np.random.default_rng(0)
    for projection in (layer.qkv.q, layer.qkv.k, layer.qkv.v, layer.out):
        shape = projection.blocks.shape
        blocks = rng.integers(0, 256, shape, np.uint8)
        halves = 1 if encoding == "Q8_0" else 2
        scales = rng.uniform(0.001, 0.002, (*shape[:2], halves)).astype(np.float16)
        blocks[..., : 2 * halves] = scales.view(np.uint8)
        projection.blocks[...] = jnp.asarray(blocks)
    return layer


def gptq(bits, group, **options):
    """Random codes, and with desc_act groups in another order for every projection."""
    config = QuantizationConfig("gptq", bits, group, **options)
    layer = GPTQAttentionWithRope(config, *COMMON.values())
    rng = np.random.default_rng(1)
    for projection in (layer.qkv.q, layer.qkv.k, layer.qkv.v, layer.out):
        if config.desc_act:
            shuffled = rng.permutation(np.asarray(projection.g_idx[...]))
            projection.g_idx[...] = jnp.asarray(shuffled)
    return layer


def build(name):
    if name in PACKED:
        return PACKED[name]()
    kind, option = name.split(":")
    layer = AttentionWithRope(**COMMON, **FORMATS[kind], **OPTIONS[option])
    rng = np.random.default_rng(2)
    for module in [m for _, m in nnx.iter_modules(layer)]:
        for leaf in ("bias", "input_scale"):
            if getattr(module, leaf, None) is not None and leaf == "bias":
                shape = module.bias.shape
                module.bias[...] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return layer


def empty(kv_heads, replicas=1):
    """A cache of four sequences of up to 12 tokens, ids counted in each replica."""
    params = KVCacheParams(
        dtype=jnp.float32, n_kv_heads=kv_heads, head_dim=D, page_size=4
    )
    cache = PagedKVCache.create(params, pages=16, sequences=4, max_pages=3)
    local = 4 // replicas
    pages = np.random.default_rng(3).permutation(16 // replicas)[: 3 * local]
    tables = pages.reshape(local, 3).tolist() * replicas
    return dataclass_replace(cache, tables)


def dataclass_replace(cache, tables):
    table = jnp.asarray(tables, jnp.int32)
    return PagedKVCache(cache.k_pages, cache.v_pages, table, cache.lengths)


CALLS = ([3, 1, 2, 4], [1, 1, 4, 1], [1, 1, 1, 1])  # prefill, mixed, decode


def rows_of(call, replicas):
    """Padded rows of each replica, its offsets, and the places of the real rows."""
    share = 4 // replicas
    counts = np.asarray(CALLS[call]).reshape(replicas, share)
    longest = counts.sum(1).max()
    offsets = np.concatenate([np.zeros((replicas, 1), int), counts.cumsum(1)], axis=1)
    places = [r * longest + i for r in range(replicas) for i in range(counts[r].sum())]
    x = np.random.default_rng(10 + call).normal(size=(counts.sum(), C))
    out = np.zeros((replicas * longest, C), np.float32)
    out[places] = x
    return out, offsets.reshape(-1).astype(np.int32), places


@jax.jit
def serve(layer, cache, inputs):
    outs = []
    for x, offsets in inputs:
        y, cache = layer(x, cache, row_offsets=offsets)
        new = offsets.reshape(-1, offsets.shape[0] // replicas_of(layer))
        new = (new[:, 1:] - new[:, :-1]).reshape(-1)
        cache = PagedKVCache(
            cache.k_pages, cache.v_pages, cache.table, cache.lengths + new
        )
        outs.append(y)
    return outs


def replicas_of(layer):
    return layer.mesh.shape["data"] if isinstance(layer, DistributedAttention) else 1


def outputs(layer, whole):
    """The real rows of three calls; ``whole`` brings an array to this process."""
    replicas = replicas_of(layer)
    if isinstance(layer, DistributedAttention):
        cache = layer.shard_cache(empty(layer.kv_heads, replicas))
    else:
        cache = empty(layer.qkv.widths[1] // D)
    inputs = [rows_of(call, replicas) for call in range(len(CALLS))]
    outs = serve(layer, cache, [(x, offsets) for x, offsets, _ in inputs])
    return [
        np.asarray(whole(y))[places]
        for y, (*_, places) in zip(outs, inputs, strict=True)
    ]


MESHES = {"TP 2": (2, 1), "TP 3": (3, 1), "TP 4": (4, 1), "DP 2": (2, 2), "2x2": (4, 2)}


def matrix(names):
    """Prints one line for each format on each mesh, and fails on a difference."""
    worst = 0.0
    for name in names:
        layer = build(name)
        expected = outputs(layer, np.asarray)
        size = max(np.abs(y).max() for y in expected)
        for label, (devices, replicas) in MESHES.items():
            if name.startswith("dynamic") and replicas > 1:
                continue  # one scale for the rows of a replica: each has its own
            mesh = make_mesh(jax.devices()[:devices], replicas)
            got = outputs(DistributedAttention(layer, mesh), np.asarray)
            error = max(np.abs(a - b).max() for a, b in zip(got, expected, strict=True))
            print(f"{name:24} {label:5} {error:.1e} of {size:.1f}", flush=True)
            worst = max(worst, error / max(1.0, size))
    assert worst < 2e-5, worst


def process():
    """Layers over two processes: what each one computes is what one alone does."""
    assert (jax.process_count(), len(jax.devices())) == (2, 2)
    whole = lambda y: multihost_utils.process_allgather(y, tiled=True)
    expected = outputs(AttentionWithRope(**COMMON), np.asarray)
    for kind in (TensorParallelAttentionWithRope, DataParallelAttentionWithRope):
        for y, want in zip(outputs(kind(**COMMON), whole), expected, strict=True):
            np.testing.assert_allclose(y, want, rtol=0, atol=2e-5)
    print("agree")


if __name__ == "__main__":
    matrix(sys.argv[2:]) if MATRIX else process()
