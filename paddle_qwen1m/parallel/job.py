"""The processes of one tensor parallel job: they find each other, share small values, and end together.

Rank 0 listens, the others connect, and a thread of each rank watches the connections. A process that dies closes its
own, a machine that goes away stops answering, a process that is stopped sends no beats: each ends every rank, with a
line that names rank, host and reason. Collectives cannot do that: they wait for the dead.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import math
import os
import queue
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from typing import Any, Callable, NoReturn

from paddle_qwen1m.parallel.connection import Connection, Message, own_progress
from paddle_qwen1m.parallel.watchdog import DEFAULT_STALL_SECONDS, STALL_SECONDS, Watchdog

START_SECONDS = "PADDLE_QWEN1M_START_SECONDS"
"""Environment variable: seconds that ranks wait for each other at the start."""
DEFAULT_START_SECONDS = 300.0
HELLO_SECONDS = 5.0
ECHO_SECONDS = 1.0
"""How long a rank that failed waits for another to be named: a collective fails on every rank when one rank dies."""
OWNER_SECONDS = 3.0
"""How long the end of a job waits for the function that the process's owner gave."""
LISTENER_SECONDS = 10.0
"""How long a rank looks for rank 0's store before it leaves the waiting to Paddle, which looks every 3 s."""
TELL_SECONDS = 1.0
"""How long a rank that ends tries to tell another why."""
FAILED = 1
PR_SET_PDEATHSIG = 1


class StartError(RuntimeError):
    """The ranks of a job did not find each other; the message says who waited for whom, where and how long."""


class JobEnded(RuntimeError):
    """A rank of the job ended too early; the message names rank, host and reason. Nothing more can be done in it."""


