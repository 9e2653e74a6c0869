"""Orders together with what becomes of their results on rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ManyOf
from dataclasses import dataclass
from typing import NamedTuple, Union

import numpy as np

from paddle_qwen1m.engine.core import Answer, Sequence, TokenLogprobs
from paddle_qwen1m.engine.orders import HEAD_ROWS, Advance, CopyPage, Decode, Drop, Head, Prefill
from paddle_qwen1m.engine.pacing import ChunkPace, Queued


class Chosen(NamedTuple):
    """A token that was sampled, its log-probability, and how likely it and others were, where anybody asked."""

    token: int
    logprob: float
    logprobs: TokenLogprobs | None = None


class Part(NamedTuple):
    """The tokens [begin, end) of a prompt."""

    sequence: Sequence
    begin: int
    end: int


@dataclass(eq=False)
class Chunk:
    """Parts of prompts that are read together; `pace` where that happens point by point."""

    parts: tuple[Part, ...]
    pace: ChunkPace | None = None


@dataclass(eq=False)
class Change:
    """Something that has no result."""

    order: Drop | CopyPage


@dataclass(eq=False)
class Read:
    """Goes on with a chunk. ended: it comes to its end with this order."""

    order: Prefill | Advance
    queued: Queued
    chunk: Chunk
    ended: bool = False


@dataclass(eq=False)
class DecodeStep:
    """Gives a Chosen for each slot and its answer in `held`, once `leaving` slots are emptied and `joining` filled."""

    order: Decode
    queued: Queued
    joining: tuple[tuple[int, Answer], ...]
    leaving: tuple[int, ...]
    held: tuple[tuple[int, Answer], ...]


@dataclass(eq=False)
class FirstTokens:
    """Gives the first Chosen of each answer of `sequences`, which have a row of logits each."""

    order: Head
    sequences: tuple[Sequence, ...]
    queued: Queued | None = None

    @property
    def answers(self) -> list[Answer]:
        return [answer for sequence in self.sequences for answer in sequence.answers]


@dataclass(eq=False)
class PromptLogits:
    """Gives logits float32 [n, vocab] after the next n logit positions of a request."""

    order: Head
    sequence: Sequence
    queued: Queued | None = None

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return (self.sequence,)


@dataclass(eq=False)
class PromptLikelihoods:
    """Gives the TokenLogprobs of a prompt's tokens from position `begin` on, one for each row."""

    order: Head
    sequence: Sequence
    begin: int
    queued: Queued | None = None

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return (self.sequence,)

    @property
    def tokens(self) -> np.ndarray:
        """int64 [count]"""
        return self.sequence.prompt[self.begin : self.begin + self.order.count]


HeadTask = Union[FirstTokens, PromptLogits, PromptLikelihoods]
Task = Union[Change, Read, DecodeStep, HeadTask]
Result = Union[None, np.ndarray, ManyOf[Chosen], ManyOf[TokenLogprobs]]


def heads(chunk: Chunk) -> Iterator[HeadTask]:
    """What is asked of the rows that a chunk's end has left: see orders.Head for their numbers."""
    first, last_rows = 0, []
    for sequence, begin, end in chunk.parts:
        request, places = sequence.request, sequence.wanted(begin, end)
        last = len(sequence.prompt) - 1
        asked = set(request.logit_positions)
        for number, count in runs([number for number, place in enumerate(places) if place in asked]):
            yield PromptLogits(Head(first + number, count), sequence)
        if sequence.asks_likelihoods:
            for number, count in runs([number for number, place in enumerate(places) if place < last]):
                yield PromptLikelihoods(Head(first + number, count), sequence, places[number] + 1)
        first += len(places)
        if end == len(sequence.prompt) and sequence.answers:
            last_rows.append((first - 1, sequence))
    numbers = [number for number, _ in last_rows]
    sequences = dict(last_rows)
    for number, count in runs(numbers):
        yield FirstTokens(Head(number, count), tuple(sequences[number + row] for row in range(count)))


def runs(numbers: ManyOf[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as runs of at most HEAD_ROWS: the first one, and how many."""
    first, count = 0, 0
    for number in numbers:
        if count and number == first + count and count < HEAD_ROWS:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count
