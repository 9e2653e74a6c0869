"""`paddle-qwen1m serve` as a process of its own, and the ranks that it starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

COMMAND = ("-m", "paddle_qwen1m", "serve")


class Command:
    """A process that serves at `url`. `lines`: what it has written on stderr."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *arguments],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.search(r"running on (http://[\d.:]+)", line)
            if found:
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.lines))
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self._reader.start()

    def wait_until_ready(self, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while httpx.get(f"{self.url}/health").status_code != 200:
            assert time.monotonic() < deadline and self.process.poll() is None, "".join(self.lines)
            time.sleep(0.1)

    def end(self, seconds: float = 30) -> int:
        """Its exit status."""
        status = self.process.wait(seconds)
        self._reader.join(5)
        return status

    def ranks(self) -> dict[int, int]:
        """The processes of its ranks, by their numbers."""
        found = {}
        for directory in Path("/proc").iterdir():
            try:
                parent = (directory / "stat").read_text().rpartition(")")[2].split()[1]
                variables = dict(
                    pair.partition(b"=")[::2] for pair in (directory / "environ").read_bytes().split(b"\0")
                )
            except (OSError, IndexError):
                continue
            if int(parent) == self.process.pid and b"PADDLE_TRAINER_ID" in variables:
                found[int(variables[b"PADDLE_TRAINER_ID"])] = int(directory.name)
        return found


@contextmanager
def running(*flags: str, arguments: Sequence[str] = COMMAND) -> Iterator[Command]:
    """Serves on a free port while the context lasts."""
    command = Command([*arguments, *flags, "--port", "0"])
    try:
        yield command
    finally:
        command.process.kill()
        command.process.wait()


def are_gone(processes: Sequence[int], seconds: float) -> bool:
    """Whether all of them end within the time; those that nobody waits for have."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(_runs(process) for process in processes):
            return True
        time.sleep(0.05)
    return False


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
