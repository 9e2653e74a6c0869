"""Lanes that ranks copy into each other's memory, as on GPUs: the host queues all, streams come to it when they do.

Each rank has a stream that computes, one that copies and one for collectives; which of all goes on is drawn.
"""

from __future__ import annotations

import ctypes
import math
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Callable, NamedTuple

import numpy as np
import paddle
import pytest
from test_lanes import EPS, LAYERS, WIDTH, Layers, Rank

from paddle_qwen1m import ops
from paddle_qwen1m.parallel.copies import Copies
from paddle_qwen1m.parallel.lanes import Lanes
from paddle_qwen1m.parallel.pending import Pending
from paddle_qwen1m.parallel.room import Room

COPIER = 7
COMPUTES, COPIES, COLLECTIVES = range(3)


class Event:
    """Of a stream, once that has come to it."""

    done = False


class Queued(NamedTuple):
    run: Callable[[], object]
    ready: Callable[[], bool]


class Machine:
    """The streams of all ranks. rank: whose host is running."""

    def __init__(self, degree: int, seed: int) -> None:
        self.degree, self.rank = degree, 0
        self.streams: list[list[deque[Queued]]] = [[deque() for _ in range(3)] for _ in range(degree)]
        self.sent = [[Event() for _ in range(ops.COPIER_MARKS)] for _ in range(degree)]
        self._draw = np.random.default_rng(seed)
        self._speeds = self._draw.choice([1, 1, 0.02], (degree, 3))
        """Of the streams: some are far behind the others."""

    def queue(self, stream: int, run: Callable[[], object], ready: Callable[[], bool] = lambda: True) -> None:
        self.streams[self.rank][stream].append(Queued(run, ready))

    def record(self, stream: int) -> Event:
        event = Event()
        self.queue(stream, lambda: setattr(event, "done", True))
        return event

    def wait(self, stream: int, event: Event) -> None:
        self.queue(stream, lambda: None, lambda: event.done)

    def run(self) -> None:
        """Everything that is queued."""
        while any(stream for own in self.streams for stream in own):
            able = [
                (rank, number)
                for rank, own in enumerate(self.streams)
                for number, stream in enumerate(own)
                if stream and stream[0].ready()
            ]
            assert able, "everybody waits for somebody"
            speeds = np.array([self._speeds[place] for place in able])
            rank, number = able[self._draw.choice(len(able), p=speeds / speeds.sum())]
            self.streams[rank][number].popleft().run()


