"""tools/truth.py: answers of several choices about the same documents, as lines, a table and a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import truth
from truth import CALIBRATED, DENSE, FORCED, Cell, Truth

CELLS = [Cell("needle", 16384), Cell("ruler", 16384)]
CHOICES = [DENSE, CALIBRATED, FORCED]


@pytest.fixture
def answered(tmp_path: Path) -> Truth:
    """Ten rounds of four answers a cell. Calibrated misses one of dense's in every second round of the first cell; the
    last round of the second cell it has not had.
    """
    given = argparse.Namespace(**dict.fromkeys(truth.GIVEN))
    made = Truth(tmp_path, given)
    for cell in CELLS:
        for number in range(10):
            made.add(cell, DENSE, number, [1, 1, 1, int(cell == CELLS[0])], "all")
            made.add(cell, FORCED, number, [0, 0, 0, 0], "5.1%")
            if (cell, number) != (CELLS[1], 9):
                missed = number % 2 and cell == CELLS[0]
                made.add(cell, CALIBRATED, number, [1, 1, int(not missed), int(cell == CELLS[0])], "8.7%")
    return made


def test_differences_are_those_of_the_rounds_that_all_choices_have_had(answered: Truth) -> None:
    first, second, _, both = answered.lines(CELLS, CHOICES)
    assert (first.title, first.answers, first.dense) == ("needle, 16,384 tokens", 40, 1.0)
    assert (second.answers, second.dense) == (36, 0.75) and both.answers == 76
    assert first.others[CALIBRATED].lost.mean == -5 / 40 and first.others[CALIBRATED].visited == "8.7%"
    assert first.others[CALIBRATED].lost.low < -5 / 40 < first.others[CALIBRATED].lost.high <= 0
    assert second.others[CALIBRATED].lost.mean == 0 and both.others[CALIBRATED].lost.mean == -5 / 76
    assert both.others[FORCED].lost.mean == -both.dense and both.others[FORCED].visited == ""


def test_lengths_at_which_dense_is_good_have_a_line_together(answered: Truth) -> None:
    first, _, strong, both = answered.lines(CELLS, CHOICES)
    assert (strong.title, strong.answers, strong.dense) == ("where dense is at least 90", 40, 1.0)
    assert strong.others[CALIBRATED].lost == first.others[CALIBRATED].lost and both.dense < 0.9
    for number in range(10):
        answered.add(CELLS[1], DENSE, number, [1, 1, 1, int(number % 5 > 0)], "all")
    _, second, strong, both = answered.lines(CELLS, CHOICES)
    assert second.dense == 34 / 36 and strong == both._replace(title=strong.title) and strong.answers == 76
    assert strong.others[CALIBRATED].lost.mean == -(5 + 7) / 76 and strong.others[CALIBRATED].visited == ""


def test_there_is_no_such_line_where_dense_is_nowhere_good(answered: Truth) -> None:
    assert [line.title for line in answered.lines(CELLS[1:], CHOICES)] == ["ruler, 16,384 tokens", "all"]


def test_the_table_says_the_same(answered: Truth) -> None:
    text = truth.table(answered.lines(CELLS, CHOICES))
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.split("\n")]
    assert rows[2][:4] == ["needle, 16,384 tokens", "40", "100.0", "87.5"] and rows[2][4].startswith("-12.5 [")
    assert [row[0] for row in rows[3:]] == ["ruler, 16,384 tokens", "where dense is at least 90", "all"]
    assert {len(row) for row in rows} == {9}


def test_the_picture_is_of_any_number_of_lines(answered: Truth, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for number, cells in enumerate([CELLS, CELLS[:1], []]):
        truth.picture(tmp_path / f"{number}.png", answered.lines(cells, CHOICES))
        assert (tmp_path / f"{number}.png").read_bytes()[:4] == b"\x89PNG"
