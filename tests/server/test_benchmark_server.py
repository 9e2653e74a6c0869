"""What the server's benchmark prints: the keys of `vllm bench serve`, with the values that they mean there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from benchmark_server import Load, Told, summary, watched_memory

KEYS = {
    "duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
    "output_throughput", "total_token_throughput", "max_concurrency", "input_lens", "output_lens", "ttfts", "itls",
    "errors",
}  # fmt: skip
KEYS |= {f"{what}_{name}_ms" for what in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl", "e2el")}


def test_its_keys_and_what_they_mean() -> None:
    load = Load([[1, 2, 3], [4, 5], [6]], 3, 2)
    told = [
        Told(0.0, [1.0, 1.5, 2.5], 3),
        Told(1.0, [4.0, 4.5], 2),
        Told(2.0, error="429"),
    ]
    found = summary(load, told, 5.0)
    assert set(found) == KEYS
    assert (found["completed"], found["failed"], found["errors"]) == (2, 1, ["", "", "429"])
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (6, 5)
    assert (found["request_throughput"], found["output_throughput"]) == (0.4, 1.0)
    assert found["ttfts"] == [1.0, 3.0] and found["itls"] == [[0.5, 1.0], [0.5]]
    assert found["mean_ttft_ms"] == 2000 and found["median_itl_ms"] == 500
    assert found["mean_tpot_ms"] == pytest.approx((750 + 500) / 2)
    assert found["mean_e2el_ms"] == pytest.approx((2500 + 3500) / 2)


def test_the_least_free_memory_of_each_gpu_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two, as a stand-in for nvidia-smi tells it on and on; without one nothing is known."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with watched_memory() as free:
        pass
    assert free == {}
    told = tmp_path / "nvidia-smi"
    told.write_text("#!/bin/sh\nfor free in 30 10 20; do echo 0, $free; echo 1, 5; done; exec /bin/sleep 60\n")
    told.chmod(0o755)
    with watched_memory() as free:
        end = time.monotonic() + 20
        while (free.get(0), free.get(1)) != (10, 5) and time.monotonic() < end:
            time.sleep(0.01)
    assert free == {0: 10, 1: 5}
