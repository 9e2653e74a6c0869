"""A rank that is stopped, and one that others wait for in vain, end the job; what merely takes long does not."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from parallel_ranks import Process, is_running, launcher, rank_environment

from paddle_qwen1m.parallel.job import free_port, join

STALLING = Path(__file__).with_name("stalling_rank.py")
HOST = socket.gethostname()
LIMIT = 3.0
START = 150.0
"""Seconds for processes to start on a busy machine."""


def begin(folder: Path, what: str, rank: int) -> list[Process]:
    port = free_port("127.0.0.1")
    limit = {"PADDLE_QWEN1M_STALL_SECONDS": str(LIMIT)}
    command = [STALLING, folder, what, str(rank)]
    return [Process(command, **rank_environment(number, 2, port), **limit) for number in range(2)]


def test_a_stopped_rank_is_named_and_ends_the_job(tmp_path: Path) -> None:
    for rank, processes in enumerate([begin(tmp_path, "stop", rank) for rank in (0, 1)]):
        status, output = processes[1 - rank].finish(START + 3 * LIMIT)
        processes[rank].kill()
        processes[rank].finish(START)
        assert status == 1, output
        assert f"error: rank {rank} on {HOST}: stopped, or cut off: no sign of life for {LIMIT:g} s" in output


def test_a_launcher_with_a_stopped_rank_ends(tmp_path: Path) -> None:
    command = launcher(2, tmp_path / "logs", [STALLING, tmp_path, "stop", "1"])
    status, output = Process(command, PADDLE_QWEN1M_STALL_SECONDS=str(LIMIT)).finish(START + 30)
    assert status != 0, output
    pids = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in pids if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "a stopped rank would keep its memory"


def test_a_rank_that_does_not_come_to_a_collective_is_named(tmp_path: Path) -> None:
    """It lives and beats, and the other waits."""
    for rank, processes in enumerate([begin(tmp_path, "absent", rank) for rank in (0, 1)]):
        for status, output in [process.finish(START + 3 * LIMIT) for process in processes]:
            assert status == 1, output
            assert f"error: rank {rank} on {HOST}: no progress for {LIMIT:g} s in the middle of a step" in output


@pytest.mark.parametrize(
    ("what", "rank"),
    [
        (["layer"], 0),
        (["late"], 0),
        pytest.param(["late"], 1, marks=pytest.mark.slow),
        (["idle", "meet", "hold", "pause"], 0),
        pytest.param(["meet", "hold"], 1, marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_takes_longer_than_the_limit_is_no_stall(tmp_path: Path, what: list[str], rank: int) -> None:
    """Idle ranks, a layer (the first of the job too), a call that keeps the interpreter's lock, a paused machine. Jobs
    that wait, and compute nothing, wait at the same time.
    """
    jobs = {}
    for one in what:
        (tmp_path / one).mkdir()
        jobs[one] = begin(tmp_path / one, one, rank)
    ends = {one: [process.finish(START + 10 * LIMIT) for process in processes] for one, processes in jobs.items()}
    for one, (first, second) in ends.items():
        assert first[0] == second[0] == 0, f"{one}: {first[1]}\n{second[1]}"


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf", ""])
def test_a_limit_that_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PADDLE_QWEN1M_STALL_SECONDS", text)
    with pytest.raises(ValueError, match=r"PADDLE_QWEN1M_STALL_SECONDS must be a number of seconds above 0, got"):
        join(0, [f"127.0.0.1:{free_port('127.0.0.1')}"] * 2)
