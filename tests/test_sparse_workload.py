"""The lines that kernels and whole models are timed on: as many as the budgets say, distinct, where they may be."""

from __future__ import annotations

import numpy as np
import pytest
import sparse_workload
from sparse_workload import NO_COLUMN, Workload

BUDGETS = [(130, 12244), (3500, 1000), (1000, 6096), (16244, 12344), (0, 100)]


@pytest.mark.parametrize(("rows", "keys"), [(32768, 1015808), (8192, 65536), (4096, 32000), (512, 600)])
def test_every_piece_has_as_many_lines_as_the_budgets_say(rows: int, keys: int) -> None:
    lines = sparse_workload.make(Workload(rows, keys, "these", 64), BUDGETS, seed=(1, 2))
    for head, sizes in enumerate(BUDGETS):
        most = [min(size, keys) for size in sizes]
        for values, count, limit in zip((lines.columns, lines.slashes(keys)), most, (max(keys - rows, most[0]), keys)):
            given, padding = values[head, :count], values[head, count:]
            assert (np.diff(given) > 0).all() and (padding == NO_COLUMN).all()
            assert count == 0 or (given[0] >= 0 and given[-1] < limit)


def test_diagonals_are_the_nearest_and_runs_that_start_anywhere() -> None:
    keys, run = 1015808, 64
    lines = sparse_workload.make(Workload(32768, keys, "these", run), [(1000, 2048 + 100 * run)])
    offsets = lines.offsets[0, ::-1]
    np.testing.assert_array_equal(offsets[:2048], np.arange(2048))
    starts = offsets[2048::run]
    np.testing.assert_array_equal(offsets[2048:].reshape(-1, run), starts[:, None] + np.arange(run))
    assert len(set(starts % run)) > 40, "no tile's multiples"
    assert abs(np.mean(starts) / keys - 0.5) < 0.1 and abs(np.mean(lines.columns) / keys - 0.5) < 0.1


def test_lines_are_the_seeds() -> None:
    made = [sparse_workload.make(Workload(4096, 65536, "these", 64), BUDGETS, seed).offsets for seed in (1, 1, 2)]
    assert (made[0] == made[1]).all() and (made[0] != made[2]).any()
