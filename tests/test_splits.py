"""Pre-tokenizers by name, and files of before their names were written down."""

import pytest
import tokenizers
from test_tokenizer import byte_level, sentencepiece
from tokenizers import pre_tokenizers

from raptax.models.splits import SPLITS
from raptax.models.tokenizer import Tokenizer

# By hand, from the patterns in llama.cpp's src/llama-vocab.cpp; | stands between words.
TEXT = "Hello camelCase HTTPServer/\n\n  it's 2024! \u65e5\u672c x, (ok)  "
WORDS = {
    "tekken": "Hello| camel|Case| HTTPServer|/\n\n| | it|'s| |2|0|2|4|!| \u65e5\u672c|"
    " x|,| (|ok|)|  ",
    "viking": "Hello| camelCase| HTTPServer/|\n\n | it's| |2|0|2|4|!| \u65e5\u672c| x|"
    ", (|ok|)  ",
    "deepseek-llm": "Hello| camelCase| HTTPServer|/|\n|\n| | it|'|s| |2024|!| |"
    "\u65e5\u672c| x|,| (|ok|)|  ",
    "deepseek-coder": "Hello| camelCase| HTTPServer|/|\n|\n| | it|'|s| |2|0|2|4|!| |"
    "\u65e5\u672c| x|,| (|ok|)|  ",
    "chameleon": "Hello| camelCase| HTTPServer|/|\n|\n|  |it|'|s| |2|0|2|4|!|"
    " \u65e5\u672c| x|,| |(|ok|)|  ",
    "mellum": "Hello| camelCase| HTTPServer|/|\n\n | it|'s| 2024|!| \u65e5\u672c| x|,"
    "| (|ok|)|  ",
}


@pytest.mark.parametrize("name", WORDS)
def test_words(name):
    cuts = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for pattern in SPLITS[name]
    ]
    words = pre_tokenizers.Sequence(cuts).pre_tokenize_str(TEXT)
    assert "|".join(word for word, _ in words) == WORDS[name]


@pytest.mark.parametrize("name", SPLITS)
def test_every_name_makes_a_tokenizer(name):
    tokenizer = Tokenizer.from_gguf(byte_level(pre=name))
    assert tokenizer.decode(tokenizer.encode("ab Zab", add_bos=False)) == "ab Zab"


def test_tekken_begins_with_bos_and_takes_known_words_whole():
    tokenizer = Tokenizer.from_gguf(byte_level(pre="tekken", merges=[]))
    assert tokenizer.encode("ab") == [56, 55]
    tokenizer = Tokenizer.from_gguf(byte_level(pre="chameleon", merges=[]))
    assert tokenizer.encode("ab") == [56, 0, 1]


def without(fields, *names):
    return {k: v for k, v in fields.items() if k.rpartition(".")[2] not in names}


def test_a_file_without_pre_takes_the_default():
    with pytest.warns(UserWarning, match=r"tokenizer.ggml.pre is missing; .*'default'"):
        tokenizer = Tokenizer.from_gguf(without(byte_level(), "pre"))
    want = Tokenizer.from_gguf(byte_level(pre="default"))
    assert tokenizer.encode("cab ab") == want.encode("cab ab")


def test_a_file_without_token_types_knows_those_that_it_names():
    tokens = [
        *byte_level()["tokenizer.ggml.tokens"][:56],
        "<bos>",
        "<end>",
        "<|im_end|>",
    ]
    fields = byte_level(tokens=tokens, merges=[], token_type=[1] * 56 + [3] * 3)
    with pytest.warns(UserWarning, match="token_type is missing; .* guessed"):
        tokenizer = Tokenizer.from_gguf(without(fields, "token_type"))
    text = "ab<bos>c<end><|im_end|>"
    assert tokenizer.encode(text) == [0, 1, 56, 2, 57, 58]
    assert tokenizer.encode(text) == Tokenizer.from_gguf(fields).encode(text)
    fields = sentencepiece([*"ab\u2581"], bos_token_id=1, eos_token_id=2)
    with pytest.warns(UserWarning, match="token_type is missing"):
        tokenizer = Tokenizer.from_gguf(without(fields, "token_type"))
    assert tokenizer.encode("a\u00e9</s>") == Tokenizer.from_gguf(fields).encode(
        "a\u00e9</s>"
    )
    assert tokenizer.decode(tokenizer.encode("a\u00e9", add_bos=False)) == "a\u00e9"
