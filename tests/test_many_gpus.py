"""tools/benchmark_many_gpus.py: what several GPUs should take, from what fewer took."""

from __future__ import annotations

import json
import re
from pathlib import Path

import benchmark_many_gpus
import pytest


def write_run(out: Path, degree: int, first_token_s: float, decode_ms: float, attention_s: float) -> None:
    reduced = {"1": 0.0, "32768": 0.0} if degree == 1 else {"1": 0.03, "32768": 1.0}
    for rank in range(degree):
        told = {
            "rank": rank,
            "first_token_s": first_token_s,
            "decode_ms": decode_ms,
            "peak_gb": 27.0,
            "plan_gb": 27.4,
            "ops_ms": {"dca_sparse_prefill": 1e3 * attention_s, "linear": 1e3, "embedding": 100.0},
            "sums_ms": reduced,
        }
        name = "7B-131072-1.json" if degree == 1 else f"7B-131072-{degree}.{rank}.json"
        (out / name).write_text(json.dumps(told), encoding="utf-8")


def test_without_a_gpu_earlier_numbers_stand_beside_their_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """10.1 s, of which 0.1 are every rank's and 4 attention; on four ranks the busiest visits 1.444 times the mean
    (docs/performance.md), one of a chunk's four lanes waits for its two collectives a layer: 1.5 + 1.444 + 0.1 + 0.056.
    A token: 6 ms, of which 28 layers' 20.5 us are every rank's and the rest is in four parts, and 56 collectives: 1.357
    + 0.574 + 1.68.
    """
    write_run(tmp_path, 1, 10.1, 6.0, 4.0)
    write_run(tmp_path, 4, 3.4, 3.25, 1.0)
    monkeypatch.setattr("sys.argv", ["benchmark_many_gpus.py", "--out", str(tmp_path)])
    assert benchmark_many_gpus.main() == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if re.match(r"7B +131,072 +4 ", line))
    assert "3.40 (3.10)" in line and " 74% " in line and "3.25 (3.61)" in line and "1.000 (1.444)" in line


def test_without_a_gpu_and_numbers_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark_many_gpus.py", "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="no GPU was found"):
        benchmark_many_gpus.main()
