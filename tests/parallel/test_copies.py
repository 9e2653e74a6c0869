"""Lanes whose sums ranks copy into each other's memory: threads in one process, late at random; who cannot has none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from test_lanes import EPS, WIDTH, Job, Layers, Rank
from thread_ranks import ThreadRanks

from paddle_qwen1m import ops
from paddle_qwen1m.parallel.copies import COPIES, Collective, Copies, open_copies
from paddle_qwen1m.parallel.group import ProcessGroup
from paddle_qwen1m.parallel.peers import Peers
from paddle_qwen1m.parallel.room import MOST_LANES, ROWS, SUMS, Room

COPIER = 7
"""Of a CPU, which copies at once."""


class Memory:
    """That of ranks that are threads, each found where it is. unable: what rank 1 cannot do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, unable: str = "") -> None:
        self._unable = unable
        self._ranks = ThreadRanks()
        self._elsewhere = paddle.zeros([4096])
        monkeypatch.delenv(COPIES, raising=False)
        for name in ("make_copier", "name_memory", "open_memory"):
            monkeypatch.setattr(ops, name, getattr(self, f"_{name}"))

    def open_all(self, degree: int, rows: int, late: Callable[[int], Collective] = lambda _: nullcontext) -> list[Any]:
        """The Copies or None that the ranks find. late: of each, what it enters when it sends."""

        def on(store: Any, rank: int) -> Copies | None:
            return open_copies(Peers(store, "copies", rank, degree), rows, WIDTH, "float32", late(rank))

        return self._ranks.run(degree, on)

    def _make_copier(self) -> int:
        self._may("make_copier")
        return COPIER

    def _name_memory(self, address: int) -> tuple[bytes, int]:
        self._may("name_memory")
        return (address - 24).to_bytes(8, "big"), 24

    def _open_memory(self, name: bytes) -> int:
        self._may("open_memory")
        if self._unable == "see" and self._ranks.rank == 1:
            return self._elsewhere.data_ptr()
        return int.from_bytes(name, "big")

    def _may(self, what: str) -> None:
        if self._unable == what and self._ranks.rank == 1:
            raise OSError(f"{what}: CUDA error 217")


class CopyingRank(Rank):
    def __init__(self, job: Job, rank: int, copies: Copies) -> None:
        super().__init__(job, rank, least=4)
        self.copies = copies

    def lend_copies(self, rows: int, width: int) -> Copies | None:
        return self.copies if width == WIDTH and self.copies.lend(rows) else None


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_ranks_that_are_late_give_what_one_does_step_after_step(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, degree: int
) -> None:
    """Of as many rows as there is room for and of fewer, in two to eight lanes: nothing is overwritten before it is
    read. The first sums of a step alone, of float32, are collectives.
    """

    def late(rank: int) -> Collective:
        drawn = np.random.default_rng(rank)

        @contextmanager
        def enter() -> Iterator[None]:
            time.sleep(drawn.choice([0, 0, 0.002, 0.005]))
            yield

        return enter

    copies = Memory(monkeypatch).open_all(degree, 67, late)
    layers, job = Layers(rng), Job(degree)
    ranks = [CopyingRank(job, rank, copies[rank]) for rank in range(degree)]
    for rows in (67, 16, 40, 9, 67, 23, 66):
        given = rng.standard_normal((rows, WIDTH)).astype(np.float32)
        expected = layers.alone(given)
        for rank in ranks:
            rank.log.clear()
        with ThreadPoolExecutor(degree) as pool:
            results = list(pool.map(partial(layers.on, rows=given), ranks))
        for found in results:
            for one, other in zip(found, expected):
                np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
            for one, other in zip(found, results[0]):
                np.testing.assert_array_equal(one, other)
        lanes = ranks[0].lanes(ranks[0].padded(rows))
        assert lanes > 1 and ranks[0].log.count("reduce_scatter") == ranks[0].log.count("all_gather") == lanes


def test_sums_are_of_float32_in_the_order_of_the_ranks(rng: np.random.Generator) -> None:
    degree, rows, first = 4, 5, 2
    deltas = rng.standard_normal((degree, rows, WIDTH)).astype(np.float32) * np.float32(
        [[[1]], [[1e4]], [[1e-4]], [[7]]]
    )
    residual = rng.standard_normal((rows, WIDTH)).astype(np.float32)
    weight = paddle.to_tensor(rng.standard_normal(WIDTH).astype(np.float32))
    total = deltas[0].copy()
    for delta in deltas[1:]:
        total += delta
    expected = paddle.to_tensor(residual)
    normed = ops.add_rms_norm(paddle.to_tensor(total), expected, weight, EPS)
    for rank in range(degree):
        parts = np.full((degree - 1, rows + 3, WIDTH), np.nan, np.float32)
        parts[:, first : first + rows] = np.delete(deltas, rank, axis=0)
        found, out = paddle.to_tensor(residual), paddle.empty([rows, WIDTH])
        own = paddle.to_tensor(deltas[rank])
        ops.parts_rms_norm(own, found, weight, EPS, paddle.to_tensor(parts), first, rank, out)
        np.testing.assert_array_equal(found.numpy(), expected.numpy())
        np.testing.assert_array_equal(out.numpy(), normed.numpy())


def test_one_step_at_a_time_has_them_if_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    for copies in Memory(monkeypatch).open_all(2, 19):
        assert not copies.lend(22) and copies.lend(20) and not copies.lend(4)
        copies.give_back()
        assert copies.lend(4)


def test_rows_of_another_width_go_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of another model in the same processes."""
    (copies, _other) = Memory(monkeypatch).open_all(2, 8)
    group: Any = SimpleNamespace(_copies={WIDTH: copies, 3 * WIDTH: None})
    assert ProcessGroup.lend_copies(group, 8, 2 * WIDTH) is None is ProcessGroup.lend_copies(group, 8, 3 * WIDTH)
    assert ProcessGroup.lend_copies(group, 8, WIDTH) is copies and ProcessGroup.lend_copies(group, 8, WIDTH) is None


@pytest.mark.parametrize("unable", ["make_copier", "name_memory", "open_memory", "see"])
def test_where_one_rank_cannot_none_does(monkeypatch: pytest.MonkeyPatch, unable: str) -> None:
    """Nor where what it sends goes elsewhere."""
    assert Memory(monkeypatch, unable).open_all(3, 8) == [None] * 3


def test_switched_off_or_for_more_ranks_than_they_are_for_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch)
    assert memory.open_all(9, 18) == [None] * 9
    monkeypatch.setenv(COPIES, "0")
    assert memory.open_all(2, 8) == [None] * 2


@pytest.mark.parametrize("degree", [2, 3, 8])
def test_nothing_in_a_room_lies_where_something_else_does(degree: int) -> None:
    room = Room(rows=6 * degree, width=8, degree=degree, itemsize=2)
    for to in range(degree):
        places = [row * room.row_bytes for row in range(room.rows)]
        places += [room.part(to, sender, row) for sender in range(degree) if sender != to for row in range(room.share)]
        assert sorted(places) == [row * room.row_bytes for row in range(room.height)]
    flags = [
        room.flag(what, lane, rank) for what in (SUMS, ROWS) for lane in range(MOST_LANES) for rank in range(degree)
    ]
    assert sorted(flags) == list(range(0, 4 * int(np.prod(room.flags)), 4))
