"""Decides what the next step works on: one chunk of a prompt, or one token of every running sequence."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Union

from paddle_qwen1m.cache import CacheFull, PagePool, PrefixIndex, digests
from paddle_qwen1m.engine.core import Sequence


def chunk_end(begin: int, prompt_length: int, max_tokens: int, chunk_len: int) -> int:
    """Where the prefill chunk that starts at `begin` ends: after max_tokens at most.

    A chunk that would end inside a DCA chunk which it did not begin in stops at that chunk's border: the critical keys
    are chosen anew for each part of a DCA chunk, so that fewer parts cost fewer probes.
    """
    end = min(begin + max_tokens, prompt_length)
    border = end // chunk_len * chunk_len
    return border if end < prompt_length and begin < border else end


@dataclass(frozen=True)
class PrefillChunk:
    """Step: the prompt of `sequence` from its num_cached on, up to `end`."""

    sequence: Sequence
    end: int


@dataclass(frozen=True)
class DecodeStep:
    """Step: the next token of each sequence."""

    sequences: tuple[Sequence, ...]


Work = Union[PrefillChunk, DecodeStep]


class Scheduler:
    """First come, first served: a sequence runs once the pool has the pages for its longest possible answer, and a
    prompt is read to its end before running sequences go on.

    max_tokens: of a prefill chunk. chunk_len: of a DCA chunk. prefixes: where prompts look for what they can reuse,
    None where they do not.
    """

    def __init__(self, pool: PagePool, max_tokens: int, chunk_len: int, prefixes: PrefixIndex | None = None) -> None:
        self._pool, self._prefixes = pool, prefixes
        self._max_tokens, self._chunk_len = max_tokens, chunk_len
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def add(self, sequence: Sequence) -> None:
        """Lines a sequence up; one that has pages already brings them along. ValueError when it can never run."""
        if self._pool.pages_for(sequence.max_length) > self._pool.num_pages:
            raise ValueError(
                f"request {sequence.id}: {sequence.max_length:,} tokens, prompt and answer together, do not fit the KV "
                f"cache of {self._pool.num_pages * self._pool.page_size:,} tokens"
            )
        self._waiting.append(sequence)

    def next(self) -> Work | None:
        """What to do now; None when nothing is left to do."""
        reading = next((sequence for sequence in self._running if not sequence.is_prefilled), None)
        sequence = reading or self._admit()
        if sequence is not None:
            return PrefillChunk(sequence, self._chunk_end(sequence, sequence.num_cached))
        return DecodeStep(tuple(self._running)) if self._running else None

    def cached(self, sequence: Sequence) -> None:
        """A chunk of the sequence's prompt is in the cache, up to its num_cached: others may reuse it now."""
        if self._prefixes is not None and sequence.num_cached in sequence.borders:
            digest = sequence.borders[sequence.num_cached]
            self._prefixes.add(digest, sequence.num_cached, sequence.pages)

    def retire(self, sequence: Sequence) -> None:
        """Takes a finished or aborted sequence out and gives its pages back."""
        (self._running if sequence in self._running else self._waiting).remove(sequence)
        self._pool.release(sequence.pages)
        sequence.pages = []

    def _admit(self) -> Sequence | None:
        if not self._waiting:
            return None
        sequence = self._waiting[0]
        try:
            if not sequence.pages and self._prefixes is not None:
                self._reuse(sequence, self._prefixes)
            self._pool.grow(sequence.pages, sequence.max_length)
        except CacheFull:
            if sequence.num_reused:
                self._pool.release(sequence.pages)
                sequence.pages, sequence.num_cached, sequence.num_reused = [], 0, 0
            return None
        self._running.append(self._waiting.popleft())
        return sequence

    def _reuse(self, sequence: Sequence, prefixes: PrefixIndex) -> None:
        if not sequence.borders:
            sequence.borders = dict(digests(sequence.prompt, self._borders(sequence), sequence.made_under))
        prefix = prefixes.find(sequence.borders.values())
        if prefix is not None:
            sequence.pages = self._pool.fork(prefix.pages, prefix.tokens)
            sequence.num_cached = sequence.num_reused = prefix.tokens

    def _borders(self, sequence: Sequence) -> Iterator[int]:
        """Where the prompt's chunks end, but for the last: its last tokens are always computed."""
        end = self._chunk_end(sequence, 0)
        while end < len(sequence.prompt):
            yield end
            end = self._chunk_end(sequence, end)

    def _chunk_end(self, sequence: Sequence, begin: int) -> int:
        return chunk_end(begin, len(sequence.prompt), self._max_tokens, self._chunk_len)
