"""How long things take on the device: what is queued is expected to end when, and how much more fits before that."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Callable

from paddle_qwen1m.config import BLOCK

FORGET = 0.95
"""An estimate is the longest time seen; by this factor it shrinks where things take less."""
PLANNED = 0.9
"""Of the bound on the time between tokens so much is planned with: an estimate is no promise."""
PART_OF_BOUND = 0.25
"""Of the bound on the time between tokens, one advance of a chunk takes this part."""
COMPARABLE = 0.5
"""What a chunk took says how long others take, unless it had less than this part of the work of the last that did: the
end of a prompt, where much does not depend on its rows.
"""
ABREAST = 6
"""Row blocks: a multiple of those that a kernel's thread block takes together, two densely and three sparsely."""


@dataclass(frozen=True)
class LayerWork:
    """Operations of one layer: for each row, and for each pair of a row and a key that it attends to. chosen: how many
    keys a row of a sparse prompt has, at most. row_blocks: that attention works on at once.
    """

    of_row: float
    of_key: float
    chosen: float = math.inf
    row_blocks: int = ABREAST

    def of(self, rows: int, begin: int, sparse: bool) -> float:
        """Of `rows` tokens that stand behind `begin` others."""
        return rows * (self.of_row + self.of_key * self.keys(begin + rows / 2, sparse))

    def keys(self, before: float, sparse: bool) -> float:
        """That a row attends to of those before it."""
        return min(before, self.chosen) if sparse else before

    def whole(self, row_blocks: int) -> int:
        """As many or fewer row blocks, so that what is computed together is not parted."""
        for together in (self.row_blocks, ABREAST):
            if row_blocks >= together:
                return row_blocks - row_blocks % together
        return row_blocks


@dataclass
class Rate:
    """Seconds a unit of work, as the last comparable chunk took it."""

    seconds: float = 0.0
    work: float = 0.0

    def __call__(self) -> float:
        return self.seconds / self.work if self.work else 0.0

    def learn(self, seconds: float, work: float) -> None:
        if work >= COMPARABLE * self.work:
            self.seconds, self.work = seconds, work
        else:  # one that is so small again and again is what there is
            self.seconds, self.work = self.seconds / 2, self.work / 2


@dataclass(eq=False)
class Queued:
    """Something that the device was given to do: since when it was, and the seconds that it was expected to take."""

    kind: str
    since: float
    expected: float
    points: int = 1
    chunk: ChunkPace | None = None


@dataclass(eq=False)
class ChunkPace:
    """A chunk that is read point by point: `row_blocks` as in Prefill, the seconds that it has taken so far."""

    work: float
    sparse: bool
    row_blocks: int
    seconds_a_point: float
    seconds: float = field(default=0.0)


class Pacer:
    """Knows what the device has been given to do, in order, and learns how long each kind of thing takes.

    bound: seconds between two tokens of an answer while prompts are read. layers: of the model. clock: seconds.
    """

    def __init__(self, bound: float, work: LayerWork, layers: int, clock: Callable[[], float]) -> None:
        self.bound, self.clock = bound, clock
        self._work, self._layers = work, layers
        self._seconds: dict[str, float] = {}
        self._rates: defaultdict[bool, Rate] = defaultdict(Rate)
        """Of dense and of sparse prompts."""
        self._queue: deque[Queued] = deque()
        self._idle_since = -math.inf

    def queue(self, kind: str, expected: float | None = None) -> Queued:
        """Tells that something is given to the device now."""
        return self._queue_up(Queued(kind, self.clock(), self.expected(kind) if expected is None else expected))

    def queue_points(self, chunk: ChunkPace, points: int) -> Queued:
        """Tells that the device is to go on with a chunk by so many points."""
        return self._queue_up(Queued("points", self.clock(), points * chunk.seconds_a_point, points, chunk))

    def finished(self, *, at_end: bool = False) -> None:
        """Tells that the oldest thing has just been done. at_end: of its chunk."""
        one, now = self._queue.popleft(), self.clock()
        seconds = now - max(one.since, self._idle_since)
        self._idle_since = now
        if one.chunk is None:
            self._seconds[one.kind] = max(seconds, FORGET * self._seconds.get(one.kind, 0.0))
            return
        chunk = one.chunk
        chunk.seconds += seconds
        chunk.seconds_a_point = max(seconds / one.points, FORGET * chunk.seconds_a_point)
        if at_end:
            self._rates[chunk.sparse].learn(chunk.seconds, self._layers * chunk.work)

    def forget(self) -> None:
        """Nothing is queued any more: what was has failed."""
        self._queue.clear()

    def expected(self, kind: str) -> float:
        """Seconds that something of this kind takes; 0 for what was never seen."""
        return self._seconds.get(kind, 0.0)

    def end_of(self, wanted: Queued | None = None) -> float:
        """When something that is queued is expected to end, all of it by default."""
        now = self.clock()
        end = now
        for number, one in enumerate(self._queue):
            begun = now - max(one.since, self._idle_since) if number == 0 else 0.0
            end += max(0.0, one.expected - begun)
            if one is wanted:
                break
        return end

    def room(self, since: float) -> float:
        """Seconds of work for which a decode step behind it should still end within the bound after `since`."""
        return since + PLANNED * self.bound - self.expected("decode") - self.end_of()

    def short(self, rows: int) -> str:
        """The kind of a chunk of short prompts, by the next power of two of its rows."""
        return f"short {1 << (rows - 1).bit_length()}"

    def begin(self, rows: int, begin: int, sparse: bool) -> ChunkPace:
        """The pace of a new chunk: layers that would take too long are cut between row blocks of their attention."""
        work = self._work.of(rows, begin, sparse)
        rate = self._rates[sparse]() or self._rates[False]()
        layer, most = rate * work, self.bound * PART_OF_BOUND
        row_blocks = 0
        if layer / 2 > most:
            a_block = rate * BLOCK * self._work.of_key * self._work.keys(begin + rows, sparse)
            fitting = self._work.whole(max(1, int(most / a_block))) if a_block else 0
            row_blocks = fitting if fitting * BLOCK < rows else 0
        return ChunkPace(work, sparse, row_blocks, min(most, layer / 2) if row_blocks else layer / 2)

    def points(self, chunk: ChunkPace, room: float) -> int:
        """How many points the chunk goes on by: as many as an advance may take and `room` seconds hold, at least 1; and
        no more before it has been timed: others say little of a sparse chunk, whose time depends on what it selects.
        """
        if not chunk.seconds:
            return 1
        return max(1, int(min(self.bound * PART_OF_BOUND, room) / chunk.seconds_a_point))

    def _queue_up(self, one: Queued) -> Queued:
        self._queue.append(one)
        return one

    @property
    def outstanding(self) -> Sequence[Queued]:
        return self._queue
