"""Prefixes that outlive the process: the speed of a store's files on one disk, and what it makes of a document's time.

    python tools/benchmark_store.py [--gigabytes 1] [--runs 5]
    python tools/benchmark_store.py --checkpoint DIR [--tokens 131072 500000]

Without a checkpoint, a prefix of the 7B's shape goes from pages through Transfers into a folder and, verified, back to
others; cold reads alternate with dd's of the same files, which are dropped from the page cache before each. With one,
on whatever device, documents of so many random tokens are asked by one process, cold and once more, then by another
that finds them in the store, from the page cache and from the disk; beside it stands what dd takes for the same files.
A DIR of a published shape: tools/random_checkpoint.py.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from paddle_qwen1m import LLM, SamplingParams
from paddle_qwen1m.cache import M2Range, PagedCache, PrefixStore, SegmentPages, StoredSegment, Transfers
from paddle_qwen1m.cache.store import segment_name, stored_files
from paddle_qwen1m.planning import PUBLISHED

SEGMENT_TOKENS, PAGE_SIZE = 8192, 256
MODEL = PUBLISHED["7B"]
SEGMENT_BYTES = SEGMENT_TOKENS * 2 * 2 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim
QUESTION_TOKENS = 64


def drop_from_page_cache(paths: list[Path]) -> None:
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def transferred(transfers: Transfers, number: int, segments: list[StoredSegment], pages: range, writes: bool) -> float:
    """Seconds that it took."""
    began = time.perf_counter()
    what = SegmentPages(tuple(segments), tuple(pages), 0, "", "{}", time.time())
    transfers.begin(number, what, writes=writes, ready=lambda: None)
    transfers.finish()
    seconds = time.perf_counter() - began
    if transfers.state(number) != len(segments):
        raise SystemExit("not all segments are whole: see the log above")
    return seconds


def direct(paths: list[Path]) -> float:
    """Seconds that dd takes to read them past the page cache."""
    began = time.perf_counter()
    for path in paths:
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=4M", "iflag=direct", "status=none"], check=True)
    return time.perf_counter() - began


def measure_files(directory: Path, gigabytes: float, runs: int) -> None:
    """Prints the seconds of a prefix of the 7B's shape through files in the directory."""
    count = max(1, round(gigabytes * 1e9 / SEGMENT_BYTES))
    pages = count * SEGMENT_TOKENS // PAGE_SIZE
    cache = PagedCache(MODEL, 2 * pages, PAGE_SIZE, "bfloat16")
    for layer in cache.layers:
        for tensor in layer[:2]:  # a disk that compresses is not to win by it
            tensor.copy_(paddle.uniform(tensor.shape, "float32").astype(tensor.dtype), False)
    segments = []
    for number in range(count):
        name = segment_name(secrets.token_hex(16), secrets.token_hex(16), M2Range(1.0, 1.0))
        segments.append(StoredSegment(name, number * SEGMENT_TOKENS, (number + 1) * SEGMENT_TOKENS))
    seconds: dict[str, list[float]] = {"write": [], "dd, direct": [], "cold": [], "page cache": []}
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        transfers = Transfers(PrefixStore(folder), cache, gpu=False)
        seconds["write"].append(transferred(transfers, 0, segments, range(pages), writes=True))
        paths = [file.path for file in stored_files(Path(folder))]
        for run in range(runs):
            drop_from_page_cache(paths)
            seconds["dd, direct"].append(direct(paths))
            drop_from_page_cache(paths)
            for number, kind in ((2 * run + 1, "cold"), (2 * run + 2, "page cache")):
                seconds[kind].append(transferred(transfers, number, segments, range(pages, 2 * pages), writes=False))
    size, reference = count * SEGMENT_BYTES, statistics.median(seconds["dd, direct"])
    print(f"{count * SEGMENT_TOKENS:,} tokens, {count} files, {size / 1e9:.2f} GB in {directory}")
    for kind, values in seconds.items():
        median = statistics.median(values)
        print(
            f"{kind:12} {median:7.3f} s median of {len(values)} ({min(values):.3f} to {max(values):.3f})"
            f"{size / median / 1e9:7.2f} GB/s  {median / reference:5.2f} times as long as dd"
        )


