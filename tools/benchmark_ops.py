"""Speed of the CPU attention ops beside the GEMM library on the same cores: GFLOP/s, median of five runs.

    python tools/benchmark_ops.py [--threads N] [--tokens N]

Dense prefill, probe and sparse prefill do two products a (row, key) pair, or one (the probe, twice); the GEMM is one
linear layer of the needle checkpoint's shape. Random data in the needle checkpoint's head shape, 4 query and 2 KV heads
of 128, L = 3,072.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.attention.positions import pieces
from paddle_qwen1m.config import BLOCK

HEADS, KV_HEADS, HEAD_DIM, CHUNK_LEN, PAGE_SIZE = 4, 2, 128, 3072, 256
COLUMNS, DIAGONALS = 1000, 500
SCALE = HEAD_DIM**-0.5


def median_seconds(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="(default: %(default)s)")
    arguments = parser.parse_args()
    ops.set_num_threads(arguments.threads)
    tokens = arguments.tokens // PAGE_SIZE * PAGE_SIZE
    random = np.random.default_rng(0)

    def normal(*shape: int) -> paddle.Tensor:
        return paddle.to_tensor(random.standard_normal(shape, dtype=np.float32))

    keys, values = (normal(tokens // PAGE_SIZE, PAGE_SIZE, KV_HEADS, HEAD_DIM) for _ in range(2))
    q = normal(3, tokens, HEADS, HEAD_DIM)
    out = paddle.empty([tokens, HEADS, HEAD_DIM])
    table = paddle.to_tensor(np.arange(tokens // PAGE_SIZE, dtype=np.int32))
    cut = list(pieces(0, tokens, CHUNK_LEN))
    dense = paddle.to_tensor(np.array([[0, piece.row, piece.rows, piece.begin] for piece in cut], np.int32))
    scale = paddle.to_tensor(np.array([SCALE], np.float32))
    last = cut[-1]
    probe_rows = paddle.to_tensor(np.ascontiguousarray(q.numpy()[:, -last.probe_rows :]))
    sums = ops.dca_probe(probe_rows, keys, table, tokens, CHUNK_LEN, SCALE)
    sizes = [paddle.to_tensor(np.full(HEADS, size, np.int32)) for size in (COLUMNS, DIAGONALS)]
    selected = ops.select_critical(*sums, *sizes, COLUMNS, DIAGONALS)
    index = ops.sparse_index(*selected, last.begin, last.rows, CHUNK_LEN)
    counts = index.counts.numpy().astype(np.int64)
    visited = BLOCK * int(BLOCK * counts[..., :3].sum() + counts[..., 3:].sum())
    x, weight = normal(4096, 512), normal(1536, 512)
    pair = 4 * HEAD_DIM
    cases: dict[str, tuple[float, Callable[[], object]]] = {
        "GEMM (linear)": (2.0 * 4096 * 512 * 1536, lambda: ops.linear(x, weight)),
        "dense prefill": (
            pair * HEADS * tokens * (tokens + 1) / 2,
            lambda: ops.dca_prefill(q, out, keys, values, table.unsqueeze(0), dense, scale, CHUNK_LEN),
        ),
        "probe": (
            pair * HEADS * float(last.probe_rows) * tokens,
            lambda: ops.dca_probe(probe_rows, keys, table, tokens, CHUNK_LEN, SCALE),
        ),
        "sparse prefill": (
            pair * float(visited),
            lambda: ops.dca_sparse_prefill(
                q, out, keys, values, table, index, last.row, last.begin, last.rows, CHUNK_LEN, SCALE
            ),
        ),
    }
    print(f"{ops.cpu_isa()}, {arguments.threads} threads, {tokens} tokens")
    gemm = 0.0
    for name, (flops, run) in cases.items():
        speed = flops / median_seconds(run) / 1e9
        gemm = gemm or speed
        print(f"{name:<15} {speed:7.1f} GFLOP/s   {speed / gemm:5.2f} of the GEMM")


if __name__ == "__main__":
    main()
