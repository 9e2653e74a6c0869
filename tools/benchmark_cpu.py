"""Speed on a CPU beside Hugging Face transformers: one run, both in float32 and on the same number of threads.

    python tools/benchmark_cpu.py

Prefill and decode of the needle checkpoint, both sides in turn, the median of the rounds; then our sparse prefill
beside our dense one. Hugging Face's side (torch, sdpa, logits of the last position only, plain RoPE: it knows no dual
chunk attention) runs in an environment of its own in .venv-hf/, made on the first run, since its tokenizers version
conflicts with PaddleNLP's. Exits with 1 when a bound does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoints" / "needle"
WORKER = Path(__file__).with_name("benchmark_hf_worker.py")
HF_ENVIRONMENT = ROOT / ".venv-hf"
HF_PACKAGES = ("torch==2.13.0", "transformers==4.57.6")
PREFILL_BOUNDS = {4096: 1.25, 16384: 1.0}
"""Tokens, and how many times Hugging Face's time ours may be."""
SPARSE_TOKENS, SPARSE_BOUND = 65536, 1 / 3
DECODE_TOKENS = 32


class Row(NamedTuple):
    """One line of the table: medians, their ratio, and the bound on it when there is one."""

    what: str
    ours: str
    other: str
    ratio: float
    bound: float | None = None

    @property
    def verdict(self) -> str:
        if self.bound is None:
            return ""
        return f"{'PASS' if self.ratio <= self.bound else 'FAIL'} (at most {self.bound:.2f})"


class HuggingFace:
    """The worker process."""

    def __init__(self, python: Path, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [str(python), str(WORKER), str(CHECKPOINT), "--threads", str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions = str(self._read()["versions"])

    def seconds(self, **request: Any) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return float(self._read()["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the Hugging Face worker ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Ours:
    """The same checkpoint through this project's engine."""

    def __init__(self, threads: int) -> None:
        import paddle
        import paddlenlp
        from needle_documents import DocumentMaker, prompt
        from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer
        from paddlenlp.utils.log import logger

        from paddle_qwen1m import ops

        logger.set_level("ERROR")
        ops.set_num_threads(threads)
        self.versions = f"paddlepaddle {paddle.version.full_version}, paddlenlp {paddlenlp.__version__}"
        self._tokenizer = AutoTokenizer.from_pretrained(str(CHECKPOINT))
        self._maker, self._prompt = DocumentMaker(self._encode), prompt
        self._dense = AutoModelForCausalLM.from_pretrained(str(CHECKPOINT), dtype="float32", sparse=False).engine
        self._sparse = AutoModelForCausalLM.from_pretrained(str(CHECKPOINT), dtype="float32").engine

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def ids(self, tokens: int) -> list[int]:
        """A prompt of about `tokens` tokens, cut to their number."""
        document = self._maker.make(tokens + 64, needles=4, seed=0)
        return self._encode(self._prompt(document, document.needles[0]))[:tokens]

    def prefill(self, ids: list[int], sparse: bool = False) -> float:
        """Seconds for the logits of the last position."""
        import numpy as np

        start = time.monotonic()
        (self._sparse if sparse else self._dense).logits(np.asarray(ids, np.int64))
        return time.monotonic() - start

    def decode(self, ids: list[int], tokens: int) -> float:
        """Seconds for `tokens` greedy steps after the prompt."""
        import numpy as np

        from paddle_qwen1m.engine import SamplingParams

        times: list[float] = []
        self._dense.generate(
            [np.asarray(ids, np.int64)],
            SamplingParams(max_tokens=tokens + 1, temperature=0.0),
            on_token=lambda index, token: times.append(time.monotonic()),
        )
        return times[-1] - times[0]


def hf_python(given: Path | None) -> Path:
    """The interpreter of Hugging Face's environment, made when it is not there."""
    if given is not None:
        return given
    python = HF_ENVIRONMENT / "bin" / "python"
    ready = HF_ENVIRONMENT / "ready"
    if not ready.exists():
        print(f"Making {HF_ENVIRONMENT.name}/ with {', '.join(HF_PACKAGES)} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(HF_ENVIRONMENT)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *HF_PACKAGES], check=True)
        ready.touch()
    return python


def beside_hugging_face(ours: Ours, other: HuggingFace, rounds: int) -> list[Row]:
    """Prefill and decode at each length, in turn."""
    rows = []
    for tokens, bound in PREFILL_BOUNDS.items():
        ids = ours.ids(tokens)
        times: dict[str, list[float]] = {"ours": [], "other": [], "our decode": [], "other decode": []}
        for _ in range(rounds):
            times["ours"].append(ours.prefill(ids))
            times["other"].append(other.seconds(op="prefill", ids=ids))
            times["our decode"].append(ours.decode(ids, DECODE_TOKENS))
            times["other decode"].append(other.seconds(op="decode", ids=ids, tokens=DECODE_TOKENS))
        mine, theirs, my_decode, their_decode = (median(values) for values in times.values())
        rows.append(Row(f"prefill {tokens:,}, dense", f"{mine:.2f} s", f"{theirs:.2f} s", mine / theirs, bound))
        rows.append(
            Row(
                f"decode after {tokens:,}",
                f"{DECODE_TOKENS / my_decode:.0f} tokens/s",
                f"{DECODE_TOKENS / their_decode:.0f} tokens/s",
                my_decode / their_decode,
            )
        )
    return rows


def sparse_beside_dense(ours: Ours, rounds: int) -> Row:
    ids = ours.ids(SPARSE_TOKENS)
    sparse, dense = [], []
    for _ in range(rounds):
        sparse.append(ours.prefill(ids, sparse=True))
        dense.append(ours.prefill(ids))
    mine, theirs = median(sparse), median(dense)
    return Row(
        f"prefill {SPARSE_TOKENS:,}, sparse beside our dense",
        f"{mine:.2f} s",
        f"{theirs:.2f} s",
        mine / theirs,
        SPARSE_BOUND,
    )


def print_rows(rows: list[Row]) -> None:
    print(f"{'':42}{'ours':>14}{'beside':>14}{'time ratio':>12}")
    for row in rows:
        print(f"{row.what:42}{row.ours:>14}{row.other:>14}{row.ratio:>12.2f}  {row.verdict}".rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of both sides (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs, of which the median counts")
    parser.add_argument("--hf-python", type=Path, help="an interpreter that has torch and transformers already")
    arguments = parser.parse_args()
    other = HuggingFace(hf_python(arguments.hf_python), arguments.threads)
    ours = Ours(arguments.threads)
    print(f"float32, {arguments.threads} threads, {platform.machine()}, Python {platform.python_version()}")
    print(f"ours: {ours.versions}; beside: {other.versions}; median of {arguments.rounds}\n", flush=True)
    rows = beside_hugging_face(ours, other, arguments.rounds)
    other.close()
    rows.append(sparse_beside_dense(ours, arguments.rounds))
    print_rows(rows)
    return 1 if any(row.verdict.startswith("FAIL") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
