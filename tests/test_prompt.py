"""What `generate` takes as a prompt, and the texts that stop it."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raptax.generate import Sampler, generate, generate_ids, until
from raptax.models import LanguageModel, load

COUNT = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return load(tiny.write(path, tiny.Sizes(layers=1), encodings="Q8_0"))


def text_of(model, prompt, **options):
    return "".join(generate(model, prompt, max_tokens=COUNT, **options))


# Prompts


@pytest.mark.parametrize("make", [list, tuple, np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_ids_in_any_row(model, make, dtype):
    ids = [40, 3, 200, 77]
    row = make(np.asarray(ids, dtype).tolist() if make is jnp.asarray else ids)
    if make is np.asarray:
        row = row.astype(dtype)
    assert text_of(model, row) == text_of(model, ids)
    items = [np.dtype(dtype).type(id) for id in ids]  # a list of numpy's numbers
    assert text_of(model, items) == text_of(model, ids)


def test_messages_are_a_chat(model):
    messages = [{"role": "user", "content": "in the nation"}]
    want = text_of(model, model.tokenizer.encode_chat(messages))
    assert text_of(model, messages) == text_of(model, tuple(messages)) == want


BAD = {
    "bytes": (b"in the", "is bytes, not text; decode it"),
    "bytearray": (bytearray(b"in the"), "is bytes, not text; decode it"),
    "texts": (["in the", "nation"], "is a list of texts; .* once for each"),
    "one text": (("in the",), "is a list of texts"),
    "text and ids": ([1, "in"], "is a list of texts"),
    "rows": ([[1, 2], [3, 4]], "several rows of token ids; .* once for each row"),
    "uneven rows": ([[1, 2], [3]], "several rows of token ids"),
    "a matrix": (np.zeros((1, 4), np.int32), "several rows of token ids"),
    "a number": (7, "must be text, a row of whole numbers"),
    "numpy's number": (np.asarray(7), "must be text, a row of whole numbers"),
    "nothing": (None, "must be text, a row of whole numbers"),
    "floats": ([1.0, 2.0], "row of whole numbers .* list of float64"),
    "bools": ([True, False], "row of whole numbers .* list of bool"),
    "a message": ({"role": "user", "content": "x"}, r"a list of messages: \[message"),
    "lone surrogate": ("in \ud83d", r"lone surrogate at 3, '\\ud83d'"),
    "empty": ("", "no tokens"),
    "no ids": (np.zeros(0, np.int32), "no tokens"),
    "huge": ([2**80], "row of whole numbers"),
    "too large": ([2**63 - 1], r"token ids must lie in \[0, "),
}


@pytest.mark.parametrize(("prompt", "sentence"), BAD.values(), ids=BAD)
def test_other_prompts_are_told_at_the_call(model, prompt, sentence, unchecked):
    with pytest.raises(ValueError, match=sentence):
        generate(model, prompt, max_tokens=1)
    if not isinstance(prompt, str | dict):
        with pytest.raises(ValueError, match=sentence):
            generate_ids(model.decoder, prompt, max_tokens=1)


OPTIONS = {
    "half a token": (dict(max_tokens=1.5), "max_tokens=1.5 must be a whole"),
    "text": (dict(max_tokens="9"), "max_tokens='9' must be a whole"),
    "true": (dict(max_tokens=True), "max_tokens=True must be a whole"),
    "half a seed": (dict(seed=0.5), "seed=0.5 must be a whole"),
    "top_p": (dict(sampler=Sampler(temperature=1.0, top_p=2.0)), "top_p=2.0 must lie"),
    "top_k": (dict(sampler=Sampler(temperature=1.0, top_k=0)), "top_k=0 must lie"),
    "min_p": (dict(sampler=Sampler(temperature=1.0, min_p=-1.0)), "min_p=-1.0 must"),
    "heat": (dict(sampler=Sampler(temperature=-1.0)), "temperature=-1.0 must be 0 or"),
    "greedy": (dict(sampler=Sampler(top_k=3)), "top_k choose among likely tokens"),
    "empty stop": (dict(stop=""), "stop='' must be text that is not empty"),
    "one empty stop": (dict(stop=["a", ""]), "stop='' must be text"),
    "stop ids": (dict(stop=[3]), "stop=3 must be text"),
}


@pytest.mark.parametrize(("options", "sentence"), OPTIONS.values(), ids=OPTIONS)
def test_other_options_are_told_at_the_call(model, options, sentence, unchecked):
    with pytest.raises(ValueError, match=sentence):
        generate(model, "in", **options)


def test_numpy_numbers_are_numbers(model):
    want = text_of(model, "in the", seed=3)
    options = dict(max_tokens=np.int64(COUNT), seed=np.uint32(3))
    assert "".join(generate(model, "in the", **options)) == want


def test_a_temperature_of_0_is_none(model):
    assert text_of(model, "in", sampler=Sampler(temperature=0.0)) == text_of(
        model, "in"
    )


def test_no_seed_is_another_one_each_time(model):
    warm = Sampler.create(temperature=1.5)
    texts = {text_of(model, "in the", sampler=warm, seed=None) for _ in range(4)}
    assert len(texts) > 1


def test_rows_of_the_embedding_are_the_tokens(tmp_path, model):
    for rows in (len(tiny.TOKENS) - 1, len(tiny.TOKENS) + 5):
        table = np.ones((rows, 64), np.float32)
        path = tiny.write(
            tmp_path / f"{rows}.gguf",
            tiny.Sizes(layers=1),
            head=False,
            tensors={"token_embd.weight": table},
        )
        with pytest.raises(
            ValueError, match=f"^{path}: the embedding has {rows} rows "
        ):
            load(path)
        other = load_decoder(path)
        with pytest.raises(ValueError, match=f"{rows} rows for {len(tiny.TOKENS)} tok"):
            LanguageModel("Tiny", other, model.tokenizer)


def load_decoder(path):
    from raptax.io.gguf import GGUFFile
    from raptax.models.families import decoder_from_gguf

    return decoder_from_gguf(GGUFFile(path))


# Texts that stop


def test_a_text_ends_before_a_stop_string(model):
    text = text_of(model, "in the nation")
    assert len(text) > 8
    for start, end in itertools.combinations(range(len(text)), 2):
        stop = text[start:end]
        want = text[: text.index(stop)]
        assert "".join(until(text, [stop])) == want
    stop = text[3:6]
    assert text_of(model, "in the nation", stop=stop) == text[: text.index(stop)]
    stops = [text[5:9], stop, "never"]
    want = "".join(until(text, stops))
    assert text_of(model, "in the nation", stop=stops) == want
    assert text_of(model, "in the nation", stop="never there") == text


def letter_by_letter(text, stops):
    """The definition: the first moment at which the text ends in a stop string."""
    for end in range(1, len(text) + 1):
        ends = [stop for stop in stops if text[:end].endswith(stop)]
        if ends:
            return text[: end - max(map(len, ends))]
    return text


words = st.text("ab\n", max_size=12)


@settings(max_examples=200, deadline=None)
@given(st.lists(words, max_size=6), st.lists(words.filter(bool), max_size=3))
@example(["a", "b", "cd"], ["abcd", "bc"])
@example(["abc", "d"], ["abcd", "bc"])
@example(["aab"], ["ab"])
def test_how_text_is_cut_does_not_matter(pieces, stops):
    text = "".join(pieces)
    shown = list(until(pieces, stops))
    assert "".join(shown) == letter_by_letter(text, stops)
    assert all(shown)
    # What is certain is shown at once: no piece waits without a reason.
    for count in range(len(pieces)):
        part = "".join(pieces[:count])
        if part == letter_by_letter(part, stops):
            told = "".join(itertools.islice(until_open(pieces[:count], stops), 99))
            held = part[len(told) :]
            assert not held or any(s.startswith(held) for s in stops)


def until_open(pieces, stops):
    """What has been shown while more may come."""

    def more():
        yield from pieces
        raise StopShowing

    try:
        yield from until(more(), stops)
    except StopShowing:
        return


class StopShowing(Exception):
    pass


def test_nothing_more_is_asked_for_after_a_stop():
    pieces = iter(["one ", "two ", "st", "op", " three"])
    assert list(until(pieces, ["stop"])) == ["one ", "two "]
    assert next(pieces) == " three"
