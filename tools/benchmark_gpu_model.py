"""The whole model at its real shape with random weights, on one GPU or several: speed, memory, where the time goes.

    python tools/benchmark_gpu_model.py prefill [--model 7B] [--tokens 262144] [--decode 64] [--lines published:21]
    python tools/benchmark_gpu_model.py decode [--model 14B] [--tokens 4096]
    either with [--quantization fp8], prefill with [--kv-cache-dtype int8] [--max-num-batched-tokens 16384]
    python -m paddle.distributed.launch --devices 0,1 tools/benchmark_gpu_model.py prefill ...  for each rank

The prefill visits seeded columns and diagonals (seeded_lines.py), as many as the published budgets say ("published:21":
those of one layer in all).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Callable

import numpy as np
import paddle
from benchmark_sums import sum_ms
from cuda_driver import DeviceClock, seconds_a_call
from seeded_lines import SeededLines, seeded_selection

from paddle_qwen1m import ops
from paddle_qwen1m.attention.positions import Piece, pieces
from paddle_qwen1m.config import ModelConfig, SparseBudgets, published_budgets
from paddle_qwen1m.dtypes import INT8
from paddle_qwen1m.engine import Engine, PrefillProgress, SamplingParams
from paddle_qwen1m.engine.borders import Chunking
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.options import EngineOptions
from paddle_qwen1m.parallel.group import ALONE, Group, ProcessGroup, start
from paddle_qwen1m.parallel.job import launched_ranks
from paddle_qwen1m.parallel.placement import Placement
from paddle_qwen1m.plan import plan_memory, weight_bytes
from paddle_qwen1m.planning import PUBLISHED

NOISE = 1 << 26
ONE = 0x3F80


def random_model(
    name: str, group: Group = ALONE, budgets: SparseBudgets | None = None, quantization: str | None = None
) -> Qwen2OneM:
    """A rank's share of a model of the published shape, heads placed by `budgets`; weights normal(0, 0.02), norms 1,
    in bfloat16, the linears' where `quantization` says so in 8 bits.
    """
    config = PUBLISHED[name]
    placement = Placement.balanced(config, group.degree, budgets)
    model = Qwen2OneM(config, "bfloat16", group, placement, quantization)
    noise = np.random.default_rng(0).standard_normal(NOISE, np.float32) * np.float32(0.02)
    bits = (noise.view(np.uint32) >> 16).astype(np.uint16)
    for name, slot in model.slots().items():
        ones = name.endswith("norm.weight")
        values = np.full(slot.held_shape, ONE, np.uint16) if ones else np.resize(bits, slot.held_shape)
        slot.write(values)
    return model


def budgets_of(config: ModelConfig, lines: str) -> SparseBudgets:
    """The published budgets, or those of one layer in every layer."""
    budgets = published_budgets(config)
    assert budgets is not None
    if lines == "published":
        return budgets
    layer = int(lines.partition(":")[2])
    return SparseBudgets(*(np.repeat(one[layer : layer + 1], len(one), 0) for one in (budgets.vertical, budgets.slash)))


class OpTimes:
    """Milliseconds by op, of the device, in a run that goes on as it would: the host waits for nothing.

    What a stream waits for between two ops, sums on their way from other ranks above all, is in none of them. "seeded
    lines" is what a real prefill has not
    """

    def __init__(self, clock: DeviceClock) -> None:
        self._clock = clock
        self._calls: list[tuple[str, str, Any, Any]] = []
        """Name, that of the call which it was made in ("" for none), marks around it."""
        self._within = [""]
        self._watching = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        names = [name for name in ops.__all__ if name[0].islower() and name not in ("gpu_obstacle", "load", "on_gpu")]
        watched = [*((ops, name) for name in names), (ProcessGroup, "all_reduce"), (SeededLines, "of")]
        originals = {call: getattr(*call) for call in watched}

        def marked(owner: Any, name: str) -> Any:
            shown = "seeded lines" if owner is SeededLines else name

            def call(*arguments: Any, **options: Any) -> Any:
                if not self._watching:
                    return originals[owner, name](*arguments, **options)
                outer = self._within[-1]
                self._within.append(shown)
                start = self._clock.mark()
                result = originals[owner, name](*arguments, **options)
                self._calls.append((shown, outer, start, self._clock.mark()))
                self._within.pop()
                return result

            return call

        for owner, name in watched:
            setattr(owner, name, marked(owner, name))
        self._watching = True
        try:
            yield
        finally:
            self.stop()
            for (owner, name), original in originals.items():
                setattr(owner, name, original)

    def stop(self) -> None:
        """What comes from now on is not counted."""
        self._watching = False

    def totals(self) -> dict[str, float]:
        """Once the device has done it all."""
        totals: dict[str, float] = defaultdict(float)
        for name, outer, begin, end in self._calls:
            milliseconds = self._clock.milliseconds(begin, end)
            totals[name] += milliseconds
            if outer:
                totals[outer] -= milliseconds
        return dict(sorted(totals.items(), key=lambda item: -item[1]))


def kept_as(options: EngineOptions) -> str:
    """How weights and keys are kept, in words."""
    return f"weights in {options.quantization or 'bf16'}, keys and values in {options.kv_cache_dtype or 'bf16'}"


def prompt_pieces(length: int, chunking: Chunking) -> list[Piece]:
    """The pieces of all chunks of a prompt that is read sparsely."""
    ends = chunking.ends(length, sparse=True)
    return [piece for chunk in zip([0, *ends], ends) for piece in pieces(*chunk, chunking.chunk_len)]


def random_prompt(model: Qwen2OneM, tokens: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, model.config.vocab_size, tokens)


def warming_up(engine: Engine, prompt: np.ndarray) -> np.ndarray:
    """The start of a prompt: more than a chunk, and read sparsely, so that every layer asks for lines."""
    return prompt[: max(engine.max_num_batched_tokens, engine.options.sparse_threshold) + 1000]


def token_seconds(
    engine: Engine,
    prompt: np.ndarray,
    new_tokens: int,
    at_first: Callable[[], object] = lambda: None,
    **hooks: Any,
) -> list[float]:
    """When each token came; `at_first` is called with the first one."""
    times: list[float] = []

    def on_token(_index: int, _token: int) -> None:
        times.append(time.perf_counter())
        if len(times) == 1:
            at_first()

    engine.generate([prompt], SamplingParams(max_tokens=new_tokens, temperature=0.0), on_token=on_token, **hooks)
    return times


def prefill(
    name: str, tokens: int, new_tokens: int, budgeted: str, group: Group, options: EngineOptions
) -> dict[str, Any]:
    """What is printed, as numbers of this rank."""
    budgets = budgets_of(PUBLISHED[name], budgeted)
    model = random_model(name, group, budgets, options.quantization)
    config, local = model.config, model.local
    engine = Engine(model, replace(options, cache_tokens=tokens + new_tokens), budgets)
    rows = engine.max_num_batched_tokens
    plan = plan_memory(
        local,
        tokens + new_tokens,
        max_num_batched_tokens=rows,
        cache_dtype=engine.kv_cache_dtype,
        weight_bytes=weight_bytes(local, "bfloat16", options.quantization),
        budgets=budgets,
        dtype="bfloat16",
        quantization=options.quantization,
        degree=group.degree,
    )
    ranks = "" if group.degree == 1 else f" (rank {group.rank} of {group.degree})"
    print(f"{name}, random weights, {kept_as(options)}{ranks}: the plan takes {plan.total / 1e9:.2f} GB", flush=True)
    prompt = random_prompt(model, tokens)
    progress: list[PrefillProgress] = []
    with seeded_selection(group.rank) as lines:
        token_seconds(engine, warming_up(engine, prompt), 3)  # libraries and memory
        lines.prepare(prompt_pieces(tokens, engine.chunking))
        gc.collect()
        gc.freeze()  # as parallel/worker.py does
        group.meet()
        watch = OpTimes(DeviceClock())
        with watch.watch():
            start = time.perf_counter()
            times = token_seconds(engine, prompt, new_tokens, watch.stop, on_prefill=progress.append)
        peak = paddle.device.cuda.max_memory_allocated() / 1e9
    paddle.device.cuda.synchronize()
    first = times[0] - start
    print(f"{tokens:,} tokens in chunks of {rows:,}, sparse with the budgets {budgeted}, attention over seeded lines;")
    print(f"first token after {first:.2f} s ({tokens / first:,.0f} tokens/s); chunk by chunk, tokens and seconds:")
    print("  " + ", ".join(f"{step.done_tokens:,} {step.seconds:.2f}" for step in progress))
    steps = np.diff(times) * 1e3
    quarter = max(1, len(steps) // 4)
    print(
        f"decode after {tokens:,}: {median(steps):.2f} ms a token, median of {len(steps)}; the first and last "
        f"{quarter}: {median(steps[:quarter]):.2f} and {median(steps[-quarter:]):.2f}"
    )
    print(
        f"memory: peak {peak:.2f} GB allocated; arithmetic {plan.total / 1e9:.2f} GB "
        f"(weights {plan.weights / 1e9:.2f}, cache {plan.cache / 1e9:.2f}, activations {plan.activations / 1e9:.2f})"
    )
    totals = watch.totals()
    whole = sum(totals.values())
    print(f"by op, {whole / 1e3:.2f} s of that prefill; in the rest the stream waits, for other ranks above all:")
    for op, milliseconds in totals.items():
        print(f"  {op:20} {milliseconds:10.1f} ms {milliseconds / whole:6.1%}")
    return {
        "rank": group.rank,
        "first_token_s": first,
        "decode_ms": median(steps),
        "peak_gb": peak,
        "plan_gb": plan.total / 1e9,
        "ops_ms": totals,
        "sums_ms": {1: sum_ms(group, config.hidden_size), rows: all_reduce_ms(group, config.hidden_size, rows)},
    }


def all_reduce_ms(group: Group, hidden: int, rows: int, calls: int = 20) -> float:
    """Of `rows` rows of bfloat16, call after call; 0 for one rank alone."""
    values = paddle.empty([rows, hidden], "bfloat16")
    return seconds_a_call(lambda: group.all_reduce(values), calls) * 1e3


def copy_bandwidth() -> float:
    """Bytes read and written a second by device copies of 4 GiB."""
    source, target = (paddle.empty([2**32], "uint8") for _ in range(2))
    return 2 * 2**32 / seconds_a_call(lambda: target.copy_(source, False), 8)


def decode(name: str, tokens: int, new_tokens: int, options: EngineOptions) -> None:
    """Steps of the captured graph, host and all, beside the time that reading the weights once takes."""
    model = random_model(name, quantization=options.quantization)
    engine = Engine(model, replace(options, sparse=False, cache_tokens=tokens + new_tokens))
    times = token_seconds(engine, random_prompt(model, tokens), new_tokens)
    step = median(np.diff(times)[4:])
    config = model.config
    read = weight_bytes(config, "bfloat16", options.quantization) - 2 * config.vocab_size * config.hidden_size
    bandwidth = copy_bandwidth()
    print(
        f"{name}, random weights, {kept_as(options)}: a decode step at {tokens:,} tokens takes {step * 1e3:.2f} ms "
        f"(median of {new_tokens - 5}); its {read / 1e9:.2f} GB of weights at {bandwidth / 1e12:.2f} TB/s, what a copy "
        f"moves, {read / bandwidth * 1e3:.2f} ms: {step * bandwidth / read:.2f}x"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kv-cache-dtype", choices=("bfloat16", INT8))
    parser.add_argument("--quantization", choices=("fp8", "int8"), help="of the layers' linears")
    parser.add_argument("--max-num-batched-tokens", type=int, help="rows of a chunk")
    parts = EngineOptions.prefix_border_parts
    parser.add_argument("--prefix-border-parts", type=int, default=parts, help="in which a prompt's last chunk is read")


def options_of(arguments: argparse.Namespace) -> EngineOptions:
    """The engine's options that `add_options` reads."""
    return EngineOptions(
        kv_cache_dtype=arguments.kv_cache_dtype,
        quantization=arguments.quantization,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        prefix_border_parts=arguments.prefix_border_parts,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prefill", "decode"))
    parser.add_argument("--model", choices=list(PUBLISHED))
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--lines", default="published", help='or "published:LAYER" (default: %(default)s)')
    parser.add_argument("--decode", type=int, default=64, help="new tokens (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also as numbers; FILE.RANK.json for several ranks")
    add_options(parser)
    arguments = parser.parse_args()
    options = options_of(arguments)
    paddle.device.set_device("gpu")
    if arguments.what == "prefill":
        group = start(launched_ranks())
        name, tokens = arguments.model or "7B", arguments.tokens or 262144
        told = prefill(name, tokens, arguments.decode, arguments.lines, group, options)
        if arguments.json is not None:
            path = arguments.json.with_suffix(f".{group.rank}.json") if group.degree > 1 else arguments.json
            path.write_text(json.dumps(told), encoding="utf-8")
    else:
        decode(arguments.model or "14B", arguments.tokens or 4096, arguments.decode, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
