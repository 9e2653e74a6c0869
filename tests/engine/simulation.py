"""A device that does what a scheduler orders, without a model: pages hold token ids, and everything takes its time.

It runs orders one after the other, as a stream does, on a clock that moves when the host waits.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paddle_qwen1m.cache import PagePool, PrefixIndex
from paddle_qwen1m.engine import Request, SamplingParams
from paddle_qwen1m.engine.borders import Chunking
from paddle_qwen1m.engine.core import Event, Sequence, TokenLogprobs
from paddle_qwen1m.engine.orders import Advance, CopyPage, Decode, Drop, Head, Prefill, Rows
from paddle_qwen1m.engine.pacing import LayerWork, Pacer
from paddle_qwen1m.engine.scheduler import Scheduler, SchedulerLimits
from paddle_qwen1m.engine.tasks import Chosen, DecodeStep, FirstTokens, PromptLikelihoods, PromptLogits, Task
from paddle_qwen1m.engine.waiting import WaitingRoom

LAYERS = 4
EMPTY = -1


@dataclass
class Speed:
    """Seconds: of the host for an order, of a decode step, of a layer for each row and for each row and key, of a short
    chunk beside its rows, and by how much anything may be slower. A row of a sparse prompt has at most sparse_keys, and
    choosing them takes a layer of a chunk of_choice seconds for each key before it.
    """

    host: float = 0.0
    decode: float = 0.01
    of_row: float = 1e-5
    of_key: float = 1e-9
    overhead: float = 0.002
    jitter: float = 0.0
    sparse_keys: float = math.inf
    of_choice: float = 0.0


@dataclass
class Slot:
    """What the device knows of a slot."""

    pages: tuple[int, ...] = ()
    length: int = 0
    token: int = EMPTY


@dataclass
class Standing:
    """A chunk, the pieces of work that are left of it, and the seconds each takes."""

    order: Prefill
    left: list[float] = field(default_factory=list)


class Device:
    """Checks on the way that everything that is read has been written, and not by others."""

    def __init__(self, num_pages: int, page_size: int, slots: int, speed: Speed, rng: np.random.Generator) -> None:
        self.memory = np.full((num_pages, page_size), EMPTY, np.int64)
        self.page_size, self.speed, self.rng = page_size, speed, rng
        self.slots = [Slot() for _ in range(slots)]
        self.standing: Standing | None = None
        self.ended: Prefill | None = None
        self.now = self.free_at = 0.0
        self.cuts: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        self.computed = 0
        self.idle = 0.0

    def run(self, order: Any) -> tuple[float | None, bool]:
        """When the result of an order arrives, if it has one, and whether a chunk comes to its end with it."""
        self.now += self.speed.host
        if isinstance(order, Drop):
            assert self.standing is not None
            self.standing = None
        elif isinstance(order, CopyPage):
            self.memory[order.target, : order.tokens] = self.memory[order.source, : order.tokens]
        elif isinstance(order, Prefill):
            return self._prefill(order)
        elif isinstance(order, Advance):
            assert self.standing is not None
            return self._advance(self.standing, order.points)
        elif isinstance(order, Head):
            assert self.ended is not None
            assert order.first + order.count <= sum(len(rows.wanted) for rows in self.ended.rows)
            return self._takes(0.001), True
        elif isinstance(order, Decode):
            return self._decode(order), True
        return None, True

    def _prefill(self, order: Prefill) -> tuple[float | None, bool]:
        assert self.standing is None or order.points == 0, "a chunk begins while another one stands"
        for rows in order.rows:
            self.computed += len(rows.ids)
        chunk, points = Standing(order, self._pieces(order)), order.points
        if points:
            self.standing = chunk
        return self._advance(chunk, points)

    def _pieces(self, order: Prefill) -> list[float]:
        speed, pieces = self.speed, []
        linear = sum(len(rows.ids) for rows in order.rows) * speed.of_row
        attention = sum(len(rows.ids) * self._keys(rows) for rows in order.rows) * speed.of_key
        choosing = sum(rows.begin for rows in order.rows if rows.sparse) * speed.of_choice
        blocks = -(-max(len(rows.ids) for rows in order.rows) // 64)
        groups = -(-blocks // order.row_blocks) if order.row_blocks else 1
        for _ in range(LAYERS):
            pieces += [attention / groups + linear / 2 / groups] * groups + [linear / 2 + speed.overhead / LAYERS]
            pieces[-1 - groups] += choosing
        return pieces

    def _keys(self, rows: Rows) -> float:
        """What each row attends to, on average."""
        keys = rows.begin + len(rows.ids) / 2
        return min(keys, self.speed.sparse_keys) if rows.sparse else keys

    def _advance(self, chunk: Standing, points: int) -> tuple[float, bool]:
        count = points or len(chunk.left)
        seconds, chunk.left = sum(chunk.left[:count]), chunk.left[count:]
        for rows in chunk.order.rows:
            self._write(rows)
        if not chunk.left:
            self.ended = chunk.order
            if self.standing is chunk:
                self.standing = None
        return self._takes(seconds), not chunk.left

    def _write(self, rows: Rows) -> None:
        places = np.arange(rows.begin, rows.end)
        self.memory[np.asarray(rows.pages)[places // self.page_size], places % self.page_size] = rows.ids

    def _decode(self, order: Decode) -> float:
        for slot in order.leave:
            assert self.slots[slot].pages, "a slot is left that nobody has"
            self.slots[slot] = Slot()
        for join in order.join:
            assert not self.slots[join.slot].pages, "a slot is taken that somebody has"
            self.slots[join.slot] = Slot(join.pages, join.length, join.token)
        assert not any(slot.pages for slot in self.slots[order.slots :]), "a slot is left out"
        for slot in self.slots[: order.slots]:
            if slot.pages:
                page, place = divmod(slot.length, self.page_size)
                self.memory[slot.pages[page], place] = slot.token
                slot.length += 1
                slot.token = next_token(self.read(slot.pages, slot.length))
        return self._takes(self.speed.decode)

    def read(self, pages: Iterable[int], length: int) -> np.ndarray:
        """The tokens whose keys would be in these pages."""
        return self.memory[list(pages)].reshape(-1)[:length]

    def _takes(self, seconds: float) -> float:
        begin = max(self.now, self.free_at)
        self.idle += begin - self.free_at
        self.free_at = begin + seconds * (1 + self.speed.jitter * self.rng.random())
        return self.free_at


def next_token(tokens: np.ndarray) -> int:
    """What the model says: anything that depends on every token before it."""
    return int((np.arange(1, len(tokens) + 1) * (tokens + 1)).sum() % 997)


class World:
    """A scheduler and its device, and the loop that an engine is. Tokens are below 1000."""

    def __init__(
        self,
        num_pages: int = 64,
        *,
        page_size: int = 4,
        chunk: int = 16,
        chunk_len: int = 64,
        parts: int = 8,
        short: int = 0,
        slots: int = 4,
        ahead: int = 0,
        bound: float = 0.2,
        reuse: bool = False,
        tolerance: float = 0.0,
        speed: Speed | None = None,
        seed: int = 0,
    ) -> None:
        self.device = Device(num_pages, page_size, slots, speed or Speed(), np.random.default_rng(seed))
        self.pool = PagePool(num_pages, page_size, self._copy)
        self.prefixes = PrefixIndex(self.pool, tolerance) if reuse else None
        self.chunking = Chunking(chunk, chunk_len, page_size, parts)
        work = LayerWork(self.device.speed.of_row, self.device.speed.of_key)
        self.pacer = Pacer(bound, work, LAYERS, lambda: self.device.now)
        self.waiting = WaitingRoom(self.pool, self.chunking, slots, short, lambda length: 1.0, self.prefixes)
        self.scheduler = Scheduler(self.waiting, self.pool, SchedulerLimits(slots, short, ahead), self.pacer)
        self.posts: deque[tuple[Task, float]] = deque()
        self._chosen: deque[list[Chosen]] = deque()
        self.sequences: dict[str, Sequence] = {}
        self.events: list[tuple[float, Event]] = []
        self.tasks: list[tuple[float, Task]] = []

    def _copy(self, source: int, target: int, tokens: int) -> None:
        raise AssertionError("pages are copied in the order of the device's work alone")

    def add(
        self,
        name: str,
        prompt: Iterable[int],
        new_tokens: int | None = 3,
        *,
        sparse: bool = False,
        m2: float = 1.0,
        salt: str = "",
        positions: tuple[int, ...] = (),
        **params: Any,
    ) -> Sequence:
        options = {"temperature": 1.0 if params.get("n", 1) > 1 else 0.0, **params}
        sampling = None if new_tokens is None else SamplingParams(max_tokens=new_tokens, **options)
        ids = np.asarray(list(prompt), np.int64)
        request = Request(name, ids, sampling, logit_positions=positions)
        sequence = Sequence(request, 0, f"{'sparse' if sparse else 'dense'} {salt}", m2, sparse)
        self.scheduler.add(sequence)
        self.sequences[name] = sequence
        return sequence

    def step(self) -> bool:
        """One turn of an engine's loop; False when there is nothing left to do."""
        tasks = self.scheduler.next()
        for task in tasks:
            self.tasks.append((self.device.now, task))
            at, at_end = self.device.run(task.order)
            self.scheduler.ran(task, at_end=at_end)
            if at is not None:
                self.posts.append((task, at))
                self._check(task)
        while self.posts and (self.posts[0][1] <= self.device.now or not tasks):
            task, at = self.posts.popleft()
            tasks = [task]
            self.device.now = max(self.device.now, at)
            for event in self.scheduler.done(task, self._result(task)):
                self.events.append((self.device.now, event))
        return bool(tasks)

    def run(self) -> None:
        while self.step():
            pass

    def _check(self, task: Task) -> None:
        """What has been computed so far is what it should be."""
        for sequence in self.sequences.values():
            if sequence.pages and not sequence.is_gone:
                found = self.device.read(sequence.pages, sequence.num_cached)
                np.testing.assert_array_equal(found, sequence.prompt[: sequence.num_cached], sequence.id)
        if isinstance(task, DecodeStep):
            for slot, answer in task.held:
                prompt, held = answer.request.prompt, self.device.slots[slot]
                coming = held.length - len(prompt) - len(answer.token_ids)
                assert coming == (1 if self._chosen else 0), "tokens on their way when this step was ordered"
                expected = [*prompt, *answer.token_ids, *answer_to([*prompt, *answer.token_ids], coming)]
                np.testing.assert_array_equal(self.device.read(held.pages, held.length), expected, answer.request.id)
            self._chosen.append([Chosen(self.device.slots[slot].token, -1.0) for slot, _ in task.held])

    def _result(self, task: Task) -> Any:
        if isinstance(task, DecodeStep):
            return self._chosen.popleft()
        if isinstance(task, FirstTokens):
            return [Chosen(next_token(answer.request.prompt), -1.0) for answer in task.answers]
        if isinstance(task, PromptLogits):
            return np.zeros((task.order.count, 1))
        if isinstance(task, PromptLikelihoods):
            return [TokenLogprobs(int(token), -1.0, 1) for token in task.tokens]
        return None

    # --- what has happened ---

    def of(self, name: str, kind: type) -> list[tuple[float, Any]]:
        """When events of this kind came, and they."""
        return [(at, event) for at, event in self.events if event.id == name and isinstance(event, kind)]

    @property
    def orders(self) -> list[Any]:
        return [task.order for _, task in self.tasks]

    def cuts(self, name: str) -> list[tuple[int, int]]:
        """Where the prompt of a request was cut."""
        return [
            (part.begin, part.end)
            for _, task in self.tasks
            if isinstance(getattr(task, "order", None), Prefill)
            for part in task.chunk.parts  # type: ignore[union-attr]
            if part.sequence.id == name
        ]


def answer_to(prompt: Iterable[int], count: int) -> list[int]:
    """The answer that every prompt gets, whatever else runs."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(np.asarray(tokens)))
    return tokens[len(tokens) - count :]
