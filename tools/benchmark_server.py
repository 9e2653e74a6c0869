"""The server beside the engine's own loop: the same requests at the same concurrency, one after the other.

    python tools/benchmark_server.py                                   the needle checkpoint, on whatever device
    python tools/benchmark_server.py --checkpoint DIR [--input 2048] [--output 64] [--concurrency 1 8 32] [--out FILE]
    python tools/benchmark_server.py --checkpoint DIR -- --tensor-parallel-size 2     flags for the server
    python tools/benchmark_server.py --checkpoint DIR --long 131072 [--others 8]     a long prompt, others meanwhile

Prints for each concurrency what `vllm bench serve` prints, under its names, in JSON, for the loop ("engine") and the
server ("server"), and how much longer the server took. Requests are streamed completions of token ids; as many as the
concurrency are under way until all are done; a round of as many goes before, for what is made once. Prompts are random,
so that none finds another's keys. With --long the least free memory of each GPU is printed, too; of several ranks the
last one is killed at the end while requests run: what their clients get is printed, and how the server ends. Needs
nothing but what the server needs. A DIR of a published shape, with random weights: tools/random_checkpoint.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from benchmark_llm import worker_of_rank
from demo_server import serving

NEEDLE = Path(__file__).resolve().parent.parent / "checkpoints" / "needle"
DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "errors")


@dataclass
class Told:
    """What came of a request: seconds from `start` on the clock perf_counter."""

    start: float
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class Load:
    """Requests to come."""

    prompts: Sequence[Sequence[int]]
    output: int
    concurrency: int


def summary(load: Load, told: Sequence[Told], seconds: float) -> dict[str, Any]:
    """What vllm's benchmark says of these requests."""
    done = [one for one in told if not one.error]
    ttfts = [one.times[0] - one.start for one in done]
    itls = [[after - before for before, after in zip(one.times, one.times[1:])] for one in done]
    tpots = [(one.times[-1] - one.times[0]) / (one.tokens - 1) for one in done if one.tokens > 1]
    e2els = [one.times[-1] - one.start for one in done]
    inputs, outputs = sum(map(len, load.prompts)), sum(one.tokens for one in done)
    result: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(told) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / seconds,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "max_concurrency": load.concurrency,
    }
    for name, values in (("ttft", ttfts), ("tpot", tpots), ("itl", [gap for one in itls for gap in one]),
                         ("e2el", e2els)):  # fmt: skip
        milliseconds = 1000 * np.asarray(values or [0.0])
        for what, value in (("mean", milliseconds.mean()), ("median", np.median(milliseconds)),
                            ("std", milliseconds.std()), ("p99", np.percentile(milliseconds, 99))):  # fmt: skip
            result[f"{what}_{name}_ms"] = float(value)
    details = [list(map(len, load.prompts)), [one.tokens for one in told], ttfts, itls, [one.error for one in told]]
    return {**result, **dict(zip(DETAILS, details))}


# --- the engine's own loop ---


def run_engine(checkpoint: str, options: dict[str, Any], loads: Sequence[Load]) -> list[dict[str, Any]]:
    from paddle_qwen1m.engine import Request, SamplingParams
    from paddle_qwen1m.llm import start_serving

    engine = start_serving(checkpoint, options)
    results = []
    for number, load in enumerate(loads):
        params = SamplingParams(temperature=0.0, max_tokens=load.output, ignore_eos=True)
        told: dict[str, Told] = {}
        left = [(f"{number}-{place}", prompt) for place, prompt in reversed(list(enumerate(load.prompts)))]
        start = time.perf_counter()
        running = 0
        while left or running:
            while left and running < load.concurrency:
                name, prompt = left.pop()
                told[name] = Told(time.perf_counter())
                engine.add(Request(name, np.asarray(prompt, np.int64), params))
                running += 1
            for event in engine.step():
                kind = type(event).__name__
                if kind == "TokenChosen":
                    told[event.id].times.append(time.perf_counter())
                    told[event.id].tokens += 1
                elif kind == "Finished":
                    running -= 1
        results.append(summary(load, list(told.values()), time.perf_counter() - start))
    engine.close()
    return results


# --- the server ---


async def ask(url: str, prompt: Sequence[int], output: int) -> Told:
    """A streamed completion over a connection of its own."""
    body = json.dumps(
        {"prompt": list(prompt), "max_tokens": output, "temperature": 0, "ignore_eos": True, "stream": True,
         "stream_options": {"include_usage": True}}
    ).encode()  # fmt: skip
    place, told = urlsplit(url), Told(time.perf_counter())
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 24)
    try:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = (await reader.readline()).split()[1]
        if status != b"200":
            told.error = (await reader.read()).decode(errors="replace")
            return told
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                told.error = event["error"]["message"]
            elif event["choices"]:
                told.times.append(time.perf_counter())
            elif event.get("usage"):
                told.tokens = event["usage"]["completion_tokens"]
    finally:
        writer.close()
    if not told.tokens:
        told.error = told.error or "the stream ended early"
    return told


