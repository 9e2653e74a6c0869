"""Speed of paddle-qwen1m convert on a 2 GB checkpoint, beside `cp` and `sync` of the same files on the same disk.

Runs alternate, the source is dropped from the page cache before each. Prints MB/s, the share of cp's, peak memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from synthetic_checkpoint import write_checkpoint

SHAPES = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 16384,
}  # layers of the 7B, with a small vocabulary: 2.1 GB
CONVERT = [sys.executable, "-W", "ignore", "-m", "paddle_qwen1m.cli", "convert"]
FORMATS = {
    "huggingface": ("huggingface",),
    "tensor-parallel": ("tensor-parallel", "--tensor-parallel-size", "4"),
    "paddlenlp": ("paddlenlp",),
}


def drop_from_page_cache(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str], source: Path, destination: Path) -> tuple[float, int]:
    """Seconds until the command has ended and the disk has everything, and the command's peak resident bytes."""
    shutil.rmtree(destination, ignore_errors=True)
    os.sync()
    drop_from_page_cache(source)
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        source, destination = Path(name) / "source", Path(name) / "destination"
        write_checkpoint(source, shards=8, **SHAPES)
        os.sync()
        size = sum(path.stat().st_size for path in source.iterdir())
        print(f"{size / 1e9:.2f} GB in {name}", flush=True)
        commands = {"cp": ["cp", "-r", "--reflink=never", str(source), str(destination)]}
        for form in arguments.formats:
            commands[form] = [*CONVERT, str(source), str(destination), "--format", *FORMATS[form]]
        seconds: dict[str, list[float]] = {form: [] for form in commands}
        peaks = dict.fromkeys(commands, 0)
        for _ in range(arguments.runs):
            for form, command in commands.items():
                taken, peak = timed(command, source, destination)
                seconds[form].append(taken)
                peaks[form] = max(peaks[form], peak)
    reference = statistics.median(seconds["cp"])
    for form, values in seconds.items():
        median = statistics.median(values)
        print(
            f"{form:16} {median:6.2f} s median of {len(values)} ({min(values):.2f} to {max(values):.2f})"
            f"{size / median / 1e6:7.0f} MB/s  {100 * reference / median:4.0f} % of cp"
            f"  peak {peaks[form] / 1e6:4.0f} MB"
        )


if __name__ == "__main__":
    main()
