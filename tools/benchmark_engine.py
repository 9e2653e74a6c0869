"""The engine's loop under several requests: a model of the real shape with random weights on one GPU, or a checkpoint.

    python tools/benchmark_engine.py throughput [--model 7B] [--prompt 2048] [--new 256] [--requests 1 8 32]
    python tools/benchmark_engine.py beside [--tokens 262144] [--sequences 8]    a long prefill beside running answers
    python tools/benchmark_engine.py prefix [--documents 229311 262144]           a second question on a cached document
    python tools/benchmark_engine.py asking [--document 499712] [--questions 1 8 64 512]    questions of other lengths
    python tools/benchmark_engine.py questions [--documents 131072 150000] [--questions 100]    an evaluation by logits
    python tools/benchmark_engine.py --checkpoint checkpoints/needle beside --tokens 60000        on whatever device

With random weights the attention of sparse prefill visits the lines of seeded_lines.py. Every bound that a line prints
beside its figure is measured in the same run: bytes over what a device copy moves, operations over a large matmul's
speed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Callable

import numpy as np
import paddle
from benchmark_gpu_model import copy_bandwidth, prompt_pieces, random_model, warming_up
from paddlenlp.transformers import AutoModelForCausalLM
from paddlenlp.utils.log import logger
from seeded_lines import seeded_selection

import paddle_qwen1m  # noqa: F401  (importing it registers the model)
from paddle_qwen1m.config import SparseBudgets, published_budgets
from paddle_qwen1m.engine import Engine, Finished, Prefilled, Request, SamplingParams, TokenChosen
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.options import EngineOptions
from paddle_qwen1m.plan import cache_bytes_per_token, parameters
from paddle_qwen1m.planning import PUBLISHED

WARM_TOKENS = 1024
ANSWER = 64


@dataclass
class Log:
    """When what came of each request, in seconds of time.perf_counter."""

    tokens: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    prefilled: dict[str, list[tuple[float, int, int]]] = field(default_factory=lambda: defaultdict(list))
    finished: dict[str, float] = field(default_factory=dict)

    def step(self, engine: Engine) -> None:
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            if isinstance(event, TokenChosen):
                self.tokens[event.id].append(now)
            elif isinstance(event, Prefilled):
                self.prefilled[event.id].append((now, event.done_tokens, event.reused_tokens))
            elif isinstance(event, Finished):
                self.finished[event.id] = now

    def run(self, engine: Engine) -> None:
        while not engine.is_idle:
            self.step(engine)


class Subject:
    """A model and its sparse budgets: a checkpoint's, or random ones of a published shape."""

    def __init__(self, shape: str, checkpoint: str | None) -> None:
        self.is_random = checkpoint is None
        self.model: Qwen2OneM
        self.budgets: SparseBudgets | None
        if checkpoint is None:
            self.model = random_model(shape)
            self.budgets = published_budgets(self.model.config)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
            self.model, self.budgets = loaded.model, loaded.engine.budgets

    def engine(self, options: EngineOptions) -> Engine:
        return Engine(self.model, options, self.budgets)

    def prompt(self, tokens: int, *seed: int) -> np.ndarray:
        return np.random.default_rng([*seed, tokens]).integers(0, self.model.config.vocab_size, tokens)

    @contextmanager
    def selection(self) -> Iterator[Callable[[Engine, int], None]]:
        """What prefill visits. Yields what makes that of prompts of so many tokens, once all layers have asked: before
        anything is timed.
        """
        if not self.is_random:
            yield lambda _engine, _tokens: None
            return
        with seeded_selection() as lines:
            yield lambda engine, tokens: lines.prepare(prompt_pieces(tokens, engine.chunking))


def params(new_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=new_tokens, temperature=0.0)


def matmul_speed(width: int = 8192) -> float:
    """Operations a second of a bfloat16 matmul of this width."""
    one, other = (paddle.empty([width, width], "bfloat16") for _ in range(2))
    paddle.matmul(one, other)
    paddle.device.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(8):
        paddle.matmul(one, other)
    paddle.device.cuda.synchronize()
    return 8 * 2 * width**3 / (time.perf_counter() - start)


