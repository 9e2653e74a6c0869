"""The ranks of a tensor parallel job as processes that their caller starts, watches and ends; it is none of them.

A thread of the caller does all of it. It starts them, because Linux ends a child with the thread that started it where
the child asks for that (job.end_with_the_launcher); and nothing interrupts it in the middle of a message, as Ctrl-C
does the main thread.
"""

from __future__ import annotations

import contextlib
import os
import queue
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from paddle_qwen1m.parallel import failure, wire
from paddle_qwen1m.parallel.job import FAILED, JobEnded

HOST = "127.0.0.1"
BOOT = """import sys
sys.path[:] = sys.argv[1:]
from paddle_qwen1m.parallel.job import end_with_the_launcher
end_with_the_launcher()
from {module} import main
main()"""
"""What a rank's interpreter runs: modules come from where this process finds them, and its script is not run again."""
TICK_SECONDS = 1.0
"""Between looks at the processes themselves; their ends are mostly seen by the ends of their connections."""
CULPRIT_SECONDS = 1.0
"""How long a rank that says that another one failed waits for that one to be found."""
END_SECONDS = 10.0
"""How long a killed process may take to be gone; it is waited for because its memory is free only then."""
DEVICE_VARIABLES = ("FLAGS_selected_gpus", "FLAGS_selected_cpus", "PADDLE_DISTRI_BACKEND")
TAIL_LINES, TAIL_BYTES = 20, 1 << 14
PIECE = 1 << 20


@dataclass
class _Rank:
    """A rank's process, and the connection that is its standard input."""

    number: int
    process: subprocess.Popen[bytes]
    channel: socket.socket
    reader: wire.Reader = field(default_factory=wire.Reader)
    unsent: deque[memoryview] = field(default_factory=deque)
    log: bytes = b""
    """The end of what it wrote; rank 0 writes to the caller's stderr itself."""
    told: dict[str, Any] | None = None
    """The exception that ended it, in its own words."""
    is_open: bool = True

    def __str__(self) -> str:
        return f"rank {self.number} on {socket.gethostname()}"


