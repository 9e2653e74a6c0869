"""The whole model at its real shape on one GPU, with random weights: speed, memory, and where the time goes.

    python tools/benchmark_gpu_model.py prefill [--model 7B] [--tokens 262144] [--decode 64]
    python tools/benchmark_gpu_model.py decode [--model 14B] [--tokens 4096]

Random weights have no structure, and the diagonals that they would choose scatter. So the prefill runs probe, top-k and
conversion for real, with the published budgets, and then attends to the columns and diagonals of sparse_workload.py
("published:21", seeded, the same in every layer), which cost what a real selection costs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import paddle
import sparse_workload

from paddle_qwen1m import ops
from paddle_qwen1m.attention.selector import Selector
from paddle_qwen1m.attention.step import SparsePiece
from paddle_qwen1m.config import ModelConfig, published_budgets
from paddle_qwen1m.engine import Engine, PrefillProgress, SamplingParams
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.options import EngineOptions
from paddle_qwen1m.plan import parameters, plan_memory
from paddle_qwen1m.planning import PUBLISHED

SEEDED = "published:21"
NOISE = 1 << 26


def random_model(name: str) -> Qwen2OneM:
    """A model of the published shape whose weights are normal(0, 0.02) and whose norms are 1, in bfloat16."""
    model = Qwen2OneM(PUBLISHED[name], "bfloat16")
    noise = np.random.default_rng(0).standard_normal(NOISE, np.float32) * np.float32(0.02)
    bits = (noise.view(np.uint32) >> 16).astype(np.uint16)
    for name, slot in model.slots().items():
        width = int(np.prod(slot.shape[1:]))
        if name.endswith("norm.weight"):
            slot.write(paddle.to_tensor(np.full(slot.shape, 0x3F80, np.uint16), place=paddle.CPUPlace()))
            continue
        step = max(1, NOISE // width)
        for first in range(0, slot.shape[0], step):
            rows = min(step, slot.shape[0] - first)
            part = bits[: rows * width].reshape(rows, *slot.shape[1:])
            slot.write(paddle.to_tensor(part, place=paddle.CPUPlace()), first)
    return model


@contextmanager
def seeded_selection(config: ModelConfig, tokens: int) -> Iterator[None]:
    """Selectors do their work and then return the tables of the seeded lines, made once for each piece."""
    original = Selector.choose
    workload = sparse_workload.Workload(min(tokens, 32768), tokens, SEEDED, 64)
    lines = sparse_workload.make(workload, sparse_workload.budgets_of(SEEDED, config.num_heads))
    columns = np.where(lines.columns < tokens, lines.columns, sparse_workload.NO_COLUMN)
    tables: dict[int, ops.SparseIndex] = {}

    def seeded(selector: Selector, sparse: SparsePiece, *arguments: Any, **options: Any) -> ops.SparseIndex:
        original(selector, sparse, *arguments, **options)
        piece = sparse.piece
        if piece.begin not in tables:
            tables.clear()
            within = np.sort(np.where(columns < piece.end, columns, sparse_workload.NO_COLUMN), axis=1)
            selected = (paddle.to_tensor(part.astype(np.int32)) for part in (within, lines.slashes(piece.end)))
            tables[piece.begin] = ops.sparse_index(*selected, piece.begin, piece.rows, config.dual_chunk.chunk_len)
        return tables[piece.begin]

    Selector.choose = seeded  # type: ignore[method-assign]
    try:
        yield
    finally:
        Selector.choose = original  # type: ignore[method-assign]


class OpTimes:
    """Milliseconds by op: the device is waited for before and after every call, which costs some microseconds each."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = defaultdict(float)

    @contextmanager
    def watch(self) -> Iterator[None]:
        names = [name for name in ops.__all__ if name[0].islower() and name not in ("gpu_obstacle", "load", "on_gpu")]
        originals = {name: getattr(ops, name) for name in names}

        def timed(name: str) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                paddle.device.cuda.synchronize()
                start = time.perf_counter()
                result = originals[name](*arguments, **options)
                paddle.device.cuda.synchronize()
                self._totals[name] += (time.perf_counter() - start) * 1e3
                return result

            return call

        for name in names:
            setattr(ops, name, timed(name))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(ops, name, original)

    def totals(self) -> dict[str, float]:
        return dict(sorted(self._totals.items(), key=lambda item: -item[1]))


def random_prompt(model: Qwen2OneM, tokens: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, model.config.vocab_size, tokens)


