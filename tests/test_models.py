"""Decoders from GGUF files against a numpy model, and against themselves in pieces."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from raptax.io.gguf import GGUFFile
from raptax.kv_cache import PageAllocator, PagedKVCache
from raptax.models import DecoderConfig, load
from raptax.models.decoder import LayerStack
from raptax.models.families import config_from_gguf, decoder_from_gguf
from raptax.nn.linear import CodesLinear, GGUFLinear, Linear

FORMS = {"blocks": GGUFLinear, "codes": CodesLinear, "float32": Linear}
LENGTH = 41
TOKENS = np.random.default_rng(1).integers(0, len(tiny.TOKENS), LENGTH)


def decoder_of(path, weights="codes"):
    return decoder_from_gguf(GGUFFile(path), weights)


@functools.partial(jax.jit, static_argnums=0)  # models of one structure compile once
def run(graph, state, *args, **options):
    return nnx.merge(graph, state)(*args, **options)


def whole_pass(decoder, tokens=TOKENS):
    tokens = np.atleast_2d(tokens)
    logits, cache = run(*nnx.split(decoder), jnp.asarray(tokens, jnp.int32))
    assert (cache, logits.dtype) == (None, jnp.float32)
    return np.asarray(logits.squeeze(0) if len(tokens) == 1 else logits)


def assert_near(got, want, tolerance):
    """Errors are in units of the largest logit, some 10 to 40."""
    assert got.shape == want.shape
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < tolerance, f"{error:.1e}"


# One pass, against numpy in float64

YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 64,
}
LINEAR = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
DIVISORS = {"rope_freqs.weight": np.geomspace(1, 8, 8, dtype=np.float32)}
K_QUANTS = {
    "": "Q8_0",
    "blk.0": "Q4_K",
    "blk.1": "Q6_K",
    "blk.2.ffn": "Q4_K",
    "embd": "Q6_K",
}
MODELS = {
    "float32": dict(),
    "float16": dict(encodings="F16"),
    "bfloat16": dict(encodings="BF16"),
    "4 bits": dict(encodings="Q4_0"),
    "8 bits": dict(encodings="Q8_0"),
    "mixed K-quants": dict(sizes=tiny.WIDE, encodings=K_QUANTS),
    "8 bits, one layer plain": dict(encodings={"": "Q8_0", "blk.1.attn_k": "F16"}),
    "tied": dict(head=False, encodings="Q8_0"),
    "biases": dict(biases=True, encodings="Q8_0"),
    "bias in one layer": dict(tensors={"blk.1.attn_q.bias": np.ones(64, np.float32)}),
    "linear": dict(fields=LINEAR),
    "linear by its factor": dict(fields={"llama.rope.scaling.factor": 4.0}),
    "yarn": dict(fields=YARN),
    "rope_freqs": dict(tensors=DIVISORS),
    "rope_freqs and yarn": dict(fields=YARN, tensors=DIVISORS),
    "other base": dict(fields={"llama.rope.freq_base": 500000.0}),
    "window": dict(fields={"llama.attention.sliding_window": 7}),
    "one kv head each": dict(sizes=tiny.Sizes(kv_heads=4)),
    "one kv head for all": dict(sizes=tiny.Sizes(kv_heads=1, layers=1)),
    "heads wider than the model": dict(sizes=tiny.Sizes(head=32)),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_logits_are_those_of_numpy(tmp_path, model):
    path = tiny.write(tmp_path / "tiny.gguf", **model)
    assert_near(whole_pass(decoder_of(path)), tiny.logits(path, TOKENS), 1e-5)


CHANGES = ["linear", "yarn", "rope_freqs", "window", "biases", "other base", "tied"]


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_file_changes_shows_in_its_logits(tmp_path, name):
    """Else the test above would pass by leaving it out on both sides."""
    plain = MODELS[name] | dict(fields=None, tensors=None, biases=False, head=True)
    one, other = (
        tiny.logits(tiny.write(tmp_path / f"{n}.gguf", **model), TOKENS)
        for n, model in enumerate((plain, MODELS[name]))
    )
    assert np.abs(one - other).max() > 0.1 * np.abs(one).max()


def test_a_batch_is_its_sequences(tmp_path):
    path = tiny.write(tmp_path / "tiny.gguf")
    decoder = decoder_of(path)
    tokens = np.stack([TOKENS, TOKENS[::-1]])
    for row, own in zip(tokens, whole_pass(decoder, tokens), strict=True):
        assert_near(own, tiny.logits(path, row), 1e-5)


# How weights lie in memory


@pytest.mark.slow
@pytest.mark.parametrize("name", ["4 bits", "biases", "mixed K-quants"])
def test_every_form_of_weights_is_the_same_model(tmp_path, name):
    path = tiny.write(tmp_path / "tiny.gguf", **MODELS[name])
    decoders = {form: decoder_of(path, form) for form in FORMS}
    for form, decoder in decoders.items():
        for stack in decoder.stacks:
            assert isinstance(stack.layer.attention.qkv.q, FORMS[form])
            assert isinstance(stack.layer.mlp.down, FORMS[form])
        assert isinstance(decoder.embed, FORMS[form])
    want = whole_pass(decoders["float32"])
    for form in ("blocks", "codes"):
        assert_near(whole_pass(decoders[form]), want, 5e-6)


@pytest.mark.parametrize(
    ("name", "form", "stacks"),
    [
        ("mixed K-quants", "codes", [3]),  # a byte a number, whatever the file had
        ("mixed K-quants", "float32", [3]),
        ("mixed K-quants", "blocks", [1, 1, 1]),
        ("8 bits, one layer plain", "codes", [3]),
        ("8 bits, one layer plain", "blocks", [1, 1, 1]),
        ("bias in one layer", "codes", [1, 1, 1]),
        ("8 bits", "blocks", [3]),
    ],
)
def test_layers_alike_are_one_stack(tmp_path, name, form, stacks):
    path = tiny.write(tmp_path / "tiny.gguf", **MODELS[name])
    assert [stack.size for stack in decoder_of(path, form).stacks] == stacks


def test_several_stacks_are_still_the_model(tmp_path):
    path = tiny.write(tmp_path / "tiny.gguf", **MODELS["mixed K-quants"])
    decoder = decoder_of(path, "blocks")
    assert_near(whole_pass(decoder), tiny.logits(path, TOKENS), 1e-5)
    [got] = in_steps(decoder, [TOKENS], [(16,), (16,), (9,)], rows=16)
    assert_near(got, tiny.logits(path, TOKENS), 1e-5)


def test_layers_unlike_do_not_stack(tmp_path):
    path = tiny.write(tmp_path / "tiny.gguf", **MODELS["bias in one layer"])
    layers = [stack.layer for stack in decoder_of(path).stacks]
    with pytest.raises(ValueError, match="layer 1 is not built as layer 0 is"):
        LayerStack(layers)


# In pieces, through a cache


def empty_cache(decoder, lengths, page_size=8):
    """Pages are held in no order, with some that no sequence holds."""
    pages = sum(-(-length // page_size) for length in lengths) + 3
    allocator = PageAllocator(pages, page_size)
    tables = [[] for _ in lengths]
    for tokens in range(1, max(lengths) + 1):  # in turns
        for held, length in zip(tables, lengths, strict=True):
            allocator.grow(held, min(tokens, length))
    order = np.random.default_rng(2).permutation(pages).tolist()
    tables = [[order[page] for page in held] for held in tables]
    cache = PagedKVCache.create(
        decoder.config.kv_params(jnp.float32, page_size),
        pages=pages,
        sequences=len(lengths),
        max_pages=max(map(len, tables)),
    )
    return cache.with_tables(tables, [0] * len(lengths))


def in_steps(decoder, sequences, steps, rows):
    """Logits of each sequence when ``steps`` say how many rows of each come at once.

    A step takes ``rows`` rows, so that one program does for all, or for one.
    """
    graph, state = nnx.split(decoder)
    cache = empty_cache(decoder, [len(tokens) for tokens in sequences])
    done, logits = [0] * len(sequences), [[] for _ in sequences]
    for counts in steps:
        new = [t[a : a + n] for t, a, n in zip(sequences, done, counts, strict=True)]
        padded = np.full(1 if sum(counts) == 1 else rows, 5, np.int32)
        padded[: sum(counts)] = np.concatenate(new)
        offsets = np.cumsum([0, *counts])
        row_offsets = jnp.asarray(offsets, jnp.int32)
        out, cache = run(
            graph, state, jnp.asarray(padded), cache, row_offsets=row_offsets
        )
        for b, count in enumerate(counts):
            logits[b].append(out[offsets[b] : offsets[b] + count])
            done[b] += count
        assert cache.lengths.tolist() == done
    assert done == [len(tokens) for tokens in sequences]
    return [np.concatenate(parts) for parts in logits]


STEPS = {
    "chunks": [(16,), (16,), (9,)],
    "uneven chunks": [(3,), (14,), (16,), (8,)],
    "one at a time": [(16,), *[(1,)] * 25],
    "from nothing": [(1,)] * LENGTH,
}


@pytest.fixture(scope="module", params=["8 bits", "window"])
def cached(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return decoder_of(tiny.write(folder / "tiny.gguf", **MODELS[request.param]))


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_pieces_are_the_one_pass(cached, steps):
    [got] = in_steps(cached, [TOKENS], steps, rows=16)
    assert_near(got, whole_pass(cached), 5e-6)


def test_a_ragged_batch_is_its_sequences(cached):
    sequences = [TOKENS, TOKENS[::-1][:33], TOKENS[3:24]]
    steps = [(7, 0, 12), (9, 13, 1), (1, 1, 1), (0, 0, 0), (15, 2, 7), (9, 17, 0)]
    found = in_steps(cached, sequences, steps, rows=26)
    for got, tokens in zip(found, sequences, strict=True):
        padded = np.pad(tokens, (0, LENGTH - len(tokens)))
        assert_near(got, whole_pass(cached, padded)[: len(tokens)], 5e-6)


def test_a_batch_with_a_cache_and_rows_of_logits(cached):
    tokens = jnp.asarray([TOKENS[:9], TOKENS[20:29]], jnp.int32)
    graph, state = nnx.split(cached)
    want = whole_pass(cached, tokens)
    got, cache = run(graph, state, tokens, empty_cache(cached, [9, 9]))
    assert cache.lengths.tolist() == [9, 9]
    assert_near(np.asarray(got), want, 5e-6)
    rows = jnp.asarray([8, 9], jnp.int32)  # the first one's last, the second's first
    empty = empty_cache(cached, [9, 9])
    got, _ = run(graph, state, tokens, empty, logit_rows=rows)
    assert_near(np.asarray(got), want.reshape(18, -1)[8:10], 5e-6)


def test_rows_need_to_know_whose_they_are(tmp_path):
    decoder = decoder_of(tiny.write(tmp_path / "tiny.gguf"))
    rows, cache = jnp.zeros(4, jnp.int32), empty_cache(decoder, [9])
    with pytest.raises(ValueError, match="with row_offsets"):
        decoder(rows, cache)
    offsets = jnp.asarray([0, 2, 4], jnp.int32)
    with pytest.raises(ValueError, match=r"one entry more than .* 1 sequences"):
        decoder(rows, cache, row_offsets=offsets)
    with pytest.raises(ValueError, match="without a cache"):
        decoder(rows, row_offsets=offsets)


# What a file says


def test_a_config_is_read_from_the_fields(tmp_path):
    fields = {"llama.attention.sliding_window": 7}
    path = tiny.write(tmp_path / "tiny.gguf", fields=fields)
    assert config_from_gguf(GGUFFile(path)) == DecoderConfig(
        vocab_size=len(tiny.TOKENS),
        hidden_size=64,
        num_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        rms_norm_eps=float(np.float32(1e-5)),
        max_position=256,
        sliding_window=7,
    )


def test_fields_that_may_be_left_out(tmp_path):
    """Without them: a kv head each, head sizes that fill the width, a base of 10000."""
    names = ("attention.head_count_kv", "attention.key_length")
    names += ("rope.dimension_count", "rope.freq_base")
    full = tiny.write(tmp_path / "full.gguf", tiny.Sizes(kv_heads=4))
    bare = tiny.write(
        tmp_path / "bare.gguf",
        tiny.Sizes(kv_heads=4),
        fields={f"llama.{name}": None for name in names},
    )
    want, got = (whole_pass(decoder_of(path)) for path in (full, bare))
    np.testing.assert_array_equal(got, want)


def field(name, value=None):
    return dict(fields={f"llama.{name}": value})


def tensor(name, shape=None):
    made = None if shape is None else np.ones(shape, np.float32)
    return dict(tensors={name: made})


BAD = {
    "architecture": (dict(architecture="gpt-neox"), "architecture 'gpt-neox'.*'llama'"),
    "experts": (field("expert_count", 4), "expert_count=4 must be 0: raptax"),
    "layers differ": (
        field("attention.head_count_kv", [2, 2, 1]),
        r"attention.head_count_kv=\[2, 2, 1\] must be a whole number in",
    ),
    "no heads": (field("attention.head_count", 0), "attention.head_count=0"),
    "no layers": (
        field("block_count", 0),
        r"block_count=0 must be a whole number in \[1, 65536\]",
    ),
    "half layers": (
        field("block_count", 2.5),
        "block_count=2.5 must be a whole number",
    ),
    "more layers": (
        field("block_count", 2),
        "block_count=2 must be the number of .* holds, 3",
    ),
    "words": (field("context_length", "long"), "context_length='long' must be a whole"),
    "widths": (
        field("feed_forward_length", [96] * 3),
        r"feed_forward_length=\[96, 96, 96\] must be",
    ),
    "values": (field("attention.value_length", 8), "value_length=8 must equal .* 16"),
    "slow rope": (
        field("rope.freq_base", 0.0),
        r"freq_base=0.0 must be a number in \[1, 1e\+12\]",
    ),
    "still rope": (field("rope.freq_base", 1.0), "theta=1.0 must be above 1"),
    "no factor": (
        field("rope.scaling.factor", 0.0),
        "factor=0.0 must be a number in",
    ),
    "unknown rope": (
        field("rope.scaling.attn_factor", 2.0),
        "llama.rope.scaling.attn_factor=2.0 must be 1.0",
    ),
    "groups": (
        field("attention.head_count_kv", 3),
        "head_count=4 must be a multiple of attention.head_count_kv=3",
    ),
    **{
        f"no {name}": (field(name), f"lacks the field 'llama.{re.escape(name)}'")
        for name in (
            "attention.head_count",
            "embedding_length",
            "block_count",
            "feed_forward_length",
            "attention.layer_norm_rms_epsilon",
            "context_length",
        )
    },
    **{
        f"no {name}": (tensor(name), f"lacks the tensor '{re.escape(name)}'")
        for name in (
            "token_embd.weight",
            "output_norm.weight",
            "blk.1.attn_norm.weight",
            "blk.2.ffn_down.weight",
        )
    },
    "q too wide": (
        tensor("blk.1.attn_q.weight", (80, 64)),
        r"blk.1.attn_q.weight must be \(64, 64\) .* it is \(80, 64\)",
    ),
    "down turned": (
        tensor("blk.0.ffn_down.weight", (96, 64)),
        r"blk.0.ffn_down.weight must be \(64, 96\)",
    ),
    "embedding": (
        tensor("token_embd.weight", (279, 32)),
        r"token_embd.weight must be \(any, 64\)",
    ),
    "head": (tensor("output.weight", (278, 64)), r"output.weight must be \(279, 64\)"),
    "norm": (tensor("output_norm.weight", (32,)), r"output_norm.weight .*\(64,\)"),
    "bias": (tensor("blk.0.attn_k.bias", (64,)), r"blk.0.attn_k.bias must be \(32,\)"),
    "scaling": (
        field("rope.scaling.type", "longrope"),
        "rope.scaling.type='longrope' is not one of 'none', 'linear', 'yarn'",
    ),
    "divisors": (
        tensor("rope_freqs.weight", (7,)),
        r"rope_freqs.weight must be \(8,\)",
    ),
    "part of it": (
        field("rope.dimension_count", 8),
        "dimension_count=8 must equal .* 16",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), BAD.values(), ids=BAD)
def test_bad_models_say_why(tmp_path, change, sentence):
    path = tiny.write(tmp_path / "tiny.gguf", **change)
    with pytest.raises(ValueError, match=rf"^{path}: .*{sentence}"):
        decoder_of(path)


def test_unknown_weights(tmp_path, unchecked):
    path = tiny.write(tmp_path / "tiny.gguf")
    with pytest.raises(
        ValueError, match="'int8' is not one of 'packed', 'blocks', 'codes'"
    ):
        decoder_of(path, "int8")


# Loading


def test_load_names_the_model_and_tells_its_progress(tmp_path):
    path = tiny.write(tmp_path / "tiny.gguf", biases=True, encodings="Q8_0")
    told = []
    model = load(path, progress=lambda *at: told.append(at))
    sizes = [tensor.raw.nbytes for tensor in GGUFFile(path).tensors.values()]
    assert told[-1] == (sum(sizes), sum(sizes))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len(told) > 10
    assert (model.name, model.tokenizer.vocab_size) == ("Tiny", len(tiny.TOKENS))
    path = tiny.write(tmp_path / "unnamed.gguf", fields={"general.name": None})
    assert load(path).name == "unnamed"


def test_no_such_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf.*published.*smollm2"):
        load(tmp_path / "none.gguf")