class Workers:
    """Ranks 0 to degree - 1, each an interpreter that runs main() of `module`; see parallel/worker.py.

    `send`, `ask` and `receive` talk to rank 0. A rank that ends, however it does, ends all; they then raise what
    happened, for good: during the start an exception of the type and text that the rank had, later JobEnded.
    """

    def __init__(self, module: str, degree: int, *, on_gpu: bool) -> None:
        self._module, self._degree, self._on_gpu = module, degree, on_gpu
        self._process = os.getpid()
        self._ranks: list[_Rank] = []
        self._received: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._calls = count()
        self._asked: dict[int, queue.SimpleQueue[dict[str, Any] | None]] = {}
        self._posted: deque[tuple[bool, bytes]] = deque()
        self._lock = threading.RLock()  # a garbage collection may call `end` in whatever this lock's owner does
        self._error: Exception | None = None
        self._closing = self._is_over = False
        self._waker, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="workers", daemon=True)
        self._thread.start()

    def send(self, message: dict[str, Any], *, to_all: bool = False) -> None:
        """Sends to rank 0, or to every rank; does not wait for them."""
        self._check()
        self._posted.append((to_all, wire.encode(message)))
        self._wake()

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Sends to rank 0, and waits for its answer, a message with the same "call". Any thread may ask."""
        call = next(self._calls)
        answers = self._asked[call] = queue.SimpleQueue()
        try:
            self.send({**message, "call": call})
            answer = answers.get()
        finally:
            del self._asked[call]
        if answer is None:
            self._check()
        assert answer is not None
        return answer

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next message of rank 0 that answers none, None after so many seconds without one."""
        self._check()
        with contextlib.suppress(queue.Empty):
            message = self._received.get(timeout=seconds)
            if message is not None:
                return message
            self._received.put(None)  # for whoever else waits, now or later
            self._check()
        return None

    def end(self) -> None:
        """Ends all ranks, whatever they do, and returns when they are gone. Does nothing in a forked child."""
        if os.getpid() != self._process:
            return
        self._closing = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError("this process was forked from the one that started the workers: it has to start its own")
        if self._is_over:
            self._thread.join()
            raise RuntimeError("the workers were ended") if self._error is None else self._error.with_traceback(None)

    def _wake(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # the thread is done, or has as many calls as it can take
            self._waker.send(b"\0", socket.MSG_DONTWAIT)

    # --- the thread ---

    def _run(self) -> None:
        error: Exception | None = None
        try:
            with selectors.DefaultSelector() as selector, _endpoints(self._degree) as endpoints:
                selector.register(self._woken, selectors.EVENT_READ, self._take_calls)
                for number in range(self._degree):
                    self._start(number, endpoints, selector)
                while not self._closing:
                    for key, _ in selector.select(TICK_SECONDS):
                        key.data()
                    self._flush(selector)
                    if any(rank.told or not rank.is_open or rank.process.poll() is not None for rank in self._ranks):
                        raise self._reason()
        except Exception as reason:
            error = reason
        self._end_all()
        with self._lock:
            self._waker.close()
            self._woken.close()
        self._error = error  # who learns of it finds the memory of all ranks free
        self._is_over = True
        for waiting in (self._received, *tuple(self._asked.values())):  # who asks from now on is told by _check
            waiting.put(None)

    def _start(self, number: int, endpoints: list[str], selector: selectors.BaseSelector) -> None:
        ours, theirs = socket.socketpair()
        output = _stderr() if number == 0 else subprocess.PIPE
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", BOOT.format(module=self._module), *filter(_is_text, sys.path)],
                stdin=theirs.fileno(),
                stdout=output,
                stderr=output if number == 0 else subprocess.STDOUT,
                env=_environment(number, endpoints, self._on_gpu),
                start_new_session=True,  # Ctrl-C is for the caller alone
            )
        rank = _Rank(number, process, ours)
        self._ranks.append(rank)
        ours.setblocking(False)
        selector.register(ours, selectors.EVENT_READ, lambda: self._read(rank))
        if process.stdout is not None:
            selector.register(process.stdout, selectors.EVENT_READ, lambda: self._read_log(rank, selector))

    def _take_calls(self) -> None:
        self._woken.recv(PIECE)
        while self._posted:
            to_all, message = self._posted.popleft()
            for rank in self._ranks if to_all else self._ranks[:1]:
                rank.unsent.append(memoryview(message))

    def _flush(self, selector: selectors.BaseSelector) -> None:
        """Sends what the ranks can take now, and asks to be told when they can take more."""
        for rank in self._ranks:
            with contextlib.suppress(BlockingIOError, ConnectionError):  # that it is gone is seen by reading
                while rank.unsent:
                    sent = rank.channel.send(rank.unsent[0])
                    rest = rank.unsent.popleft()[sent:]
                    if rest:
                        rank.unsent.appendleft(rest)
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if rank.unsent else 0)
            key = selector.get_key(rank.channel)
            if key.events != wanted:
                selector.modify(rank.channel, wanted, key.data)

    def _read(self, rank: _Rank) -> bool:
        """Takes what has come from a rank, if something has."""
        try:
            piece = rank.channel.recv(PIECE)
        except BlockingIOError:
            return False
        except ConnectionError:
            piece = b""
        rank.is_open = rank.is_open and bool(piece)
        for message in rank.reader.feed(piece):
            if message["kind"] == "failed":
                rank.told = message
            elif "call" not in message:
                self._received.put(message)
            elif (waiting := self._asked.get(message["call"])) is not None:  # else whoever asked was interrupted
                waiting.put(message)
        return bool(piece)

    def _read_log(self, rank: _Rank, selector: selectors.BaseSelector) -> None:
        assert rank.process.stdout is not None
        piece = rank.process.stdout.read1(PIECE)  # type: ignore[attr-defined]
        rank.log = (rank.log + piece)[-TAIL_BYTES:]
        if not piece:
            selector.unregister(rank.process.stdout)

    def _reason(self) -> Exception:
        """Why the ranks cannot go on: what one of them says, else how one ended, else what others say of one."""
        deadline = time.monotonic() + CULPRIT_SECONDS
        while True:
            ended = [rank for rank in self._ranks if rank.process.poll() is not None]
            ended.sort(key=lambda rank: rank.process.returncode == FAILED)  # as those end that miss another one
            for rank in self._ranks:
                while self._read(rank):
                    pass
            for rank in self._ranks:
                if rank.told is not None and not failure.is_echo(rank.told["error"]):
                    return self._told(rank, rank.told)
            for rank in ended:
                if rank.told is None:
                    self._show_log(rank)
                    return JobEnded(f"{rank}: {_how(rank.process.returncode)}")
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        for rank in self._ranks:
            if rank.told is not None:
                return JobEnded(rank.told["error"]["text"])
        closed = next(rank for rank in self._ranks if not rank.is_open)
        return JobEnded(f"{closed}: closed its connection")

    def _told(self, rank: _Rank, told: dict[str, Any]) -> Exception:
        error = told["error"]
        if not failure.is_known(error):
            self._show_log(rank)
        if told["loading"]:
            return failure.rebuild(error, str(rank))
        return failure.caused(JobEnded(f"{rank}: {failure.summary(error)}"), error)

    def _show_log(self, rank: _Rank) -> None:
        """The last lines that a rank other than 0 wrote, on stderr."""
        if rank.process.stdout is None:
            return
        os.set_blocking(rank.process.stdout.fileno(), False)
        rank.log += rank.process.stdout.read() or b""
        for line in rank.log[-TAIL_BYTES:].decode(errors="replace").splitlines()[-TAIL_LINES:]:
            _note(f"rank {rank.number}: {line}")

    def _end_all(self) -> None:
        """Kills the ranks: they hold nothing that outlives them, and one that hangs heeds nothing else."""
        for rank in self._ranks:
            rank.process.kill()
        deadline = time.monotonic() + END_SECONDS
        for rank in self._ranks:
            try:
                rank.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _note(f"{rank} (process {rank.process.pid}) was killed, but is not gone yet: it still has its memory")
            rank.channel.close()
            if rank.process.stdout is not None:
                rank.process.stdout.close()


