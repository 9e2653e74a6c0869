"""Processes that decide themselves what the end of their job means.

owning_rank.py owner     makes two jobs, one after the other, of itself and a worker; the first worker is killed in the
                         middle. Prints what it is told and what its calls raise, then the sum of the second job.
owning_rank.py worker PORT HOW       works in one: HOW is `kill` or `work`
owning_rank.py told PORT RANK HOW    a rank of two whose owner wants to be told; rank 1 fails; HOW is `prompt` or `slow`
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Callable

import paddle

from paddle_qwen1m.parallel.group import ProcessGroup
from paddle_qwen1m.parallel.job import Job, JobEnded, free_port, join


def endpoints(port: int) -> list[str]:
    return [f"127.0.0.1:{port}"] * 2


def said(job: Job, call: Callable[[], object]) -> str:
    """What the end of the job makes of a call."""
    try:
        return f"returned {call()}"
    except JobEnded as error:
        assert error is job.ended
        return str(error)


def make_job(how: str) -> None:
    port = free_port("127.0.0.1")
    worker = subprocess.Popen([sys.executable, __file__, "worker", str(port), how])
    job = join(0, endpoints(port))
    told: list[JobEnded] = []
    job.survive(told.append)
    group = ProcessGroup(job)
    group.share("begin")
    print("collective:", said(job, lambda: group.all_reduce(paddle.ones([2])).tolist()), flush=True)
    if job.ended is not None:
        for call in (lambda: group.share(1), lambda: group.all_reduce(paddle.ones([2])), lambda: job.fail("again")):
            print("later:", said(job, call), flush=True)
    print("told:", *told, flush=True)
    job.leave()
    worker.wait()


def own() -> None:
    make_job("kill")
    make_job("work")


def work(port: str, how: str) -> None:
    group = ProcessGroup(join(1, endpoints(int(port))))
    group.share(None)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    group.all_reduce(paddle.ones([2]))


def be_told(port: str, rank: str, how: str) -> None:
    job = join(int(rank), endpoints(int(port)))

    def on_end(ended: JobEnded) -> None:
        print("told:", ended, flush=True)
        time.sleep(60 if how == "slow" else 0)
        print("done", flush=True)

    job.on_end = on_end
    if job.rank == 1:
        job.fail("out of luck", 7)
    job.share(None)
    time.sleep(60)


if __name__ == "__main__":
    from paddle_qwen1m.ops import load

    load()
    {"owner": own, "worker": work, "told": be_told}[sys.argv[1]](*sys.argv[2:])
