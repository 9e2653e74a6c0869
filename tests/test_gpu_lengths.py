"""tools/benchmark_gpu_lengths.py: its floor, its sum over dense chunks, and its picture, which need no GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import benchmark_gpu_lengths as lengths
import numpy as np
import pytest

from paddle_qwen1m.config import published_budgets
from paddle_qwen1m.planning import PUBLISHED

BFLOAT16 = lengths.Kept(None, "bfloat16")


@pytest.mark.parametrize("length", [1, 5, 40])
def test_pairs_are_those_of_a_loop(length: int) -> None:
    most = np.array([1, 3, 7, 100])
    assert lengths.causal_pairs(length, most) == sum(min(row + 1, m) for m in most for row in range(length))


def test_chunks_between_the_timed_ones_are_interpolated() -> None:
    """Exact where a chunk takes linearly more with the keys before it; the last, of fewer rows, takes its share."""
    begins = lengths.sampled_begins(1_010_000, 32768, 3)
    assert begins == [0, 14 * 32768, 29 * 32768]
    summed = lengths.summed_seconds(100_000, 32768, begins, [1 + begin / 1e5 for begin in begins])
    whole = [1 + begin / 1e5 for begin in range(0, 98304, 32768)]
    assert summed == pytest.approx(sum(whole) + (100_000 - 98304) / 32768 * (1 + 98304 / 1e5))
    behind = lengths.summed_seconds(1_010_000, 32768, begins, [1 + begin / 1e5 for begin in begins])
    parts = [(1 + begin / 1e5) * min(1, (1_010_000 - begin) / 32768) for begin in range(0, 1_010_000, 32768)]
    assert behind == pytest.approx(sum(parts)), "as between the last two"


def test_the_floor_of_a_million_tokens() -> None:
    """The 7B: 13 PFLOP of linears, 0.2 exp(18) of attention, which sparse budgets cut; bytes do not matter."""
    config, speeds = PUBLISHED["7B"], lengths.Speeds(800e12, 3e12)
    dense = lengths.floor_seconds(config, 10**6, 32768, BFLOAT16, None, speeds)
    linear = 2 * 6.53e9 * 1e6
    assert dense * 800e12 == pytest.approx(linear + 4 * 128 * 28 * 28 * 10**12 / 2, rel=0.01)
    sparse = lengths.floor_seconds(config, 10**6, 32768, BFLOAT16, published_budgets(config), speeds)
    assert linear / 800e12 < sparse < dense / 5
    eight_bit = lengths.floor_seconds(
        config, 10**6, 32768, lengths.Kept("fp8", "int8"), published_budgets(config), speeds
    )
    assert sparse - eight_bit == pytest.approx(linear / 2 / 800e12, rel=0.01)


def test_one_token_is_bound_by_bytes() -> None:
    config, speeds = PUBLISHED["7B"], lengths.Speeds(800e12, 3e12)
    assert lengths.floor_seconds(config, 1, 32768, BFLOAT16, None, speeds) == pytest.approx(2 * 6.53e9 / 3e12, rel=0.01)


@pytest.mark.parametrize("model", list(PUBLISHED))
def test_the_longest_prompt_leaves_room_for_the_token_that_is_waited_for(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert max(lengths.LENGTHS) <= lengths.longest_prompt(model) == 1_009_999
    arguments = ["measure", "never.json", "--model", model, "--lengths", "32768", "1010000"]
    monkeypatch.setattr(sys, "argv", ["benchmark_gpu_lengths.py", *arguments])
    with pytest.raises(SystemExit):
        lengths.main()
    assert f"--lengths: the {model} reads at most 1009999 tokens and answers one" in capsys.readouterr().err


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """One on which a token of a sparse prompt takes 10 us, and a dense chunk of 1,000 rows a second, and another second
    for every 10,000 keys before it.
    """
    for name in ("matmul_speed", "copy_bandwidth"):
        monkeypatch.setattr(lengths, name, lambda: 1e12)
    for name, value in (("set_device", None), ("cuda.empty_cache", None), ("cuda.get_device_name", "a card")):
        monkeypatch.setattr(f"paddle.device.{name}", lambda *_, value=value: value)
    engine = SimpleNamespace(max_num_batched_tokens=1000, kv_cache_dtype="bfloat16")
    monkeypatch.setattr(lengths, "random_model", lambda *_, **__: None)
    monkeypatch.setattr(lengths, "Engine", lambda *_: engine)
    monkeypatch.setattr(lengths, "random_prompt", lambda _, tokens: np.zeros(tokens, np.int64))
    monkeypatch.setattr(lengths, "sparse_seconds", lambda _, prompt: len(prompt) / 1e5)
    monkeypatch.setattr(lengths, "dense_chunk_seconds", lambda _, __, begin, ___: 1 + begin / 1e4)


def measure_into(file: Path, monkeypatch: pytest.MonkeyPatch, *given: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_gpu_lengths.py", "measure", str(file), *given])
    assert lengths.main() == 0


@pytest.mark.usefixtures("card")
def test_what_is_measured_is_summed_for_every_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_into(tmp_path / "a.json", monkeypatch, "--lengths", "10000", "500", "2000", "--dense-samples", "3")
    told = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert told["title"] == "7B, weights in bf16, keys and values in bf16, a card" and told["chunk"] == 1000
    assert told["dense_chunks"] == {"0": 1.0, "4000": 1.4, "9000": 1.9}
    rows = {row["tokens"]: (row["sparse"], row["dense"]) for row in told["lengths"]}
    assert rows == {500: (0.005, 0.5), 2000: (0.02, pytest.approx(2.1)), 10000: (0.1, pytest.approx(14.5))}


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("ends_at", "lengths_told", "chunks", "dense"),
    [
        (("sparse_seconds", 2), [500, 2000], [], [None, None]),
        (("dense_chunk_seconds", 1), [500, 2000, 10000], ["0"], [0.5, None, None]),
        (("dense_chunk_seconds", 2), [500, 2000, 10000], ["0", "4000"], [0.5, pytest.approx(2.1), None]),
    ],
)
def test_an_interrupted_run_leaves_what_it_has_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ends_at: tuple[str, int],
    lengths_told: list[int],
    chunks: list[str],
    dense: list[float | None],
) -> None:
    """A length that the timed chunks do not reach has no dense seconds yet, and no point in the picture."""
    name, calls_done = ends_at
    whole, calls = getattr(lengths, name), iter(range(100))

    def interrupted(*arguments: object) -> float:
        if next(calls) == calls_done:
            raise KeyboardInterrupt
        return float(whole(*arguments))

    monkeypatch.setattr(lengths, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_into(tmp_path / "a.json", monkeypatch, "--lengths", "500", "2000", "10000", "--dense-samples", "3")
    told = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert [row["tokens"] for row in told["lengths"]] == lengths_told and list(told["dense_chunks"]) == chunks
    assert [row["dense"] for row in told["lengths"]] == dense
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["", "picture", str(tmp_path / "a.png"), str(tmp_path / "a.json")])
    assert lengths.main() == 0 and (tmp_path / "a.png").stat().st_size > 10_000


def test_the_picture_has_a_panel_for_each_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"tokens": n, "sparse": n / 1e5, "dense": n**2 / 1e9, "sparse_floor": n / 2e5, "dense_floor": n**2 / 2e9}
        for n in (32768, 1_010_000)
    ]
    told = {"title": "made up", "lengths": rows}
    lengths.picture(tmp_path / "images" / "lengths.png", [told, told])
    assert (tmp_path / "images" / "lengths.png").stat().st_size > 10_000
    lengths.print_table(told)
    assert "| 1,010,000 | 10.10 s | 5.05 s | 1020.10 s | 510.05 s | 101.00x |" in capsys.readouterr().out
    rows[1]["dense"] = None
    lengths.print_table(told)
    assert "| 1,010,000 | 10.10 s | 5.05 s |  | 510.05 s |  |" in capsys.readouterr().out