def _environment(rank: int, endpoints: list[str], on_gpu: bool) -> dict[str, str]:
    """What paddle.distributed.launch tells a rank, in this process's environment; Paddle itself is to be quiet."""
    degree = str(len(endpoints))
    kept = {name: value for name, value in os.environ.items() if name not in DEVICE_VARIABLES}
    device = {"FLAGS_selected_gpus": str(rank)} if on_gpu else {"PADDLE_DISTRI_BACKEND": "gloo"}
    return {
        "GLOG_minloglevel": "2",
        **kept,
        **device,
        "PADDLE_MASTER": endpoints[0],
        "PADDLE_NNODES": "1",
        "PADDLE_GLOBAL_SIZE": degree,
        "PADDLE_GLOBAL_RANK": str(rank),
        "PADDLE_LOCAL_SIZE": degree,
        "PADDLE_LOCAL_RANK": str(rank),
        "PADDLE_RANK_IN_NODE": str(rank),
        "PADDLE_TRAINERS_NUM": degree,
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
    }


@contextmanager
def _endpoints(degree: int) -> Iterator[list[str]]:
    """An address for each rank to listen at. Until the end no other socket is given one: they are bound here, and not
    listened at, which on Linux lets a rank do so.
    """
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(degree)]
        for one in held:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((HOST, 0))
        yield [f"{HOST}:{one.getsockname()[1]}" for one in held]


def _stderr() -> int:
    """The descriptor of this process's stderr, where it began with one: else that number may be any file's by now."""
    try:
        return subprocess.DEVNULL if sys.__stderr__ is None else sys.__stderr__.fileno()
    except (OSError, ValueError):  # without a descriptor, or closed
        return subprocess.DEVNULL


def _note(line: str) -> None:
    """A line on stderr; that nobody can read it is no failure."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _how(status: int) -> str:
    """How a process ended."""
    if status >= 0:
        return f"ended with exit status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"killed by {name}{', as the kernel does for lack of memory' if -status == signal.SIGKILL else ''}"


def _is_text(value: object) -> bool:
    return isinstance(value, str)
