"""What may be given as a prompt, and which text may stop an answer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex, cast

import jax
import numpy as np

from ..models.tokenizer import Tokenizer

Ids = Sequence[SupportsIndex] | np.ndarray | jax.Array
Prompt = str | Ids | Sequence[Mapping[str, Any]]
"""Text, token ids, or the messages of a conversation."""


def ids_of(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a prompt.

    Those of a text are `Tokenizer.encode`'s, those of messages `Tokenizer.encode_chat`'s.

    Raises:
        ValueError: The prompt is none of these, or several at once.
    """
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if isinstance(prompt, Mapping):
        raise ValueError("the prompt is a mapping; give a list of messages: [message].")
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        return tokenizer.encode_chat(cast(Sequence[Mapping[str, Any]], prompt))
    return checked_ids(cast(Ids, prompt))


def checked_ids(prompt: Ids) -> list[int]:
    """Token ids as a list of ints.

    Raises:
        ValueError: They are no row of whole numbers.
    """
    if isinstance(prompt, bytes | bytearray):
        raise ValueError("the prompt is bytes, not text; decode it: prompt.decode().")
    if isinstance(prompt, Sequence) and any(isinstance(item, str) for item in prompt):
        raise ValueError(
            "the prompt is a list of texts; prompts are continued one at a time: call "
            "once for each."
        )
    try:
        ids = np.asarray(prompt)
    except ValueError:  # rows of unequal lengths
        ids = np.zeros((0, 0))
    if ids.ndim > 1:
        raise ValueError(
            "the prompt is several rows of token ids; prompts are continued one at a "
            "time: call once for each row."
        )
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"the prompt must be text, a row of whole numbers (token ids) or a list of "
            f"messages; got {type(prompt).__name__} of {ids.dtype}."
        )
    return ids.astype(object).tolist()


def checked_stops(stop: str | Sequence[str]) -> list[str]:
    """Stop strings as a list.

    Raises:
        ValueError: One is empty or no text.
    """
    stops = [stop] if isinstance(stop, str) else list(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop={text!r} must be text that is not empty.")
    return stops


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The text of ``pieces`` before the first of ``stops``.

    Text is held back for as long as it may be the beginning of a stop string. The one
    that is complete first decides, the longest if several are, so how the text is cut
    into pieces does not matter.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            _, at = min(found)
            if at:
                yield held[:at]
            return
        keep = max((_overlap(held, stop) for stop in stops), default=0)
        if text := held[: len(held) - keep]:
            yield text
        held = held[len(held) - keep :]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
