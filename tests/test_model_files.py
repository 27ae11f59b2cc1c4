"""What a file says is used, known to change nothing, or refused by name."""

import numpy as np
import pytest
import tiny
from test_models import decoder_of, whole_pass

ONE_LAYER = tiny.Sizes(layers=1)


def vector(size):
    return np.full(size, 0.5, np.float32)


# Tensors and fields that llama.cpp or a converter may write for this architecture or a
# neighbour of it. Every one changes what a model computes, and none is implemented.
TENSORS = {
    "blk.0.attn_q_norm.weight": vector(16),
    "blk.0.attn_k_norm.weight": vector(16),
    "blk.0.attn_sinks.weight": vector(4),
    "blk.0.post_attention_norm.weight": vector(64),
    "blk.0.post_ffw_norm.weight": vector(64),
    "blk.0.attn_qkv.weight": np.ones((128, 64), np.float32),
    "blk.0.ffn_gate_inp.weight": np.ones((4, 64), np.float32),
    "blk.0.attn_q.scale": vector(1),
    "blk.0.attn_output.input_scale": vector(1),
    "blk.0.attn_norm.bias": vector(64),
    "blk.0.ffn_norm.bias": vector(64),
    "output_norm.bias": vector(64),
    "token_embd.bias": vector(len(tiny.TOKENS)),
    "token_embd_norm.weight": vector(64),
    "token_embd_norm.bias": vector(64),
    "position_embd.weight": np.ones((256, 64), np.float32),
    "rope_factors_long.weight": vector(8),
    "rope_factors_short.weight": vector(8),
    "mm.0.weight": np.ones((64, 64), np.float32),
}
FIELDS = {
    "attention.temperature_length": 8192,
    "attention.temperature_scale": 0.1,
    "attention.gate": True,
    "attention.scale": 0.5,
    "attention.causal": False,
    "attention.clamp_kqv": 8.0,
    "attention.max_alibi_bias": 8.0,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "nextn_predict_layers": 1,
    "pooling_type": 1,
    "expert_count": 8,
    "expert_used_count": 2,
    "logit_scale": 0.25,
    "residual_scale": 0.25,
    "embedding_scale": 12.0,
    "rope.scaling.attn_factor": 0.5,
    "rope.scaling.yarn_attn_factor": 0.5,
    "rope.scaling.yarn_ext_factor": 1.0,  # with linear scaling
    "rope.scaling.yarn_log_multiplier": 0.1,
    "rope.scaling.alpha": 1000.0,
    "tensor_data_layout": "reference",
    "never_heard_of": "x",
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_not_used_is_named(tmp_path, name):
    path = tmp_path / "tiny.gguf"
    tiny.write(path, ONE_LAYER, tensors={name: TENSORS[name]})
    with pytest.raises(ValueError, match=f"^{path}: it has 1 tensors .*'{name}'"):
        decoder_of(path)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_not_used_is_named(tmp_path, name):
    path = tmp_path / "tiny.gguf"
    tiny.write(path, ONE_LAYER, fields={f"llama.{name}": FIELDS[name]})
    with pytest.raises(ValueError, match=f"^{path}: llama.{name}={FIELDS[name]!r}"):
        decoder_of(path)


NOTHING = {
    "llama.vocab_size": len(tiny.TOKENS),
    "llama.expert_count": 0,
    "llama.expert_used_count": 0,
    "llama.attention.causal": True,
    "llama.attention.clamp_kqv": 0.0,
    "llama.rope.scaling.finetuned": True,
    "llama.rope.scaling.attn_factor": 1.0,
    "llama.rope.scaling.yarn_attn_factor": 1.0,
    "llama.rope.scaling.yarn_ext_factor": 0.0,
    "llama.tensor_data_layout": "Meta AI original pth",
    "general.sampling.temp": 0.7,
    "quantize.imatrix.file": "x",
}


def test_fields_that_change_nothing(tmp_path):
    plain = tiny.write(tmp_path / "plain.gguf", ONE_LAYER)
    told = tiny.write(tmp_path / "told.gguf", ONE_LAYER, fields=NOTHING)
    got, want = (whole_pass(decoder_of(path)) for path in (told, plain))
    np.testing.assert_array_equal(got, want)


def test_an_older_name_of_the_scaling(tmp_path):
    names = ("llama.rope.scaling.factor", "llama.rope.scale_linear")
    one, other = (
        tiny.write(tmp_path / f"{n}.gguf", ONE_LAYER, fields={name: 4.0})
        for n, name in enumerate(names)
    )
    np.testing.assert_array_equal(*(whole_pass(decoder_of(p)) for p in (one, other)))


def stored_as(path, name, number):
    """Rewrites a tensor's encoding in the table of a file."""
    data = bytearray(path.read_bytes())
    at = data.index(b"".join((len(name).to_bytes(8, "little"), name.encode())))
    axes = at + 8 + len(name)
    at = axes + 4 + 8 * int.from_bytes(data[axes : axes + 4], "little")
    data[at : at + 4] = number.to_bytes(4, "little")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "name", ["token_embd.weight", "blk.0.attn_k.weight", "blk.0.attn_norm.weight"]
)
def test_a_tensor_that_is_used_and_cannot_be_read_is_named(tmp_path, name):
    path = stored_as(tiny.write(tmp_path / "tiny.gguf", ONE_LAYER), name, 26)
    with pytest.raises(ValueError, match=f"^{path}: {name} is stored as I32, which"):
        decoder_of(path)


def test_a_bias_that_cannot_be_read_is_not_taken_for_none(tmp_path):
    path = tiny.write(tmp_path / "tiny.gguf", ONE_LAYER, biases=True)
    path = stored_as(path, "blk.0.attn_k.bias", 26)
    with pytest.raises(ValueError, match=r"blk.0.attn_k.bias is stored as I32"):
        decoder_of(path)


BROKEN = {
    "blk.0.attn_norm.weight": (np.full(64, np.nan, np.float32), "not finite"),
    "blk.0.attn_k.bias": (np.full(32, np.inf, np.float32), "not finite"),
    "rope_freqs.weight": (np.zeros(8, np.float32), "divisors above 0; it has 0.0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_numbers_that_cannot_be(tmp_path, name):
    numbers, sentence = BROKEN[name]
    path = tiny.write(tmp_path / "tiny.gguf", ONE_LAYER, tensors={name: numbers})
    with pytest.raises(ValueError, match=f"^{path}: {name} .*{sentence}"):
        decoder_of(path)


def test_a_part_of_a_split_model_says_how_to_join(tmp_path):
    path = tiny.write(tmp_path / "tiny.gguf", ONE_LAYER, fields={"split.count": 3})
    with pytest.raises(ValueError, match=r"one of 3 parts .*llama-gguf-split --merge"):
        decoder_of(path)
