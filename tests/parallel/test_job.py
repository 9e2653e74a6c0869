"""How the ranks of a job meet and share values; what they do when one fails is in test_failures.py."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from paddle_qwen1m.parallel.job import Job, StartError, free_port, join


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


def test_waiting_for_a_rank_0_that_is_done_is_an_error() -> None:
    first, second = meet(2)
    first.share("last")
    first.leave()
    assert second.share(None) == "last"
    with pytest.raises(RuntimeError, match="rank 0 ended while this rank waited"):
        second.share(None)
    second.leave()


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