async def run_server(url: str, load: Load) -> dict[str, Any]:
    room, start = asyncio.Semaphore(load.concurrency), time.perf_counter()

    async def one(prompt: Sequence[int]) -> Told:
        async with room:
            return await ask(url, prompt, load.output)

    told = await asyncio.gather(*map(one, load.prompts))
    return summary(load, told, time.perf_counter() - start)


# --- a long prompt ---


@contextmanager
def watched_memory() -> Iterator[dict[int, int]]:
    """The least free memory of each GPU from now to the end, in MiB, as nvidia-smi tells it; nothing without one."""
    least: dict[int, int] = {}
    query = ["nvidia-smi", "--query-gpu=index,memory.free", "--format=csv,noheader,nounits", "--loop-ms=100"]
    if shutil.which(query[0]) is None:
        yield least
        return
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as process:

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                number, free = map(int, line.split(","))
                least[number] = min(free, least.get(number, free))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield least
        finally:
            process.terminate()
            reader.join()


async def _lines(url: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
    """The lines of a streamed completion that are not empty; when it is closed, so is the connection."""
    raw, place = json.dumps({"temperature": 0, "ignore_eos": True, "stream": True, **body}).encode(), urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 24)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    try:
        writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        status = await reader.readline()
        if status.split()[1] != b"200":
            raise SystemExit((await reader.read()).decode())
        while line := await reader.readline():
            if line.startswith((b":", b"data: ")):
                yield line
    finally:
        writer.close()


async def _gauge(url: str, name: str) -> float:
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 24)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return float(next(line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(f"vllm:{name}{{")))


async def run_long(url: str, tokens: int, output: int, others: int, vocabulary: int) -> dict[str, Any]:
    """A prompt of so many tokens with its progress, `others` short requests at once meanwhile; then one that its client
    leaves.
    """
    random = np.random.default_rng(1)
    short: list[float] = []
    done = asyncio.Event()

    async def ask_on() -> None:
        while not done.is_set():
            told = await ask(url, random.integers(0, vocabulary, 64).tolist(), 16)
            if told.error:
                raise SystemExit(told.error)
            short.append(told.times[-1] - told.start)
            await asyncio.sleep(0.5)

    beside = asyncio.gather(*(ask_on() for _ in range(others)))
    start = time.perf_counter()
    moments, progress, firsts = [], [], []
    prompt = random.integers(0, vocabulary, tokens).tolist()
    async for line in _lines(url, {"prompt": prompt, "max_tokens": output, "return_progress": True}):
        moments.append(time.perf_counter() - start)
        if b"prompt_progress" in line:
            progress.append(json.loads(line[6:])["prompt_progress"]["processed"])
        elif line.startswith(b"data: {"):
            firsts.append(moments[-1])
    done.set()
    await beside
    prompt = random.integers(0, vocabulary, tokens).tolist()
    left = _lines(url, {"prompt": prompt, "max_tokens": output, "return_progress": True})
    async for line in left:
        if b"prompt_progress" in line and json.loads(line[6:])["prompt_progress"]["processed"]:
            break
    await left.aclose()
    gone = time.perf_counter()
    while await _gauge(url, "num_requests_running") or await _gauge(url, "kv_cache_usage_perc"):
        await asyncio.sleep(0.01)
    return {
        "input_tokens": tokens,
        "first_byte_s": moments[0],
        "longest_silence_s": max(after - before for before, after in zip(moments, moments[1:])),
        "different_progress": len(set(progress)),
        "ttft_s": firsts[0],
        "e2el_s": moments[-1],
        "others_at_once": others,
        "others_meanwhile": len(short),
        "others_median_s": float(np.median(short)),
        "others_longest_s": max(short),
        "freed_after_s": time.perf_counter() - gone,
    }


async def run_killed(url: str, rank: int, tokens: int, vocabulary: int) -> dict[str, Any]:
    """What the clients of a long and a short request get when a rank is killed while theirs run."""
    random = np.random.default_rng(2)
    long, short = (random.integers(0, vocabulary, length).tolist() for length in (tokens, 64))
    running = [asyncio.ensure_future(ask(url, long, 16)), asyncio.ensure_future(ask(url, short, 4096))]
    await asyncio.sleep(1.0)
    os.kill(worker_of_rank(rank), signal.SIGKILL)
    killed = time.perf_counter()
    errors = [(await one).error for one in running]
    return {"killed_rank": rank, "told_after_s": time.perf_counter() - killed, "errors": errors}


