"""Loading weights: seconds and GB/s of some ranks at once, from the page cache and from the disk, beside dd.

    python tools/benchmark_loading.py DIR [--ranks 1 2 4] [--runs 3]

Each rank is a process that fills its part of the model, on its GPU where Paddle has any; they begin together when all
have their parameters. Files are dropped from the page cache before each cold run. DIR of a published shape:
tools/random_checkpoint.py, or a rank form of it for the ranks it was made for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import paddle
from resident_memory import peak_bytes, reset_peak, resident_bytes

from paddle_qwen1m import ops
from paddle_qwen1m.config import SPARSE_CONFIG, ModelConfig, default_budgets
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.parallel.group import Group
from paddle_qwen1m.parallel.placement import Placement
from paddle_qwen1m.weights import load_checkpoint
from paddle_qwen1m.weights.sharding import rank_directory, rank_sets, recorded_placement
from paddle_qwen1m.weights.tensors import HEAD


def drop_from_page_cache(paths: list[Path]) -> None:
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of_dd(paths: list[Path], *flags: str) -> float:
    """What dd takes to read them one after the other."""
    began = time.perf_counter()
    for path in paths:
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=4M", "status=none", *flags], check=True)
    return time.perf_counter() - began


def load_here(directory: Path, rank: int, degree: int) -> None:
    """Life of a rank: says that it is ready, loads at every line that comes, and says what that took."""
    if ops.on_gpu():
        paddle.device.set_device(f"gpu:{rank}")
    described = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config, group = ModelConfig.from_dict(described, "config.json"), Group()
    group.rank, group.degree = rank, degree
    beside = directory / SPARSE_CONFIG
    budgets, _ = default_budgets(config, beside if beside.is_file() else None)
    placement = recorded_placement(described, config) or Placement.balanced(config, degree, budgets)
    model = Qwen2OneM(config, config.dtype, group, placement)
    slots = model.slots()
    if rank_sets(described) is not None:
        directory = directory / rank_directory(rank, degree)
        slots = {name: slot.without_slicing() for name, slot in slots.items()}
    for slot in slots.values():
        slot.tensor.zero_()  # on a CPU memory is there once it is written
    print("{}", flush=True)
    for _ in sys.stdin:
        before = resident_bytes()
        reset_peak()
        began = time.perf_counter()
        nbytes = load_checkpoint(directory, slots, ignore={HEAD} - slots.keys())
        if ops.on_gpu():
            paddle.device.synchronize()
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "bytes": nbytes, "memory": peak_bytes() - before}), flush=True)


class Ranks:
    """Processes that load when they are told to."""

    def __init__(self, directory: Path, degree: int) -> None:
        command = [sys.executable, "-W", "ignore", __file__, str(directory), "--ranks", str(degree), "--rank"]
        self._processes = [
            subprocess.Popen([*command, str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for rank in range(degree)
        ]
        self._answers()

    def load(self) -> list[dict[str, Any]]:
        """What each rank says of having loaded once."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("load\n")
            process.stdin.flush()
        return self._answers()

    def close(self) -> None:
        for process in self._processes:
            process.communicate()

    def _answers(self) -> list[dict[str, Any]]:
        lines = [process.stdout.readline() for process in self._processes if process.stdout is not None]
        if not all(lines):
            raise SystemExit("a rank ended: see above")
        return [json.loads(line) for line in lines]


def report(kind: str, said: list[dict[str, Any]], dd: float, size: int) -> None:
    seconds = max(rank["seconds"] for rank in said)
    rate = max(rank["bytes"] for rank in said) / seconds / 1e9
    memory = max(rank["memory"] for rank in said)
    print(
        f"{len(said)} ranks {kind:10} {seconds:7.3f} s {rate:6.2f} GB/s a rank, "
        f"{sum(rank['bytes'] for rank in said) / 1e9:6.2f} GB in all at {size / seconds / 1e9:6.2f} GB/s of files, "
        f"{dd / seconds:5.2f} of dd's speed; memory beyond the weights {memory >> 20} MiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--runs", type=int, default=3, help="of which the fastest counts, warm; cold there is one")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        load_here(arguments.directory, arguments.rank, arguments.ranks[0])
        return
    paths = sorted(arguments.directory.rglob("*.safetensors"))
    size = sum(path.stat().st_size for path in paths)
    drop_from_page_cache(paths)
    direct = seconds_of_dd(paths, "iflag=direct")
    drop_from_page_cache(paths)
    cold, warm = seconds_of_dd(paths), seconds_of_dd(paths)
    print(f"{size / 1e9:.2f} GB in {len(paths)} files in {arguments.directory}")
    for kind, seconds in (("direct", direct), ("cold", cold), ("page cache", warm)):
        print(f"dd, {kind:12} {seconds:7.3f} s {size / seconds / 1e9:6.2f} GB/s", flush=True)
    for degree in arguments.ranks:
        ranks = Ranks(arguments.directory, degree)
        drop_from_page_cache(paths)
        report("cold", ranks.load(), min(direct, cold), size)
        runs = [ranks.load() for _ in range(arguments.runs)]
        report("page cache", min(runs, key=lambda said: max(rank["seconds"] for rank in said)), warm, size)
        ranks.close()


if __name__ == "__main__":
    main()