def throughput(subject: Subject, prompt_tokens: int, new_tokens: int, numbers: list[int]) -> None:
    config = subject.model.config
    weights = parameters(config) - config.vocab_size * config.hidden_size
    bandwidth, speed = copy_bandwidth(), matmul_speed()
    most = max(numbers)
    engine = subject.engine(
        EngineOptions(cache_tokens=most * (prompt_tokens + new_tokens + 256), sparse=False, max_num_seqs=most)
    )
    print(
        f"{prompt_tokens:,} tokens in, {new_tokens} out; a copy moves {bandwidth / 1e12:.2f} TB/s, a matmul does "
        f"{speed / 1e12:.0f} TFLOP/s"
    )
    print("requests  tokens/s  first token s  ms a step  bytes' ms  operations' ms  times the larger")
    for number in numbers:
        for turn in range(2):  # the first captures the graphs
            log, start = Log(), time.perf_counter()
            for index in range(number):
                prompt = subject.prompt(prompt_tokens, number, turn, index)
                engine.add(Request(f"{number}-{turn}-{index}", prompt, params(new_tokens)))
            log.run(engine)
        seconds = max(log.finished.values()) - start
        firsts = [times[0] for times in log.tokens.values()]
        last_first, first_end = max(firsts), min(times[-1] for times in log.tokens.values())
        together = sorted({when for times in log.tokens.values() for when in times if last_first <= when <= first_end})
        step = float(np.median(np.diff(together)))
        keys = number * (prompt_tokens + new_tokens / 2) * cache_bytes_per_token(config, "bfloat16")
        by_bytes, by_operations = (2 * weights + keys) / bandwidth, 2 * weights * number / speed
        print(
            f"{number:8} {number * new_tokens / seconds:9.1f} {max(firsts) - start:14.2f} {step * 1e3:10.2f} "
            f"{by_bytes * 1e3:10.2f} {by_operations * 1e3:15.2f} {step / max(by_bytes, by_operations):17.2f}",
            flush=True,
        )


def gaps(log: Log, begin: float, end: float) -> np.ndarray:
    """Seconds between tokens of one sequence, of all that came within the time."""
    found = [np.diff([when for when in times if begin <= when <= end]) for times in log.tokens.values()]
    return np.concatenate(found)


def beside(subject: Subject, tokens: int, sequences: int) -> None:
    answers = 20_000
    room = tokens + ANSWER + sequences * (WARM_TOKENS + answers) + 16 * WARM_TOKENS
    engine = subject.engine(EngineOptions(cache_tokens=room))
    bound, short_tokens = engine.max_inter_token_ms, engine.max_pause_tokens
    long = subject.prompt(tokens)
    with subject.selection() as prepare:
        Log().run(_with(engine, Request("warm", warming_up(engine, long), params(4))))
        prepare(engine, tokens)
        alone, start = Log(), time.perf_counter()
        alone.run(_with(engine, Request("alone", long, params(2))))
        alone_seconds = alone.tokens["alone"][0] - start
        log = Log()
        for index in range(sequences):
            engine.add(Request(f"answer-{index}", long[index * 7 :][:WARM_TOKENS], params(answers)))
        while len(log.tokens) < sequences or min(map(len, log.tokens.values())) < 100:
            log.step(engine)
        begin = time.perf_counter()
        until = min(map(len, log.tokens.values())) + 200
        while min(map(len, log.tokens.values())) < until:
            log.step(engine)
        usual = gaps(log, begin, time.perf_counter())
        with _idle_share(subject.model.on_gpu) as idle:
            start = time.perf_counter()
            engine.add(Request("long", long, params(2)))
            short_at = None
            while "long" not in log.tokens:
                log.step(engine)
                if short_at is None and time.perf_counter() - start > alone_seconds / 2:
                    short_at = time.perf_counter()
                    engine.add(Request("short", subject.prompt(short_tokens, 3), params(2)))
        end = log.tokens["long"][0]
        within = gaps(log, start, end)
        steps = sum(start <= when <= end for when in log.tokens["answer-0"])
        own = steps * float(np.median(usual))
        engine.add(Request("dropped", long[::-1].copy(), params(2)))
        pause = time.perf_counter() + alone_seconds / 4
        while time.perf_counter() < pause:
            log.step(engine)
        before = engine.metrics.pages_held
        asked = time.perf_counter()
        engine.abort("dropped")
        freed = time.perf_counter() - asked
        after = engine.metrics.pages_held
        for index in range(sequences):
            engine.abort(f"answer-{index}")
        log.run(engine)
    assert short_at is not None
    whole = end - start
    print(f"{tokens:,} tokens beside {sequences} answers, bound on the time between tokens {bound} ms")
    print(f"time between tokens without the prefill: median {np.median(usual) * 1e3:.2f} ms, p99 {_p99(usual):.2f} ms")
    print(f"with it: median {np.median(within) * 1e3:.1f} ms, p99 {_p99(within):.1f} ms, of {len(within)}")
    print(f"a short request's first token after {(log.tokens['short'][0] - short_at) * 1e3:.1f} ms")
    print(
        f"the long prefill: {alone_seconds:.2f} s alone, {whole:.2f} s with {steps} decode steps of {own:.2f} s in it: "
        f"{(whole - own) / alone_seconds - 1:+.1%} beside them"
    )
    if idle:
        print(f"the GPU was idle for {np.mean(idle):.1%} of that time, as its driver says, of {len(idle)} samples")
    pages = f"{before - after:,} of {before:,} pages in use"
    print(f"aborted: {pages} are free again after {freed * 1e3:.1f} ms")


