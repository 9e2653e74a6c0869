"""An engine whose ranks are processes of their own: the same calls as Engine's, over a connection to rank 0."""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from itertools import count
from typing import Any

import paddle

from paddle_qwen1m.engine import Event, Finished, Metrics, Request, SamplingParams
from paddle_qwen1m.engine.admission import Limits
from paddle_qwen1m.parallel import failure
from paddle_qwen1m.parallel.workers import Workers
from paddle_qwen1m.threads import default_num_threads

WORKER = "paddle_qwen1m.parallel.worker"
STEP_SECONDS = 0.05
"""How long a step waits for events, so that whoever loops over steps can do something else."""


def start_engine(model: str, options: dict[str, Any], worker: str = WORKER) -> RemoteEngine:
    """Starts options["tensor_parallel_size"] ranks on Paddle's kind of device, and returns when they serve.

    Raises what paddlenlp.serving.load_engine does, in whatever rank, and JobEnded for one that dies; none is left then.
    worker: the module whose main() a rank runs.
    """
    degree = int(options["tensor_parallel_size"])
    on_gpu = paddle.device.get_device().startswith("gpu")
    workers = Workers(worker, degree, on_gpu=on_gpu)
    try:
        threads = max(1, default_num_threads() // degree)
        workers.send(
            {"kind": "load", "model": model, "options": options, "on_gpu": on_gpu, "threads": threads}, to_all=True
        )
        ready = workers.receive()
        assert ready is not None and ready["kind"] == "ready"
        return RemoteEngine(workers, ready["limits"], writes="prefix_store" in options)
    except BaseException:
        workers.end()
        raise


class RemoteEngine:
    """As engine.interface.Serving says, over `workers`, which end with it.

    A rank that dies or fails ends all of them: every call but close then raises JobEnded, which names it and says why.
    Requests have numbers of their own on the way: what still comes of one that was aborted is nobody's. writes: whether
    ranks write to a prefix store, which they are given the time for when this is closed.
    """

    def __init__(self, workers: Workers, limits: Limits, *, writes: bool = False) -> None:
        self.limits = limits
        self._writes = writes
        self._workers = workers
        self._end = weakref.finalize(self, workers.end)
        self._numbers = count()
        self._running: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._events: deque[Event] = deque()

    @property
    def is_idle(self) -> bool:
        return not self._running

    @property
    def metrics(self) -> Metrics:
        return self._ask("metrics")

    def prepare(self, params: SamplingParams) -> None:
        if params.structured_outputs is not None:
            self._ask("prepare", params)

    def add(self, request: Request) -> None:
        if request.id in self._running:
            raise ValueError(f"there is a request with the id {request.id!r} already")
        self.limits.check(request)
        number = str(next(self._numbers))
        self._running[request.id], self._names[number] = number, request.id
        try:
            self._ask("add", replace(request, id=number))
        except BaseException:  # Ctrl-C while it waits for the answer, too
            with contextlib.suppress(RuntimeError):
                self.abort(request.id)
            raise

    def abort(self, request_id: str) -> bool:
        number = self._running.pop(request_id, None)
        if number is None:
            return False
        del self._names[number]
        self._events = deque(event for event in self._events if event.id != request_id)
        self._tell("abort", number)
        return True

    def stop(self, request_id: str, index: int, reason: int | str) -> bool:
        number = self._running.get(request_id)
        if number is None:
            return False
        self._tell("stop", number, index, reason)
        return True

    def step(self) -> list[Event]:
        seconds = 0.0 if self._events or self.is_idle else STEP_SECONDS
        while (message := self._workers.receive(seconds)) is not None:
            self._events.extend(self._named(message["events"]))
            seconds = 0.0
        events, self._events = list(self._events), deque()
        for event in events:
            if isinstance(event, Finished):
                del self._names[self._running.pop(event.id)]
        return events

    def reset_prefix_cache(self) -> bool:
        return bool(self._ask("reset_prefix_cache"))

    def close(self) -> None:
        if self._writes and self._end.alive:
            with contextlib.suppress(RuntimeError):  # a rank has ended
                self._ask("close")
        self._end()

    def _tell(self, method: str, *arguments: Any) -> None:
        self._workers.send({"kind": method, "arguments": arguments})

    def _ask(self, method: str, *arguments: Any) -> Any:
        """What rank 0's engine returns or raises."""
        answer = self._workers.ask({"kind": method, "arguments": arguments})
        if "error" in answer:
            raise failure.rebuild(answer["error"], "rank 0")
        return answer["value"]

    def _named(self, events: Iterable[Event]) -> Iterable[Event]:
        for event in events:
            name = self._names.get(event.id)
            if name is not None:
                yield replace(event, id=name)
