"""Marks in a computation, which tell other processes that it gets on."""

from __future__ import annotations

import paddle

from paddle_qwen1m.ops.library import call


def mark_progress(values: paddle.Tensor, *, replayed: bool = False) -> None:
    """A mark behind `values` (any tensor): it counts as work done once they are computed. Nothing waits.

    replayed: they come from the replay of a graph, in which the marks of its capture do not count.
    """
    call("mark_progress", values, replayed)
