"""Everything that one GPU must show, in one command: the tests, several at a time, then what is timed, one by one.

    python tools/cuda_library.py && python tools/verify_gpu.py [NAME ...] [--without NAME ...] [--seconds 3600]
        [--out DIR] [--jobs 8]
    python tools/verify_gpu.py --list

NAME is a file of tests/gpu without `test_`, `tests` for all of them, `sanitize`, or `time-...`, a benchmark. What does
not come to its end within --seconds is ended and said; DIR has a log of each. Exit status 0 where nothing failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTHING_RAN = 5
"""pytest's exit status where every test is skipped."""
TESTS = sorted(path.stem.removeprefix("test_") for path in (ROOT / "tests/gpu").glob("test_*.py"))
TIMED = {
    "sanitize": ("sanitize_gpu.py",),
    "time-attention": ("benchmark_gpu_attention.py",),
    "time-step": ("benchmark_gpu_step.py",),
    "time-int8": ("benchmark_gpu_int8.py",),
    "time-fp8": ("benchmark_gpu_fp8.py",),
    "time-decode-7B": ("benchmark_gpu_model.py", "decode", "--model", "7B"),
    "time-decode-14B": ("benchmark_gpu_model.py", "decode", "--model", "14B"),
    "time-prefill-7B": ("benchmark_gpu_model.py", "prefill", "--model", "7B", "--tokens", "1009936"),
}


@dataclass(frozen=True)
class Outcome:
    """What became of one: "passed", "failed", "skipped", "over time" or "no time left"."""

    name: str
    state: str
    seconds: float
    last: str = ""

    def __str__(self) -> str:
        return f"{self.name:20} {self.state:12} {self.seconds:6.1f} s  {self.last}"


def command(name: str) -> list[str]:
    if name in TIMED:
        script, *more = TIMED[name]
        return [sys.executable, str(ROOT / "tools" / script), *more]
    options = ["-o", "addopts=", "-q", "-rs", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *options, str(ROOT / "tests/gpu" / f"test_{name}.py")]


def run(name: str, out: Path, end: float) -> Outcome:
    """Runs one in a session of its own, which is ended with all that it has started when its time is over."""
    started = time.monotonic()
    if started >= end:
        return Outcome(name, "no time left", 0.0)
    paths = [str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    log = out / f"{name}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command(name), cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(end - started)
            state = {0: "passed", NOTHING_RAN: "skipped"}.get(status, "failed")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            state = "over time"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return Outcome(name, state, time.monotonic() - started, last[:120])


def run_all(names: list[str], out: Path, end: float, jobs: int) -> Iterator[Outcome]:
    """Tests together, then what is timed, each alone; in the order of their names."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda name: run(name, out, end), [name for name in names if name in TESTS])
    yield from (run(name, out, end) for name in names if name in TIMED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["tests", *TESTS, *TIMED]
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of all of it (default: %(default)g)")
    parser.add_argument("--out", type=Path, help="where logs go (default: a folder under /tmp)")
    parser.add_argument("--jobs", type=int, default=min(8, max(1, (os.cpu_count() or 1) // 2)), help="of the tests")
    parser.add_argument("--list", action="store_true", help="print the names and do no more")
    arguments = parser.parse_args()
    unknown = {*arguments.names, *arguments.without} - set(known)
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    if arguments.list:
        print("\n".join(known))
        return 0
    given = arguments.names or known
    wanted = [name for name in (*TESTS, *TIMED) if name in given or ("tests" in given and name in TESTS)]
    out = arguments.out or Path(tempfile.mkdtemp(prefix="verify_gpu-"))
    out.mkdir(parents=True, exist_ok=True)
    failed = False
    end = time.monotonic() + arguments.seconds
    for outcome in run_all([name for name in wanted if name not in arguments.without], out, end, arguments.jobs):
        print(outcome, flush=True)
        failed |= outcome.state not in ("passed", "skipped")
    print(f"logs: {out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
