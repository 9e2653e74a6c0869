"""Which pages a prompt can reuse: prefixes that end where a prefill chunk ended, found by their tokens."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from paddle_qwen1m.cache.pool import PagePool


@dataclass(frozen=True)
class Prefix:
    """The first `tokens` tokens of a prompt and the pages that hold their keys; the last page may hold more."""

    tokens: int
    pages: tuple[int, ...]


def digests(prompt: np.ndarray, borders: Iterable[int], name: str) -> Iterator[tuple[int, bytes]]:
    """Each border with the digest of what its prefix is: the tokens before it, and the borders on the way.

    prompt: int64 [n]. borders: ascending. name: what else decides about keys (dense or sparse, the temperature).
    """
    running, begin = hashlib.blake2b(name.encode(), digest_size=16), 0
    for border in borders:
        running.update(border.to_bytes(8, "little") + prompt[begin:border].tobytes())
        begin = border
        yield border, running.copy().digest()


class PrefixIndex:
    """Prefixes by digest. It holds their pages in the pool, and gives up the least recently used when asked to."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._prefixes: OrderedDict[bytes, Prefix] = OrderedDict()
        pool.reclaim = self._give_up_one

    def __len__(self) -> int:
        return len(self._prefixes)

    def add(self, digest: bytes, tokens: int, pages: Sequence[int]) -> None:
        """Remembers a prefix whose keys are all in `pages`, which a sequence holds."""
        if digest not in self._prefixes:
            prefix = Prefix(tokens, tuple(pages[: self._pool.pages_for(tokens)]))
            self._pool.hold(prefix.pages, index=True)
            self._prefixes[digest] = prefix
        self._prefixes.move_to_end(digest)

    def find(self, keys: Iterable[bytes]) -> Prefix | None:
        """The last known one of these digests, a prompt's prefixes in order; those found on the way count as used."""
        found = None
        for digest in keys:
            prefix = self._prefixes.get(digest)
            if prefix is not None:
                self._prefixes.move_to_end(digest)
                found = prefix
        return found

    def _give_up_one(self) -> bool:
        if not self._prefixes:
            return False
        _, prefix = self._prefixes.popitem(last=False)
        self._pool.release(prefix.pages, index=True)
        return True