# --- both ---


def loads_of(arguments: argparse.Namespace) -> list[Load]:
    """For each concurrency a round that nobody looks at, then the measured ones."""
    random, loads = np.random.default_rng(0), []
    for concurrency in arguments.concurrency:
        for number in (concurrency, max(arguments.least, arguments.rounds * concurrency)):
            prompts = random.integers(0, arguments.vocabulary, (number, arguments.input)).tolist()
            loads.append(Load(prompts, arguments.output, concurrency))
    return loads


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(NEEDLE), metavar="DIR")
    parser.add_argument("--input", type=int, default=2048, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument("--rounds", type=int, default=3, help="requests, as times the concurrency (%(default)s)")
    parser.add_argument("--least", type=int, default=8, help="requests at least (%(default)s)")
    parser.add_argument("--out", type=Path, help="where the whole of it goes, each request's times included")
    parser.add_argument(
        "--long", type=int, metavar="TOKENS", help="a prompt of so many tokens instead, others meanwhile"
    )
    parser.add_argument("--others", type=int, default=1, help="meanwhile, at once (default: %(default)s)")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    own, flags = _parted(sys.argv[1:])
    arguments = parser.parse_args(own)
    config = json.loads((Path(arguments.checkpoint) / "config.json").read_text(encoding="utf-8"))
    arguments.vocabulary = config["vocab_size"]
    length = (arguments.long or arguments.input) + arguments.output
    flags = ["--max-model-len", str(max(32768, length)), "--max-num-seqs", str(max(arguments.concurrency)), *flags]
    if arguments.long:
        ranks = _options(flags).get("tensor_parallel_size", 1)
        try:
            with serving(arguments.checkpoint, *flags) as url:
                with watched_memory() as free:
                    told = asyncio.run(
                        run_long(url, arguments.long, arguments.output, arguments.others, arguments.vocabulary)
                    )
                print(json.dumps({**told, "least_free_mib": free}, indent=2), flush=True)
                if ranks > 1:
                    told = asyncio.run(run_killed(url, ranks - 1, arguments.long, arguments.vocabulary))
                    print(json.dumps(told, indent=2), flush=True)
        except RuntimeError as error:
            if ranks == 1:
                raise
            print(error)
        return 0
    loads = loads_of(arguments)
    if arguments.bare:
        print(json.dumps(run_engine(arguments.checkpoint, _options(flags), loads)))
        return 0
    bare = [sys.executable, "-W", "ignore", __file__, *own, "--bare", "--", *flags[4:]]
    said = subprocess.run(bare, stdout=subprocess.PIPE, text=True, check=True).stdout
    engine = json.loads(said.splitlines()[-1])
    with serving(arguments.checkpoint, *flags) as url:
        server = [asyncio.run(run_server(url, load)) for load in loads]
    results = []
    for one, other in zip(engine[1::2], server[1::2]):
        longer = other["duration"] / one["duration"] - 1
        results.append({"engine": one, "server": other, "server_adds": longer})
        shown = {name: {key: value for key, value in part.items() if key not in DETAILS}
                 for name, part in (("engine", one), ("server", other))}  # fmt: skip
        print(json.dumps({**shown, "server_adds": round(longer, 4)}, indent=2), flush=True)
        if other["failed"]:
            print(f"failed: {[error for error in other['errors'] if error][:3]}", file=sys.stderr)
    for one in results:
        engine_part, server_part = one["engine"], one["server"]
        print(
            f"concurrency {engine_part['max_concurrency']:3}: {engine_part['output_throughput']:8.1f} tokens/s by the "
            f"engine's loop, {server_part['output_throughput']:8.1f} by the server, which adds "
            f"{100 * one['server_adds']:.1f} %; first token {engine_part['median_ttft_ms']:.0f} and "
            f"{server_part['median_ttft_ms']:.0f} ms"
        )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results), encoding="utf-8")
    return int(any(one["server"]["failed"] for one in results))


def _parted(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The benchmark's own arguments, and those behind --."""
    place = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:place]), list(argv[place + 1 :])


def _options(flags: Sequence[str]) -> dict[str, Any]:
    """LLM's options of the server's flags."""
    from paddle_qwen1m.options import read_llm_options
    from paddle_qwen1m.server.flags import add_flags, model_options, spelled

    parser = argparse.ArgumentParser()
    add_flags(parser)
    return read_llm_options(model_options(parser.parse_args(["MODEL", *spelled(flags)])))


if __name__ == "__main__":
    sys.exit(main())
