"""A decoder with its tokenizer, and the one call that loads both."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable

from jax.typing import DTypeLike

from .._core.errors import choices
from ..io.fields import Fields, errors_of
from ..io.gguf import GGUFFile
from ..kernels.cpu.packed_linear import Precision
from .decoder import Decoder, DecoderConfig
from .families import (
    ARCHITECTURES,
    Weights,
    config_from_gguf,
    decoder_from_gguf,
)
from .hub import MODELS, fetch
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
    weights: Weights | None = None,
    precision: Precision = "float32",
    kv_dtype: DTypeLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Loads a published model by name, or a GGUF file by path.

    Args:
        model: A name in `raptax.models.MODELS`, fetched once into the user's cache, or
            the path of a GGUF file.
        weights: How weights lie in memory; see `Weights`. By default packed where the
            C++ kernels are there to read them, else codes.
        precision: What inputs of packed weights are rounded to before products,
            ``"float32"`` (not at all) or ``"int8"``; see `kernels.cpu.packed_linear`.
        kv_dtype: Of the keys and values that generation keeps. float32 by default;
            float16 where ``precision`` is int8, whose rounding is larger.
        progress: Called with (bytes read, bytes in all) as tensors are read.

    Raises:
        ValueError: The file is damaged or holds what raptax does not run.
        OSError: There is no such file, or the model cannot be fetched.
    """
    name = os.fspath(model)
    file = GGUFFile(_existing(name))
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
    decoder = decoder_from_gguf(
        file, weights, report, precision=precision, kv_dtype=kv_dtype
    )
    return LanguageModel(title, decoder, tokenizer)


def _existing(name: str) -> str:
    """The path of a model's file, fetched if it is a published model."""
    run = [m.name for m in MODELS.values() if m.architecture in ARCHITECTURES]
    if name in MODELS:
        if name not in run:
            raise ValueError(
                f"model={name!r} is of the architecture {MODELS[name].architecture}, "
                f"which raptax does not run; it runs {choices(run)}."
            )
        return os.fspath(fetch(name))
    if os.path.isdir(name):
        files = sorted(file.name for file in pathlib.Path(name).glob("*.gguf"))
        held = f"it holds {choices(files[:5])}" if files else "it holds no GGUF file"
        raise IsADirectoryError(
            f"model={name!r} is a folder; give the path of a GGUF file: {held}."
        )
    if not os.path.exists(name):
        slip = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(".gguf"):
            slip = (
                " If it is meant to be a Hugging Face repository, download a GGUF file "
                "from it and give its path."
            )
        raise FileNotFoundError(
            f"model={name!r} is neither a file nor one of the published models: "
            f"{', '.join(run)}.{slip}"
        )
    return name
