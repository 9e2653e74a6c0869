"""What a layer of a prefill waits for where ranks add up: its products of many rows, with the sums and without.

    python -m paddle.distributed.launch --devices 0,1 tools/benchmark_lanes.py [--model 7B 14B]
        [--rows 8192 16384 32768]

Milliseconds a layer, random weights, no attention: a rank's products and norms alone, with no sums; with the sums as a
prefill has them, copied where the cards reach each other's memory; and by NCCL's collectives. The rows that come out of
both are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import paddle
from cuda_driver import seconds_a_call

from paddle_qwen1m import ops
from paddle_qwen1m.config import ModelConfig
from paddle_qwen1m.parallel.group import ALONE, Group, start
from paddle_qwen1m.parallel.job import launched_ranks
from paddle_qwen1m.parallel.lanes import Lanes
from paddle_qwen1m.planning import PUBLISHED

LAYERS = 4
CALLS = 5
EPS = 1e-6
DTYPE = "bfloat16"


class Weights(NamedTuple):
    """A rank's share of a layer's, in the activations' type."""

    output: paddle.Tensor
    gate_up: paddle.Tensor
    down: paddle.Tensor
    norm: paddle.Tensor

    @classmethod
    def draw(cls, config: ModelConfig, group: Group) -> Weights:
        hidden, rng = config.hidden_size, np.random.default_rng(group.rank)
        heads, inner = (size // group.degree for size in (config.num_heads * config.head_dim, config.intermediate_size))

        def drawn(height: int, width: int) -> paddle.Tensor:
            return activations(rng.standard_normal((height, width), np.float32) / width**0.5)

        norm = activations(np.ones(hidden, np.float32))
        return cls(drawn(hidden, heads), drawn(2 * inner, hidden), drawn(hidden, inner), norm)


def activations(values: np.ndarray) -> paddle.Tensor:
    return ops.cast(ops.tensor(values), DTYPE)


class Rows:
    """A rank's, of a step: what the embedding gives, float32, and what the heads give, the same for all layers."""

    def __init__(self, config: ModelConfig, group: Group, rows: int) -> None:
        rng = np.random.default_rng([1, group.rank])
        width = config.num_heads * config.head_dim // group.degree
        self.embedded = ops.tensor(rng.standard_normal((rows, config.hidden_size), np.float32))
        self.heads = activations(rng.standard_normal((rows, width), np.float32))

    def through(self, group: Group, weights: Weights) -> paddle.Tensor:
        """What is behind the last norm."""
        with paddle.no_grad(), Lanes(group, *self.embedded.shape, EPS) as lanes:
            lanes.add(self.embedded, [lambda rows: ops.cast(rows, "float32")], weights.norm)
            normed = lanes.all_rows()
            for _ in range(LAYERS):
                lanes.add(self.heads, [lambda rows: ops.linear(rows, weights.output)], weights.norm)
                products = [
                    lambda rows: ops.linear(rows, weights.gate_up),
                    ops.silu_mul,
                    lambda rows: ops.linear(rows, weights.down),
                ]
                lanes.add(None, products, weights.norm)
                normed = lanes.all_rows()
            return normed


@contextmanager
def without_copies(group: Group) -> Iterator[None]:
    """The group's lanes go by collectives."""
    lend, group.lend_copies = group.lend_copies, lambda rows, width: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        group.lend_copies = lend  # type: ignore[method-assign]


def compared(group: Group, config: ModelConfig, rows: int) -> tuple[bool, list[float], float, float]:
    """Whether the cards copy; milliseconds a layer alone, with sums, by NCCL; the largest difference of the two's rows,
    and the largest of them.
    """
    group.open_copies(rows, config.hidden_size, DTYPE)
    weights, given = Weights.draw(config, group), Rows(config, group, rows)
    found = given.through(group, weights).numpy().view(np.uint16)
    copied = group.lend_copies(rows, config.hidden_size)
    if copied is not None:
        copied.give_back()
    times = [seconds_a_call(partial(given.through, one, weights), CALLS) for one in (ALONE, group)]
    with without_copies(group):
        times.append(seconds_a_call(partial(given.through, group, weights), CALLS))
        reduced = given.through(group, weights).numpy().view(np.uint16)
    one, other = ((bits.astype(np.uint32) << 16).view(np.float32) for bits in (found, reduced))
    milliseconds = [1e3 * seconds / LAYERS for seconds in times]
    return copied is not None, milliseconds, float(np.abs(one - other).max()), float(np.abs(other).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 16384, 32768])
    arguments = parser.parse_args()
    paddle.device.set_device("gpu")
    group = start(launched_ranks())
    if group.rank == 0:
        print(f"{group.degree} ranks, ms a layer   alone   with the sums   by NCCL   largest difference, of")
    for name in arguments.model:
        for rows in arguments.rows:
            copied, (alone, summed, reduced), off, largest = compared(group, PUBLISHED[name], rows)
            if group.rank == 0:
                way = "copied" if copied else "NCCL's"
                times = f"{alone:10.3f} {summed:8.3f} {way} {reduced:9.3f}"
                print(f"{name:4} {rows:7,} rows {times} {off:18.2g} {largest:5.2g}", flush=True)


if __name__ == "__main__":
    main()
