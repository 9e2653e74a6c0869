"""Time to the first token against the length of the prompt, sparse and dense, beside a floor: a table and a picture.

    python tools/benchmark_gpu_lengths.py measure FILE.json [--model 7B] [--lengths 32768 1009936] [--dense-samples 5]
                                          [--kv-cache-dtype int8] [--quantization fp8] [--max-num-batched-tokens 16384]
    python tools/benchmark_gpu_lengths.py picture OUT.png FILE.json ...      needs matplotlib, and no GPU

Sparse prompts are read whole through the engine, their attention over seeded lines (seeded_lines.py). Dense
ones would take up to a quarter of an hour: some of their chunks are timed over a full cache, the ones between are
interpolated, since a chunk takes linearly more with the keys before it, and all are summed. FILE.json is written after
each of them; dense is null there for lengths that the timed chunks do not reach yet.

The floor is what no kernel can do without at the speeds that a matrix product and a device copy reach on the same card:
the larger of the operations' time and the bytes'. Sparse attention counts as many keys a row as its budgets say; of the
bytes weights are read once a chunk, keys and values once a dense chunk, keys once a sparse one, for the probe.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paddle
from benchmark_gpu_model import (
    add_options,
    copy_bandwidth,
    kept_as,
    options_of,
    prompt_pieces,
    random_model,
    random_prompt,
    token_seconds,
    warming_up,
)
from cuda_driver import seconds_a_call
from seeded_lines import seeded_selection

from paddle_qwen1m import ops
from paddle_qwen1m.attention.step import SequenceRows, StepBuilder
from paddle_qwen1m.cache import choose_page_size
from paddle_qwen1m.config import ModelConfig, SparseBudgets, published_budgets
from paddle_qwen1m.engine import Engine
from paddle_qwen1m.engine.borders import Chunking
from paddle_qwen1m.options import EngineOptions
from paddle_qwen1m.plan import cache_bytes_per_token, parameters, weight_bytes
from paddle_qwen1m.planning import PUBLISHED

LENGTHS = (32768, 65536, 131072, 262144, 524288, 1009936)


class Speeds(NamedTuple):
    """What the card reaches: operations a second of a bfloat16 matrix product, bytes a second of a device copy."""

    matmul: float
    copy: float


class Kept(NamedTuple):
    """How weights are kept, fp8, int8 or as bfloat16 (None), and the type of keys and values."""

    quantization: str | None
    cache_dtype: str


def spans(length: int, rows: int) -> list[tuple[int, int]]:
    """The chunks [begin, end) of a prompt, were they cut nowhere else."""
    return [(begin, min(begin + rows, length)) for begin in range(0, length, rows)]


def causal_pairs(length: int, most: np.ndarray) -> float:
    """Pairs of a row and a key at or before it, of which row i has i + 1, `most` at most; summed over `most` [n]."""
    bound = np.minimum(most.astype(np.float64), length)
    return float((length * bound - bound * (bound - 1) / 2).sum())


def operations(config: ModelConfig, length: int, rows: int, kept: Kept, budgets: SparseBudgets | None) -> float:
    """Those of a bfloat16 matrix product: two a weight and token, of linears in fp8 half as many, and four a pair of a
    row and a key in every head and number. budgets: of a sparse prefill, whose probe scores all keys once more.
    """
    weights = parameters(config) - 2 * config.vocab_size * config.hidden_size
    linear = 2.0 * weights * length / (2 if kept.quantization == "fp8" else 1)
    heads = config.num_layers * config.num_heads
    if budgets is None:
        return linear + 4 * config.head_dim * causal_pairs(length, np.full(heads, length))
    chosen = 4 * config.head_dim * causal_pairs(length, (budgets.vertical + budgets.slash).ravel())
    chunk_len = config.dual_chunk.chunk_len
    ends = [piece.end for piece in prompt_pieces(length, Chunking(rows, chunk_len, choose_page_size(chunk_len)))]
    return linear + chosen + 2 * config.head_dim * heads * ops.PROBE_ROWS * float(sum(ends))


def bytes_moved(config: ModelConfig, length: int, rows: int, kept: Kept, *, sparse: bool) -> float:
    """Weights and cached keys and values, read and written."""
    chunks = spans(length, rows)
    weights = weight_bytes(config, "bfloat16", kept.quantization) - 2 * 2 * config.vocab_size * config.hidden_size
    of_token = cache_bytes_per_token(config, kept.cache_dtype)
    read = float(sum(end for _, end in chunks)) * (of_token / 2 if sparse else of_token)
    return weights * len(chunks) + of_token * length + read


def floor_seconds(
    config: ModelConfig, length: int, rows: int, kept: Kept, budgets: SparseBudgets | None, speeds: Speeds
) -> float:
    """The least that a prefill can take; budgets: of a sparse one."""
    return max(
        operations(config, length, rows, kept, budgets) / speeds.matmul,
        bytes_moved(config, length, rows, kept, sparse=budgets is not None) / speeds.copy,
    )


def sampled_begins(length: int, rows: int, samples: int) -> list[int]:
    """Where the full chunks begin that are timed: the first, the last, and others at equal distances."""
    last = last_begin(length, rows) // rows
    return [int(number) * rows for number in np.unique(np.linspace(0, last, samples).round())]


def last_begin(length: int, rows: int) -> int:
    """Where a prompt's last full chunk begins, or its only one where that is not full."""
    return max(0, length // rows - 1) * rows


def summed_seconds(length: int, rows: int, begins: Sequence[int], seconds: Sequence[float]) -> float:
    """Of all chunks of a prompt, from those of full chunks that begin at `begins`; behind the last of them as between
    the last two.
    """
    rise = np.diff(seconds)[-1] / np.diff(begins)[-1] if len(begins) > 1 else 0.0

    def full(begin: int) -> float:
        return float(np.interp(begin, begins, seconds)) + rise * max(0, begin - begins[-1])

    return sum((end - begin) / rows * full(begin) for begin, end in spans(length, rows))


def matmul_speed() -> float:
    """Operations a second of a bfloat16 matrix product of 8192^3."""
    a, b = (
        ops.cast(paddle.to_tensor(np.random.default_rng(seed).standard_normal((8192, 8192), np.float32)), "bfloat16")
        for seed in (0, 1)
    )
    return 2 * 8192**3 / seconds_a_call(lambda: paddle.matmul(a, b), 20)


def dense_chunk_seconds(engine: Engine, prompt: np.ndarray, begin: int, rows: int) -> float:
    """Of rows [begin, begin + rows) of a prompt, densely, over the keys that the engine's cache holds already."""
    cache = engine.runner.cache
    pages = list(range(-(-(begin + rows) // cache.page_size)))
    step = StepBuilder(engine.model.config).prefill(
        [SequenceRows(prompt[begin : begin + rows], begin, pages, len(prompt))], cache, []
    )
    paddle.device.cuda.synchronize()
    start = time.perf_counter()
    engine.runner.forward(step)
    paddle.device.cuda.synchronize()
    return time.perf_counter() - start


def sparse_seconds(engine: Engine, prompt: np.ndarray) -> float:
    """To the first token of a prompt; the engine decides as always whether it is read sparsely."""
    with seeded_selection() as lines:
        token_seconds(engine, warming_up(engine, prompt), 1)
        lines.prepare(prompt_pieces(len(prompt), engine.chunking))
        start = time.perf_counter()
        return token_seconds(engine, prompt, 1)[0] - start


@dataclass
class Measured:
    """Of a model on a card: seconds to the first token by length, sparse, and of dense chunks by where they begin."""

    title: str
    config: ModelConfig
    budgets: SparseBudgets
    rows: int
    kept: Kept
    speeds: Speeds
    sparse: dict[int, float] = field(default_factory=dict)
    dense: dict[int, float] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """What `picture` takes: of every length the seconds, sparse and dense, measured and at least."""
        return {
            "title": self.title,
            "speeds": self.speeds._asdict(),
            "chunk": self.rows,
            "dense_chunks": {str(begin): seconds for begin, seconds in self.dense.items()},
            "lengths": [
                {
                    "tokens": length,
                    "sparse": seconds,
                    "dense": self._dense_seconds(length),
                    "sparse_floor": self._floor(length, self.budgets),
                    "dense_floor": self._floor(length, None),
                }
                for length, seconds in self.sparse.items()
            ],
        }

    def _dense_seconds(self, length: int) -> float | None:
        """None where no chunk is timed at or behind the last full one."""
        if last_begin(length, self.rows) > max(self.dense, default=-1):
            return None
        return summed_seconds(length, self.rows, list(self.dense), list(self.dense.values()))

    def _floor(self, length: int, budgets: SparseBudgets | None) -> float:
        return floor_seconds(self.config, length, self.rows, self.kept, budgets, self.speeds)


def longest_prompt(name: str) -> int:
    """Tokens that leave room for the one that is waited for."""
    return PUBLISHED[name].max_position_embeddings - 1


def measure(name: str, lengths: Sequence[int], samples: int, options: EngineOptions) -> Iterator[Measured]:
    """The same object after every length, then after every dense chunk."""
    speeds = Speeds(matmul_speed(), copy_bandwidth())
    paddle.device.cuda.empty_cache()
    config, budgets = PUBLISHED[name], published_budgets(PUBLISHED[name])
    assert budgets is not None
    longest = max(lengths)
    model = random_model(name, budgets=budgets, quantization=options.quantization)
    engine = Engine(model, replace(options, cache_tokens=longest + 1), budgets)
    rows, kept = engine.max_num_batched_tokens, Kept(options.quantization, engine.kv_cache_dtype)
    prompt, card = random_prompt(model, longest), paddle.device.cuda.get_device_name()
    measured = Measured(f"{name}, {kept_as(options)}, {card}", config, budgets, rows, kept, speeds)
    print(f"{name}, random weights, {kept_as(options)}, chunks of {rows:,}; {card}")
    print(f"matrix product {speeds.matmul / 1e12:.0f} TFLOP/s, copy {speeds.copy / 1e12:.2f} TB/s", flush=True)
    for length in sorted(lengths):
        measured.sparse[length] = sparse_seconds(engine, prompt[:length])
        print(f"{length:9,} tokens: {measured.sparse[length]:.2f} s", flush=True)
        yield measured
    for begin in sampled_begins(longest, rows, samples):
        measured.dense[begin] = dense_chunk_seconds(engine, prompt, begin, rows)
        print(f"dense chunk behind {begin:9,} keys: {measured.dense[begin]:.2f} s", flush=True)
        yield measured


def print_table(told: dict[str, Any]) -> None:
    print(told["title"])
    print("| tokens | sparse | floor | dense, summed | floor | dense over sparse |\n|---|---|---|---|---|---|")
    for row in told["lengths"]:
        dense = row["dense"]
        summed, times = ("", "") if dense is None else (f"{dense:.2f} s", f"{dense / row['sparse']:.2f}x")
        print(
            f"| {row['tokens']:,} | {row['sparse']:.2f} s | {row['sparse_floor']:.2f} s | {summed} "
            f"| {row['dense_floor']:.2f} s | {times} |"
        )


def picture(out: Path, all_told: Sequence[dict[str, Any]]) -> None:
    """Seconds against tokens, both in powers: a panel for each measurement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(all_told), figsize=(6 * len(all_told), 4.5), squeeze=False, sharey=True)
    for axes, told in zip(panels[0], all_told):
        tokens = [row["tokens"] for row in told["lengths"]]
        for key, label, style in (
            ("dense", "dense, summed from timed chunks", "C1o-"),
            ("dense_floor", "its floor", "C1--"),
            ("sparse", "sparse", "C0o-"),
            ("sparse_floor", "its floor", "C0--"),
        ):
            seconds = [math.nan if row[key] is None else row[key] for row in told["lengths"]]
            axes.loglog(tokens, seconds, style, label=label)
        axes.set_xticks(tokens, [f"{count // 1000}k" for count in tokens])
        axes.minorticks_off()
        axes.set(title=told["title"], xlabel="tokens of the prompt", ylabel="seconds to the first token")
        axes.grid(True, alpha=0.3)
        axes.legend()
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    measuring = what.add_parser("measure")
    measuring.add_argument("file", type=Path)
    measuring.add_argument("--model", choices=list(PUBLISHED), default="7B")
    measuring.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS")
    measuring.add_argument("--dense-samples", type=int, default=5, metavar="CHUNKS")
    add_options(measuring)
    drawing = what.add_parser("picture")
    drawing.add_argument("out", type=Path)
    drawing.add_argument("files", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.what == "measure":
        longest = longest_prompt(arguments.model)
        if max(arguments.lengths) > longest:
            parser.error(f"--lengths: the {arguments.model} reads at most {longest} tokens and answers one")
        paddle.device.set_device("gpu")
        for measured in measure(arguments.model, arguments.lengths, arguments.dense_samples, options_of(arguments)):
            arguments.file.write_text(json.dumps(measured.told(), indent=1), encoding="utf-8")
        print_table(measured.told())
        return 0
    all_told = [json.loads(file.read_text(encoding="utf-8")) for file in arguments.files]
    for told in all_told:
        print_table(told)
    picture(arguments.out, all_told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
