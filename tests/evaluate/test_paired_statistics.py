"""Differences of two configurations on the same documents, and how sure they are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from paddle_qwen1m.evaluate.statistics import paired_difference, standard_error


def test_the_interval_of_many_documents_is_the_normal_one(rng: np.random.Generator) -> None:
    other = rng.random(400)
    one = other + rng.normal(0.1, 0.2, 400)
    found = paired_difference(one.tolist(), other.tolist(), range(400))
    difference = one - other
    half = 1.96 * difference.std(ddof=1) / math.sqrt(400)
    assert found.mean == pytest.approx(difference.mean())
    assert found.low == pytest.approx(difference.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(difference.mean() + half, abs=0.1 * half)


def test_the_truth_is_in_the_interval_about_19_times_of_20(rng: np.random.Generator) -> None:
    covered = 0
    for _ in range(60):
        differences = rng.choice([0.0, -1.0], p=[0.8, 0.2], size=50)
        found = paired_difference(differences.tolist(), [0.0] * 50, range(50))
        covered += found.low <= -0.2 <= found.high
    assert covered >= 52


def test_questions_of_one_document_are_no_more_than_one_draw(rng: np.random.Generator) -> None:
    differences = rng.choice([0.0, -1.0], size=20)
    alone = paired_difference(differences.tolist(), [0.0] * 20, range(20))
    tenfold = paired_difference(np.repeat(differences, 10).tolist(), [0.0] * 200, np.repeat(range(20), 10).tolist())
    assert (tenfold.low, tenfold.high) == pytest.approx((alone.low, alone.high))


def test_no_difference_seen_is_not_no_difference() -> None:
    found = paired_difference([1.0] * 100, [1.0] * 100, range(100))
    assert (found.mean, found.low, found.high) == (0.0, -0.03, 0.03), "the rule of three"


def test_few_documents_have_no_interval() -> None:
    found = paired_difference([1.0, 0.0, 1.0], [0.0, 0.0, 1.0], range(3))
    assert found.mean == pytest.approx(1 / 3)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_the_standard_error_is_that_of_documents(rng: np.random.Generator) -> None:
    scores = rng.random(50)
    expected = scores.std(ddof=1) / math.sqrt(50)
    assert standard_error(scores.tolist(), range(50)) == pytest.approx(expected)
    assert standard_error(np.repeat(scores, 4).tolist(), np.repeat(range(50), 4).tolist()) == pytest.approx(expected)
    assert math.isnan(standard_error([1.0, 0.0], ["one", "one"]))


def test_pairs_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="got 2, 1, 2"):
        paired_difference([1.0, 1.0], [1.0], [0, 1])
