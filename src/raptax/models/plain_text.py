"""Texts of a conversation that shall not spell control tokens.

A template mixes its own text with that of the messages, and its text alone may make
control tokens. So before the template runs, a character that occurs nowhere in the
conversation is put in front of every place in it where a control token is spelled, or
where a text ends in what may become one by the text after it. Tokens behind that
character are not cut out, and it is removed before anything is merged. Texts without
such places reach the template as they are.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

# Code points that Unicode keeps for uses like this one, then some for private use.
_CANDIDATES = (range(0xFDD0, 0xFDF0), range(0x100000, 0x10FFFE))


class PlainText:
    """Marks texts, and removes the marks.

    Args:
        spellings: Of the control tokens.
        values: All that will stand beside a mark: texts, and mappings and lists of them.

    Attributes:
        character: The mark.

    Raises:
        ValueError: The values hold every character that could be a mark.
    """

    def __init__(self, spellings: Sequence[str], values: Any):
        texts = [*_texts(values), *spellings]
        used = set(itertools.chain.from_iterable(texts))
        free = (c for c in map(chr, itertools.chain(*_CANDIDATES)) if c not in used)
        self.character = next(
            (c for c in free if not any(_escaped(c) in text for text in texts)), ""
        )
        if not self.character:
            raise ValueError(
                f"the messages hold all of {sum(map(len, _CANDIDATES))} characters that "
                "have no meaning in Unicode; are they text?"
            )
        whole = "|".join(map(re.escape, spellings))
        self._spelled = re.compile(f"(?={whole})") if whole else None
        self._beginnings = {
            spelling[:size]
            for spelling in spellings
            for size in range(1, len(spelling))
        }
        self._longest = max(map(len, self._beginnings), default=0)

    def mark(self, value: Any) -> Any:
        """The same value with its texts marked."""
        if isinstance(value, str):
            return self._marked(value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def _marked(self, text: str) -> str:
        if self._spelled is None:
            return text
        end = text.rstrip()  # a template may take spaces off
        places = {found.start() for found in self._spelled.finditer(text)}
        places.update(
            len(end) - size
            for size in range(1, min(len(end), self._longest) + 1)
            if end[len(end) - size :] in self._beginnings
        )
        cuts = itertools.pairwise((0, *sorted(places), len(text)))
        return self.character.join(text[start:stop] for start, stop in cuts)

    def rendered(self, text: str) -> str:
        """What a template made of marked texts, with marks that JSON escapes undone."""
        return text.replace(_escaped(self.character), self.character)

    def unmark(self, parts: Iterable[str | int]) -> Iterator[str | int]:
        """Parts of a marked text without the marks, and without empty ones."""
        for part in parts:
            if isinstance(part, int):
                yield part
            elif text := part.replace(self.character, ""):
                yield text


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in itertools.chain(value.keys(), value.values()):
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
