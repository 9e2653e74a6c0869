"""Speed of the GPU kernels around attention, each beside the bandwidth of a device copy in the same run.

    python tools/cuda_library.py && python tools/benchmark_gpu_step.py [OP ...] [--models 7B 14B]

Last, or for OP `step` alone, whole decode steps as the model launches them, beside the time to read what they read.

Needs PyTorch. Prefill is 32,768 rows; decode is one row and eight, and sixteen for the linears, which stand beside
PyTorch's (cuBLAS). Every launch works on other buffers than the last, several times what L2 holds in turn; where that
takes more than MAX_COPIES, on so many. Two times are printed: inside a CUDA graph of many launches, and alone between
two events. Rates are those of the graph.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Callable

import numpy as np
from cuda_library import CudaLibrary
from decode_step import HEAD_DIM, MODELS, VOCABULARY, DecodeStep

Launch = Callable[[], Any]

PREFILL_ROWS = 32768
DECODE_ROWS = (1, 8)
LINEAR_ROWS = (1, 8, 16)
PAGE_SIZE = 64
DECODE_LENGTH = 1_000_000
MAX_COPIES = 64
GRAPH_LAUNCHES = 32
REPEATS = 15
WHOLE_STEPS = ((1, 4096), (8, 2048), (16, 2048))
"""Sequences, and keys of each."""
L2_TIMES = 4


@dataclass(frozen=True)
class Case:
    """One op on one shape. `make` allocates buffers of its own and returns a launch on them, or several to compare."""

    op: str
    shape: str
    moved: int
    make: Callable[[], tuple[Launch, ...]]


@dataclass(frozen=True)
class Timing:
    graph: float
    alone: float


class Cases:
    """Every case of a model."""

    def __init__(self, cuda: CudaLibrary, name: str) -> None:
        self._cuda, self._name, self._model = cuda, name, MODELS[name]

    def all(self) -> Iterator[Case]:
        for rows in (PREFILL_ROWS, *DECODE_ROWS):
            yield self._embedding(rows)
            yield self._rms_norm(rows)
            yield self._silu_mul(rows)
            yield self._rotate_and_cache(rows, 1)
            yield self._rotate_and_cache(rows, 3)
        yield self._gather_rows(8)
        yield self._cast(PREFILL_ROWS)
        yield self._rotary_table(PREFILL_ROWS)
        yield self._rotate_queries(64)
        for rows in DECODE_ROWS:
            yield self._decode_inputs(rows)
        for layer in self._model.linears:
            for rows in LINEAR_ROWS:
                yield self._linear(layer, rows)

    def _case(self, op: str, shape: str, moved: int, make: Callable[[], dict[str, Any]], struct: str = "") -> Case:
        def launches() -> tuple[Launch, ...]:
            fields = make()
            return (lambda: self._cuda(struct or op, **fields),)

        return Case(op, f"{self._name} {shape}", moved, launches)

    @cached_property
    def _table(self) -> Any:
        """Of the vocabulary; every launch takes other rows of it."""
        return normal(VOCABULARY, self._model.hidden)

    def _embedding(self, rows: int) -> Case:
        shape = f"[{rows}, {self._model.hidden}] to f32"
        return self._case("embedding", shape, rows * (6 * self._model.hidden + 8), lambda: self._rows(rows, "float32"))

    def _gather_rows(self, rows: int) -> Case:
        shape, moved = f"[{rows}, {self._model.hidden}]", rows * (4 * self._model.hidden + 8)
        return self._case("gather_rows", shape, moved, lambda: self._rows(rows, "bfloat16"), "embedding")

    def _rows(self, rows: int, out_dtype: str) -> dict[str, Any]:
        return {
            "ids": integers(0, VOCABULARY, rows),
            "table": self._table,
            "out": empty(rows, self._model.hidden, dtype=out_dtype),
            "tokens": rows,
            "width": self._model.hidden,
            "rows": VOCABULARY,
            "first": 0,
            "dtype": "bfloat16",
            "out_dtype": out_dtype,
        }

    def _rms_norm(self, rows: int) -> Case:
        width = self._model.hidden

        def make() -> dict[str, Any]:
            return {
                "delta": normal(rows, width),
                "residual": normal(rows, width, dtype="float32"),
                "weight": normal(width),
                "out": empty(rows, width),
                "tokens": rows,
                "width": width,
                "eps": 1e-6,
                "activation": "bfloat16",
                "dtype": "bfloat16",
            }

        return self._case("add_rms_norm", f"[{rows}, {width}]", 12 * rows * width + 2 * width, make, "rms_norm")

    def _silu_mul(self, rows: int) -> Case:
        width = self._model.intermediate

        def make() -> dict[str, Any]:
            return {
                "gate_up": normal(rows, 2 * width),
                "out": empty(rows, width),
                "tokens": rows,
                "width": width,
                "activation": "bfloat16",
            }

        return self._case("silu_mul", f"[{rows}, 2 * {width}]", 6 * rows * width, make)

    def _cast(self, rows: int) -> Case:
        count = rows * self._model.hidden

        def make() -> dict[str, Any]:
            return {
                "values": normal(count, dtype="float32"),
                "out": empty(count),
                "count": count,
                "dtype": "float32",
                "out_dtype": "bfloat16",
            }

        return self._case("cast", f"[{count}] f32 to bf16", 6 * count, make)

    def _rotary_table(self, rows: int) -> Case:
        def make() -> dict[str, Any]:
            return {
                "positions": integers(0, 516095, 3, rows, dtype="int32"),
                "inv_freq": inverse_frequencies(),
                "table": empty(3, rows, HEAD_DIM, dtype="float32"),
                "rows": 3 * rows,
                "head_dim": HEAD_DIM,
            }

        return self._case("rotary_table", f"[3, {rows}, {HEAD_DIM}]", 3 * rows * (4 * HEAD_DIM + 4), make)

    def _rotate_and_cache(self, rows: int, variants: int) -> Case:
        model = self._model

        def make() -> dict[str, Any]:
            pages = -(-rows // PAGE_SIZE)
            shape = (pages, PAGE_SIZE, model.kv_heads, HEAD_DIM)
            return {
                "qkv": normal(rows, model.qkv),
                "bias": normal(model.qkv),
                "table": normal(variants, rows, HEAD_DIM, dtype="float32"),
                "slots": permutation(pages * PAGE_SIZE)[:rows],
                "q": empty(variants, rows, model.heads, HEAD_DIM),
                "cache": {
                    "key": empty(*shape),
                    "value": empty(*shape),
                    "dtype": "bfloat16",
                    "page_size": PAGE_SIZE,
                    "kv_heads": model.kv_heads,
                    "head_dim": HEAD_DIM,
                },
                "activation": "bfloat16",
                "bias_dtype": "bfloat16",
                "variants": variants,
                "tokens": rows,
                "heads": model.heads,
            }

        written = 2 * HEAD_DIM * (variants * model.heads + 2 * model.kv_heads)
        moved = rows * (2 * model.qkv + 4 * variants * HEAD_DIM + 8 + written) + 2 * model.qkv
        return self._case("rotate_and_cache", f"[{rows}, {model.qkv}] {variants} ways", moved, make)

    def _rotate_queries(self, rows: int) -> Case:
        model = self._model

        def make() -> dict[str, Any]:
            return {
                "qkv": normal(rows, model.qkv),
                "bias": normal(model.qkv),
                "table": normal(3, rows, HEAD_DIM, dtype="float32"),
                "q": empty(3, rows, model.heads, HEAD_DIM),
                "activation": "bfloat16",
                "bias_dtype": "bfloat16",
                "variants": 3,
                "row": 0,
                "rows": rows,
                "table_row": 0,
                "table_rows": rows,
                "heads": model.heads,
                "kv_heads": model.kv_heads,
                "head_dim": HEAD_DIM,
            }

        moved = rows * HEAD_DIM * (8 * model.heads + 12) + 2 * HEAD_DIM * model.heads
        return self._case("rotate_queries", f"[{rows}, {model.heads * HEAD_DIM}] 3 ways", moved, make)

    def _decode_inputs(self, rows: int) -> Case:
        pages = DECODE_LENGTH // PAGE_SIZE + 2

        def make() -> dict[str, Any]:
            return {
                "lengths": empty(rows, dtype="int32").fill_(DECODE_LENGTH // 2),
                "block_tables": integers(0, pages, rows, pages, dtype="int32"),
                "inv_freq": inverse_frequencies(),
                "slots": empty(rows, dtype="int64"),
                "table": empty(3, rows, HEAD_DIM, dtype="float32"),
                "scale": empty(rows, dtype="float32"),
                "batch": rows,
                "table_width": pages,
                "page_size": PAGE_SIZE,
                "head_dim": HEAD_DIM,
                "chunk_len": 253952,
                "chunk_size": 262144,
                "original_max_position_embeddings": 262144,
            }

        return self._case("decode_inputs", f"{rows} sequences", rows * (12 * HEAD_DIM + 24) + 2 * HEAD_DIM, make)

    def _linear(self, layer: str, rows: int) -> Case:
        """The head's logits are float32, PyTorch's beside them bfloat16."""
        depth, features = self._model.linears[layer]
        out_dtype = "float32" if layer == "head" else "bfloat16"

        def make() -> tuple[Launch, ...]:
            import torch

            x, weight = normal(rows, depth), normal(features, depth)
            y, other = empty(rows, features, dtype=out_dtype), empty(rows, features)
            fields = {
                "x": x,
                "weight": weight,
                "bias": None,
                "y": y,
                "tokens": rows,
                "in_features": depth,
                "out_features": features,
                "activation": "bfloat16",
                "out_dtype": out_dtype,
                "dtype": "bfloat16",
            }
            return lambda: self._cuda("linear", **fields), lambda: torch.matmul(x, weight.T, out=other)

        moved = 2 * depth * (features + rows) + rows * features * (4 if layer == "head" else 2)
        return Case("linear", f"{self._name} {layer}: {rows} x {depth} to {features}", moved, make)


def empty(*shape: int, dtype: str = "bfloat16") -> Any:
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")


def normal(*shape: int, dtype: str = "bfloat16") -> Any:
    return empty(*shape, dtype=dtype).normal_()


def integers(low: int, high: int, *shape: int, dtype: str = "int64") -> Any:
    """In [low, high)."""
    return empty(*shape, dtype=dtype).random_(low, high)


def permutation(count: int) -> Any:
    import torch

    return torch.randperm(count, device="cuda")


def inverse_frequencies() -> Any:
    import torch

    return torch.tensor(1e7 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM), dtype=torch.float32, device="cuda")


def microseconds_in_graph(launches: list[Launch], rounds: int) -> float:
    """Of one launch, when a CUDA graph runs them all in turn so many times; median over replays."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for launch in launches:
                launch()
    graph.replay()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 1e3 * float(np.median(times)) / (rounds * len(launches))