def first_tokens(checkpoint: str, folder: str, tokens: int, times: int) -> dict[str, Any]:
    """What a process of its own says of one document of so many tokens and `times` questions, one after the other."""
    asked = {"checkpoint": checkpoint, "folder": folder, "tokens": tokens, "times": times}
    command = [sys.executable, "-W", "ignore", __file__, "--asked", json.dumps(asked)]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(json.loads(said.splitlines()[-1]))


def ask_here(checkpoint: str, folder: str, tokens: int, times: int) -> dict[str, Any]:
    """Seconds to the first token of each question, and of what the store wrote and read."""
    length = tokens + QUESTION_TOKENS
    with LLM(checkpoint, prefix_store=folder, max_model_len=length + 64, seed=0) as llm:
        vocabulary = len(llm.get_tokenizer())
        document = np.random.default_rng(tokens).integers(0, vocabulary, tokens).tolist()
        random = np.random.default_rng()
        greedy = SamplingParams(temperature=0.0, max_tokens=1)
        llm.generate([random.integers(0, vocabulary, 2048).tolist()], greedy, use_tqdm=False)  # what is made once
        seconds = []
        for _ in range(times):
            prompt = document + random.integers(0, vocabulary, QUESTION_TOKENS).tolist()
            began = time.perf_counter()
            llm.generate([prompt], greedy, use_tqdm=False)
            seconds.append(time.perf_counter() - began)
        closing = time.perf_counter()
        metrics = llm.get_metrics()
    return {
        "seconds": seconds,
        "writes_ended_after": time.perf_counter() - closing,
        "stored_tokens": metrics.store_tokens,
        "read_seconds": metrics.store_read_seconds,
    }


def measure_documents(checkpoint: str, directory: Path, lengths: list[int]) -> None:
    """Prints for each length what a document costs cold, warm and from the store."""
    for tokens in lengths:
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            cold, warm = (first := first_tokens(checkpoint, folder, tokens, 2))["seconds"]
            paths = [file.path for file in stored_files(Path(folder))]
            size = sum(path.stat().st_size for path in paths)
            cached = first_tokens(checkpoint, folder, tokens, 1)
            drop_from_page_cache(paths)
            disk = direct(paths)
            drop_from_page_cache(paths)
            stored = first_tokens(checkpoint, folder, tokens, 1)
            print(f"{tokens:,} tokens: {len(paths)} files, {size / 1e9:.2f} GB in {directory}")
            print(f"  cold        {cold:8.3f} s; written {first['writes_ended_after']:.2f} s after the second answer")
            print(f"  warm        {warm:8.3f} s, {cold / warm:.0f} times sooner")
            for kind, said in (("page cache", cached), ("from disk", stored)):
                taken = said["seconds"][0]
                print(
                    f"  {kind:11} {taken:8.3f} s, {cold / taken:.1f} times sooner; {said['stored_tokens']:,} tokens "
                    f"from the store in {said['read_seconds']:.3f} s, {size / taken / 1e9:.2f} GB/s in all"
                )
            print(f"  dd, direct  {disk:8.3f} s, {size / disk / 1e9:.2f} GB/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the prefix; twice that is taken of memory")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--checkpoint", metavar="DIR", help="asks documents of this model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[131_072, 500_000], help="of the documents")
    parser.add_argument("--asked", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.asked:
        print(json.dumps(ask_here(**json.loads(arguments.asked))))
    elif arguments.checkpoint:
        measure_documents(arguments.checkpoint, arguments.directory, arguments.tokens)
    else:
        measure_files(arguments.directory, arguments.gigabytes, arguments.runs)


if __name__ == "__main__":
    main()
