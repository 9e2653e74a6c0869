"""Decides what every rank does next: which prompt is read on and how far, and when running answers go on."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as ManyOf
from dataclasses import dataclass
from typing import Callable, NamedTuple, cast

import numpy as np

from paddle_qwen1m.cache import PagePool
from paddle_qwen1m.engine.core import Answer, Event, Finished, Logits, Prefilled, PromptLogprobs, Sequence
from paddle_qwen1m.engine.orders import Advance, Decode, Drop, Join, Prefill, Rows
from paddle_qwen1m.engine.pacing import ChunkPace, Pacer
from paddle_qwen1m.engine.slots import Slots
from paddle_qwen1m.engine.tasks import (
    Change,
    Chosen,
    Chunk,
    DecodeStep,
    FirstTokens,
    HeadTask,
    Part,
    PromptLogits,
    Read,
    Result,
    Task,
    heads,
)
from paddle_qwen1m.engine.waiting import WaitingRoom, next_turn, take_turn


@dataclass(frozen=True)
class SchedulerLimits:
    """max_num_seqs: answers at a time. short_tokens: a prompt with at most so many tokens to compute is short, and
    short ones share chunks of so many. ahead: what the device is given beside the one thing that it does.
    """

    max_num_seqs: int
    short_tokens: int
    ahead: int


class _Work(NamedTuple):
    """Something that reads prompts on: the seconds that it is expected to take, or the least part of it; what begins
    it, given the seconds that there are for it.
    """

    expected: float
    begin: Callable[[float], Task]


class Scheduler:
    """Continuous batching, without a model: `next` says what to give the device, `ran` is told that it was given, and
    `done` what came of it, in the same order.

    One long chunk at a time is on the device, and stands there at points. In between, decode steps run as often as the
    bound on the time between tokens needs, and short prompts, whole and together; the end of a long prompt, which may
    take long behind so many keys, goes from point to point as the rest does. Without prompts to read every step
    decodes, and the next is queued behind it. Long prompts take turns where their chunks end, short ones and what is
    admitted come in their order.
    """

    def __init__(self, waiting: WaitingRoom, pool: PagePool, limits: SchedulerLimits, pacer: Pacer) -> None:
        self._waiting, self._pool, self._limits, self._pacer = waiting, pool, limits, pacer
        self._sequences: dict[str, Sequence] = {}
        self._reading: list[Sequence] = []
        self._slots = Slots(limits.max_num_seqs)
        self._chunk: Chunk | None = None
        self._heads: deque[HeadTask] = deque()
        self._changes: list[Change] = []
        self._decoding: deque[DecodeStep] = deque()
        self._outstanding = 0
        self._was_decode = self._was_short = False

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    @property
    def requests(self) -> ManyOf[str]:
        """The ids of all that wait or run."""
        return tuple(self._sequences)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Lines a sequence up. ValueError when it can never run."""
        self._waiting.add(sequence)
        self._sequences[sequence.id] = sequence

    def abort(self, request_id: str) -> bool:
        """Drops a request in whatever state; it holds nothing any more. False where there is none."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        sequence.is_gone = True
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            return True
        if sequence in self._reading:
            self._reading.remove(sequence)
        if self._chunk is not None and self._chunk.parts[0].sequence is sequence:
            self._chunk = None
            self._changes.append(Change(Drop()))
        self._heads = deque(head for head in self._heads if not all(one.is_gone for one in head.sequences))
        for answer in sequence.answers:
            self._end_answer(sequence, answer, "abort")
        self._waiting.leave(sequence)
        return True

    def stop(self, request_id: str, index: int, reason: int | str) -> list[Event] | None:
        """Ends one answer, and the request where it was the last; None where there is no such answer any more."""
        sequence = self._sequences.get(request_id)
        if sequence is None or not 0 <= index < len(sequence.answers):
            return None
        answer = sequence.answers[index]
        if answer.finish_reason is not None or not answer.token_ids:
            return None
        answer.stop_reason = reason
        self._end_answer(sequence, answer, "stop")
        return self._finished(sequence)

    def rest(self) -> None:
        """The device has been told to forget whatever it had of requests; there are none."""
        assert not self._sequences
        self._pacer.forget()
        self._slots.empty()
        self._heads.clear()
        self._changes.clear()
        self._decoding.clear()
        self._chunk = None
        self._outstanding = 0

    # --- what to do next ---

    def next(self) -> list[Task]:
        """What to give the device now: nothing while it has enough, or when nothing is left to do."""
        changes, self._changes = self._changes, []
        return [*changes, *([] if self._is_busy else self._choose())]

    @property
    def _is_busy(self) -> bool:
        if self._outstanding == 0:
            return False
        queued = self._pacer.end_of() - self._pacer.clock()
        return self._outstanding > self._limits.ahead or queued > self._pacer.bound / 2

    def _choose(self) -> list[Task]:
        self._reading += self._waiting.admit(self._reading)
        work, room = self._next_work(), self._room()
        if work is None:
            return [self._decode()] if self._can_decode else []
        if len(self._slots) and not self._decoding and room < work.expected and not self._was_decode:
            return [self._decode()]
        self._was_decode = False
        return [work.begin(room)]

    @property
    def _can_decode(self) -> bool:
        """Whether a decode step has something to do. While the one before it is under way, its tokens are not known
        here: then every answer must stay in its slot, none may have a say in its next token, and some must go on.
        """
        if not self._decoding:
            return len(self._slots) > 0
        return (
            self._slots.are_settled
            and all(answer.rules is None for answer in self._slots)
            and any(answer.tokens_left > len(self._decoding) for answer in self._slots)
        )

    def _room(self) -> float:
        """Seconds that may go by before the device has to begin a decode step."""
        if not len(self._slots):
            return math.inf
        if self._decoding:
            return self._pacer.room(self._pacer.end_of(self._decoding[-1].queued))
        return self._pacer.room(min(answer.chosen_at for answer in self._slots))

    def _next_work(self) -> _Work | None:
        """What reads prompts on, if anything does: the heads of the chunk that has ended, which the end of the next one
        would lose, short prompts (not twice while long ones wait), the chunk that stands at a point, or a new one.
        """
        pacer = self._pacer
        if self._heads:
            return _Work(pacer.expected("head"), self._head)
        standing = self._chunk
        free = [one for one in self._reading if standing is None or one is not standing.parts[0].sequence]
        short = [one for one in free if one.own_tokens <= self._limits.short_tokens]
        long = [one for one in free if one.own_tokens > self._limits.short_tokens]
        if short and not (self._was_short and (standing is not None or long)):
            parts = self._together(short)
            kind = pacer.short(sum(part.end - part.begin for part in parts))
            return _Work(pacer.expected(kind), lambda _room: self._begin_short(parts, kind))
        if standing is not None and standing.pace is not None:
            return _Work(standing.pace.seconds_a_point, lambda room: self._advance(standing, room))
        if long:
            part = self._next_part(next_turn(long))
            pace = pacer.begin(part.end - part.begin, part.begin, part.sequence.sparse)
            return _Work(pace.seconds_a_point, lambda room: self._begin(part, pace, long, room))
        return None

    def _together(self, prompts: Iterable[Sequence]) -> tuple[Part, ...]:
        """The first of these short prompts, as many as share a chunk."""
        parts: list[Part] = []
        left = self._limits.short_tokens
        for part in map(self._next_part, prompts):
            left -= part.end - part.begin
            if left < 0:
                break
            parts.append(part)
        return tuple(parts)

    def _begin_short(self, parts: tuple[Part, ...], kind: str) -> Task:
        self._was_short = True
        order = Prefill(tuple(map(self._rows, parts)), points=0)
        return Read(order, self._pacer.queue(kind), Chunk(parts))

    def _begin(self, part: Part, pace: ChunkPace, candidates: ManyOf[Sequence], room: float) -> Task:
        self._was_short = False
        take_turn(part.sequence, candidates)
        points = self._pacer.points(pace, room)
        self._chunk = Chunk((part,), pace)
        order = Prefill((self._rows(part),), pace.row_blocks, points)
        return Read(order, self._pacer.queue_points(pace, points), self._chunk)

    def _advance(self, chunk: Chunk, room: float) -> Task:
        self._was_short = False
        assert chunk.pace is not None
        points = self._pacer.points(chunk.pace, room)
        return Read(Advance(points), self._pacer.queue_points(chunk.pace, points), chunk)

    def _head(self, _room: float) -> Task:
        task = self._heads.popleft()
        task.queued = self._pacer.queue("head")
        return task

    def _decode(self) -> Task:
        self._was_decode = True
        seats = self._slots.seat()
        join = tuple(
            Join(slot, answer.token_ids[-1], answer.num_cached, tuple(answer.pages)) for slot, answer in seats.joining
        )
        asked = any(answer.params.logprobs is not None for _, answer in seats.held)
        order = Decode(seats.count, join, seats.leaving, asked)
        queued = self._pacer.queue("decode")
        step = DecodeStep(order, queued, seats.joining, seats.leaving, seats.held)
        self._decoding.append(step)
        return step

    def _next_part(self, sequence: Sequence) -> Part:
        begin = sequence.num_cached
        return Part(sequence, begin, sequence.ends[bisect_right(sequence.ends, begin)])

    def _rows(self, part: Part) -> Rows:
        sequence, begin, end = part
        if sequence.started is None:
            sequence.started = self._pacer.clock()
        return Rows(
            ids=sequence.prompt[begin:end],
            begin=begin,
            pages=tuple(sequence.pages[: self._pool.pages_for(end)]),
            length=len(sequence.prompt),
            sparse=sequence.sparse,
            wanted=tuple(place - begin for place in sequence.wanted(begin, end)),
        )

    # --- what has become of it ---

    def ran(self, task: Task, *, at_end: bool) -> None:
        """The device was given a task. at_end: the chunk that it goes on with comes to its end."""
        if isinstance(task, Change):
            return
        self._outstanding += 1
        if isinstance(task, Read) and at_end:
            self._end_chunk(task)

    def _end_chunk(self, task: Read) -> None:
        task.ended = True
        if self._chunk is task.chunk:
            self._chunk = None
        for sequence, _, end in task.chunk.parts:
            sequence.num_cached = end
            sequence.results += 1
            self._waiting.keep(sequence)
            if sequence.is_prefilled:
                self._reading.remove(sequence)
                self._changes += map(Change, self._waiting.hand_out(sequence))
        for head in heads(task.chunk):
            for sequence in head.sequences:
                sequence.results += 1
            self._heads.append(head)

    def done(self, task: Task, result: Result = None) -> list[Event]:
        """What becomes of the oldest task that was given and has a result: see tasks.py for what that is."""
        self._outstanding -= 1
        self._pacer.finished(at_end=isinstance(task, Read) and task.ended)
        if isinstance(task, Read):
            return self._read(task) if task.ended else []
        if isinstance(task, DecodeStep):
            self._decoding.popleft()
            return self._chosen([answer for _, answer in task.held], cast(ManyOf[Chosen], result))
        if isinstance(task, FirstTokens):
            for sequence in task.sequences:
                sequence.results -= 1
            events = self._chosen(task.answers, cast(ManyOf[Chosen], result))
            for answer in task.answers:
                if answer.finish_reason is None:
                    self._slots.join(answer)
            return events
        assert not isinstance(task, Change)
        sequence = task.sequence
        sequence.results -= 1
        if sequence.is_gone:
            return []
        if isinstance(task, PromptLogits):
            return [Logits(sequence.id, cast(np.ndarray, result)), *self._finished(sequence)]
        return [PromptLogprobs(sequence.id, task.begin, tuple(result)), *self._finished(sequence)]  # type: ignore

    def _read(self, task: Read) -> list[Event]:
        events: list[Event] = []
        for sequence, _, end in task.chunk.parts:
            sequence.results -= 1
            if sequence.is_gone:
                continue
            assert sequence.started is not None
            done, total = end, len(sequence.prompt)
            reused, restored = sequence.num_reused, sequence.num_restored
            events.append(Prefilled(sequence.id, done, total, reused, sequence.started, restored))
            events += self._finished(sequence)
        return events

    def _chosen(self, answers: Iterable[Answer], result: ManyOf[Chosen]) -> list[Event]:
        events: list[Event] = []
        for answer, chosen in zip(answers, result):
            if answer.finish_reason is not None:  # it ended while this was on its way
                continue
            answer.chosen_at = self._pacer.clock()
            events.append(answer.append(*chosen))
            if answer.finish_reason is not None:
                sequence = self._sequences[answer.request.id]
                self._slots.leave(answer)
                self._waiting.retire(sequence, answer)
                events += self._finished(sequence)
        return events

    def _end_answer(self, sequence: Sequence, answer: Answer, reason: str) -> None:
        if answer.finish_reason is None:
            answer.finish_reason = reason
            self._slots.leave(answer)
            self._waiting.retire(sequence, answer)

    def _finished(self, sequence: Sequence) -> list[Event]:
        if not sequence.is_finished:
            return []
        del self._sequences[sequence.id]
        self._waiting.leave(sequence)
        return [Finished(sequence.id, sequence.completions())]
