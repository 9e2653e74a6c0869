"""Who holds which page of the KV cache: references, free pages, and pages that only the prefix index still holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Callable

import numpy as np

PREFERRED_PAGE_SIZE = 256


def choose_page_size(chunk_len: int, page_size: int | None = None) -> int:
    """The largest power of two up to 256 that divides L, or `page_size` if it does; ValueError if it does not."""
    if page_size is None:
        return math.gcd(chunk_len, PREFERRED_PAGE_SIZE)
    if chunk_len % page_size:
        raise ValueError(f"page_size must divide chunk_size - local_size = {chunk_len}, got {page_size}")
    return page_size


class CacheFull(Exception):
    """More pages are wanted than are free."""


class PagePool:
    """Counts references to each of `num_pages` pages of `page_size` tokens. `copy(source, target, tokens)` copies the
    first tokens of a page to another, in whatever memory the pages stand for.

    A sequence, or whoever reads or writes a page for a while, holds it; a page is free again when nobody does. The
    prefix index holds pages in its own name: those that nobody else holds count as free, and `reclaim` is asked to give
    them up when they are taken. A page is written by the one sequence that took it.
    """

    def __init__(self, num_pages: int, page_size: int, copy: Callable[[int, int, int], None]) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._copy = copy
        self.reclaim: Callable[[int], None] = lambda count: None
        """Frees at least so many of the pages that only the prefix index holds."""
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = np.zeros(num_pages, np.int32)
        self._indexed = np.zeros(num_pages, np.int32)
        self._only_indexed = 0

    @property
    def available(self) -> int:
        """Pages that can be taken: free ones, and those that only the prefix index holds."""
        return len(self._free) + self._only_indexed

    @property
    def in_use(self) -> bool:
        """Whether anybody but the prefix index holds a page."""
        return self.available < self.num_pages

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """So many pages, held once each. Raises CacheFull, taking nothing."""
        if count > self.available:
            raise CacheFull(f"{count} pages of {self.page_size} tokens are wanted, {self.available} are free")
        if count > len(self._free):
            self.reclaim(count - len(self._free))
            assert count <= len(self._free), "the prefix index did not give up the pages that it alone holds"
        pages = [self._free.pop() for _ in range(count)]
        self._holders[pages] += 1
        return pages

    def grow(self, pages: list[int], tokens: int) -> None:
        """Adds pages to a sequence's list until it holds `tokens` tokens. Raises CacheFull, taking nothing."""
        pages += self.take(max(0, self.pages_for(tokens) - len(pages)))

    def fork(self, pages: Sequence[int], tokens: int) -> list[int]:
        """Pages of a sequence that goes on behind the first `tokens` tokens in `pages`, which somebody holds.

        Whole pages are shared; one that the tokens end within is copied. Raises CacheFull, holding nothing.
        """
        whole, rest = divmod(tokens, self.page_size)
        shared = list(pages[:whole])
        self.hold(pages[: self.pages_for(tokens)])
        if rest:
            try:
                shared += self.take(1)
                self._copy(pages[whole], shared[whole], rest)
            except BaseException:
                self.release(shared)
                raise
            finally:
                self.release([pages[whole]])
        return shared

    def hold(self, pages: Sequence[int], *, index: bool = False) -> None:
        """One more reference to each of these different pages, which somebody holds already."""
        where = np.asarray(pages, np.int64)
        assert (self._holders[where] > 0).all(), "a free page cannot be held: take it"
        before = self._num_only_indexed(where)
        self._holders[where] += 1
        if index:
            self._indexed[where] += 1
        self._only_indexed += self._num_only_indexed(where) - before

    def release(self, pages: Sequence[int], *, index: bool = False) -> None:
        """Gives back one reference to each of these different pages."""
        where = np.asarray(pages, np.int64)
        before = self._num_only_indexed(where)
        self._holders[where] -= 1
        if index:
            self._indexed[where] -= 1
        assert (self._indexed[where] >= 0).all() and (self._holders[where] >= self._indexed[where]).all()
        self._only_indexed += self._num_only_indexed(where) - before
        self._free.extend(where[self._holders[where] == 0][::-1].tolist())

    def count_only_indexed(self, pages: Sequence[int]) -> int:
        """How many of these pages the prefix index alone holds."""
        return sum(self._holders[page] == self._indexed[page] > 0 for page in pages)

    def _num_only_indexed(self, where: np.ndarray) -> int:
        indexed = self._indexed[where]
        return int(np.count_nonzero((indexed > 0) & (indexed == self._holders[where])))