def prefix(subject: Subject, documents: list[int], question: int, *, sparse: bool) -> None:
    options = _reusing(documents, question, sparse)
    engine = subject.engine(options)
    print(f"documents and questions of {question} tokens, {'sparse' if sparse else 'dense'}")
    print("document    cold s  cold without cuts s  the cuts cost  second question s  times sooner  tokens reused")
    for tokens in documents:
        document, first, second = subject.prompt(tokens), subject.prompt(question), subject.prompt(question, 1)
        with subject.selection() as prepare:
            warm_up = warming_up(engine, np.concatenate([document[::-1], first]))
            Log().run(_with(engine, Request("warm", warm_up, params(2))))
            engine.reset_prefix_cache()
            prepare(engine, tokens + question)
            cold, _ = _first_token(engine, np.concatenate([document, first]))
            warm, reused = _first_token(engine, np.concatenate([document, second]))
            engine.configure(replace(options, prefix_border_parts=1), subject.budgets)
            prepare(engine, tokens + question)
            whole, _ = _first_token(engine, np.concatenate([document, first]))
            engine.configure(options, subject.budgets)
        print(
            f"{tokens:9,} {cold:9.3f} {whole:20.3f} {cold / whole - 1:14.1%} {warm:18.3f} {cold / warm:13.1f} "
            f"{reused:14,}",
            flush=True,
        )


def asking(subject: Subject, tokens: int, lengths: list[int], times: int, *, sparse: bool) -> None:
    """First tokens behind questions of several lengths on one cached document. It should end where a prompt is cut."""
    engine = subject.engine(_reusing([tokens], times * sum(lengths), sparse))
    document = subject.prompt(tokens)
    print(f"a document of {tokens:,} tokens, {'sparse' if sparse else 'dense'}; medians of {times}")
    print("question   first token ms   tokens reused")
    with subject.selection() as prepare:
        Log().run(_with(engine, Request("warm", warming_up(engine, document[::-1]), params(2))))
        engine.reset_prefix_cache()
        for question in lengths:
            prepare(engine, tokens + question)
            prompts = [np.concatenate([document, subject.prompt(question, one)]) for one in range(times + 2)]
            asked = [_first_token(engine, prompt) for prompt in prompts][2:]
            seconds, reused = float(np.median([one for one, _ in asked])), min(reused for _, reused in asked)
            print(f"{question:8,} {seconds * 1e3:16.2f} {reused:15,}", flush=True)


def questions(subject: Subject, documents: list[int], question: int, many: int, answer: int, *, sparse: bool) -> None:
    """What `eval --score logits` asks of the engine, beside one prefill and as many questions on a cached document; and
    as many answers, all asked for at once as `eval` does without it.
    """
    engine = subject.engine(_reusing(documents, question, sparse))
    print(f"{many} questions of {question} tokens, logits of all but the first, {'sparse' if sparse else 'dense'}")
    print(
        f"document    prefill s  one question s  all s  of the prefill and as many questions  {answer} tokens each, s"
    )
    for tokens in documents:
        document = subject.prompt(tokens)
        prompts = [np.concatenate([document, subject.prompt(question, one)]) for one in range(many)]
        with subject.selection() as prepare:
            warm_up = warming_up(engine, np.concatenate([document[::-1], prompts[0]]))
            _logits_seconds(engine, warm_up, question)
            engine.reset_prefix_cache()
            prepare(engine, tokens + question)
            first, *rest = (_logits_seconds(engine, prompt, question) for prompt in prompts[:8])
            one = float(np.median(rest))
            engine.reset_prefix_cache()
            whole = sum(_logits_seconds(engine, prompt, question) for prompt in prompts)
            engine.reset_prefix_cache()
            start = time.perf_counter()
            engine.generate(prompts, params(answer))
            generated = time.perf_counter() - start
        prefill = first - one
        share = whole / (prefill + many * one)
        print(f"{tokens:9,} {prefill:12.3f} {one:15.4f} {whole:6.2f} {share:8.3f} {generated:51.2f}", flush=True)