def microseconds_alone(launches: list[Launch]) -> float:
    """Between two events, when the device has been kept busy until all launches wait for it; median."""
    import torch

    events = []
    torch.cuda._sleep(20_000_000)
    for i in range(max(REPEATS, len(launches))):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        launches[i % len(launches)]()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return 1e3 * float(np.median([begin.elapsed_time(end) for begin, end in events]))


def time_launches(launches: list[Launch], rounds: int | None = None) -> Timing:
    """rounds: in the graph; default: as many as make GRAPH_LAUNCHES."""
    import torch

    for launch in launches:  # cuBLAS chooses and allocates before a graph is captured
        launch()
    torch.cuda.synchronize()
    rounds = rounds or -(-GRAPH_LAUNCHES // len(launches))
    return Timing(microseconds_in_graph(launches, rounds), microseconds_alone(launches))


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device copy of 2 GiB."""
    source, target = (empty(2**31, dtype="uint8") for _ in range(2))
    return 2 * 2**31 / (1e-6 * time_launches([lambda: target.copy_(source)]).alone)


def measure(case: Case, copies: int) -> list[Timing]:
    """Of the op, then of what stands beside it."""
    made = [case.make() for _ in range(copies)]
    return [time_launches(list(launches)) for launches in zip(*made)]


def whole_steps(cuda: CudaLibrary, name: str, bandwidth: float) -> Iterator[str]:
    """Decode steps in a graph: the time to read weights and cache at the speed of a copy, and the step's beside it."""
    import torch

    for batch, keys in WHOLE_STEPS:
        step = DecodeStep(cuda, MODELS[name], batch, keys)
        time = time_launches([step], rounds=1).graph
        weights, cache = (1e6 * read / bandwidth for read in (step.weight_bytes, step.cache_bytes))
        yield (
            f"{name} step of {batch} sequences, {keys:,} keys each: {time:8.1f} us; weights {weights:.1f} us "
            f"({time / weights:.3f}x), and cache {cache:.1f} us ({time / (weights + cache):.3f}x)"
        )
        del step
        torch.cuda.empty_cache()


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="such as linear, silu_mul or step; default: all")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    arguments = parser.parse_args()
    cuda = CudaLibrary()
    properties = torch.cuda.get_device_properties(0)
    bandwidth = copy_bandwidth()
    lines = [
        f"{properties.name}: a copy moves {bandwidth / 1e12:.2f} TB/s",
        f"{'op':18}{'shape':38}{'MB':>9}{'us':>9}{'alone':>10}{'GB/s':>8}{'of copy':>9}{'cuBLAS us':>11}{'alone':>10}",
    ]
    for case in (case for name in arguments.models for case in Cases(cuda, name).all()):
        if arguments.ops and case.op not in arguments.ops:
            continue
        copies = min(max(-(-L2_TIMES * properties.L2_cache_size // case.moved), 2), MAX_COPIES)
        ours, *others = measure(case, copies)
        torch.cuda.empty_cache()
        rate = case.moved / ours.graph * 1e6
        line = f"{case.op:18}{case.shape:38}{case.moved / 1e6:9.2f}{ours.graph:9.1f}{ours.alone:10.1f}"
        line += f"{rate / 1e9:8.0f}{100 * rate / bandwidth:8.0f}%"
        lines.append(line + "".join(f"{other.graph:11.1f}{other.alone:10.1f}" for other in others))
        print(lines[-1], file=sys.stderr)
    if not arguments.ops or "step" in arguments.ops:
        for name in arguments.models:
            lines += whole_steps(cuda, name, bandwidth)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
