"""One bar for all ranks that load a model: what each has read is told to rank 0, which shows the sum."""

from __future__ import annotations

import threading

from paddle_qwen1m.parallel.group import ALONE, Group
from paddle_qwen1m.progress import Progress

INTERVAL_SECONDS = 0.25


class LoadingBar:
    """For as long as ranks load, each within its own; one that is done waits for the others at the end. Rank 0 shows
    it, if it is `visible`.
    """

    def __init__(self, group: Group = ALONE, *, visible: bool = True) -> None:
        self._group = group
        self._done = self._total = 0
        self._progress = Progress("Loading weights", 0, "bytes", visible=visible and group.rank == 0)
        self._is_over = threading.Event()
        self._teller = threading.Thread(target=self._tell, name="loading bar", daemon=True)
        self._teller.start()

    def __enter__(self) -> LoadingBar:
        return self

    def __exit__(self, kind: object, *_error: object) -> None:
        if kind is None and self._group.rank == 0:
            self._group.meet()
        self._is_over.set()
        self._teller.join()
        if kind is None and self._group.rank != 0:  # when its last word is said
            self._group.meet()
        self._progress.close()

    def expect(self, total: int) -> None:
        """This rank reads so many bytes."""
        self._total = total

    def update(self, more: int) -> None:
        """This rank has read so many bytes more; one thread at a time."""
        self._done += more

    def _tell(self) -> None:
        is_over = False
        while not is_over:
            is_over = self._is_over.wait(INTERVAL_SECONDS)
            done, total = self._group.add_up(self._done, self._total)
            self._progress.expect(total)
            self._progress.update(done - self._progress.done)