def _reusing(documents: list[int], question: int, sparse: bool) -> EngineOptions:
    """With room for a document twice, and what questions add."""
    tokens = 2 * (max(documents) + question) + 65536
    return EngineOptions(cache_tokens=tokens, enable_prefix_caching=True, sparse=sparse)


def _logits_seconds(engine: Engine, prompt: np.ndarray, question: int) -> float:
    """How long the logits behind the prompt's last `question` tokens but one take: of all its tokens but the first."""
    places = range(len(prompt) - question, len(prompt) - 1)
    start = time.perf_counter()
    Log().run(_with(engine, Request("one", prompt, logit_positions=tuple(places))))
    return time.perf_counter() - start


@contextmanager
def _idle_share(on_gpu: bool) -> Iterator[list[float]]:
    """Meanwhile, how often the driver saw no kernel on the GPU: a share for each of its samples, there at the end."""
    shares: list[float] = []
    if not on_gpu:
        yield shares
        return
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-i", "0", "-lms", "100"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as sampler:
        try:
            yield shares
        finally:
            sampler.terminate()
            shares += [1 - int(line) / 100 for line in sampler.communicate()[0].split()]


def _first_token(engine: Engine, prompt: np.ndarray) -> tuple[float, int]:
    log, start = Log(), time.perf_counter()
    log.run(_with(engine, Request("one", prompt, params(2))))
    return log.tokens["one"][0] - start, log.prefilled["one"][0][2]


def _with(engine: Engine, request: Request) -> Engine:
    engine.add(request)
    return engine


def _p99(seconds: np.ndarray) -> float:
    return float(np.percentile(seconds, 99)) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*PUBLISHED], default="7B", help="of random weights (default: %(default)s)")
    parser.add_argument("--checkpoint", metavar="DIR", help="in place of random weights")
    commands = parser.add_subparsers(dest="what", required=True)
    one = commands.add_parser("throughput")
    one.add_argument("--prompt", type=int, default=2048)
    one.add_argument("--new", type=int, default=256)
    one.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    one = commands.add_parser("beside")
    one.add_argument("--tokens", type=int, default=262144 - ANSWER)
    one.add_argument("--sequences", type=int, default=8)
    one = commands.add_parser("prefix")
    one.add_argument("--documents", type=int, nargs="+", default=[229311, 262144], help="their tokens")
    one.add_argument("--question", type=int, default=64, help="its tokens")
    one.add_argument("--dense", action="store_true")
    one = commands.add_parser("asking")
    one.add_argument("--document", type=int, default=499712, help="its tokens (default: %(default)s)")
    one.add_argument("--questions", type=int, nargs="+", default=[1, 8, 64, 512], help="their tokens")
    one.add_argument("--times", type=int, default=5, help="each is asked (default: %(default)s)")
    one.add_argument("--dense", action="store_true")
    one = commands.add_parser("questions")
    one.add_argument("--documents", type=int, nargs="+", default=[131072, 150000], help="their tokens")
    one.add_argument("--question", type=int, default=64, help="its tokens, the answer's with it")
    one.add_argument("--questions", type=int, default=100, help="at least 2 (default: %(default)s)")
    one.add_argument("--answer", type=int, default=32, help="tokens where one is generated (default: %(default)s)")
    one.add_argument("--dense", action="store_true")
    arguments = parser.parse_args()
    logger.set_level("ERROR")
    if arguments.checkpoint is None:
        paddle.device.set_device("gpu")
    subject = Subject(arguments.model, arguments.checkpoint)
    device = paddle.device.cuda.get_device_name() if subject.model.on_gpu else "CPU"
    print(f"{arguments.checkpoint or f'{arguments.model}, random weights, bf16'}, {device}")
    if arguments.what == "throughput":
        throughput(subject, arguments.prompt, arguments.new, arguments.requests)
    elif arguments.what == "beside":
        beside(subject, arguments.tokens, arguments.sequences)
    elif arguments.what == "asking":
        asking(subject, arguments.document, arguments.questions, arguments.times, sparse=not arguments.dense)
    elif arguments.what == "questions":
        sparse = not arguments.dense
        many, answer = arguments.questions, arguments.answer
        questions(subject, arguments.documents, arguments.question, many, answer, sparse=sparse)
    else:
        prefix(subject, arguments.documents, arguments.question, sparse=not arguments.dense)
    return 0


if __name__ == "__main__":
    sys.exit(main())
