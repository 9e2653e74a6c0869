"""Many requests of every kind at once: each gets what its options promise and what it gets alone; nothing is lost."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import mixed_requests
import pytest
import resident_memory
from mixed_requests import Case, Maker, shuffled
from needle_subject import Subject
from runner_setup import fill_with_nan

from paddle_qwen1m.engine import Engine

POOL_TOKENS = 10**9 // 8192
SPARSE_FROM = 4096
MEGABYTE = 10**6


def filled(engine: Engine) -> Engine:
    """The engine, its whole pool made and full of NaN: no page is written for the first time in a later round."""
    engine.reserve()
    fill_with_nan(engine.runner.cache)
    return engine


class Alone:
    """What greedy requests get of an engine that has nothing else to do, and keeps nothing of what was before."""

    def __init__(self, subject: Subject, **options: Any) -> None:
        self._subject, self._engine = subject, filled(subject.engine(**options))
        self._known: dict[str, list[int]] = {}

    def tokens(self, case: Case) -> list[int]:
        """Of its answer."""
        if case.name not in self._known:
            outcome = self._subject.serve(self._engine, [replace(case, abort_after=None)])
            self._known[case.name] = outcome.outputs[case.name].outputs[0].token_ids
        return self._known[case.name]


def run(subject: Subject, cases: list[Case], engine: Engine, alone: Alone) -> int:
    """Serves the cases, and holds every one to its options and the greedy ones to what they get alone. How many of them
    found a part of their prompt in the cache.
    """
    outcome = subject.serve(engine, cases)
    assert engine.is_idle and engine.metrics.pages_held == 0
    mixed_requests.check(cases, outcome)
    for case in cases:
        if case.kind.is_greedy and case.name in outcome.outputs:
            assert outcome.outputs[case.name].outputs[0].token_ids == alone.tokens(case), case.name
    return sum(bool(output.num_cached_tokens) for output in outcome.outputs.values())


def test_forty_requests(needle_checkpoint: Path) -> None:
    """With small chunks and a tight bound, so that they get into each other's way."""
    options = {"sparse_threshold": 1024, "max_num_batched_tokens": 512, "max_pause_tokens": 64}
    subject = Subject(needle_checkpoint, always=True)
    engine = filled(subject.engine(cache_tokens=32768, enable_prefix_caching=True, max_inter_token_ms=20, **options))
    maker = Maker(subject.encode, 1)
    cases = maker.cases(20, 1, 1024) + maker.cases(20, 1025, 3000)
    hits = run(subject, shuffled(cases, 1, 300), engine, Alone(subject, cache_tokens=32768, **options))
    assert hits >= 3


@pytest.mark.soak
@pytest.mark.parametrize(("always", "rounds"), [(False, 1), (True, 2)], ids=["strict", "one temperature"])
def test_two_hundred_and_ten_requests(needle_checkpoint: Path, always: bool, rounds: int) -> None:
    """In a pool that holds a few of the long ones at a time, and of which nothing is left behind. A second round has
    the same requests in another order, and other ones of them are aborted.
    """
    subject = Subject(needle_checkpoint, always=always)
    maker = Maker(subject.encode, 0)
    mixed = maker.cases(100, 1, SPARSE_FROM) + maker.cases(100, SPARSE_FROM + 1, 30_000)
    parts = [(mixed, {"sparse_threshold": SPARSE_FROM}), (maker.cases(10, 33_000, 60_000), {})]
    resident: list[int] = []
    hits = 0
    for cases, options in parts:
        engine = filled(
            subject.engine(
                cache_tokens=POOL_TOKENS, enable_prefix_caching=True, prefix_temperature_tolerance=0.0, **options
            )
        )
        alone = Alone(subject, cache_tokens=65536, **options)
        for number in range(rounds):
            hits += run(subject, shuffled(cases, number, 1000), engine, alone)
            gc.collect()
            resident.append(resident_memory.resident_bytes())
        assert resident[-1] - resident[-rounds] <= 20 * MEGABYTE
        engine.close()
    assert not always or hits >= 60
