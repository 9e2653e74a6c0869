"""Decides from the beats of a job's ranks that one of them is stopped, or that none gets on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

STALL_SECONDS = "PADDLE_QWEN1M_STALL_SECONDS"
"""Environment variable of rank 0: seconds without a beat, or without progress of any rank, that end a job."""
DEFAULT_STALL_SECONDS = 60.0


@dataclass
class Vital:
    """What is known of a rank: when it last showed life, and its counters."""

    heard: float
    work: int = 0
    entered: int = 0
    busy: bool = False
    left: bool = False


@dataclass(frozen=True)
class Verdict:
    """Why a job cannot go on, and whose fault it is."""

    ranks: list[int]
    reason: str


class Watchdog:
    """Knows the ranks that it was told of; times are seconds of any one clock.

    A rank that computes moves its `work`. A rank whose collective waits is busy: where every rank has stood still for
    the limit while one of them is busy, it waits for those that have entered the fewest collectives.
    """

    def __init__(self, ranks: Iterable[int], limit: float, now: float) -> None:
        self.limit = limit
        self._ranks = {rank: Vital(now) for rank in ranks}
        self._moved = now

    def beat(self, rank: int, now: float, beat: dict[str, Any]) -> None:
        """What rank's beat says. Idle ranks count as moving: time in which nothing waited is not held against them."""
        vital = self._ranks[rank]
        counters = int(beat["work"]), int(beat["entered"])
        if counters != (vital.work, vital.entered):
            self._moved = now
        vital.work, vital.entered = counters
        vital.busy = bool(beat["busy"])
        if not any(one.busy for one in self._ranks.values()):
            self._moved = now

    def heard(self, rank: int, now: float) -> None:
        """Anything came from it."""
        self._ranks[rank].heard = now

    def left(self, rank: int) -> None:
        """It has done its part and is gone: it owes no beats, but what it did not enter it never will."""
        self._ranks[rank].left = True
        self._ranks[rank].busy = False

    def forgive(self, now: float) -> None:
        """This process itself stood still: what it did not hear in that time says nothing."""
        self._moved = now
        for vital in self._ranks.values():
            vital.heard = now

    def silent(self, now: float) -> Verdict | None:
        """Who has sent nothing for the limit."""
        gone = [rank for rank, vital in self._ranks.items() if not vital.left and now - vital.heard > self.limit]
        reason = f"stopped, or cut off: no sign of life for {self.limit:g} s"
        return Verdict(gone, reason) if gone else None

    def stuck(self, now: float) -> Verdict | None:
        """Whom the others wait for when nothing moves."""
        busy = any(vital.busy for vital in self._ranks.values())
        if not busy or now - self._moved <= self.limit:
            return None
        fewest = min(vital.entered for vital in self._ranks.values())
        last = [rank for rank, vital in self._ranks.items() if vital.entered == fewest]
        if all(self._ranks[rank].left for rank in last):
            return Verdict(last, "ended with exit status 0 while other ranks wait for it")
        reason = f"no progress for {self.limit:g} s in the middle of a step ({STALL_SECONDS} sets the time)"
        return Verdict(last, reason)
