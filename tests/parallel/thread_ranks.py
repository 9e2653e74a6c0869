"""Ranks that are threads of one process, over Paddle's store; each knows which it is."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

from paddle.base import core

from paddle_qwen1m.parallel.job import free_port


class ThreadRanks:
    """What they call finds `rank`, its caller's."""

    def __init__(self) -> None:
        self._here = threading.local()

    @property
    def rank(self) -> int:
        return int(self._here.rank)

    def run(self, degree: int, call: Callable[[Any, int], Any]) -> list[Any]:
        """What each makes of a store of its own and its rank, all at a time."""
        port = free_port("127.0.0.1")
        stores = [core.TCPStore("127.0.0.1", port, rank == 0, 1) for rank in range(degree)]

        def one(rank: int) -> Any:
            self._here.rank = rank
            return call(stores[rank], rank)

        with ThreadPoolExecutor(degree) as pool:
            return list(pool.map(one, range(degree)))
