"""Every field of a file with values of every type: one error, the file and the field."""

import itertools
import math
import random
import tracemalloc

import numpy as np
import pytest
import tiny
from gguf import GGUFValueType as Type

from raptax.models import load

ONE_LAYER = tiny.Sizes(layers=1)
LIMIT = 20_000_000  # bytes that a load may take beyond the file, of 0.3 MB

# What each field may be; a field may also be out of range.
KINDS = {
    "whole": """
        llama.context_length llama.embedding_length llama.block_count
        llama.feed_forward_length llama.attention.head_count
        llama.attention.head_count_kv llama.attention.key_length
        llama.attention.value_length llama.attention.sliding_window
        llama.rope.dimension_count llama.rope.scaling.original_context_length
        llama.expert_count llama.pooling_type split.count
        tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id
        tokenizer.ggml.eot_token_id tokenizer.ggml.padding_token_id
        tokenizer.ggml.unknown_token_id tokenizer.ggml.fim_pad_token_id
    """,
    "number": """
        llama.attention.layer_norm_rms_epsilon llama.rope.freq_base
        llama.rope.scaling.factor llama.rope.scale_linear
        llama.rope.scaling.yarn_beta_fast llama.rope.scaling.yarn_beta_slow
        llama.rope.scaling.attn_factor
    """,
    "flag": """
        llama.attention.causal tokenizer.ggml.add_bos_token
        tokenizer.ggml.add_eos_token tokenizer.ggml.add_space_prefix
        tokenizer.ggml.add_sep_token
    """,
    "text": """
        general.architecture general.name llama.rope.scaling.type
        tokenizer.ggml.model tokenizer.ggml.pre tokenizer.chat_template
    """,
    "texts": "tokenizer.ggml.tokens tokenizer.ggml.merges",
    "whole list": "tokenizer.ggml.token_type",
    "number list": "tokenizer.ggml.scores",
}
FIELDS = [(name, kind) for kind, names in KINDS.items() for name in names.split()]

WHOLE = {
    Type.UINT8: (0,),
    Type.INT8: (-1,),
    Type.UINT16: (2**16 - 1,),
    Type.INT16: (-(2**15),),
    Type.UINT32: (7, 2**32 - 1),
    Type.INT32: (-(2**31),),
    Type.UINT64: (2**64 - 1,),
    Type.INT64: (2**31,),
}
FLOATS = {
    Type.FLOAT32: (1.5, math.nan),
    Type.FLOAT64: (1e300, -math.inf),
}
SCALARS = {
    "whole": WHOLE,
    "number": FLOATS,
    "flag": {Type.BOOL: (True, False)},
    "text": {Type.STRING: ("", "\N{SNOWMAN}\0")},
}
FITS = {
    "whole": {"whole"},
    "number": {"whole", "number"},
    "flag": {"flag"},
    "text": {"text"},
    "texts": {"text list"},
    "whole list": {"whole list"},
    "number list": {"whole list", "number list"},
}


def values():
    """Pairs of a kind and a value: every GGUF type and arrays of every type."""
    for kind, types in SCALARS.items():
        for type, numbers in types.items():
            for value in numbers:
                yield kind, tiny.Typed(value, type)
            yield f"{kind} list", tiny.Typed([numbers[0]] * 300, Type.ARRAY, type)


# A vocabulary of the other kind, for the fields that only it has.
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"ab\u2581"]
PIECES += [f"<pad{n}>" for n in range(len(tiny.TOKENS) - len(PIECES))]
SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259),
    "tokenizer.ggml.scores": [0.0] * len(PIECES),
    "tokenizer.ggml.merges": None,
    "tokenizer.ggml.bos_token_id": 1,
}


def complaint(path) -> str | None:
    """What loading says, or None; nothing but a ValueError that names the file."""
    said = None
    try:
        load(path)
    except ValueError as error:
        said = str(error)
    assert said is None or said.startswith(f"{path}")
    return said


