"""What a layer asks of a cache."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Int


@runtime_checkable
class KVCache(Protocol):
    """A value that holds past keys and values; `PagedKVCache` says what each part does.

    A layer asks for the positions of its new rows, then writes them and attends in one
    call. The cache comes back as a new value.
    """

    @property
    def lengths(self) -> Int[Array, " B"]:
        """Tokens held by each sequence."""
        ...

    def positions(self, rows: int, row_offsets: Any) -> Any: ...

    def append_and_attend(
        self, query: Any, key: Any, value: Any, **options: Any
    ) -> tuple[Any, Any]: ...

    def advance(self, row_offsets: Any) -> Any: ...