class Job:
    """This process's place among the ranks of a job, from when all have come until one fails or all have left.

    A rank fails when its process ends with a status other than 0, or without one: by a signal or os._exit. Its process
    tells the others as it ends (custom_ops/cpu/job.cpp); a rank that ends with 0 has done its part. A rank that is
    stopped, and ranks that wait for each other for ever, are found by a Watchdog.
    """

    def __init__(
        self,
        rank: int,
        degree: int,
        peers: dict[int, Connection],
        store_port: int,
        address: str,
        stall_seconds: float = DEFAULT_STALL_SECONDS,
    ) -> None:
        self.rank, self.degree = rank, degree
        self.store_address = address, store_port
        self.on_end: Callable[[JobEnded], object] | None = None
        self.outlives_job = False
        self._peers = peers
        self._stall_seconds = stall_seconds
        self._process = os.getpid()
        self._shared: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._arrived: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._last_words: dict[int, str] = {}
        self._said: dict[int, tuple[int, int]] = {}
        self._gone: set[int] = set()
        self._ending = threading.Lock()
        self.ended: JobEnded | None = None
        """Why the job has ended, where the process outlives it."""
        self._has_left = False
        self._leaving = threading.Lock()
        """Held while the others are told; connections are closed behind it."""
        for peer in peers.values():
            peer.open(self._tick)
        atexit.register(self._say_last_words)
        threading.Thread(target=self._watch, name="job watch", daemon=True).start()

    @property
    def _tick(self) -> float:
        """Seconds between beats, and between looks at them."""
        return min(1.0, self._stall_seconds / 5)

    def survive(self, on_end: Callable[[JobEnded], object]) -> None:
        """This process outlives the job: at its end `on_end` is called, and every use of the job raises JobEnded."""
        self.on_end, self.outlives_job = on_end, True

    def share(self, value: Any) -> Any:
        """Rank 0's value (anything that JSON has) on every rank; all ranks call it, in the same order.

        RuntimeError when rank 0 is done and shares nothing more; JobEnded, where the process outlives its job.
        """
        self.check()
        if self.rank == 0:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):  # the watch sees it too, and knows what to do
                    peer.send({"kind": "value", "value": value})
            self.check()
            return value
        return self._next(self._shared)["value"]

    def smallest(self, value: int) -> int:
        """The smallest of the ranks' values: all call it. One may be as late as it likes; in a collective it stalls.

        RuntimeError when a rank is done and does not come any more; JobEnded, where the process outlives its job.
        """
        self.check()
        if self.rank == 0:
            values = [self._next(self._arrived)["value"] for _ in self._peers]
            return self.share(min(value, *values))
        with contextlib.suppress(OSError):
            self._peers[0].send({"kind": "arrived", "value": value})
        return self.share(None)

    def add_up(self, done: int, total: int) -> tuple[int, int]:
        """Rank 0: the sums of its own and of what the others said last; they: what they say, which rank 0 is told."""
        if self.rank == 0:
            said = [(done, total), *self._said.values()]
            return sum(one for one, _ in said), sum(whole for _, whole in said)
        with contextlib.suppress(OSError):
            self._peers[0].send({"kind": "progress", "done": done, "total": total}, TELL_SECONDS)
        return done, total

    def _next(self, messages: queue.SimpleQueue[Message]) -> Message:
        message = messages.get()
        if "ended" not in message:
            return message
        messages.put(message)
        self.check()
        raise RuntimeError(f"rank {message['ended']} ended while this rank waited for it")

    def check(self) -> None:
        """JobEnded when the job has ended, RuntimeError in a process that was forked from a rank."""
        if self.ended is not None:
            raise self.ended
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this process was forked from rank {self.rank} of a tensor parallel job and is no rank of it: load a "
                "model in it, or leave the work to the rank"
            )

    def fail(self, reason: str, status: int = FAILED) -> NoReturn:
        """Ends every rank of the job with `status`; raises JobEnded where this process outlives it."""
        self.check()
        time.sleep(ECHO_SECONDS)
        sys.stdout.flush()
        self._end(self._described({self.rank}, reason), status)
        assert self.ended is not None
        raise self.ended

    def explain(self, error: Exception) -> None:
        """For a collective that failed with `error`: raises JobEnded where that is because of another rank."""
        time.sleep(ECHO_SECONDS)  # within it the watch begins to end the job, if it has to
        with self._ending:
            pass
        if self.ended is not None:
            raise self.ended from error
        if self._gone:
            reason = "ended with exit status 0 while this rank waited for it"
            raise JobEnded(self._described(self._gone, reason)) from error

    def leave(self) -> None:
        """This rank is done, while its process goes on."""
        with self._leaving:
            self._has_left = True
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    peer.send({"kind": "exit", "status": 0, **own_progress(), "busy": 0}, TELL_SECONDS)
                    peer.socket.shutdown(socket.SHUT_WR)

    def _described(self, ranks: Iterable[int], reason: str) -> str:
        hosts = {rank: peer.host for rank, peer in self._peers.items()}
        names = [f"rank {rank} on {hosts.get(rank) or socket.gethostname()}" for rank in sorted(ranks)]
        return f"{' and '.join(names)}: {reason}"

    def _say_last_words(self) -> None:
        """Tells the others which exception ends this process, if one does. It decides nothing: the status does."""
        error = getattr(sys, "last_value", None)
        if error is None or self._has_left or os.getpid() != self._process:
            return
        time.sleep(ECHO_SECONDS)
        words = "".join(traceback.format_exception_only(type(error), error)).strip()
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.send({"kind": "words", "text": words}, TELL_SECONDS)

    def _watch(self) -> None:
        woken = time.monotonic()
        watchdog = Watchdog([self.rank, *self._peers], self._stall_seconds, woken)
        with selectors.DefaultSelector() as selector:
            for peer in self._peers.values():
                selector.register(peer.socket, selectors.EVENT_READ, peer)
                for message in peer.buffered():
                    self._take(message, peer, watchdog, woken)
            while not self._has_left and self.ended is None:
                ready = selector.select(self._tick)
                now = time.monotonic()
                if now - woken > self._stall_seconds / 2:
                    watchdog.forgive(now)
                woken = now
                for key, _ in ready:
                    peer = key.data
                    messages, end = peer.read()
                    for message in messages:
                        self._take(message, peer, watchdog, now)
                    if end is not None and peer.rank not in self._gone:
                        self._end(self._described({peer.rank}, self._last_words.get(peer.rank, end)), FAILED)
                    if peer.rank in self._gone:
                        selector.unregister(peer.socket)
                    watchdog.heard(peer.rank, now)
                watchdog.heard(self.rank, now)
                watchdog.beat(self.rank, now, own_progress())
                self._judge(watchdog, now)
        atexit.unregister(self._say_last_words)
        with self._leaving:
            for peer in self._peers.values():
                peer.close()

    def _take(self, message: Message, peer: Connection, watchdog: Watchdog, now: float) -> None:
        kind = message["kind"]
        if kind == "beat":
            watchdog.beat(peer.rank, now, message)
        elif kind == "value":
            self._shared.put(message)
        elif kind == "arrived":
            self._arrived.put(message)
        elif kind == "progress":
            self._said[peer.rank] = message["done"], message["total"]
        elif kind == "words":
            self._last_words[peer.rank] = message["text"]
        elif kind == "exit" and message["status"] == 0:
            self._gone.add(peer.rank)
            watchdog.beat(peer.rank, now, message)
            watchdog.left(peer.rank)
            self._wake(peer.rank)
        elif kind == "exit":
            status = message["status"]
            reason = self._last_words.get(peer.rank, f"ended with exit status {status}")
            self._end(self._described({peer.rank}, reason), status)
        else:
            self._end(message["text"], message["status"])

    def _wake(self, rank: int) -> None:
        """Whoever waits for a message learns that this rank, or the job, has ended."""
        self._shared.put({"ended": rank})
        self._arrived.put({"ended": rank})

    def _judge(self, watchdog: Watchdog, now: float) -> None:
        """Rank 0 sees the beats of all; the others see its alone, and judge progress when it is gone."""
        verdict = watchdog.silent(now)
        if verdict is None and (self.rank == 0 or 0 in self._gone):
            verdict = watchdog.stuck(now)
        if verdict is not None:
            self._end(self._described(verdict.ranks, verdict.reason), FAILED)

    def _end(self, text: str, status: int) -> None:
        """Tells the others (rank 0 tells all, the rest tell rank 0), then this process's owner, and ends the process,
        whatever its threads do. Returns where the process outlives the job.
        """
        with self._ending:
            if self.ended is not None:
                return
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    peer.send({"kind": "failed", "text": text, "status": status}, TELL_SECONDS)
                    peer.socket.shutdown(socket.SHUT_WR)
            ended = JobEnded(text)
            if not self.outlives_job:
                os.write(2, f"error: {text}\n".encode(errors="replace"))
            if self.on_end is not None:
                owner = threading.Thread(target=self.on_end, args=(ended,), name="job end", daemon=True)
                owner.start()
                owner.join(OWNER_SECONDS)
            if not self.outlives_job:
                os._exit(status)
            self.ended = ended
            self._wake(self.rank)


