"""A long prefill beside running answers on a trained model: tokens keep coming, and the prefill hardly takes longer.

Time is the processor's, of one thread, and an engine's own: it stands still while others work. So a busy machine, or
one that slows down meanwhile, tells nothing.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from needle_subject import Subject

from paddle_qwen1m import ops
from paddle_qwen1m.engine import Event, Request, SamplingParams, TokenChosen
from paddle_qwen1m.engine import engine as engine_module
from paddle_qwen1m.engine.orders import Advance, Order, Prefill
from paddle_qwen1m.threads import default_num_threads

LONG, ANSWERS, PROMPT = 60_000, 8, 1024
BOUND = 0.5
"""Seconds: the default on a CPU."""


class OwnTime:
    """An engine, the seconds that its steps have taken, and of these the seconds of each kind of order."""

    def __init__(self, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens: dict[str, list[float]] = defaultdict(list)
        self._began: float | None = None
        monkeypatch.setattr(engine_module, "time", SimpleNamespace(perf_counter=self.clock))
        self.engine = subject.engine(cache_tokens=LONG + ANSWERS * 8 * PROMPT + 16 * PROMPT)
        self.engine.reserve()
        self._run = self.engine.runner.run
        monkeypatch.setattr(self.engine.runner, "run", self._timed)

    def clock(self) -> float:
        return self.now + (0.0 if self._began is None else time.process_time() - self._began)

    def step(self) -> None:
        self._began = time.process_time()
        events: list[Event] = self.engine.step()
        self.now, self._began = self.clock(), None
        for event in events:
            if isinstance(event, TokenChosen):
                self.tokens[event.id].append(self.now)

    def add(self, name: str, prompt: np.ndarray, new_tokens: int) -> None:
        self.engine.add(Request(name, prompt, SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)))

    def _timed(self, order: Order, *rest: Any) -> Any:
        start = time.process_time()
        try:
            return self._run(order, *rest)
        finally:
            is_long = isinstance(order, Advance) or (isinstance(order, Prefill) and order.points > 0)
            self.seconds["long" if is_long else type(order).__name__] += time.process_time() - start


@pytest.fixture
def one_thread() -> Iterator[None]:
    ops.set_num_threads(1)
    yield
    ops.set_num_threads(default_num_threads())


def gaps(times: dict[str, list[float]], begin: float, end: float) -> np.ndarray:
    """Seconds between the tokens of each answer that came within the time."""
    return np.concatenate([np.diff([when for when in of if begin <= when <= end]) for of in times.values()])


@pytest.mark.slow
def test_answers_go_on_beside_a_long_prefill_which_hardly_takes_longer(
    needle_checkpoint: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same prompt is read by two engines in turn, step by step: one has nothing else to do."""
    subject = Subject(needle_checkpoint, always=False)
    rng = np.random.default_rng(0)
    prompt, short = (rng.integers(0, 700, length) for length in (LONG, 256))
    alone, beside = (OwnTime(subject, monkeypatch) for _ in range(2))
    for number in range(ANSWERS):
        beside.add(str(number), prompt[number * 7 :][:PROMPT], 5000)
    while len(beside.tokens) < ANSWERS or min(map(len, beside.tokens.values())) < 100:
        beside.step()
    first = min(of[0] for of in beside.tokens.values())
    usual = gaps(beside.tokens, max(of[10] for of in beside.tokens.values()), beside.now)
    assert first < beside.now

    beside.seconds.clear()
    begin = beside.now
    alone.add("long", prompt, 1)
    beside.add("long", prompt, 1)
    while not ("long" in alone.tokens and "long" in beside.tokens):
        behind = alone if alone.seconds["long"] <= beside.seconds["long"] and "long" not in alone.tokens else beside
        behind = behind if "long" not in behind.tokens else alone
        behind.step()
        if beside.seconds["long"] > 5.0 and "short" not in beside.tokens and "short" not in beside.engine._requests:
            asked = beside.now
            beside.add("short", short, 1)
    whole, within = beside.tokens["long"][0] - begin, gaps(beside.tokens, begin, beside.tokens["long"][0])
    others = sum(seconds for kind, seconds in beside.seconds.items() if kind != "long")
    cost = (whole - others) / alone.tokens["long"][0] - 1

    beside.add("dropped", prompt[::-1].copy(), 1)
    for _ in range(50):
        beside.step()
    held, start = beside.engine.metrics.pages_held, time.process_time()
    beside.engine.abort("dropped")
    freed, pages = time.process_time() - start, held - beside.engine.metrics.pages_held

    p99, usual_p99 = (float(np.percentile(times, 99)) for times in (within, usual))
    late = beside.tokens["short"][0] - asked
    with capsys.disabled():
        print(
            f"\n{LONG:,} tokens beside {ANSWERS} answers: between tokens p99 {p99 * 1e3:.0f} ms, {usual_p99 * 1e3:.0f} "
            f"ms without; a short request's first token after {late * 1e3:.0f} ms; the prefill {whole:.2f} s, of which "
            f"{others:.2f} s are others', {alone.tokens['long'][0]:.2f} s alone: {cost:+.1%}; {pages} pages free again "
            f"after {freed * 1e3:.1f} ms\n{dict(beside.seconds)} {dict(alone.seconds)}"
        )
    assert p99 <= BOUND + 2 * usual_p99
    assert late <= 2 * BOUND
    assert cost <= 0.05
    assert pages == -(-(LONG + 1) // 256) and freed <= BOUND
