"""Decides what the next step works on: one chunk of a prompt, or one token of every running sequence."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from typing import Union

from paddle_qwen1m.cache import CacheFull, PagePool, PrefixChain, PrefixIndex
from paddle_qwen1m.engine.borders import Chunking
from paddle_qwen1m.engine.core import Sequence


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

    chunking: where prompts are cut. prefixes: where they look for what they can reuse, None where they do not.
    """

    def __init__(self, pool: PagePool, chunking: Chunking, prefixes: PrefixIndex | None = None) -> None:
        self._pool, self._chunking, self._prefixes = pool, chunking, prefixes
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
            return PrefillChunk(sequence, self._chunk_end(sequence))
        return DecodeStep(tuple(self._running)) if self._running else None

    def cached(self, sequence: Sequence) -> None:
        """A chunk of the sequence's prompt is in the cache, up to its num_cached: others may reuse it now."""
        if self._prefixes is not None and sequence.chain is not None:
            self._prefixes.add(sequence.chain, sequence.num_reused, sequence.num_cached, sequence.pages)

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
        if sequence.chain is None:
            prompt, size = sequence.prompt, self._pool.page_size
            cuts = self._chunking.cuts(len(prompt), sparse=sequence.sparse)
            sequence.chain = PrefixChain.of(prompt, cuts, sequence.made_under, sequence.m2, size)
        prefix = prefixes.find(sequence.chain)
        if prefix.tokens:
            sequence.pages = self._pool.fork(prefix.pages, prefix.tokens)
            sequence.num_cached = sequence.num_reused = prefix.tokens

    def _chunk_end(self, sequence: Sequence) -> int:
        ends = self._chunking.ends(len(sequence.prompt), sparse=sequence.sparse)
        return ends[bisect_right(ends, sequence.num_cached)]
