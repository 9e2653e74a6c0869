"""A CUDA graph around a step that is the same every time but for what its tensors hold."""

from __future__ import annotations

from typing import Callable

import paddle
from paddle.device.cuda.graphs import CUDAGraph

Outputs = tuple[paddle.Tensor, ...]


class ReplayedStep:
    """Runs `step` once, which readies libraries and memory; captures it at the second call, and replays it since.

    The tensors that a replay returns are those of the capture, with new contents.
    """

    def __init__(self, step: Callable[[], Outputs]) -> None:
        self._step = step
        self._is_warm = False
        self._graph: CUDAGraph | None = None
        self._outputs: Outputs = ()

    def __call__(self) -> Outputs:
        if not self._is_warm:
            self._is_warm = True
            return self._step()
        if self._graph is None:
            device = paddle.device.get_device().partition(":")[2]
            graph = CUDAGraph(paddle.CUDAPlace(int(device or 0)))
            graph.capture_begin()
            try:
                self._outputs = self._step()
            finally:
                graph.capture_end()
            self._graph = graph
        self._graph.replay()
        return self._outputs

    def release(self) -> None:
        """Gives back the memory of the graph; the step may not be called again."""
        self._outputs = ()
        if self._graph is not None:
            self._graph.reset()
            self._graph = None
