"""Text to ids as llama.cpp does it, and back to the same text."""

import functools
import itertools
import json
import string
from pathlib import Path

import gguf
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raptax.models.tokenizer import Kind, Tokenizer

DATA = Path(__file__).parent / "data"


@functools.cache
def tokenizer_of(path):
    """Reading a GGUF file's metadata takes seconds, so once per file."""
    fields = gguf.GGUFReader(path).fields
    metadata = {
        key: field.contents()
        for key, field in fields.items()
        if key.startswith("tokenizer.")
    }
    return Tokenizer.from_gguf(metadata)


@pytest.fixture
def smollm2(smollm2_path):
    return tokenizer_of(smollm2_path)


@pytest.fixture
def gemma3(gemma3_path):
    return tokenizer_of(gemma3_path)


def expected(name):
    return json.loads((DATA / f"tokens_{name}.json").read_text())


@functools.cache
def known_bytes(tokenizer):
    pieces = map(tokenizer.piece, range(tokenizer.vocab_size))
    return {piece[0] for piece in pieces if len(piece) == 1}


def spelled(tokenizer, text):
    """What is left of a text when bytes without a token are left out."""
    known = known_bytes(tokenizer)
    return bytes(b for b in text.encode() if b in known).decode(errors="replace")


def streamed(tokenizer, ids, prompt=()):
    stream = tokenizer.stream(prompt)
    return [*map(stream.push, ids), stream.finish()]


# Small vocabularies, so that most of this runs without a model


def byte_level(**changes):
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*(string.ascii_letters + "ĠÃ©"), "ab", "<bos>", "<end>", "<tag>"],
        "merges": ["a b"],
        "bos_token_id": 56,
        "eos_token_id": 57,
    }
    fields["token_type"] = [Kind.NORMAL] * 56 + [3, 3, 4]
    return {f"tokenizer.ggml.{k}": v for k, v in (fields | changes).items()}


def sentencepiece(words=(), scores=None, **changes):
    whole = {"<unk>": 2, "<s>": 3, "</s>": 3, "<tag>": 4}
    tokens = [*whole, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 260 + [float(-n) for n in (scores or range(len(words)))],
        "token_type": [*whole.values()]
        + [Kind.BYTE] * 256
        + [Kind.NORMAL] * len(words),
    }
    return {f"tokenizer.ggml.{k}": v for k, v in (fields | changes).items()}


def tokens_of(tokenizer, ids):
    return [tokenizer.piece(id).decode() for id in ids]


def test_merges_control_and_user_defined_tokens():
    tokenizer = Tokenizer.from_gguf(byte_level())
    split = functools.partial(tokenizer.encode, "cab <end><tag>")
    assert tokens_of(tokenizer, split()) == ["c", "ab", " ", "<end>", "<tag>"]
    # < and > have no token here, so they are left out
    plain = split(special=False)
    assert tokens_of(tokenizer, plain) == ["c", "ab", " ", "e", "n", "d", "<tag>"]
    assert tokenizer.decode(split(), skip_special=True) == "cab <tag>"


def test_a_byte_without_a_token_keeps_its_neighbours_apart():
    tokenizer = Tokenizer.from_gguf(byte_level())
    assert tokenizer.encode("ab") == [55]
    assert tokenizer.encode("a\x04b") == [0, 1]


def test_the_beginning_and_the_end_are_added_when_asked():
    tokenizer = Tokenizer.from_gguf(byte_level())
    assert (tokenizer.bos_id, tokenizer.eos_id) == (56, 57)
    assert tokenizer.encode("a") == [0]
    assert tokenizer.encode("a", add_bos=True, add_eos=True) == [56, 0, 57]
    tokenizer = Tokenizer.from_gguf(byte_level(add_bos_token=True, add_eos_token=True))
    assert tokenizer.encode("a") == [56, 0, 57]
    assert tokenizer.encode("a", add_bos=False, add_eos=False) == [0]


def test_llama_3_begins_with_bos_and_takes_known_words_whole():
    fields = byte_level(pre="llama-bpe", merges=[])
    assert Tokenizer.from_gguf(fields).encode("ab") == [56, 55]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_puts_a_space_before_text_and_after_tokens(prefix):
    fields = sentencepiece([*"ab\u2581"], add_space_prefix=prefix)
    tokenizer = Tokenizer.from_gguf(fields)
    space = [" "] * prefix
    ids = tokenizer.encode("a</s>b <tag>")
    assert tokens_of(tokenizer, ids) == [
        *("<s>", *space, "a", "</s>", *space, "b", " ", "<tag>")
    ]
    assert tokenizer.decode(ids[1:]) == "a</s>b <tag>"


