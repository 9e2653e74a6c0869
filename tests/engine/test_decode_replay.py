"""Decode as a GPU replays it, on a CPU, with stand-ins for its graphs."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import paddle
import pytest
from small_model import CONFIG, random_model
from stand_in_graph import StandInGraph, stand_in

from paddle_qwen1m.cache import PagedCache
from paddle_qwen1m.engine import SamplingParams
from paddle_qwen1m.engine.orders import Decode, Head, Join, Prefill, Rows
from paddle_qwen1m.engine.questions import Questions
from paddle_qwen1m.engine.runner import Runner
from paddle_qwen1m.engine.sampling import SamplingSlots
from paddle_qwen1m.model import Qwen2OneM

PAGE, PAGES_EACH, SLOTS = 32, 8, 6
PARAMS = SamplingParams(temperature=1.5, repetition_penalty=1.1, presence_penalty=0.5)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[StandInGraph]:
    """The graphs of decode steps that are made from now on, by a runner that replays on a CPU."""
    monkeypatch.setattr(Questions, "takes", lambda _rows: False)
    return stand_in(monkeypatch)


class Served(NamedTuple):
    """What a run of orders gave: of each decode step the ids and log-probabilities of every slot."""

    runner: Runner
    sampling: SamplingSlots
    steps: list[tuple[np.ndarray, ...]]


class Load:
    """Sequences that join and leave slots at random, the same for the same seed."""

    def __init__(self, model: Qwen2OneM, *, replay: bool, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.prompts = [self.rng.integers(0, CONFIG.vocab_size, length) for length in (100, 3, 31, 127, 60, 90, 16)]
        cache = PagedCache(CONFIG, PAGES_EACH * len(self.prompts), PAGE, "float32")
        self.runner = Runner(model, None, 0, replay=replay)
        self.sampling = SamplingSlots(SLOTS, CONFIG.vocab_size)
        self.runner.use(cache, self.sampling, max_num_seqs=SLOTS, max_model_len=PAGE * PAGES_EACH)
        slots = self.runner._slots
        assert slots is not None
        StandInGraph.state[:] = [slots._ids, slots._lengths, self.sampling._counts, self.sampling._steps]
        self.answers: list[list[int]] = []
        for number, prompt in enumerate(self.prompts):
            self._run(
                Prefill((Rows(prompt, 0, self._pages(number), len(prompt), wanted=(len(prompt) - 1,)),), points=0)
            )
            post = self.runner.run(Head(0, 1), lambda logits: [logits])
            assert post is not None
            self.answers.append([int(post.result()[0].argmax())])
        self.slots: list[int | None] = [None] * SLOTS
        self.steps: list[tuple[np.ndarray, ...]] = []
        self.changes = 0

    def step(self, most: int = SLOTS, **options: Any) -> None:
        """Some leave, some join one of the first `most` slots; then a token of each."""
        leave = [slot for slot, taken in enumerate(self.slots) if taken is not None and self.rng.random() < 0.5]
        for slot in leave:
            self.sampling.clear(slot)
            self.slots[slot] = None
        joins = []
        for number in self.rng.permutation(len(self.prompts)).tolist():
            free = [slot for slot in range(most) if self.slots[slot] is None]
            if free and number not in self.slots and len(self.answers[number]) < 100:
                joins.append(self._join(number, int(self.rng.choice(free))))
        self.changes += len(joins) + len(leave)
        used = 1 + max(slot for slot, taken in enumerate(self.slots) if taken is not None)
        step = self._run(Decode(used, tuple(joins), tuple(leave), **options))
        self.steps.append(step)
        for slot, taken in enumerate(self.slots):
            if taken is not None:
                self.answers[taken].append(int(step[0][slot]))

    def _join(self, number: int, slot: int) -> Join:
        prompt, answer = self.prompts[number], self.answers[number]
        self.sampling.put(slot, PARAMS, prompt=prompt, answer_tokens=answer, seed=number)
        self.slots[slot] = number
        return Join(slot, answer[-1], len(prompt) + len(answer) - 1, self._pages(number))

    def _pages(self, number: int) -> tuple[int, ...]:
        return tuple(range(number * PAGES_EACH, (number + 1) * PAGES_EACH))

    def _run(self, order: Prefill | Decode) -> tuple[np.ndarray, ...]:
        post = self.runner.run(order)
        assert post is not None
        return post.result()


@pytest.fixture
def model(rng: np.random.Generator) -> Qwen2OneM:
    return random_model(rng)


def test_replayed_steps_are_the_steps(model: Qwen2OneM, graphs: list[StandInGraph]) -> None:
    """Tokens and all log-probabilities, over borders of pages and DCA chunks, whoever joins and leaves."""
    loads = [Load(model, replay=replay) for replay in (False, True)]
    for load in loads:
        for number in range(30):
            load.step(top_logprobs=number % 3 == 0)
    eager, replayed = loads
    assert eager.answers == replayed.answers
    for got, expected in zip(replayed.steps, eager.steps):
        assert len(got) == len(expected)
        for one, other in zip(got, expected):
            np.testing.assert_array_equal(one, other)
    assert {len(step) for step in eager.steps} == {2, 6} and sum(one.replays for one in graphs) > 15


def test_hundreds_of_joins_and_leaves_capture_nothing(model: Qwen2OneM, graphs: list[StandInGraph]) -> None:
    """A graph for each number of slots that is run, made at its second step; they go when the cache does."""
    load = Load(model, replay=True)
    for most in (1, 2, 3, 4, 6) * 3:
        for slot, taken in enumerate(load.slots):
            if taken is not None and slot >= most:
                load.sampling.clear(slot)
                load.runner.run(Decode(1, leave=(slot,)))
                load.slots[slot] = None
        load.step(most)
    made = len(graphs)
    assert made <= 4  # 1, 2, 4 and 6
    for _ in range(45):
        load.step()
    assert load.changes > 200 and len(graphs) <= 4
    assert not any(one.was_reset for one in graphs)
    load.runner.use(None)
    assert all(one.was_reset for one in graphs)


def test_an_error_while_capturing_ends_the_capture(
    model: Qwen2OneM, graphs: list[StandInGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Load(model, replay=True)
    logits = model.logits

    def fail_when_captured(rows: paddle.Tensor) -> paddle.Tensor:
        if graphs:
            raise RuntimeError("out of memory")
        return logits(rows)

    monkeypatch.setattr(model, "logits", fail_when_captured)
    with pytest.raises(RuntimeError, match="out of memory"):
        for _ in range(9):
            load.step()
    assert not graphs[0].is_capturing
