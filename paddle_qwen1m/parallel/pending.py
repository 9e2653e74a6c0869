"""What a collective fills, perhaps on a stream of its own."""

from __future__ import annotations

from typing import Any

import paddle


class Pending:
    """A tensor, or rows in FP8, that a collective fills, on a stream of its own perhaps: whoever uses it has waited
    before.

    task: what waits, None where there is nothing to wait for. kept: what the collective reads, alive until then.
    """

    def __init__(self, values: Any, task: Any = None, kept: paddle.Tensor | None = None) -> None:
        self._values, self._task, self._kept = values, task, kept

    def wait(self) -> Any:
        """It; what is queued from now on comes behind the collective. The host does not wait for a GPU."""
        if self._task is not None:
            self._task.wait()
            self._task = self._kept = None
        return self._values
