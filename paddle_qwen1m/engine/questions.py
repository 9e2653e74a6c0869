"""Questions: few tokens behind what is cached of their sequence, read in steps that are captured once and replayed."""

from __future__ import annotations

from typing import Callable

import paddle

from paddle_qwen1m.attention.few_rows import FewRows
from paddle_qwen1m.attention.step import SequenceRows, Step, StepBuilder
from paddle_qwen1m.cache import PagedCache
from paddle_qwen1m.config import QUESTION_ROWS
from paddle_qwen1m.engine.graph import ReplayedStep
from paddle_qwen1m.parallel.group import Group

Forward = Callable[[Step], paddle.Tensor]
"""What logits are made of, [n, hidden], of a step's n rows."""


class Questions:
    """Reads rows of one sequence, of up to max_pages pages, at a time: in the shortest step that has room for them."""

    def __init__(self, builder: StepBuilder, cache: PagedCache, max_pages: int, forward: Forward, group: Group) -> None:
        self._builder, self._cache, self._max_pages = builder, cache, max_pages
        self._forward, self._group = forward, group
        self._steps: dict[int, tuple[FewRows, ReplayedStep]] = {}

    @staticmethod
    def takes(rows: SequenceRows) -> bool:
        """Whether they are few enough: no more than the probe's, which attend to all keys in a sparse prompt, too."""
        return len(rows.ids) <= QUESTION_ROWS[-1]

    def read(self, rows: SequenceRows) -> paddle.Tensor:
        """Puts keys and values of the n rows into the cache. What logits are made of, [n, hidden], until others are
        read.
        """
        count = len(rows.ids)
        size = next(size for size in QUESTION_ROWS if count <= size)
        if size not in self._steps:
            self._steps[size] = self._step_of(size)
        few, step = self._steps[size]
        few.fill(rows, self._cache.slots(rows.pages, rows.begin, rows.end))
        (hidden,) = step()
        self._group.mark(hidden, replayed=True)  # no layer of a replay marks itself
        return hidden[:count]

    def release(self) -> None:
        """Gives back the memory of the graphs; nothing may be read any more."""
        for _, step in self._steps.values():
            step.release()
        self._steps = {}

    def _step_of(self, size: int) -> tuple[FewRows, ReplayedStep]:
        few = FewRows(self._builder, size, self._max_pages, self._cache.page_size)
        return few, ReplayedStep(lambda: (self._forward(few.step()),))
