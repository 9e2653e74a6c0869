"""How the ranks of a job meet and share values, and what the owner of a process has to do with its end."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from parallel_ranks import Process

from paddle_qwen1m.parallel.connection import Connection, Message
from paddle_qwen1m.parallel.job import Job, JobEnded, StartError, free_port, join

OWNING = Path(__file__).with_name("owning_rank.py")
HOST = socket.gethostname()


def meet(degree: int) -> list[Job]:
    endpoints = [f"127.0.0.1:{free_port('127.0.0.1')}"] * degree
    with ThreadPoolExecutor(degree) as pool:
        return list(pool.map(lambda rank: join(rank, endpoints), range(degree)))


def test_every_rank_gets_what_rank_0_shares_in_order() -> None:
    jobs = meet(3)
    large = list(range(300_000))
    with ThreadPoolExecutor(3) as pool:
        for value in (1, {"prompts": [[1, 2]]}, None, large):
            own = [value, "not", "these"]
            assert list(pool.map(lambda job, value: job.share(value), jobs, own)) == [value] * 3
    for job in jobs:
        job.leave()


def test_rank_0_adds_up_what_ranks_said_last_when_they_meet() -> None:
    jobs = meet(3)
    for done in (5, 7):
        for job in jobs[1:]:
            assert job.add_up(done, 10 * job.rank) == (done, 10 * job.rank)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda job: job.smallest(0), jobs))
    assert jobs[0].add_up(1, 4) == (1 + 7 + 7, 4 + 10 + 20)
    for job in jobs:
        job.leave()


def test_waiting_for_a_rank_0_that_is_done_is_an_error() -> None:
    first, second = meet(2)
    first.share("last")
    first.leave()
    assert second.share(None) == "last"
    with pytest.raises(RuntimeError, match="rank 0 ended while this rank waited"):
        second.share(None)
    second.leave()


def test_connections_close_when_the_others_know_that_a_rank_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = meet(2)
    told: list[JobEnded] = []
    second.survive(told.append)
    send = Connection.send

    def late(connection: Connection, message: Message, seconds: float | None = None) -> None:
        if message["kind"] == "exit":
            time.sleep(1.5)  # more than a look at the connections takes to come
        send(connection, message, seconds)

    monkeypatch.setattr(Connection, "send", late)
    first.leave()
    with pytest.raises(RuntimeError, match="rank 0 ended while this rank waited"):
        second.share(None)
    second.leave()
    assert not told


def test_whatever_else_connects_is_ignored() -> None:
    """A port scan, and a rank of another job."""
    port = free_port("127.0.0.1")
    endpoints = [f"127.0.0.1:{port}"] * 2
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(join, 0, endpoints)
        other = pool.submit(join, 2, endpoints * 2)
        with pytest.raises(StartError, match="rank 2 lost rank 0"):
            other.result(timeout=30)
        with socket.create_connection(("127.0.0.1", port)) as scan:
            scan.sendall(b"GET / HTTP/1.0\r\n\r\n")
        second = pool.submit(join, 1, endpoints)
        jobs = [first.result(timeout=30), second.result(timeout=30)]
    for job in jobs:
        job.leave()


def test_an_owner_outlives_its_job() -> None:
    """Its calls raise an error that names the rank, the one that was waiting and later ones, and a new job works."""
    status, output = Process([OWNING, "owner"]).finish(90)
    assert status == 0, output
    ended = f"rank 1 on {HOST}: killed or crashed, its connection is closed"
    assert f"collective: {ended}" in output and output.count(f"later: {ended}") == 3 and f"told: {ended}" in output
    assert "collective: returned [2.0, 2.0]" in output


@pytest.mark.parametrize("how", ["prompt", "slow"])
def test_the_owner_of_a_process_is_told_before_it_ends(how: str) -> None:
    """For at most 3 seconds."""
    port = free_port("127.0.0.1")
    processes = [Process([OWNING, "told", str(port), str(rank), how]) for rank in range(2)]
    for status, output in [process.finish(60) for process in processes]:
        assert status == 7, output
        reason = f"rank 1 on {HOST}: out of luck"
        assert f"told: {reason}" in output and f"error: {reason}" in output
        assert ("done" in output) is (how == "prompt")


def test_ranks_agree_on_the_smallest_value_when_the_last_has_come() -> None:
    jobs = meet(3)
    with ThreadPoolExecutor(3) as pool:
        for last, values in ((0, (3, 1, 2)), (1, (7, 9, 8)), (2, (1 << 40, 5, 0)), (0, (4, 4, 4))):
            early = [pool.submit(job.smallest, values[job.rank]) for job in jobs if job.rank != last]
            time.sleep(0.2)
            assert not any(one.done() for one in early)
            assert jobs[last].smallest(values[last]) == min(values)
            assert [one.result(timeout=30) for one in early] == [min(values)] * 2
    jobs[2].leave()
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="rank 2 ended while this rank waited"):
        pool.submit(jobs[1].smallest, 0)
        try:
            jobs[0].smallest(0)
        finally:
            jobs[0].leave()
    jobs[1].leave()


def test_a_share_that_waits_raises_when_the_job_ends() -> None:
    jobs = meet(3)
    told: list[JobEnded] = []
    for job in jobs:
        job.survive(told.append)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(jobs[1].share, None)
        with pytest.raises(JobEnded, match=f"rank 2 on {HOST}: out of luck"):
            jobs[2].fail("out of luck")
        with pytest.raises(JobEnded, match=f"rank 2 on {HOST}: out of luck"):
            waiting.result(timeout=30)
    deadline = time.monotonic() + 30
    while jobs[0].ended is None and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(JobEnded, match=f"rank 2 on {HOST}: out of luck"):
        jobs[0].share("more")
    assert [str(one) for one in told] == [f"rank 2 on {HOST}: out of luck"] * 3


def test_a_child_of_a_rank_is_no_rank() -> None:
    """It is refused, and its end is not that of the rank."""
    first, second = meet(2)
    child = os.fork()
    if child == 0:
        try:
            second.share(None)
        except RuntimeError as error:
            os._exit(0 if "this process was forked from rank 1" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    first.share("on")
    assert second.share(None) == "on"
    for job in (first, second):
        job.leave()
