"""A rank of a job of two that goes on or not: stalling_rank.py FOLDER WHAT RANK

WHAT: `stop` (SIGSTOP to itself), `idle` (both do nothing for three limits), `layer` (before their first collective both
compute a layer for longer than a limit), `late` (computes for longer than a limit while the other waits in a
collective), `meet` (comes to a meeting after more than a limit), `hold` (a call into C keeps the interpreter's lock for
longer than a limit; the other is idle), `absent` (never comes to a collective in which the other waits), `pause`
(stops, and is continued by a child after more than a limit, as is the other). Rank k writes its process id to FOLDER/k.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.parallel.group import start
from paddle_qwen1m.parallel.job import launched_rank

LIMIT = float(os.environ["PADDLE_QWEN1M_STALL_SECONDS"])


def compute_one_long_layer() -> None:
    """One linear that takes longer than a limit on this machine, on one thread: twice as long ones until one does."""
    ops.set_num_threads(1)
    weight = paddle.to_tensor(np.ones((4096, 2048), np.float32))
    rows, seconds = 256, 0.0
    while seconds <= LIMIT:
        begun = time.monotonic()
        ops.linear(paddle.to_tensor(np.ones((rows, 2048), np.float32)), weight)
        seconds, rows = time.monotonic() - begun, 2 * rows


def main() -> None:
    folder, what, rank = sys.argv[1:]
    group = start(2)
    ours = launched_rank() == int(rank)
    Path(folder, str(launched_rank())).write_text(str(os.getpid()), encoding="utf-8")
    if what != "layer":
        group.all_reduce(paddle.ones([4]))
    if what == "idle":
        time.sleep(3 * LIMIT)
    if what == "meet":
        time.sleep(2 * LIMIT if ours else 0)
        group.meet()
    if what == "layer":
        compute_one_long_layer()
    if what == "pause":
        me = os.getpid()
        if os.fork() == 0:
            time.sleep(2 * LIMIT)
            os.kill(me, signal.SIGCONT)
            os._exit(0)
        os.kill(me, signal.SIGSTOP)
    if ours and what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if ours and what == "late":
        compute_one_long_layer()
    if what == "hold":
        (ctypes.PyDLL if ours else ctypes.CDLL)(None).sleep(int(2 * LIMIT + 1))
    if ours and what == "absent":
        time.sleep(60)
    group.all_reduce(paddle.ones([4]))


if __name__ == "__main__":
    main()