def launched_ranks() -> int:
    """How many ranks paddle.distributed.launch started; 1 without it."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


def launched_rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("PADDLE_TRAINER_ID", "0"))


def join(rank: int, endpoints: list[str]) -> Job:
    """Meets the other ranks at the first of the launcher's endpoints, "host:port" of each rank.

    Raises StartError when they do not all come within PADDLE_QWEN1M_START_SECONDS (300), ValueError for a limit that is
    no number of seconds.
    """
    host, _, port = endpoints[0].rpartition(":")
    limit = _seconds(START_SECONDS, DEFAULT_START_SECONDS)
    if rank == 0:
        return _gather(host, int(port), len(endpoints), limit)
    return _connect(host, int(port), rank, len(endpoints), limit)


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable, str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"the environment variable {variable} must be a number of seconds above 0, got {text!r}")
    return seconds


def free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])


def await_listener(host: str, port: int) -> None:
    """Returns when somebody listens there, or after LISTENER_SECONDS."""
    deadline = time.monotonic() + LISTENER_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1.0) as raw:
            if raw.getsockname() != raw.getpeername():  # a free local port that was connected to itself
                return
        time.sleep(0.02)


def end_with_the_launcher() -> None:
    """From now on the end of the process that started this one, even by SIGKILL, ends it too."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _gather(host: str, port: int, degree: int, limit: float) -> Job:
    deadline = time.monotonic() + limit
    stall_seconds = _seconds(STALL_SECONDS, DEFAULT_STALL_SECONDS)
    peers: dict[int, Connection] = {}
    try:
        server = socket.create_server((host, port))
    except OSError as error:
        raise StartError(
            f"rank 0 cannot listen at {host}:{port}, where the other ranks look for it: {error.strerror}"
        ) from error
    with server:
        while len(peers) < degree - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                raw, _ = server.accept()
            except socket.timeout:
                missing = ", ".join(str(rank) for rank in range(1, degree) if rank not in peers)
                text = (
                    f"rank 0 on {socket.gethostname()} waited {limit:g} s at {host}:{port}, missing of {degree} ranks: "
                    f"{missing}; see their logs, and whether their machines reach this address ({START_SECONDS} sets "
                    "the time)"
                )
                for peer in peers.values():
                    with contextlib.suppress(OSError):
                        peer.send({"kind": "failed", "text": text})
                raise StartError(text) from None
            newcomer = _hello(raw, degree, peers)
            if newcomer is not None:
                peers[newcomer.rank] = newcomer
    store_port = free_port(host)
    for peer in peers.values():
        with contextlib.suppress(OSError):  # a rank that died meanwhile: the watch says so
            peer.send(
                {
                    "kind": "go",
                    "store_port": store_port,
                    "host": socket.gethostname(),
                    "stall_seconds": stall_seconds,
                }
            )
    return Job(0, degree, peers, store_port, host, stall_seconds)


