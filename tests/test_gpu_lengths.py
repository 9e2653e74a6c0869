"""tools/benchmark_gpu_lengths.py: its floor, its sum over dense chunks, and its picture, which need no GPU."""

from __future__ import annotations

from pathlib import Path

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