class Device:
    """The ops of one machine; whatever they read and write, they do when their stream comes to it."""

    def __init__(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._machine = machine
        self._rms_norm, self._parts_rms_norm = ops.rms_norm, ops.parts_rms_norm
        for name in ("send_rows", "await_rows", "rms_norm", "parts_rms_norm"):
            monkeypatch.setattr(ops, name, getattr(self, name))

    def send_rows(
        self, _values: Any, _copier: int, sources: Any, targets: Any, flags: Any, size: int, number: int, mark: int
    ) -> None:
        machine = self._machine
        machine.wait(COPIES, machine.record(COMPUTES))
        for source, target, flag in zip(sources, targets, flags):
            machine.queue(COPIES, lambda source=source, target=target: ctypes.memmove(target, source, size))
            machine.queue(COPIES, lambda flag=flag: setattr(ctypes.c_uint32.from_address(flag), "value", number))
        machine.sent[machine.rank][mark] = machine.record(COPIES)

    def await_rows(self, _values: Any, copier: int, flags: Sequence[int], number: int, mark: int) -> None:
        if copier:
            self._machine.wait(COMPUTES, self._machine.sent[self._machine.rank][mark])
        seen = [ctypes.c_uint32.from_address(flag) for flag in flags]
        self._machine.queue(COMPUTES, lambda: None, lambda: all(flag.value == number for flag in seen))

    def rms_norm(self, hidden: paddle.Tensor, weight: paddle.Tensor, eps: float, out: None) -> paddle.Tensor:
        assert out is None, "ranks bring their shares together"
        return self.product(lambda values: self._rms_norm(paddle.to_tensor(values), weight, eps).numpy(), hidden, WIDTH)

    def parts_rms_norm(self, *arguments: Any) -> None:
        self._machine.queue(COMPUTES, lambda: self._parts_rms_norm(*arguments))

    def product(self, compute: Callable[[np.ndarray], np.ndarray], rows: paddle.Tensor, width: int) -> paddle.Tensor:
        out = paddle.empty([rows.shape[0], width])
        self._machine.queue(COMPUTES, lambda: np.copyto(memory_of(out), compute(memory_of(rows).copy())))
        return out


def memory_of(tensor: paddle.Tensor) -> np.ndarray:
    """float32, to be written to."""
    values = (ctypes.c_float * math.prod(tensor.shape)).from_address(tensor.data_ptr())
    return np.ctypeslib.as_array(values).reshape(tensor.shape)


class LateRank(Rank):
    """One whose collectives are queued, too. board: what the ranks have brought to each of them."""

    def __init__(self, machine: Machine, rank: int, copies: Copies, board: dict[tuple[int, int], np.ndarray]) -> None:
        self.machine, self.rank, self.degree, self.copies = machine, rank, machine.degree, copies
        self._lane_rows, self._board, self._collectives = 4, board, 0

    def lend_copies(self, rows: int, width: int) -> Copies | None:
        return self.copies if width == WIDTH and self.copies.lend(rows) else None

    def reduce_scatter(self, values: paddle.Tensor) -> Pending:
        share = values.shape[0] // self.degree
        own = paddle.empty([share, values.shape[1]])
        rows = slice(self.rank * share, (self.rank + 1) * share)
        return self._meet(values, own, lambda brought: sum(brought)[rows])

    def all_gather(self, values: paddle.Tensor, out: paddle.Tensor) -> Pending:
        return self._meet(values, out, np.concatenate)

    def _meet(self, values: paddle.Tensor, out: paddle.Tensor, join: Callable[[list[np.ndarray]], Any]) -> Pending:
        machine, board, number = self.machine, self._board, self._collectives
        self._collectives += 1
        places = [(number, rank) for rank in range(self.degree)]
        machine.wait(COLLECTIVES, machine.record(COMPUTES))
        machine.queue(COLLECTIVES, lambda: board.update({(number, self.rank): memory_of(values).copy()}))
        machine.queue(
            COLLECTIVES,
            lambda: np.copyto(memory_of(out), join([board[place] for place in places])),
            lambda: all(place in board for place in places),
        )
        done = machine.record(COLLECTIVES)

        class Task:
            def wait(self) -> None:
                machine.wait(COMPUTES, done)

        return Pending(out, Task(), values)


def layers_on(device: Device, group: LateRank, layers: Layers, rows: np.ndarray) -> list[np.ndarray]:
    """Queues what one rank does with a step's rows: what will be behind each layer."""
    rank, degree, found = group.rank, group.degree, list[np.ndarray]()

    def part(weight: np.ndarray, axis: int) -> np.ndarray:
        return np.split(weight, degree, axis)[rank]

    def product(weight: np.ndarray) -> Any:
        return lambda values: device.product(lambda given: given @ weight, values, weight.shape[1])

    def keep(normed: paddle.Tensor) -> None:
        found.append(np.zeros(normed.shape, np.float32))
        group.machine.queue(COMPUTES, lambda into=found[-1]: np.copyto(into, memory_of(normed)))

    norms = [paddle.to_tensor(one) for one in layers.norms]
    with Lanes(group, len(rows), WIDTH, EPS) as lanes:
        given = paddle.to_tensor(np.ascontiguousarray(part(rows, 1)))
        lanes.add(given, [product(part(layers.first, 0))], norms[0])
        normed = lanes.all_rows()
        keep(normed)
        for layer in range(LAYERS):
            heads = device.product(lambda values: part(values, 1), normed, WIDTH // degree)  # reads all rows at once
            lanes.add(heads, [product(part(layers.output[layer], 0))], norms[2 * layer + 1])
            gated = [
                product(part(layers.up[layer], 1)),
                lambda values: device.product(np.tanh, values, values.shape[1]),
            ]
            lanes.add(None, [*gated, product(part(layers.down[layer], 0))], norms[2 * layer + 2])
            normed = lanes.all_rows()
            keep(normed)
    return found


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("seed", range(6))
def test_no_row_is_written_before_it_has_been_read_however_far_streams_are_apart(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, degree: int, seed: int
) -> None:
    """Steps of as many rows as there is room for and of fewer, in four to eight lanes, one behind the other, all queued
    before any runs.
    """
    layers, machine, room = Layers(rng), Machine(degree, seed), Room(64, WIDTH, degree, 4)
    memories = [paddle.full([room.height, WIDTH], float("nan")) for _ in range(degree)]
    flags = [paddle.zeros(room.flags, "int32") for _ in range(degree)]
    addresses = tuple([tensor.data_ptr() for tensor in tensors] for tensors in (memories, flags))
    device, board = Device(machine, monkeypatch), dict[tuple[int, int], np.ndarray]()
    ranks = [
        LateRank(machine, rank, Copies(room, memories[rank], flags[rank], addresses, rank, COPIER, nullcontext), board)
        for rank in range(degree)
    ]
    steps = [rng.standard_normal((rows, WIDTH)).astype(np.float32) for rows in (64, 16, 24, 56, 64)]
    queued: list[list[list[np.ndarray]]] = []
    for group in ranks:
        machine.rank = group.rank
        queued.append([layers_on(device, group, layers, rows) for rows in steps])
    machine.run()
    for number, rows in enumerate(steps):
        expected = layers.alone(rows)
        for of_rank in queued:
            for one, other in zip(of_rank[number], expected):
                np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
