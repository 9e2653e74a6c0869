"""Everything that several GPUs of one machine owe, in one command and one table, with a prediction beside each figure.

    python tools/benchmark_many_gpus.py [--models 7B 14B] [--tokens 131072 1009936] [--ranks 1 2 4 8] [--out DIR]
        [--only model answers failures] [--kv-cache-dtype int8] [--quantization fp8] [--max-num-batched-tokens 16384]

model: benchmark_gpu_model.py, random weights of the published shapes, at each number of ranks that the machine has and
the memory allows; each is predicted from the smallest: what the ranks share out takes its part of the time, attention
what the busiest rank of each layer visits of the keys, and collectives what they took when they were measured alone.
Without a GPU the table is of the numbers that --out has from earlier runs. answers: the needle checkpoint's
tokens of several ranks and of one, dense and sparse. failures: benchmark_llm.py, a rank killed while it works.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from benchmark_gpu_model import add_options, kept_as, options_of

from paddle_qwen1m.config import published_budgets
from paddle_qwen1m.engine.admission import Allowance, Need, longest_fitting
from paddle_qwen1m.options import GPU_BATCHED_TOKENS, EngineOptions
from paddle_qwen1m.parallel.group import GPU_LANE_ROWS
from paddle_qwen1m.parallel.placement import Placement
from paddle_qwen1m.parallel.room import lanes_of
from paddle_qwen1m.parallel.split import degrees
from paddle_qwen1m.planning import PUBLISHED
from paddle_qwen1m.weights.convert import convert
from paddle_qwen1m.weights.source import HUGGINGFACE, PADDLENLP, TENSOR_PARALLEL

TOOLS = Path(__file__).resolve().parent
NEEDLE = TOOLS.parent / "checkpoints" / "needle"
NOT_SHARED = ("embedding", "gather_rows")
"""Ops that every rank does for all rows and the whole width."""
DECODE_LAYER_MS = 0.0205
"""What ranks do not share of a layer of a decode step, however many they are: launches, norms, merges."""
NEW_TOKENS = 64
DOCUMENTS = (2_000, 16_000, 60_000)


@dataclass(frozen=True)
class Run:
    """What the ranks told of one prefill; the slowest counts."""

    ranks: list[dict[str, Any]]

    def __getitem__(self, name: str) -> float:
        return max(one[name] for one in self.ranks)

    @property
    def degree(self) -> int:
        return len(self.ranks)

    def op(self, name: str) -> float:
        """Seconds of the slowest rank."""
        return max(one["ops_ms"].get(name, 0.0) for one in self.ranks) / 1e3

    def sums_ms(self) -> tuple[float, float]:
        """Milliseconds of a collective of one row, and of a chunk's rows."""
        one, chunk = sorted(self.ranks[0]["sums_ms"].items(), key=lambda item: int(item[0]))
        return float(one[1]), float(chunk[1])

    def imbalance(self) -> float:
        """Sparse attention of the slowest rank over the mean, all layers together."""
        times = [one["ops_ms"].get("dca_sparse_prefill", 0.0) for one in self.ranks]
        return max(times) / (sum(times) / len(times)) if sum(times) else 1.0


@cache
def imbalance_of_layers(model: str, degree: int) -> float:
    """What the busiest rank of each layer visits over the mean of all ranks: in every layer they wait for it."""
    config = PUBLISHED[model]
    budgets = published_budgets(config)
    assert budgets is not None
    return Placement.balanced(config, degree, budgets).imbalance(budgets)


def launched(degree: int, script: str, *arguments: str) -> list[str]:
    """The command of a script of this folder on so many GPUs."""
    if degree == 1:
        return [sys.executable, "-W", "ignore", str(TOOLS / script), *arguments]
    devices = ",".join(map(str, range(degree)))
    launch = [sys.executable, "-W", "ignore", "-m", "paddle.distributed.launch", "--devices", devices]
    return [*launch, "--log_dir", tempfile.mkdtemp(), str(TOOLS / script), *arguments]


def fits(model: str, degree: int, tokens: int, memory: int, options: EngineOptions) -> bool:
    shapes = PUBLISHED[model]
    options = replace(options, max_num_batched_tokens=chunk_rows(options), max_num_seqs=1)
    need = Need.of(
        shapes, degree, options, published_budgets(shapes), kept="bfloat16", computed="bfloat16", on_gpu=True
    )
    return (longest_fitting(need, Allowance(memory)) or 0) >= tokens + NEW_TOKENS


