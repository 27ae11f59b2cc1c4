"""Metadata of a model file, read field by field with a type and a range.

`Fields` keeps account: every field that is asked for, or that is known not to matter, is
marked, and `refuse_the_rest` raises on what is left over. So a field that changes a
model and is unknown here stops the file instead of being ignored.
"""

import contextlib
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .._core.errors import choices

REQUIRED: Any = object()


@contextlib.contextmanager
def errors_of(source: str) -> Iterator[None]:
    """Puts the file's name in front of every ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


class Fields:
    """Typed access to the fields whose names begin with ``prefix``.

    Every method takes a name without the prefix and a default, which is returned as it
    is where the field is lacking; without a default such a field is an error.

    Raises:
        ValueError: A field is lacking, of another type, or out of its range. The message
            names the field.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str):
        self.values, self.prefix = values, prefix
        self._seen: set[str] = set()

    def integer(
        self, name: str, low: int, high: int, default: Any = REQUIRED
    ) -> int | Any:
        wanted = f"a whole number in [{low}, {high}]"
        return self._get(
            name, default, wanted, lambda x: _is_whole(x) and low <= x <= high
        )

    def number(
        self, name: str, low: float, high: float, default: Any = REQUIRED
    ) -> float | Any:
        wanted = f"a number in [{low:g}, {high:g}]"
        return self._get(
            name,
            default,
            wanted,
            lambda x: type(x) in (int, float) and low <= x <= high,
        )

    def flag(self, name: str, default: Any = REQUIRED) -> bool | Any:
        return self._get(name, default, "true or false", lambda x: type(x) is bool)

    def text(self, name: str, default: Any = REQUIRED) -> str | Any:
        return self._get(name, default, "text", lambda x: isinstance(x, str))

    def texts(self, name: str, default: Any = REQUIRED) -> list[str] | Any:
        return self._list(name, default, "texts", lambda x: isinstance(x, str))

    def integers(
        self, name: str, low: int, high: int, default: Any = REQUIRED
    ) -> list[int] | Any:
        wanted = f"whole numbers in [{low}, {high}]"
        return self._list(
            name, default, wanted, lambda x: _is_whole(x) and low <= x <= high
        )

    def numbers(self, name: str, default: Any = REQUIRED) -> list[float] | Any:
        def finite(x: Any) -> bool:
            return type(x) in (int, float) and abs(x) < float("inf")

        return self._list(name, default, "finite numbers", finite)

    def neutral(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Marks a field that may be there only with a value that changes nothing."""
        known = [(type(value), value) for value in allowed]
        self._get(
            name,
            None,
            f"{choices(allowed)}: raptax does not do what any other value asks for",
            lambda x: (type(x), x) in known,
        )

    def ignore(self, *names: str) -> None:
        """Marks fields that change nothing, whatever they hold."""
        self._seen.update(names)

    def refuse_the_rest(self) -> None:
        """Raises ValueError unless every field has been read or marked."""
        names = [
            name.removeprefix(self.prefix)
            for name in self.values
            if name.startswith(self.prefix)
        ]
        if left := [name for name in names if name not in self._seen]:
            told = ", ".join(
                f"{self.prefix}{name}={_short(self.values[self.prefix + name])}"
                for name in left[:5]
            )
            raise ValueError(
                f"{told}: raptax does not know what this asks for, and ignores nothing."
            )

    def _get(
        self, name: str, default: Any, wanted: str, fits: Callable[[Any], bool]
    ) -> Any:
        self._seen.add(name)
        full = self.prefix + name
        if full not in self.values:
            if default is REQUIRED:
                raise ValueError(f"it lacks the field {full!r}.")
            return default
        value = self.values[full]
        if not fits(value):
            raise ValueError(f"{full}={_short(value)} must be {wanted}.")
        return value

    def _list(
        self, name: str, default: Any, wanted: str, fits: Callable[[Any], bool]
    ) -> Any:
        def all_fit(value: Any) -> bool:
            return isinstance(value, list) and all(map(fits, value))

        return self._get(name, default, f"a list of {wanted}", all_fit)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    """Its repr, of a few items or characters at most: files hold 10**5 of them."""
    return reprlib.repr(value)
