"""Stands in for CUDA graphs on a CPU: a capture is taken back, a replay runs the step again."""

from __future__ import annotations

from typing import ClassVar

import paddle
import pytest

from paddle_qwen1m.engine import decode, graph, questions


class StandInGraph:
    """Replays by calling the step again; what the step changed while it was captured is put back."""

    made: ClassVar[list[StandInGraph]] = []
    state: ClassVar[list[paddle.Tensor]] = []
    calling: ClassVar[list[graph.ReplayedStep]] = []

    def __init__(self, _place: object) -> None:
        self._step = self.calling[-1]
        self._before: list[paddle.Tensor] = []
        self.replays, self.is_capturing, self.was_reset = 0, False, False
        self.made.append(self)

    def capture_begin(self) -> None:
        self.is_capturing = True
        self._before = [tensor.clone() for tensor in self.state]

    def capture_end(self) -> None:
        self.is_capturing = False
        for tensor, before in zip(self.state, self._before):
            tensor.copy_(before, True)

    def replay(self) -> None:
        self.replays += 1
        for captured, new in zip(self._step._outputs, self._step._step()):
            captured.copy_(new, True)

    def reset(self) -> None:
        self.was_reset = True


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[StandInGraph]:
    """The graphs that are made from now on, by a runner that replays on a CPU. `StandInGraph.state`: what a captured
    step changes.
    """

    class NotedStep(graph.ReplayedStep):
        def __call__(self) -> graph.Outputs:
            StandInGraph.calling.append(self)
            return super().__call__()

    for module in (decode, questions):
        monkeypatch.setattr(module, "ReplayedStep", NotedStep)
    monkeypatch.setattr(graph, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(paddle, "CUDAPlace", lambda number: number)
    for noted in (StandInGraph.made, StandInGraph.calling, StandInGraph.state):
        noted.clear()
    return StandInGraph.made