def chunk_rows(options: EngineOptions) -> int:
    return options.max_num_batched_tokens or GPU_BATCHED_TOKENS


def run_model(model: str, degree: int, tokens: int, options: EngineOptions, out: Path, memory: int) -> Run | None:
    """That of an earlier run into the same folder, or a new one; None where `memory` bytes a GPU are too few, and, with
    the reason printed, where it did not come to its end.
    """
    kept = {name: getattr(options, name) for name in ("kv_cache_dtype", "quantization", "max_num_batched_tokens")}
    given = {name: str(value) for name, value in kept.items() if value is not None}
    numbers = out / f"{'-'.join([model, str(tokens), str(degree), *given.values()])}.json"
    paths = [numbers] if degree == 1 else [numbers.with_suffix(f".{rank}.json") for rank in range(degree)]
    if not all(path.exists() for path in paths):
        if not memory or not fits(model, degree, tokens, memory, options):
            return None
        arguments = ["prefill", "--model", model, "--tokens", str(tokens), "--decode", str(NEW_TOKENS)]
        for option, value in given.items():
            arguments += [f"--{option.replace('_', '-')}", value]
        began = time.perf_counter()
        log = numbers.with_suffix(".log")
        with log.open("w") as stream:
            command = launched(degree, "benchmark_gpu_model.py", *arguments, "--json", str(numbers))
            status = subprocess.run(command, stdout=stream, stderr=stream).returncode
        if status:
            print(f"{model}, {tokens:,} tokens, {degree} ranks: exit status {status}, see {log}")
            return None
        print(f"({model}, {tokens:,} tokens, {degree} ranks: {time.perf_counter() - began:.0f} s in all)", flush=True)
    return Run([json.loads(path.read_text(encoding="utf-8")) for path in paths])


def predicted(base: Run, model: str, measured: Run, bare: float) -> tuple[float, float]:
    """First token in seconds and decode in milliseconds from those of the base, with the collectives that were
    measured there, of a prefill those of one lane of each chunk, which lie beside nothing, `bare` chunks' in all, and
    the imbalance that the placement has."""
    degree, layers = measured.degree, PUBLISHED[model].num_layers
    share = base.degree / degree
    of_all = sum(base.op(name) for name in NOT_SHARED)
    attention = base.op("dca_sparse_prefill")
    one, chunk = (2 * layers * 1e-3 * ms for ms in measured.sums_ms())
    one_before, chunk_before = (2 * layers * 1e-3 * ms for ms in base.sums_ms())
    shared = base["first_token_s"] - of_all - attention - bare * chunk_before
    uneven = imbalance_of_layers(model, degree) / imbalance_of_layers(model, base.degree)
    first = shared * share + attention * share * uneven + of_all
    of_each = layers * DECODE_LAYER_MS
    step = (base["decode_ms"] - 1e3 * one_before - of_each) * share + of_each + 1e3 * one
    return first + bare * chunk, step


def measure_models(
    models: list[str], lengths: list[int], ranks: list[int], memory: int, options: EngineOptions, out: Path
) -> None:
    print(kept_as(options))
    print("model  tokens     ranks  first token s (predicted)  of the smallest's speed a card  decode ms (predicted)  "
          "peak GB (plan)  busiest rank's sparse attention over the mean: all layers (each, by keys)")  # fmt: skip
    rows = chunk_rows(options)
    for model in models:
        for tokens in lengths:
            bare = tokens / rows / lanes_of(rows, GPU_LANE_ROWS)
            base: Run | None = None
            for degree in (one for one in ranks if one in degrees(PUBLISHED[model])):
                run = run_model(model, degree, tokens, options, out, memory)
                if run is None:
                    continue
                base = base or run
                first, step = predicted(base, model, run, bare)
                speed = base["first_token_s"] * base.degree / (run["first_token_s"] * degree)
                print(
                    f"{model:5} {tokens:10,} {degree:6} {run['first_token_s']:10.2f} ({first:.2f})"
                    f"{speed:22.0%} {run['decode_ms']:22.2f} ({step:.2f}) {run['peak_gb']:12.2f} ({run['plan_gb']:.2f})"
                    f"{run.imbalance():10.3f} ({imbalance_of_layers(model, degree):.3f})",
                    flush=True,
                )
                for one in run.ranks:
                    largest = sorted(one["ops_ms"].items(), key=lambda item: -item[1])[:8]
                    print(f"    rank {one['rank']}: " + ", ".join(f"{op} {ms / 1e3:.2f} s" for op, ms in largest))


