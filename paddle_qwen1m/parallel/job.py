"""The processes of one tensor parallel job: they find each other, share small values, and end together.

Rank 0 listens, the others connect, and a thread of each rank watches the connections. A process that dies closes its
own, a machine that goes away stops answering; either ends every rank with a line that names rank, host and reason.
Collectives cannot do that: they wait for the dead.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from typing import Any, NoReturn

START_SECONDS = "PADDLE_QWEN1M_START_SECONDS"
"""Environment variable: seconds that ranks wait for each other at the start."""
DEFAULT_START_SECONDS = 300.0
HELLO_SECONDS = 5.0
ECHO_SECONDS = 1.0
"""How long a rank that failed waits for another to be named: a collective fails on every rank when one rank dies."""
FAILED = 1
MAX_FRAME = 1 << 30
PR_SET_PDEATHSIG = 1


class StartError(RuntimeError):
    """The ranks of a job did not find each other; the message says who waited for whom, where and how long."""


class Connection:
    """JSON values over a socket, each behind its length."""

    def __init__(self, raw: socket.socket, rank: int, host: str) -> None:
        self.socket, self.rank, self.host = raw, rank, host
        self._lock = threading.Lock()
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that is gone is noticed after 5 + 3 x 5 seconds, by the kernel, whatever this process computes.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000)

    def send(self, message: dict[str, Any]) -> None:
        raw = json.dumps(message).encode()
        with self._lock:
            self.socket.sendall(struct.pack("<Q", len(raw)) + raw)

    def receive(self) -> dict[str, Any] | None:
        """The next message, None at the end of the connection; ValueError for what is no message."""
        header = self._exactly(8)
        if header is None:
            return None
        (length,) = struct.unpack("<Q", header)
        if length > MAX_FRAME:
            raise ValueError(f"a message of {length} bytes")
        raw = self._exactly(length)
        message = None if raw is None else json.loads(raw)
        if message is not None and not isinstance(message, dict):
            raise ValueError("not a message")
        return message

    def _exactly(self, size: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < size:
            part = self.socket.recv(min(size - len(parts), 1 << 20))
            if not part:
                return None
            parts += part
        return bytes(parts)


class Job:
    """This process's place among the ranks of a job, from when all have come until one fails or all have left."""

    def __init__(self, rank: int, degree: int, peers: dict[int, Connection], store_port: int, address: str) -> None:
        self.rank, self.degree = rank, degree
        self.store_address = address, store_port
        self._peers = peers
        self._shared: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ending = False
        threading.Thread(target=self._watch, name="job watch", daemon=True).start()

    def share(self, value: Any) -> Any:
        """Rank 0's value (anything that JSON has) on every rank; all ranks call it, in the same order.

        RuntimeError when rank 0 is done and shares nothing more.
        """
        if self.rank != 0:
            message = self._shared.get()
            if message["kind"] == "bye":
                raise RuntimeError("rank 0 ended while this rank waited for it")
            return message["value"]
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # the watch sees it too, and knows what to do
                peer.send({"kind": "value", "value": value})
        return value

    def fail(self, reason: str, status: int = FAILED) -> NoReturn:
        """Ends every rank of the job with `status`."""
        time.sleep(ECHO_SECONDS)
        sys.stdout.flush()
        self._end(self._described(self.rank, socket.gethostname(), reason), status)

    def leave(self) -> None:
        """This rank is done: the end of its process is no failure."""
        self._ending = True
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.send({"kind": "bye"})

    @staticmethod
    def _described(rank: int, host: str, reason: str) -> str:
        return f"rank {rank} on {host}: {reason}"

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers.values():
                selector.register(peer.socket, selectors.EVENT_READ, peer)
            while selector.get_map():
                for key, _ in selector.select():
                    peer = key.data
                    try:
                        message = peer.receive()
                    except (OSError, ValueError) as error:
                        message = {"kind": "lost", "reason": str(error)}
                    if message is None:
                        message = {"kind": "lost", "reason": "killed or crashed, its connection is closed"}
                    if self._ending or message["kind"] == "bye":
                        selector.unregister(peer.socket)
                        self._shared.put({"kind": "bye"})
                    elif message["kind"] == "value":
                        self._shared.put(message)
                    elif message["kind"] == "lost":
                        self._end(self._described(peer.rank, peer.host, message["reason"]), FAILED)
                    else:
                        self._end(message["text"], message["status"])

    def _end(self, text: str, status: int) -> NoReturn:
        """Tells the others (rank 0 tells all, the rest tell rank 0) and ends the process, whatever its threads do."""
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.socket.settimeout(HELLO_SECONDS)
                peer.send({"kind": "failed", "text": text, "status": status})
                peer.socket.shutdown(socket.SHUT_WR)
        os.write(2, f"error: {text}\n".encode(errors="replace"))
        os._exit(status)


def launched_ranks() -> int:
    """How many ranks paddle.distributed.launch started; 1 without it."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


def launched_rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("PADDLE_TRAINER_ID", "0"))


def join(rank: int, endpoints: list[str]) -> Job:
    """Meets the other ranks at the first of the launcher's endpoints, "host:port" of each rank.

    Raises StartError when they do not all come within PADDLE_QWEN1M_START_SECONDS (300).
    """
    host, _, port = endpoints[0].rpartition(":")
    limit = float(os.environ.get(START_SECONDS, DEFAULT_START_SECONDS))
    if rank == 0:
        return _gather(host, int(port), len(endpoints), limit)
    return _connect(host, int(port), rank, len(endpoints), limit)


def free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])


def end_with_the_launcher() -> None:
    """From now on the end of the process that started this one, even by SIGKILL, ends it too."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _gather(host: str, port: int, degree: int, limit: float) -> Job:
    deadline = time.monotonic() + limit
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
            peer.send({"kind": "go", "store_port": store_port, "host": socket.gethostname()})
    return Job(0, degree, peers, store_port, host)


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
    return Job(rank, degree, {0: connection}, message["store_port"], host)