def test_a_stream_after_a_prompt_keeps_the_space_between_them():
    tokenizer = Tokenizer.from_gguf(sentencepiece([*"ab\u2581"]))
    ids = [tokenizer.encode(" ", add_bos=False)[0], *tokenizer.encode("b")[-1:]]
    assert "".join(streamed(tokenizer, ids)) == "b"
    assert "".join(streamed(tokenizer, ids, tokenizer.encode("a"))) == " b"


def test_a_character_without_a_token_is_spelled_in_bytes():
    tokenizer = Tokenizer.from_gguf(
        sentencepiece([*"ab\u2581"], add_space_prefix=False)
    )
    ids = tokenizer.encode("aé", add_bos=False)
    assert [tokenizer.piece(id) for id in ids] == [b"a", b"\xc3", b"\xa9"]
    assert streamed(tokenizer, ids) == ["a", "", "é", ""]
    assert streamed(tokenizer, ids[:-1]) == ["a", "", "\ufffd"]


def greedy(text, scores):
    """SentencePiece's rule as it is stated: always the best pair, leftmost first."""
    parts = list(text)
    while pairs := [
        (-scores[a + b], at)
        for at, (a, b) in enumerate(itertools.pairwise(parts))
        if a + b in scores
    ]:
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.text("ab", min_size=2, max_size=6), min_size=1, max_size=25, unique=True
    ),
    st.lists(st.text("ab", max_size=40), min_size=1, max_size=10),
)
@example(["ab", "aba", "aab"], ["aabaabababaa"])
@example(["an", "na", "ana"], ["anananan"])
def test_merges_from_scores_follow_sentencepiece(words, texts):
    words = ["a", "b", "n", *(w for w in words)]
    scores = {word: float(-n) for n, word in enumerate(words)}
    tokenizer = Tokenizer.from_gguf(sentencepiece(words, add_space_prefix=False))
    for text in texts:
        ids = tokenizer.encode(text, add_bos=False)
        assert tokens_of(tokenizer, ids) == greedy(text, scores)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({}, "lacks the field 'tokenizer.ggml.model'"),
        (byte_level(model="bert"), "'bert' is not one of 'gpt2', 'llama'"),
        (byte_level(pre="mine"), "pre='mine' is not one of 'chameleon', .*'smollm'"),
        (byte_level(tokens=["a", "a"]), "has 'a' twice"),
        (byte_level(token_type=[1]), "token_type has 1 entries for 59 tokens"),
        (byte_level(merges=["a c"]), "'a c', which does not join two tokens"),
        (byte_level(add_space_prefix=True), "add_space_prefix has no agreed meaning"),
        (byte_level(add_sep_token=True), "add_sep_token=True must be False"),
        (byte_level(eot_token_id=59), "eot_token_id=59 is not in the vocabulary of 59"),
        (byte_level(lowercase=True), "lowercase=True: raptax does not know what"),
        (byte_level(**{"normalizer.lowercase": True}), "lowercase=True must be False"),
        (byte_level(token_type=[*[1] * 58, 6]), "'<tag>', whose type is byte"),
        (byte_level(token_type=[*[1] * 58, 7]), r"whole numbers in \[0, 6\]"),
        (sentencepiece(scores=[0, 0]), "scores has 262 entries for 260 tokens"),
        (sentencepiece(["x" * 1025]), "a token of 1025 letters, .* with 'xxxx"),
        (
            sentencepiece(tokens=["a"], token_type=[1]),
            "lacks the byte token '<0x00>'",
        ),
    ],
)
def test_what_cannot_be_read_is_named(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        Tokenizer.from_gguf(fields)


def test_what_cannot_be_encoded_or_decoded_is_named():
    fields = byte_level()
    del fields["tokenizer.ggml.bos_token_id"]
    tokenizer = Tokenizer.from_gguf(fields)
    with pytest.raises(ValueError, match=r"add_bos needs .*bos_token_id"):
        tokenizer.encode("a", add_bos=True)
    with pytest.raises(ValueError, match=r"lone surrogate at 1, '\\ud800'"):
        tokenizer.encode("a\ud800")
    for id in (-1, 59):
        with pytest.raises(ValueError, match=f"id={id} is not in the vocabulary of 59"):
            tokenizer.decode([id])


def test_a_token_id_of_all_ones_means_none():
    for none in (-1, 2**32 - 1):
        fields = byte_level(bos_token_id=none, padding_token_id=none)
        assert Tokenizer.from_gguf(fields).bos_id is None
        assert Tokenizer.from_gguf(sentencepiece(bos_token_id=none)).bos_id is None
    assert Tokenizer.from_gguf(sentencepiece()).bos_id == 1


def test_tokens_end_a_turn_by_metadata_and_by_spelling():
    names = ["a", "<|im_end|>", "<|end|>", "</s>"]
    fields = byte_level(
        tokens=names, token_type=[1, 3, 3, 4], merges=[], bos_token_id=0, eos_token_id=2
    )
    # </s> that is not a control token is HTML
    assert Tokenizer.from_gguf(fields).stop_ids == {1, 2}
    fields["tokenizer.ggml.eot_token_id"] = 0
    fields["tokenizer.ggml.token_type"] = [1, 3, 3, 3]
    assert Tokenizer.from_gguf(fields).stop_ids == {0, 1, 2, 3}


def chat_of(template, *messages, **options):
    fields = byte_level()
    if template is not None:
        fields["tokenizer.chat_template"] = template
    return Tokenizer.from_gguf(fields).chat(list(messages), **options)


def test_a_template_is_rendered_as_hugging_face_does():
    template = (
        "{{ bos_token }}{% for m in messages %}\n"
        "  {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m | tojson }}{% endgeneration %}\n"
        "{% endfor %}\n"
        "{% if tools %}{{ tools }}{% endif %}{{ add_generation_prompt }}"
        "{{ strftime_now('%%') }}"
    )
    text = chat_of(template, {"role": "skip"}, {"role": "é<"}, variables={"tools": 3})
    assert text == '<bos>{"role": "é<"}3True%'


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('one system turn only') }}", "one system turn only"),
        ("{% for %}", "does not take these messages"),
        ("{{ messages[0].content + '' }}", "no attribute 'content'"),
        ("{{ messages[0]['role'] + 1 }}", "can only concatenate str"),
        ("{{ messages.append(1) }}", "append"),
    ],
)
def test_a_template_that_refuses_says_so(template, complaint):
    with pytest.raises(ValueError, match=complaint):
        chat_of(template, {"role": "user"})


