"""Pages: who holds them, what is copied, and that a refusal changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from paddle_qwen1m.cache import CacheFull, PagePool

PAGE = 4


class Memory:
    """A pool over pages that hold numbers."""

    def __init__(self, num_pages: int) -> None:
        self.values = np.full((num_pages, PAGE), -1)
        self.pool = PagePool(num_pages, PAGE, self._copy)

    def _copy(self, source: int, target: int, tokens: int) -> None:
        self.values[target, :tokens] = self.values[source, :tokens]


def test_who_goes_on_behind_a_partial_page_gets_a_copy_of_it() -> None:
    memory = Memory(6)
    pages = memory.pool.take(3)
    memory.values[pages] = np.arange(12).reshape(3, PAGE)
    shared = memory.pool.fork(pages, 6)
    assert shared[0] == pages[0] and shared[1] not in pages and len(shared) == 2
    assert memory.values[shared].reshape(-1)[:6].tolist() == list(range(6))
    memory.pool.release(pages)
    assert memory.pool.available == 4
    memory.pool.release(shared)
    assert memory.pool.available == 6 and not memory.pool.in_use


def test_whole_pages_are_shared_without_a_copy() -> None:
    pool = PagePool(3, PAGE, lambda source, target, tokens: pytest.fail("nothing is to be copied"))
    pages = pool.take(3)
    assert pool.fork(pages, 8) == pages[:2]
    pool.release(pages)
    assert pool.available == 1


def test_a_refusal_takes_nothing() -> None:
    memory = Memory(3)
    pages = memory.pool.take(2)
    with pytest.raises(CacheFull, match="2 pages of 4 tokens are wanted, 1 are free"):
        memory.pool.grow(pages, 13)
    (last,) = memory.pool.take(1)
    with pytest.raises(CacheFull):
        memory.pool.fork(pages, 6)  # there is no page for the copy
    memory.pool.release([*pages, last])
    assert memory.pool.available == 3


def test_pages_of_the_index_alone_count_as_free_and_are_given_up_when_they_are_taken() -> None:
    pool = PagePool(4, PAGE, lambda source, target, tokens: None)
    asked = []

    def reclaim(count: int) -> None:
        asked.append(count)
        pool.release(pages[:count], index=True)

    pool.reclaim = reclaim
    pages = pool.take(3)
    pool.hold(pages, index=True)
    assert pool.available == 1 and pool.count_only_indexed(pages) == 0
    pool.release(pages)
    assert pool.available == 4 and pool.count_only_indexed(pages) == 3 and not pool.in_use
    assert len(pool.take(1)) == 1 and asked == []
    assert sorted(pool.take(2)) == sorted(pages[:2]) and asked == [2]
    assert pool.available == 1
