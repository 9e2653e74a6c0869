"""A rank of a job in which one ends: ending_rank.py FOLDER RANK HOWS WHERE OTHER...

RANK ends, HOWS say how (see `end`; several, where the first do not end it), WHERE whether its `main` thread does it or
`another` for each. The others in their order
meanwhile wait in a `collective`, are `computing` for a minute, or are `done`. Rank k writes its process id to FOLDER/k,
and FOLDER/k.done when it has done all its work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.parallel.group import start
from paddle_qwen1m.parallel.job import launched_rank


def end(how: str) -> None:
    if how == "sys.exit(0)":
        sys.exit(0)
    if how == "sys.exit(3)":
        sys.exit(3)
    if how == "exit(3)":
        exit(3)
    if how == "raise SystemExit(3)":
        raise SystemExit(3)
    if how == "raise":
        raise LookupError("the dog ate it")
    if how == "os._exit(3)":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "caught sys.exit(3)":
        with contextlib.suppress(SystemExit):
            sys.exit(3)
    if how == "caught exit(3)":
        with contextlib.suppress(SystemExit):
            exit(3)
    if how == "child":  # a process that was forked from the rank ends, in whatever way, and is no rank
        in_main = threading.current_thread() is threading.main_thread()
        for leave in (sys.exit, os._exit) if in_main else (os._exit,):
            for status in (0, 3):
                child = os.fork()
                if child == 0:
                    leave(status)
                os.waitpid(child, 0)
    if how == "kill, child lives":
        if os.fork() == 0:
            os.closerange(0, 3)
            time.sleep(20)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    folder, ending, hows, where, *others = sys.argv[1:]
    group = start(1 + len(others))
    own, rank = launched_rank(), int(ending)
    Path(folder, str(own)).write_text(str(os.getpid()), encoding="utf-8")
    group.all_reduce(paddle.ones([4]))
    if own != rank:
        work = others[own - (own > rank)]
        if work == "collective":
            group.all_reduce(paddle.ones([4]))
        if work == "computing":
            rows, weight = (paddle.to_tensor(np.ones((8192, 2048), np.float32)) for _ in range(2))
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                ops.linear(rows, weight)
    else:
        for how in hows.split(","):
            if where == "another":
                thread = threading.Thread(target=end, args=(how,))
                thread.start()
                thread.join()
            else:
                end(how)
    Path(folder, f"{own}.done").touch()


if __name__ == "__main__":
    main()
