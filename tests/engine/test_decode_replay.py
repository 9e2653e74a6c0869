"""Decode as a GPU replays it, on a CPU: the graph is stood in for by one that takes back what its capture did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import AutoModelForCausalLM

import paddle_qwen1m  # noqa: F401  registers the model
from paddle_qwen1m.engine import Engine, SamplingParams, decode, graph, runner


class StandInGraph:
    """Replays by calling the step again; what the step changed while it was captured is put back."""

    made: ClassVar[list[StandInGraph]] = []
    batches: ClassVar[list[decode.DecodeBatch]] = []
    steps: ClassVar[list[graph.ReplayedStep]] = []

    def __init__(self, _place: object) -> None:
        self._batch, self._step = self.batches[-1], self.steps[-1]
        self._state = [self._batch._ids, self._batch._lengths, *self._batch._sampling._inputs]
        self._before: list[paddle.Tensor] = []
        self.replays, self.is_capturing, self.was_reset = 0, False, False
        self.made.append(self)

    def capture_begin(self) -> None:
        self.is_capturing = True
        self._before = [tensor.clone() for tensor in self._state]

    def capture_end(self) -> None:
        self.is_capturing = False
        for tensor, before in zip(self._state, self._before):
            tensor.copy_(before, True)

    def replay(self) -> None:
        self.replays += 1
        for captured, new in zip(self._step._outputs, self._batch.step()):
            captured.copy_(new, True)

    def reset(self) -> None:
        self.was_reset = True


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StandInGraph]]:
    """The graphs that are made from now on, by engines that replay on a CPU."""

    class NotedBatch(decode.DecodeBatch):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            StandInGraph.batches.append(self)

    class NotedStep(graph.ReplayedStep):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            StandInGraph.steps.append(self)

    plain = decode.Decoder
    monkeypatch.setattr(decode, "DecodeBatch", NotedBatch)
    monkeypatch.setattr(decode, "ReplayedStep", NotedStep)
    monkeypatch.setattr(runner, "Decoder", lambda *arguments, replay: plain(*arguments, replay=True))
    monkeypatch.setattr(graph, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(paddle, "CUDAPlace", lambda number: number)
    yield StandInGraph.made
    for noted in (StandInGraph.made, StandInGraph.batches, StandInGraph.steps):
        noted.clear()


@pytest.fixture(scope="module")
def needle(needle_checkpoint: Path) -> Engine:
    return AutoModelForCausalLM.from_pretrained(str(needle_checkpoint)).engine


PROMPTS = [np.arange(5, 5 + length, dtype=np.int64) for length in (700, 30, 250)]
CHOICES = [
    SamplingParams(max_tokens=90, temperature=1.5, seed=3, repetition_penalty=1.1),
    SamplingParams(max_tokens=20, min_tokens=12, stop_token_ids=(745, 747), temperature=0.0),
    SamplingParams(max_tokens=2, temperature=0.0),
]


def test_replayed_steps_are_the_steps(
    needle: Engine, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Tokens and log-probabilities, over borders of pages and DCA chunks, as one sequence after the other ends."""
    expected = needle.generate(PROMPTS, CHOICES)
    graphs = request.getfixturevalue("graphs")
    assert needle.generate(PROMPTS, CHOICES) == expected
    assert len(expected[0].token_ids) == 90 and len(graphs) >= 2


def test_a_batch_is_run_once_captured_once_and_replayed(needle: Engine, graphs: list[StandInGraph]) -> None:
    """One graph a composition; one that lasts a single step needs none. All of them are reset at the end."""
    steps = SamplingParams(max_tokens=10, temperature=0.0)
    needle.generate(PROMPTS[:1], steps)
    assert [one.replays for one in graphs] == [8]  # ten tokens: one of the prefill, one that warms up
    needle.generate(PROMPTS[:2], [steps, SamplingParams(max_tokens=2, temperature=0.0)])
    assert [one.replays for one in graphs] == [8, 7]
    assert all(one.was_reset for one in graphs)


def test_an_interrupt_resets_the_graph(needle: Engine, graphs: list[StandInGraph]) -> None:
    def interrupt(_index: int, _token: int) -> None:
        if graphs:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        needle.generate(PROMPTS[:1], SamplingParams(max_tokens=10, temperature=0.0), on_token=interrupt)
    assert [one.was_reset for one in graphs] == [True]


def test_an_error_while_capturing_ends_the_capture(
    needle: Engine, graphs: list[StandInGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = needle.runner.forward

    def fail_when_captured(*arguments: object) -> object:
        if graphs:
            raise RuntimeError("out of memory")
        return forward(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(needle.runner, "forward", fail_when_captured)
    with pytest.raises(RuntimeError, match="out of memory"):
        needle.generate(PROMPTS[:1], SamplingParams(max_tokens=10, temperature=0.0))
    assert not graphs[0].is_capturing
