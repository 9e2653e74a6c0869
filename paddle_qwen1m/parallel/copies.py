"""How a prefill's lanes go between the cards of one machine: by their copy engines, beside the products.

A collective of NCCL is a kernel, and a product leaves no processor for it: it runs behind the product that it should
run beside. A copy engine needs none. So each rank has room that the others copy into, their parts of the sums of its
share and the rows that they have normed, and flags that say what has come. Nothing says that it may be written again.
Whoever sends a lane's parts has had the rows of the norm before from all, which they sent when they had read the parts
before these; and whoever sends its normed rows has had all parts of their sums, which the others sent when they had
read the rows before.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Callable

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.parallel.peers import Peers
from paddle_qwen1m.parallel.pending import Pending
from paddle_qwen1m.parallel.room import MOST_LANES, ROWS, SUMS, Room

COPIES = "PADDLE_QWEN1M_COPIES"
"""Environment variable: 0 on any rank leaves the sums of many rows to NCCL."""
Collective = Callable[[], AbstractContextManager[None]]
"""What a collective is made within."""


class Copies:
    """The rooms of all ranks, of which this rank's is `memory` [room.height, room.width] with `flags` int32, zeros at
    first. addresses: where this process has each rank's memory and flags. copier: of `ops.make_copier`, 0 on a CPU.
    collective: entered while something is sent.

    One step at a time has them, from `lend` to `give_back`. Its first sums must have come another way, in which each
    rank waits for all: then nobody writes where another step's rows are still read.
    """

    def __init__(
        self,
        room: Room,
        memory: paddle.Tensor,
        flags: paddle.Tensor,
        addresses: tuple[Sequence[int], Sequence[int]],
        rank: int,
        copier: int,
        collective: Collective,
    ) -> None:
        self._room, self._memory, self._flags, self._rank = room, memory, flags, rank
        self._rooms, self._all_flags = addresses
        self._copier, self._collective = copier, collective
        self._others = [(rank + 1 + number) % room.degree for number in range(room.degree - 1)]
        self._parts = memory[room.rows : room.rows + (room.degree - 1) * room.share].reshape(
            [room.degree - 1, room.share, room.width]
        )
        self._sent = np.zeros([2, MOST_LANES], np.int64)
        self._lent = False

    def lend(self, rows: int) -> bool:
        """Whether a step of so many rows, a multiple of degree, has them from now on."""
        if self._lent or rows > self._room.rows:
            return False
        self._lent = True
        return True

    def give_back(self) -> None:
        """No step has them any more."""
        self._lent = False

    def rows(self, first: int, last: int) -> paddle.Tensor:
        """Those [first, last) that the ranks have normed, activations [n, N]."""
        return self._memory[first:last]

    def scatter(self, values: paddle.Tensor, lane: int, first: int) -> Pending:
        """Sends this rank's part of a lane's sums [n, N], whose first row is the step's row `first`, to those whose
        shares they are. What comes of it is the own part [n / degree, N]; by then the others' have come.
        """
        room, share = self._room, values.shape[0] // self._room.degree
        sources = [values.data_ptr() + other * share * room.row_bytes for other in self._others]
        targets = [room.part(other, self._rank, first // room.degree) for other in self._others]
        task = self._send(values, sources, targets, share, SUMS, lane)
        return Pending(values[self._rank * share : (self._rank + 1) * share], task, values)

    def add_rms_norm(
        self, own: paddle.Tensor, lane: int, first: int, residual: paddle.Tensor, weight: paddle.Tensor, eps: float
    ) -> Pending:
        """`ops.add_rms_norm` of the sums that the `own` part [n, N] is of, once that has been waited for, sent to all:
        the lane's rows [degree * n, N].
        """
        room, share = self._room, own.shape[0]
        begin = first + self._rank * share
        normed = self._memory[begin : begin + share]
        ops.parts_rms_norm(own, residual, weight, eps, self._parts, first // room.degree, self._rank, normed)
        sources = [normed.data_ptr()] * len(self._others)
        targets = [begin * room.row_bytes] * len(self._others)
        task = self._send(normed, sources, targets, share, ROWS, lane)
        return Pending(self._memory[first : first + room.degree * share], task)

    def check(self, peers: Peers, dtype: str) -> bool:
        """Whether what one rank sends, of `dtype`, comes to the others, of which each calls it before anything else."""
        room, degree = self._room, self._room.degree
        drawn = [
            np.random.default_rng(rank).standard_normal([degree, room.width], np.float32) for rank in range(degree)
        ]
        values = [ops.cast(ops.tensor(of_rank), dtype) for of_rank in drawn]
        self.scatter(values[self._rank], 0, 0)
        if ops.on_gpu():
            paddle.device.cuda.synchronize()
        if not peers.agree(True):
            return False
        others = [other for other in range(degree) if other != self._rank]
        come = [self._parts[number][:1].numpy().tobytes() for number in range(degree - 1)]
        sent = [values[other][self._rank : self._rank + 1].numpy().tobytes() for other in others]
        return peers.agree(come == sent)

    def _send(
        self, values: paddle.Tensor, sources: list[int], targets: list[int], rows: int, what: int, lane: int
    ) -> _Arrival:
        """Rows from addresses here to bytes of the others' rooms."""
        self._sent[what, lane] += 1
        number, room = int(self._sent[what, lane]) % ops.PEER_NUMBERS, self._room
        places = [self._rooms[other] + target for other, target in zip(self._others, targets)]
        raised = [self._all_flags[other] + room.flag(what, lane, self._rank) for other in self._others]
        with self._collective():
            ops.send_rows(values, self._copier, sources, places, raised, rows * room.row_bytes, number, lane)
        own = [self._all_flags[self._rank] + room.flag(what, lane, other) for other in self._others]
        return _Arrival(self._flags, self._copier if what == SUMS else 0, own, number, lane)


class _Arrival:
    """What others send to this rank as it sends to them."""

    def __init__(self, flags: paddle.Tensor, copier: int, own: list[int], number: int, lane: int) -> None:
        self._flags, self._copier, self._own, self._number, self._lane = flags, copier, own, number, lane

    def wait(self) -> None:
        ops.await_rows(self._flags, self._copier, self._own, self._number, self._lane)


def open_copies(peers: Peers, rows: int, width: int, dtype: str, collective: Collective) -> Copies | None:
    """For steps of up to `rows` rows of `width` activations of `dtype`; None on all ranks where one cannot bring rows
    to another's GPU.
    """
    room = Room.of(rows, width, peers.degree, paddle.empty([1], dtype).element_size())
    copier = _make_copier() if peers.degree <= ops.PEER_RANKS and os.environ.get(COPIES) != "0" else 0
    memory = paddle.empty([room.height if copier else 1, width], dtype)
    flags = ops.tensor(np.zeros(room.flags, np.int32))
    rooms = peers.reach(memory.data_ptr() if copier else None)
    all_flags = None if rooms is None else peers.reach(flags.data_ptr())
    if rooms is None or all_flags is None:
        return None
    copies = Copies(room, memory, flags, (rooms, all_flags), peers.rank, copier, collective)
    return copies if copies.check(peers, dtype) else None


def _make_copier() -> int:
    try:
        return ops.make_copier()
    except OSError:
        return 0
