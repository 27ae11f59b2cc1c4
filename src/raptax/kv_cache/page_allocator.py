"""Page allocation on the host: which sequence holds which page."""

NO_PAGE = -1  # in a table: a page that was given away, or never held


class PageAllocator:
    """Hands out the pages of a pool and takes them back. Host side, not traced.

    A sequence's pages are a list that the caller keeps, as `PagedKVCache.with_tables`
    takes it; -1 stands for a page that was evicted. A page that several sequences share
    is free again when the last of them has given it back.
    """

    def __init__(self, pages: int, page_size: int):
        if pages < 1 or page_size < 1:
            raise ValueError(
                f"pages={pages} and page_size={page_size} must be at least 1."
            )
        self.page_size = page_size
        self._free = list(range(pages))[::-1]
        self._owners: dict[int, int] = {}  # of each page that is handed out

    @property
    def free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def owners(self, page: int) -> int:
        """How many sequences hold ``page``."""
        return self._owners.get(page, 0)

    def grow(self, held: list[int], tokens: int) -> None:
        """Extends ``held`` in place until it holds ``tokens`` tokens.

        Raises MemoryError when the pool has too few pages; nothing is taken then.
        """
        short = -(-tokens // self.page_size) - len(held)
        if short > len(self._free):
            raise MemoryError(
                f"the sequence needs {short} more pages but only {len(self._free)} are "
                "free; evict a sequence or build the cache with more pages."
            )
        held.extend(self._take() for _ in range(short))

    def fork(
        self, held: list[int], tokens: int
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Pages for a copy of a sequence with ``tokens`` tokens in ``held``.

        Full pages are shared. The half-full last page is not, as both will write to
        theirs: the copy gets a new one.

        Returns:
            The pages, and the ``(source, target)`` pairs whose contents have to be
            copied, none or one: by `PagedKVCache.fork` or `PagedKVCache.copy_pages`.

        Raises:
            ValueError: ``held`` is too short for so many tokens.
            MemoryError: A page is needed and none is free; nothing is taken then.
        """
        self._check_room(held, tokens)
        full, half = divmod(tokens, self.page_size)
        if half and not self._free:
            raise MemoryError(
                "the copy needs a page for the half-full last one, and none is free; "
                "evict a sequence or build the cache with more pages."
            )
        pages = held[:full]
        for page in pages:
            if page != NO_PAGE:
                self._owners[page] += 1
        if not half:
            return pages, []
        pages.append(self._take())
        return pages, [(held[full], pages[full])]

    def truncate(self, held: list[int], tokens: int) -> list[tuple[int, int]]:
        """Takes back the pages of ``held`` behind its first ``tokens`` tokens, in place.

        Returns:
            The ``(source, target)`` pairs that `PagedKVCache.copy_pages` has to copy: one
            where the last page left is half full and shared, so that the sequence gets a
            page of its own in its place; else none.

        Raises:
            ValueError: ``held`` is too short for so many tokens.
            MemoryError: A page is needed and none is free; nothing is changed then.
        """
        self._check_room(held, tokens)
        keep, half = -(-tokens // self.page_size), tokens % self.page_size
        last = held[keep - 1] if half else NO_PAGE
        shared = self.owners(last) > 1
        if shared and not self._free and all(self.owners(p) != 1 for p in held[keep:]):
            raise MemoryError(
                f"page {last} would be half full and is shared, and no page is free for "
                "a copy; evict a sequence or build the cache with more pages."
            )
        tail = held[keep:]
        del held[keep:]
        self._drop(tail)
        if not shared:
            return []
        held[-1] = self._take()
        self._drop([last])
        return [(last, held[-1])]

    def evict_before(self, held: list[int], position: int) -> None:
        """Takes back the pages whose tokens all stand before ``position``.

        Their entries in ``held`` become -1. ``position`` is at most that of the
        sequence's last token, whose page stays.

        Raises ValueError where ``held`` holds no token at ``position``.
        """
        self._check_room(held, position + 1)
        count = position // self.page_size
        self._drop([page for page in held[:count] if page != NO_PAGE])
        held[:count] = [NO_PAGE] * count

    def release(self, held: list[int]) -> None:
        """Takes back all of ``held`` and empties it.

        Raises ValueError for pages that are not handed out; nothing is released then.
        """
        self._check_handed_out(held)
        self._drop(held)
        held.clear()

    def _take(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _drop(self, pages: list[int]) -> None:
        for page in pages:
            if page == NO_PAGE:
                continue
            self._owners[page] -= 1
            if not self._owners[page]:
                del self._owners[page]
                self._free.append(page)

    def _check_handed_out(self, held: list[int]) -> None:
        pages = [page for page in held if page != NO_PAGE]
        if len(set(pages)) < len(pages) or not self._owners.keys() >= set(pages):
            raise ValueError(f"pages {held} are not all handed out: released twice?")

    def _check_room(self, held: list[int], tokens: int) -> None:
        self._check_handed_out(held)
        if not 0 <= tokens <= (capacity := len(held) * self.page_size):
            raise ValueError(
                f"{tokens} tokens must lie within the {capacity} of {len(held)} pages."
            )