def compare_answers(degree: int) -> bool:
    """Whether so many ranks choose the needle checkpoint's tokens that one does, from each form of its weights, of
    documents dense and sparse.
    """

    def asked(ranks: int, checkpoint: Path) -> list[list[int]]:
        command = [sys.executable, "-W", "ignore", __file__, "--answer-with", str(ranks), str(checkpoint)]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        return list(json.loads(said.splitlines()[-1]))

    expected = asked(1, NEEDLE)
    good = True
    with tempfile.TemporaryDirectory() as folder:
        forms = {
            HUGGINGFACE: NEEDLE,
            PADDLENLP: Path(folder) / PADDLENLP,
            TENSOR_PARALLEL: Path(folder) / TENSOR_PARALLEL,
        }
        convert(NEEDLE, forms[PADDLENLP], PADDLENLP, progress=False)
        convert(NEEDLE, forms[TENSOR_PARALLEL], TENSOR_PARALLEL, degree=degree, progress=False)
        for form, checkpoint in forms.items():
            equal = asked(degree, checkpoint) == expected
            print(
                f"needle checkpoint, {form}, {DOCUMENTS} tokens, dense and sparse: {degree} ranks choose those of one: "
                f"{equal}", flush=True,
            )  # fmt: skip
            good &= equal
    return good


def answer(ranks: int, checkpoint: str) -> list[list[int]]:
    """Tokens that a checkpoint chooses behind documents of random tokens."""
    from paddle_qwen1m import LLM, SamplingParams

    answers = []
    for threshold in (4096, 1 << 20):
        options: dict[str, Any] = {"tensor_parallel_size": ranks, "sparse_threshold": threshold}
        with LLM(checkpoint, max_model_len=65536, **options) as llm:
            vocabulary = len(llm.get_tokenizer())
            prompts = [np.random.default_rng(size).integers(0, vocabulary, size).tolist() for size in DOCUMENTS]
            greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
            outputs = llm.generate(prompts, greedy, use_tqdm=False)
            answers += [list(one.outputs[0].token_ids) for one in outputs]
    return answers


def check_failures(degree: int) -> int:
    """The exit status of benchmark_llm.py, on a checkpoint of the 7B's shape with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = str(Path(folder) / "7B")
        subprocess.run([sys.executable, str(TOOLS / "random_checkpoint.py"), "7B", checkpoint], check=True)
        command = [sys.executable, "-W", "ignore", str(TOOLS / "benchmark_llm.py"), checkpoint, "-tp", str(degree)]
        return subprocess.run(command).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--tokens", nargs="+", type=int, default=[131_072, 1_009_936])
    parser.add_argument("--ranks", nargs="+", type=int, help="(default: 1, 2, 4, 8 as far as there are GPUs)")
    parser.add_argument("--only", nargs="+", choices=("model", "answers", "failures"))
    parser.add_argument(
        "--out", type=Path, help="of logs and numbers; those that are there are taken (default: a new one)"
    )
    add_options(parser)
    parser.add_argument("--answer-with", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer_with:
        number, checkpoint = arguments.answer_with
        print(json.dumps(answer(int(number), checkpoint)))
        return 0
    ranks = arguments.ranks or [1, 2, 4, 8]
    cards = paddle.device.cuda.device_count()
    if not cards:
        if arguments.out is None or not arguments.out.is_dir():
            raise SystemExit("no GPU was found, and --out is no folder with numbers of earlier runs")
        measure_models(arguments.models, arguments.tokens, ranks, 0, options_of(arguments), arguments.out)
        return 0
    ranks = [one for one in ranks if one <= cards]
    names = {paddle.device.cuda.get_device_name(card) for card in range(cards)}
    memory = min(paddle.device.cuda.get_device_properties(card).total_memory for card in range(cards))
    out = arguments.out or Path(tempfile.mkdtemp(prefix="many_gpus-"))
    out.mkdir(parents=True, exist_ok=True)
    print(f"{cards} x {', '.join(names)}, {memory / 1e9:.1f} GB each; logs in {out}", flush=True)
    parts = arguments.only or ("model", "answers", "failures")
    good = True
    if "model" in parts:
        measure_models(arguments.models, arguments.tokens, ranks, memory, options_of(arguments), out)
    if "answers" in parts and max(ranks) > 1:
        good &= all([compare_answers(degree) for degree in ranks if degree in (2, 4)])
    if "failures" in parts and max(ranks) > 1:
        good &= check_failures(max(one for one in ranks if one <= 4)) == 0
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
