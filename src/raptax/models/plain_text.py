"""Texts of a conversation that shall not spell control tokens.

A template mixes its own text with that of the messages, and its text alone may make
control tokens. So before the template runs, a character that occurs nowhere in the
conversation is put inside every control token that is spelled there, after its first
letter, and likewise into what ends a text and may become one by the text after it. The
broken spellings are not found when the tokens are cut out, and the character is removed
before anything is merged. Texts without such places reach the template as they are.

A token of one letter cannot be broken: the character stands before it, and `Tokenizer`
does not cut it out there.
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
        longer = [spelling for spelling in spellings if len(spelling) > 1]
        whole = "|".join(map(re.escape, longer))
        self._spelled = re.compile(f"(?={whole})") if whole else None
        self._letters = {spelling for spelling in spellings if len(spelling) == 1}
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
        places: set[int] = set()
        if self._letters:
            places.update(at for at, one in enumerate(text) if one in self._letters)
        if self._spelled is not None:
            places.update(f.start() + 1 for f in self._spelled.finditer(text))
        end = text.rstrip()  # a template may take spaces off
        places.update(
            len(end) - size + 1
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
