"""What a decode step waits for where ranks add up: a norm of few rows, with the sum and without, in a graph.

    python -m paddle.distributed.launch --devices 0,1,2,3 tools/benchmark_sums.py [--hidden 3584 5120]

Microseconds a call: of one rank's rows alone; of their sum over the ranks through the cards' mailboxes, as decode steps
have it where the cards reach each other; and of NCCL's all-reduce and the norm. Both sums are compared in values.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Callable

import numpy as np
import paddle
from cuda_driver import seconds_a_call

from paddle_qwen1m import ops
from paddle_qwen1m.engine.graph import ReplayedStep
from paddle_qwen1m.parallel.group import ALONE, Group, start
from paddle_qwen1m.parallel.job import launched_ranks

CALLS = 64
"""In a graph."""
REPLAYS = 20
EPS = 1e-6

Norm = Callable[[paddle.Tensor, paddle.Tensor, paddle.Tensor, float], paddle.Tensor]
"""As Group.add_rms_norm."""


class Rows:
    """Random ones of a rank, [rows, hidden] bfloat16, to be added to a residual stream and normed."""

    def __init__(self, rank: int, rows: int, hidden: int) -> None:
        drawn = np.random.default_rng([rank, rows]).standard_normal([rows, hidden], np.float32)
        self.values = ops.cast(ops.tensor(drawn), "bfloat16")
        self.weight = ops.cast(ops.tensor(np.ones(hidden, np.float32)), "bfloat16")
        self.residual = ops.tensor(np.zeros([rows, hidden], np.float32))

    def milliseconds(self, norm: Norm) -> float:
        """A call, one behind the other in a graph."""

        def step() -> tuple[paddle.Tensor]:
            for _ in range(CALLS):
                normed = norm(self.values, self.residual, self.weight, EPS)
            return (normed,)

        replayed = ReplayedStep(step)
        for _ in range(2):  # eagerly, then captured
            replayed()
        seconds = seconds_a_call(replayed, REPLAYS)
        replayed.release()
        return seconds / CALLS * 1e3

    def sums(self, norm: Norm) -> np.ndarray:
        """What is added to the residual stream, which must be zeros."""
        norm(self.values, self.residual, self.weight, EPS)
        return self.residual.numpy()


def all_reduced(group: Group) -> Norm:
    """As the group's add_rms_norm, by its all_reduce in any case."""
    return partial(Group.add_rms_norm, group)


def sum_ms(group: Group, hidden: int) -> float:
    """What the sum over the ranks adds to a decode step's norm of one row; 0 for one rank alone."""
    if group.degree == 1:
        return 0.0
    rows = Rows(group.rank, 1, hidden)
    return rows.milliseconds(group.add_rms_norm) - rows.milliseconds(ALONE.add_rms_norm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[3584, 5120])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    arguments = parser.parse_args()
    paddle.device.set_device("gpu")
    group = start(launched_ranks())
    if group.rank == 0:
        print(f"{group.degree} ranks, microseconds   alone   with the sum   by NCCL   largest difference of sums")
    for hidden in arguments.hidden:
        for count in arguments.rows:
            rows = Rows(group.rank, count, hidden)
            norms = (ALONE.add_rms_norm, group.add_rms_norm, all_reduced(group))
            alone, summed, reduced = (1e3 * rows.milliseconds(norm) for norm in norms)
            sums = [Rows(group.rank, count, hidden).sums(norm) for norm in norms[1:]]
            off = np.abs(sums[0] - sums[1]).max()
            if group.rank == 0:
                times = f"{alone:12.1f} {summed:14.1f} {reduced:9.1f}"
                print(f"{count:4} rows of {hidden:5} {times} {off:28.2g}", flush=True)


if __name__ == "__main__":
    main()