def token_seconds(engine: Engine, prompt: np.ndarray, new_tokens: int, **hooks: Any) -> list[float]:
    """When each token came."""
    times: list[float] = []
    engine.generate(
        [prompt],
        SamplingParams(max_tokens=new_tokens, temperature=0.0),
        on_token=lambda index, token: times.append(time.perf_counter()),
        **hooks,
    )
    return times


def prefill(name: str, tokens: int, new_tokens: int) -> None:
    model = random_model(name)
    config = model.config
    engine = Engine(model, EngineOptions(cache_tokens=tokens + new_tokens), published_budgets(config))
    rows = engine.max_num_batched_tokens
    plan = plan_memory(
        config,
        tokens + new_tokens,
        max_num_batched_tokens=rows,
        cache_dtype="bfloat16",
        weight_bytes=2 * parameters(config),
        budgets=published_budgets(config),
        dtype="bfloat16",
    )
    prompt = random_prompt(model, tokens)
    progress: list[PrefillProgress] = []
    with seeded_selection(config, tokens):
        token_seconds(engine, prompt[: rows + 1000], 3)  # libraries and memory
        start = time.perf_counter()
        times = token_seconds(engine, prompt, new_tokens, on_prefill=progress.append)
        watch = OpTimes()
        with watch.watch():
            engine.logits(prompt)
    first = times[0] - start
    print(f"{name}, random weights, bf16: {tokens:,} tokens in chunks of {rows:,}, sparse with the published budgets;")
    print(f"attention over the seeded lines {SEEDED} of sparse_workload.py after a real probe, top-k and conversion")
    print(f"first token after {first:.2f} s ({tokens / first:,.0f} tokens/s); chunk by chunk, tokens and seconds:")
    print("  " + ", ".join(f"{step.done_tokens:,} {step.seconds:.2f}" for step in progress))
    steps = np.diff(times) * 1e3
    print(f"decode after {tokens:,}: {median(steps):.2f} ms a token, median of {len(steps)}")
    peak = paddle.device.cuda.max_memory_allocated() / 1e9
    print(
        f"memory: peak {peak:.2f} GB allocated; arithmetic {plan.total / 1e9:.2f} GB "
        f"(weights {plan.weights / 1e9:.2f}, cache {plan.cache / 1e9:.2f}, activations {plan.activations / 1e9:.2f})"
    )
    totals = watch.totals()
    whole = sum(totals.values())
    print(f"by op, a prefill of its own ({whole / 1e3:.2f} s on the device):")
    for op, milliseconds in totals.items():
        print(f"  {op:20} {milliseconds:10.1f} ms {milliseconds / whole:6.1%}")


def copy_bandwidth() -> float:
    """Bytes read and written a second by device copies of 4 GiB."""
    source, target = (paddle.empty([2**32], "uint8") for _ in range(2))
    target.copy_(source, False)
    paddle.device.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(8):
        target.copy_(source, False)
    paddle.device.cuda.synchronize()
    return 8 * 2 * 2**32 / (time.perf_counter() - start)


def decode(name: str, tokens: int, new_tokens: int) -> None:
    """Steps of the captured graph, host and all, beside the time that reading the weights once takes."""
    model = random_model(name)
    engine = Engine(model, EngineOptions(sparse=False, cache_tokens=tokens + new_tokens))
    times = token_seconds(engine, random_prompt(model, tokens), new_tokens)
    step = median(np.diff(times)[4:])
    config = model.config
    read = 2 * (parameters(config) - config.vocab_size * config.hidden_size)
    bandwidth = copy_bandwidth()
    print(
        f"{name}, random weights, bf16: a decode step at {tokens:,} tokens takes {step * 1e3:.2f} ms (median of "
        f"{new_tokens - 5}); its {read / 1e9:.2f} GB of weights at {bandwidth / 1e12:.2f} TB/s, what a copy moves, "
        f"{read / bandwidth * 1e3:.2f} ms: {step * bandwidth / read:.2f}x"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prefill", "decode"))
    parser.add_argument("--model", choices=list(PUBLISHED))
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--decode", type=int, default=64, help="new tokens (default: %(default)s)")
    arguments = parser.parse_args()
    paddle.device.set_device("gpu")
    if arguments.what == "prefill":
        prefill(arguments.model or "7B", arguments.tokens or 262144, arguments.decode)
    else:
        decode(arguments.model or "14B", arguments.tokens or 4096, arguments.decode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
