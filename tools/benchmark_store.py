"""Speed of a prefix store's files on one disk: written, read cold beside `dd` without the page cache, and read from it.

A prefix of the 7B's shape goes from pages through Transfers into a folder and, verified, back to others. Cold reads
alternate with dd's of the same files, which are dropped from the page cache before each.
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import paddle

from paddle_qwen1m.cache import M2Range, PagedCache, PrefixStore, StoredSegment, Transfer, Transfers
from paddle_qwen1m.cache.store import segment_name, stored_files
from paddle_qwen1m.planning import PUBLISHED

SEGMENT_TOKENS, PAGE_SIZE = 8192, 256
MODEL = PUBLISHED["7B"]
SEGMENT_BYTES = SEGMENT_TOKENS * 2 * 2 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim


def drop_from_page_cache(paths: list[Path]) -> None:
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def transferred(transfers: Transfers, number: int, segments: list[StoredSegment], pages: range, writes: bool) -> float:
    """Seconds that it took."""
    began = time.perf_counter()
    transfers.begin(number, Transfer(segments, pages, 0, "", "{}", time.time(), writes=writes, ready=lambda: None))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the prefix; twice that is taken of memory")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    count = max(1, round(arguments.gigabytes * 1e9 / SEGMENT_BYTES))
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
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        transfers = Transfers(PrefixStore(folder), cache, gpu=False)
        seconds["write"].append(transferred(transfers, 0, segments, range(pages), writes=True))
        paths = [file.path for file in stored_files(Path(folder))]
        for run in range(arguments.runs):
            drop_from_page_cache(paths)
            seconds["dd, direct"].append(direct(paths))
            drop_from_page_cache(paths)
            for number, kind in ((2 * run + 1, "cold"), (2 * run + 2, "page cache")):
                seconds[kind].append(transferred(transfers, number, segments, range(pages, 2 * pages), writes=False))
    size, reference = count * SEGMENT_BYTES, statistics.median(seconds["dd, direct"])
    print(f"{count * SEGMENT_TOKENS:,} tokens, {count} files, {size / 1e9:.2f} GB in {arguments.directory}")
    for kind, values in seconds.items():
        median = statistics.median(values)
        print(
            f"{kind:12} {median:7.3f} s median of {len(values)} ({min(values):.3f} to {max(values):.3f})"
            f"{size / median / 1e9:7.2f} GB/s  {median / reference:5.2f} times as long as dd"
        )


if __name__ == "__main__":
    main()