@pytest.fixture
def frugal():
    """Fails if more is allocated than a file of 0.3 MB may ask for."""
    tracemalloc.start()
    yield
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < LIMIT


@pytest.mark.parametrize(("name", "kind"), FIELDS)
def test_a_field_of_another_type_is_told(tmp_path, name, kind, unchecked):
    spm = name in ("tokenizer.ggml.scores", "tokenizer.ggml.add_space_prefix")
    path, told = tmp_path / "tiny.gguf", 0
    for given, value in values():
        fields = (SENTENCEPIECE if spm else {}) | {name: value}
        if name == "general.architecture":
            fields = {name: value}
        tiny.write(path, ONE_LAYER, fields=fields)
        said = complaint(path)
        if given not in FITS[kind]:
            assert said is not None, (name, value)
            assert name in said
            told += 1
        assert said is None or len(said) < 1200
    assert told > 10


def test_files_of_both_vocabularies_load(tmp_path):
    """So that the refusals above are about the field that was changed."""
    for fields in ({}, SENTENCEPIECE):
        path = tiny.write(tmp_path / "tiny.gguf", ONE_LAYER, fields=fields)
        assert complaint(path) is None


COUNTS = [
    name
    for name in KINDS["whole"].split()
    if name.startswith("llama.") and name not in ("llama.pooling_type",)
]
HUGE = (0, 2**16, 2**20, 2**24 + 1, 2**32 - 1, 2**64 - 1)


@pytest.mark.parametrize("name", COUNTS)
def test_a_size_costs_nothing_before_it_is_believed(tmp_path, name, frugal):
    path = tmp_path / "tiny.gguf"
    for size in HUGE:
        tiny.write(path, ONE_LAYER, fields={name: tiny.Typed(size, Type.UINT64)})
        said = complaint(path)
        rest = name.removeprefix("llama.")
        harmless = ("length" in rest and "context" in rest) or "window" in rest
        if not (harmless and 0 < size < 2**31) and (rest, size) != ("expert_count", 0):
            assert said is not None
            assert rest in said or "blk.0." in said or "token_embd" in said


@pytest.mark.parametrize("value", [0.0, -1e-5, 0.5, 1.5, 2**32 - 1, math.nan, math.inf])
def test_an_epsilon_that_cannot_be(tmp_path, value):
    name = "llama.attention.layer_norm_rms_epsilon"
    path = tiny.write(tmp_path / "tiny.gguf", ONE_LAYER, fields={name: value})
    assert "rms_epsilon=" in complaint(path)


def test_layers_that_are_numbered_far_apart(tmp_path):
    names = {f"blk.{2**40}.attn_q.weight": np.ones((64, 64), np.float32)}
    fields = {"llama.block_count": 2}
    path = tiny.write(tmp_path / "a.gguf", ONE_LAYER, fields=fields, tensors=names)
    assert "lacks the tensor 'blk.1.attn_q.weight'" in complaint(path)


@pytest.mark.filterwarnings("ignore:tokenizer.ggml")
def test_damage_anywhere_in_the_metadata(tmp_path, frugal):
    """Bytes of fields and of the tensor table, changed at random with a seed."""
    path = tiny.write(tmp_path / "tiny.gguf", ONE_LAYER)
    good, rng, said = path.read_bytes(), random.Random(0), []
    end = good.index(b"output_norm.weight")
    starts = [good.index(name.encode()) for name, _ in FIELDS if name.encode() in good]
    for start in itertools.chain(starts * 2, rng.sample(range(end), 100)):
        data = bytearray(good)
        for _ in range(rng.choice((1, 2, 8))):
            data[min(start + rng.randrange(64), end)] = rng.randrange(256)
        path.unlink()  # it may still be mapped
        path.write_bytes(data)
        said.append(complaint(path))
    assert 3 < said.count(None) < len(said) - 50
