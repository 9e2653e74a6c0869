"""The paged KV cache: pools of pages, one key and one value tensor a layer, and who owns which page."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import paddle

from paddle_qwen1m.config import ModelConfig

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


class PagedCache:
    """Keys and values of all layers: `keys[layer]` and `values[layer]` are [pages, page_size, G, D].

    A page belongs to one sequence at a time. Memory is reserved when the cache is made; on a CPU it becomes resident
    as it is written.
    """

    def __init__(self, config: ModelConfig, num_pages: int, page_size: int, dtype: str) -> None:
        shape = [num_pages, page_size, config.num_kv_heads, config.head_dim]
        self.page_size = page_size
        self.num_pages = num_pages
        self.keys = [paddle.empty(shape, dtype) for _ in range(config.num_layers)]
        self.values = [paddle.empty(shape, dtype) for _ in range(config.num_layers)]
        self._free = list(range(num_pages - 1, -1, -1))

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def grow(self, pages: list[int], tokens: int) -> None:
        """Adds pages to a sequence's list until it holds `tokens` tokens. Raises CacheFull, taking nothing."""
        wanted = self.pages_for(tokens) - len(pages)
        if wanted > len(self._free):
            raise CacheFull(f"{wanted} pages of {self.page_size} tokens are wanted, {len(self._free)} are free")
        for _ in range(wanted):
            pages.append(self._free.pop())

    def shrink(self, pages: list[int], tokens: int) -> None:
        """Gives back the pages past the first `tokens` tokens."""
        keep = self.pages_for(tokens)
        self._free.extend(reversed(pages[keep:]))
        del pages[keep:]

    def slots(self, pages: Sequence[int], begin: int, end: int) -> np.ndarray:
        """Where tokens [begin, end) of a sequence lie: int64 page * page_size + offset."""
        positions = np.arange(begin, end, dtype=np.int64)
        return np.asarray(pages, np.int64)[positions // self.page_size] * self.page_size + positions % self.page_size

    def release(self) -> None:
        """Gives the memory back; the cache holds nothing afterwards."""
        self.keys, self.values, self._free = [], [], []
