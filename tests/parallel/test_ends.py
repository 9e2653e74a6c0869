"""A job's end is what its ranks say it is: every way in which a process can end, and what the others make of it."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
from parallel_ranks import Process, is_running, launch, rank_environment

from paddle_qwen1m.parallel.job import free_port

ENDING = Path(__file__).with_name("ending_rank.py")
HOST = socket.gethostname()
START = 150.0
"""Seconds for processes to start on a busy machine."""
END = 30.0
"""Seconds in which the end of one rank must be that of both."""

DEATHS = {
    "sys.exit(3)": "ended with exit status 3",
    "exit(3)": "ended with exit status 3",
    "raise SystemExit(3)": "ended with exit status 3",
    "raise": "LookupError: the dog ate it",
    "os._exit(3)": "killed or crashed",
    "kill": "killed or crashed",
    "interrupt": "KeyboardInterrupt",
}
HEALTHY = ["caught sys.exit(3),caught exit(3),child,return", "sys.exit(0)"]
OF_A_THREAD = "return,sys.exit(0),sys.exit(3),exit(3),raise SystemExit(3),raise,child"
"""What ends no more than the thread that does it."""


def run(folder: Path, rank: int, how: str, where: str, *others: str, **changes: str) -> list[tuple[int, str]]:
    """Exit status and output of each rank. No launcher would end one for another: as on machines of their own."""
    degree, port = 1 + len(others), free_port("127.0.0.1")
    command = [ENDING, folder, str(rank), how, where, *others]
    processes = [Process(command, **rank_environment(number, degree, port), **changes) for number in range(degree)]
    results = {rank: processes[rank].finish(START)}
    deadline = time.monotonic() + END
    for number, process in enumerate(processes):
        if number != rank:
            results[number] = process.finish(deadline - time.monotonic())
    return [results[number] for number in range(degree)]


RANKS = [pytest.param(0, marks=pytest.mark.slow), 1]
"""Either may end; the quick suite tries one."""
QUICK = ("sys.exit(3)", "raise", "kill", "interrupt")
"""Of the deaths; the others are further ways to the same."""


def ways(*hows: str) -> list[Any]:
    return [how if how in QUICK else pytest.param(how, marks=pytest.mark.slow) for how in hows]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("how", ways(*DEATHS))
def test_a_rank_that_ends_with_an_error_ends_all(tmp_path: Path, how: str, rank: int) -> None:
    """One that waits in a collective, and one that computes, where nothing else would tell it."""
    results = run(tmp_path, rank, how, "main", "collective", "computing")
    assert results.pop(rank)[0] != 0
    for status, output in results:
        assert status == (3 if "exit status 3" in DEATHS[how] else 1), output
        assert f"error: rank {rank} on {HOST}: {DEATHS[how]}" in output


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("how", ways("os._exit(3)", "kill"))
def test_a_thread_can_end_its_process_and_so_the_job(tmp_path: Path, how: str, rank: int) -> None:
    results = run(tmp_path, rank, how, "another", "computing")
    assert results[rank][0] != 0 and results[1 - rank][0] == 1, results
    assert f"error: rank {rank} on {HOST}: {DEATHS[how]}" in results[1 - rank][1]


@pytest.mark.parametrize("rank", RANKS)
def test_the_end_of_a_thread_is_no_end(tmp_path: Path, rank: int) -> None:
    results = run(tmp_path, rank, OF_A_THREAD, "another", "done")
    assert [status for status, _ in results] == [0, 0], results
    assert not any("error: rank" in output for _, output in results)
    assert (tmp_path / "0.done").exists() and (tmp_path / "1.done").exists()


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("how", HEALTHY)
def test_a_rank_that_is_done_leaves_the_other_alone(tmp_path: Path, how: str, rank: int) -> None:
    """An exit that a caller catches is none, and neither is that of a forked child."""
    results = run(tmp_path, rank, how, "main", "done")
    assert [status for status, _ in results] == [0, 0], results
    assert not any("error: rank" in output for _, output in results)


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_that_is_done_too_early_is_named(tmp_path: Path, rank: int) -> None:
    """Status 0, while the other waits for it in a collective."""
    results = run(tmp_path, rank, "return", "main", "collective")
    assert results[rank][0] == 0 and results[1 - rank][0] == 1, results
    assert f"rank {rank} on {HOST}: ended with exit status 0 while this rank waited for it" in results[1 - rank][1]


def test_a_forked_child_does_not_hide_the_death_of_its_rank(tmp_path: Path) -> None:
    """It holds copies of the rank's sockets, which would keep the connection open."""
    results = run(tmp_path, 1, "kill, child lives", "main", "computing")
    assert results[0][0] == 1 and f"error: rank 1 on {HOST}: killed or crashed" in results[0][1], results


@pytest.mark.parametrize(
    ("how", "where", "other", "status"),
    [
        ("exit(3)", "main", "computing", 3),
        ("caught sys.exit(3)", "main", "done", 0),
    ],
)
def test_the_launcher_ends_as_its_ranks_do(tmp_path: Path, how: str, where: str, other: str, status: int) -> None:
    found, output = launch(2, tmp_path / "logs", [ENDING, tmp_path, "1", how, where, other], START)
    assert found == status if status == 0 else found != 0, output
    pids = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert not any(map(is_running, pids))