# Real vocabularies


def check_rows(tokenizer, name):
    for row in expected(name)["rows"]:
        text = row["text"]
        ids = tokenizer.encode(text, add_bos=False)
        assert ids == row["special"], text
        assert tokenizer.encode(text, add_bos=False, special=False) == row["plain"], (
            text
        )
        assert tokenizer.encode(text) == row["default"], text
        yield text, ids, row["plain"]


def test_smollm2_agrees_with_llama_cpp(smollm2):
    for text, *both in check_rows(smollm2, "smollm2"):
        for ids in both:
            assert smollm2.decode(ids) == spelled(smollm2, text)
            assert "".join(streamed(smollm2, ids)) == spelled(smollm2, text)
    assert smollm2.stop_ids == set(expected("smollm2")["stops"])


@settings(max_examples=300, deadline=None)
@given(text=st.text(), special=st.booleans())
def test_smollm2_gives_any_text_back(smollm2_path, text, special):
    tokenizer = tokenizer_of(smollm2_path)
    ids = tokenizer.encode(text, special=special)
    assert tokenizer.decode(ids) == spelled(tokenizer, text)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 49151)))
def test_smollm2_streams_any_ids(smollm2_path, ids):
    tokenizer = tokenizer_of(smollm2_path)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_smollm2_never_streams_half_a_character(smollm2):
    text = "👨‍👩‍👧‍👦 é 你"
    pieces = streamed(smollm2, smollm2.encode(text))
    assert "".join(pieces) == text
    assert "" in pieces
    assert "\ufffd" not in "".join(pieces)


def test_smollm2_chats(smollm2):
    message = {"role": "user", "content": "Hi"}
    system = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
        "trained by Hugging Face<|im_end|>\n"
    )
    turn = "<|im_start|>user\nHi<|im_end|>\n"
    assert smollm2.chat([message], add_generation_prompt=False) == system + turn
    text = smollm2.chat([message])
    assert text == system + turn + "<|im_start|>assistant\n"
    assert smollm2.encode(text).count(smollm2.eos_id) == 2
    with pytest.raises(ValueError, match="no attribute 'content'"):
        smollm2.chat([{"role": "user"}])


@pytest.mark.slow
def test_gemma3_agrees_with_llama_cpp(gemma3):
    for text, *both in check_rows(gemma3, "gemma3"):
        for ids in both:
            as_spaces = text.replace("\u2581", " ")
            assert gemma3.decode(ids) == as_spaces
            assert "".join(streamed(gemma3, ids)) == as_spaces
    # llama.cpp stops at the end of struck-through text: it only looks at the spelling.
    assert gemma3.stop_ids == set(expected("gemma3")["stops"]) - {212}
    assert tokens_of(gemma3, [212]) == ["</s>"]
    assert gemma3.encode("<s>x</s>", add_bos=False, special=False)[-1] == 212