def _hello(raw: socket.socket, degree: int, peers: dict[int, Connection]) -> Connection | None:
    """A rank's connection; None, and closed, for whatever else connects to the port."""
    raw.settimeout(HELLO_SECONDS)
    connection = Connection(raw, -1, "")
    try:
        message = connection.receive() or {}
        connection.rank, connection.host = int(message["rank"]), str(message["host"])
        if message["degree"] != degree or not 0 < connection.rank < degree or connection.rank in peers:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raw.close()
        return None
    raw.settimeout(None)
    return connection


def _connect(host: str, port: int, rank: int, degree: int, limit: float) -> Job:
    deadline = time.monotonic() + limit
    raw, problem = None, ""
    while raw is None:
        try:
            raw = socket.create_connection((host, port), timeout=max(0.01, deadline - time.monotonic()))
            if raw.getsockname() == raw.getpeername():  # a free local port that was connected to itself
                raw.close()
                raw = None
        except OSError as error:
            problem = str(error)
        if raw is None:
            if time.monotonic() >= deadline:
                raise StartError(
                    f"rank {rank} on {socket.gethostname()} waited {limit:g} s for rank 0 at {host}:{port}: {problem}; "
                    f"see rank 0's log, and whether this machine reaches that address ({START_SECONDS} sets the time)"
                )
            time.sleep(0.1)
    connection = Connection(raw, 0, host)
    # Rank 0 says itself when its time is over.
    raw.settimeout(max(0.0, deadline - time.monotonic()) + limit + HELLO_SECONDS)
    try:
        connection.send({"rank": rank, "degree": degree, "host": socket.gethostname()})
        message = connection.receive()
    except OSError as error:
        raise StartError(f"rank {rank} lost rank 0 at {host}:{port} while it waited for the others: {error}") from error
    if message is None:
        raise StartError(f"rank {rank} lost rank 0 at {host}:{port} while it waited for the others")
    if message["kind"] == "failed":
        raise StartError(message["text"])
    raw.settimeout(None)
    connection.host = message["host"]
    return Job(rank, degree, {0: connection}, message["store_port"], host, message["stall_seconds"])
