"""Decides what the next step works on: one chunk of a prompt, or one token of every running sequence."""

from __future__ import annotations

from collections import deque

from paddle_qwen1m.cache import CacheFull, PagedCache
from paddle_qwen1m.engine.core import Sequence


def chunk_end(begin: int, prompt_length: int, max_tokens: int, chunk_len: int) -> int:
    """Where the prefill chunk that starts at `begin` ends: after max_tokens at most.

    A chunk that would end inside a DCA chunk which it did not begin in stops at that chunk's border: the critical keys
    are chosen anew for each part of a DCA chunk, so that fewer parts cost fewer probes.
    """
    end = min(begin + max_tokens, prompt_length)
    border = end // chunk_len * chunk_len
    return border if end < prompt_length and begin < border else end


class Scheduler:
    """First come, first served. A sequence is admitted when the cache has the pages for its longest possible answer."""

    def __init__(self, cache: PagedCache, max_num_batched_tokens: int, chunk_len: int) -> None:
        self._cache = cache
        self._max_tokens = max_num_batched_tokens
        self._chunk_len = chunk_len
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def next_chunk(self) -> tuple[Sequence, int] | None:
        """A sequence and the end of its next prefill chunk; None when no prompt can go on."""
        partial = next((sequence for sequence in self._running if not sequence.is_prefilled), None)
        sequence = partial or self._admit()
        if sequence is None:
            return None
        return sequence, chunk_end(sequence.num_cached, len(sequence.prompt), self._max_tokens, self._chunk_len)

    def next_batch(self) -> list[Sequence]:
        """Every running sequence."""
        return list(self._running)

    def retire(self, sequence: Sequence) -> None:
        """Takes a finished or aborted sequence out and frees its pages."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._cache.shrink(sequence.pages, 0)

    def _admit(self) -> Sequence | None:
        if not self._waiting:
            return None
        try:
            self._cache.grow(self._waiting[0].pages, self._waiting[0].max_length)
        except CacheFull:
            return None
        self._running.append(self._waiting.popleft())
        return self._running[-1]
