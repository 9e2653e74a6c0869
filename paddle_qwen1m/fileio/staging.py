"""Buffers in turn between files and a device: one is filled while what is in the others is on its way."""

from __future__ import annotations

from paddle_qwen1m import ops

BUFFERS = 4


class Staging:
    """Buffers of `nbytes` each, pinned where a GPU copies from and to them. Its maker's device is the one."""

    def __init__(self, nbytes: int, *, gpu: bool, buffers: int = BUFFERS) -> None:
        self._buffers = [ops.PieceBuffer(nbytes, gpu=gpu) for _ in range(buffers)]
        self._next = 0

    def next(self) -> ops.PieceBuffer:
        """The buffer whose copies were queued longest ago, when they are done."""
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        buffer.wait()
        return buffer

    def wait(self) -> None:
        """Returns when all copies are done."""
        for buffer in self._buffers:
            buffer.wait()
