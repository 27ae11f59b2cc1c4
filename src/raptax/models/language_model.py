"""A decoder with its tokenizer, and the one call that loads both."""

import dataclasses
import os
import pathlib
from collections.abc import Callable

from .decoder import Decoder, DecoderConfig
from .fields import Fields, errors_of
from .gguf_file import GGUFFile
from .llama import Weights, config_from_gguf, decoder_from_gguf
from .published import MODELS, fetch
from .tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """What it takes to turn text into text.

    Raises:
        ValueError: The decoder's vocabulary has more or fewer rows than the tokenizer
            has tokens. (llama.cpp refuses such files too: a row without a token could
            be sampled and has no text, and a token without a row has no vector.)
    """

    name: str
    decoder: Decoder
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        _check_vocabulary(self.decoder.config, self.tokenizer)


def _check_vocabulary(config: DecoderConfig, tokenizer: Tokenizer) -> None:
    rows, tokens = config.vocab_size, tokenizer.vocab_size
    if rows != tokens:
        raise ValueError(
            f"the embedding has {rows} rows for {tokens} tokens; each row must be a "
            "token. A padded embedding needs as many padding tokens in "
            "tokenizer.ggml.tokens, of type 5 (unused)."
        )


def load(
    model: str | os.PathLike[str],
    *,
    weights: Weights = "codes",
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Loads a published model by name, or a GGUF file by path.

    Args:
        model: A name in `raptax.models.MODELS`, fetched once into the user's cache, or
            the path of a GGUF file.
        weights: How weights lie in memory; see `Weights`.
        progress: Called with (bytes read, bytes in all) as tensors are read.

    Raises:
        ValueError: The file is damaged or holds what raptax does not run.
        OSError: There is no such file, or the model cannot be fetched.
    """
    name = os.fspath(model)
    file = GGUFFile(fetch(name) if name in MODELS else _existing(name))
    total, done = sum(t.raw.nbytes for t in file.tensors.values()), 0

    def report(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    config = config_from_gguf(file)
    with errors_of(file.path):
        title = Fields(file.fields, "general.").text("name", pathlib.Path(name).stem)
        tokenizer = Tokenizer.from_gguf(file.fields)
        _check_vocabulary(config, tokenizer)
    return LanguageModel(title, decoder_from_gguf(file, weights, report), tokenizer)


def _existing(path: str) -> str:
    if not os.path.exists(path):
        names = ", ".join(MODELS)
        raise FileNotFoundError(
            f"model={path!r} is neither a file nor one of the published models: {names}."
        )
    return path
