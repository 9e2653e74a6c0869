"""Whom the watchdog of a job names, and when: no process, no clock."""

from __future__ import annotations

from typing import Any

import pytest

from paddle_qwen1m.parallel.watchdog import Verdict, Watchdog

LIMIT = 60.0


def beat(work: int = 0, entered: int = 0, busy: bool = False) -> dict[str, Any]:
    return {"work": work, "entered": entered, "busy": busy}


class Ranks:
    """A watchdog that hears a beat of each rank every second."""

    def __init__(self, degree: int) -> None:
        self.now = 1000.0
        self.dog = Watchdog(range(degree), LIMIT, self.now)

    def hear(self, seconds: float, **beats: dict[str, Any]) -> Verdict | None:
        """The first verdict within the time, of ranks named r0, r1, ..."""
        end = self.now + seconds
        while self.now < end:
            self.now += 1
            for name, said in beats.items():
                self.dog.heard(int(name[1:]), self.now)
                self.dog.beat(int(name[1:]), self.now, said)
            verdict = self.dog.silent(self.now) or self.dog.stuck(self.now)
            if verdict is not None:
                return verdict
        return None


def test_a_rank_without_beats_is_named_after_the_limit() -> None:
    ranks = Ranks(3)
    assert ranks.hear(LIMIT, r0=beat(), r2=beat()) is None
    verdict = ranks.hear(2, r0=beat(), r2=beat())
    assert verdict is not None and verdict.ranks == [1] and "no sign of life for 60 s" in verdict.reason


def test_a_rank_that_left_owes_no_beats() -> None:
    ranks = Ranks(2)
    ranks.dog.left(1)
    assert ranks.hear(10 * LIMIT, r0=beat()) is None


def test_idle_ranks_may_be_idle_for_ever() -> None:
    ranks = Ranks(2)
    assert ranks.hear(10 * LIMIT, r0=beat(5, 9), r1=beat(5, 7)) is None
    assert ranks.hear(LIMIT - 1, r0=beat(5, 9), r1=beat(5, 10, busy=True)) is None, "the wait counts from its beginning"


def test_those_with_the_fewest_collectives_are_named_when_nothing_moves() -> None:
    ranks = Ranks(4)
    waits, late = beat(700, 12, busy=True), beat(900, 11)
    verdict = ranks.hear(2 * LIMIT, r0=waits, r1=late, r2=waits, r3=late)
    assert verdict is not None and verdict.ranks == [1, 3] and "no progress for 60 s" in verdict.reason
    assert ranks.now == pytest.approx(1000 + LIMIT + 2, abs=1)


def test_a_rank_that_computes_keeps_those_that_wait_for_it() -> None:
    ranks = Ranks(2)
    for tiles in range(20):
        assert ranks.hear(LIMIT - 1, r0=beat(1, 12, busy=True), r1=beat(tiles, 11)) is None


def test_a_collective_that_hangs_on_all_ranks_names_all() -> None:
    ranks = Ranks(2)
    verdict = ranks.hear(2 * LIMIT, r0=beat(1, 5, busy=True), r1=beat(2, 5, busy=True))
    assert verdict is not None and verdict.ranks == [0, 1]


def test_waiting_for_a_rank_that_is_done_names_it() -> None:
    ranks = Ranks(2)
    assert ranks.hear(1, r0=beat(1, 5, busy=True), r1=beat(2, 4)) is None
    ranks.dog.left(1)
    verdict = ranks.hear(2 * LIMIT, r0=beat(1, 5, busy=True))
    assert verdict is not None and verdict.ranks == [1] and "ended with exit status 0" in verdict.reason


def test_what_a_stopped_process_did_not_hear_says_nothing() -> None:
    ranks = Ranks(2)
    assert ranks.hear(10, r0=beat(1, 5, busy=True), r1=beat(2, 4)) is None
    ranks.now += 10 * LIMIT
    ranks.dog.forgive(ranks.now)
    assert ranks.hear(LIMIT - 1, r0=beat(1, 5, busy=True), r1=beat(2, 4)) is None
    assert ranks.hear(3, r0=beat(1, 5, busy=True), r1=beat(2, 4)) is not None
