"""A rank of an engine that serves another process: workers.Workers starts it, remote.RemoteEngine talks to it.

Its standard input is a connection to that process; when it ends, so does the rank.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, NoReturn

import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.parallel import failure, wire
from paddle_qwen1m.parallel.group import Group, ProcessGroup, start
from paddle_qwen1m.parallel.job import launched_rank, launched_ranks

LINGER_SECONDS = 0.002
"""After an answer the caller often asks again at once: requests that come together are in one step."""
BURST_SECONDS = 0.05
"""How long requests may go on coming together while others run."""
PREPARING_THREADS = 2
PIECE = 1 << 20


class Caller:
    """The process that started this one."""

    def __init__(self) -> None:
        self._socket = socket.socket(fileno=os.dup(0))
        nowhere = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nowhere, 0)
        os.close(nowhere)
        self._sending = threading.Lock()
        self._received: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._receive, name="caller", daemon=True).start()

    def send(self, kind: str, **values: Any) -> None:
        message = wire.encode({"kind": kind, **values})
        with self._sending:
            self._socket.sendall(message)

    def next(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next message, None where none comes within so many seconds."""
        with contextlib.suppress(queue.Empty):
            return self._received.get(timeout=seconds)
        return None

    def _receive(self) -> None:
        """A long prompt comes in while a step computes; the end of the caller ends this process whatever it does."""
        reader = wire.Reader()
        with contextlib.suppress(OSError):
            while piece := self._socket.recv(PIECE):
                for message in reader.feed(piece):
                    self._received.put(message)
        os._exit(0)


def main() -> None:
    """A rank of the model that the caller names."""
    from paddle_qwen1m.paddlenlp.serving import load_engine

    serve(load_engine)


def serve(load: Callable[[str, dict[str, Any]], Any]) -> NoReturn:
    """Meets the other ranks, loads what the caller wants, and serves it until the caller ends.

    load: makes this rank's part of an engine, as paddlenlp.serving.load_engine does. Whatever is raised ends the rank;
    the caller gets to know it.
    """
    caller, loading = Caller(), True
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # here: PaddleNLP takes it off when it is imported
        wanted = caller.next()
        assert wanted is not None
        group = _join(caller, wanted)
        engine = load(wanted["model"], wanted["options"])
        group.meet()
        loading = False
        gc.collect()
        gc.freeze()  # all that is there stays: looking through it takes some 0.2 s, in which a GPU gets nothing to do
        if launched_rank() == 0:
            caller.send("ready", limits=engine.limits)
            _lead(engine, caller)
        while True:
            engine.follow()
    except BaseException as error:
        _end(caller, error, loading)


def _join(caller: Caller, wanted: dict[str, Any]) -> Group:
    """The group of all ranks, on the caller's kind of device. Its end is told to the caller, and is this rank's."""
    degree = launched_ranks()
    if not wanted["on_gpu"]:
        paddle.device.set_device("cpu")
    elif paddle.device.cuda.device_count() < degree:
        raise ValueError(
            f"tensor_parallel_size={degree} needs {degree} GPUs, Paddle sees {paddle.device.cuda.device_count()} "
            f"(CUDA_VISIBLE_DEVICES: {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})"
        )
    group = start(degree)
    ops.set_num_threads(wanted["threads"])
    assert isinstance(group, ProcessGroup) and group.job is not None
    group.job.survive(lambda ended: _end(caller, ended, loading=False))
    return group


def _lead(engine: Any, caller: Caller) -> NoReturn:
    """Rank 0: does what the caller says, between steps or, what takes long, beside them; tells what comes of it."""
    beside = ThreadPoolExecutor(PREPARING_THREADS, "prepare")
    while True:
        message = caller.next(None if engine.is_idle else 0.0)
        burst = time.monotonic() + BURST_SECONDS
        while message is not None:
            lingers = "call" in message and time.monotonic() < burst
            if message["kind"] == "prepare":
                beside.submit(_obey, engine, caller, message)
            else:
                _obey(engine, caller, message)
            message = caller.next(LINGER_SECONDS if lingers else 0.0)
        events = engine.step()
        if events:
            caller.send("events", events=events)


def _obey(engine: Any, caller: Caller, message: dict[str, Any]) -> None:
    """Calls the method of the engine, or reads its property, that the message names; answers a caller who waits."""

    def value() -> Any:
        named = getattr(engine, message["kind"])
        return named(*message["arguments"]) if callable(named) else named

    if "call" not in message:
        value()
        return
    try:
        caller.send("answer", call=message["call"], value=value())
    except Exception as error:
        caller.send("answer", call=message["call"], error=failure.describe(error))


def _end(caller: Caller, error: BaseException, loading: bool) -> NoReturn:
    """Ends this process, whatever its threads do."""
    with contextlib.suppress(OSError):
        caller.send("failed", error=failure.describe(error), loading=loading)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(1)
