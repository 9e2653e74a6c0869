"""Strategies against models of a layer's attention: brute force over the grid, and the published 14B file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from paddle_qwen1m.calibrate.strategies import (
    BASES,
    COLUMNS,
    DIAGONALS,
    Floats,
    Goal,
    Kept,
    Pairs,
    least,
    published,
)
from paddle_qwen1m.config import CONFIGS

HEADS = 40


class Simulated:
    """Heads that keep and cost the more the more columns and diagonals they have, each in its own way, of two texts."""

    def __init__(self, rng: np.random.Generator, *, last_differs: float = 0.0) -> None:
        shape = (2, HEADS, len(COLUMNS), len(DIAGONALS))
        gains = rng.exponential(size=shape) ** 3
        sums = gains.cumsum(2).cumsum(3)
        self._recall = sums / sums[..., -1:, -1:]
        self._cost = np.broadcast_to(np.add.outer(COLUMNS, 3 * np.array(DIAGONALS)) / 60_000, shape[1:])
        self._last = self._recall * (1 - last_differs * rng.random((2, HEADS, 1, 1)))
        self.calls = 0

    def table(self, *, first_alone: bool) -> Kept:
        texts = slice(1 if first_alone else None)
        return Kept(self._recall[texts].mean(0), self._last[texts].mean(0), self._cost)

    def __call__(self, *pairs: Pairs, first_alone: bool = False) -> list[Kept]:
        self.calls += 1
        return [self.one(pair, first_alone=first_alone) for pair in pairs]

    def one(self, pairs: Pairs, *, first_alone: bool = False) -> Kept:
        where = (
            np.arange(HEADS),
            np.searchsorted(COLUMNS, pairs.columns),
            np.searchsorted(DIAGONALS, pairs.diagonals),
        )
        assert np.array_equal(np.array(COLUMNS)[where[1]], pairs.columns)
        return Kept(*(values[where] for values in self.table(first_alone=first_alone)))


class OneText(Simulated):
    """The same, where the first text is like all."""

    def table(self, *, first_alone: bool) -> Kept:
        return super().table(first_alone=False)


def test_least_finds_what_a_look_at_the_whole_grid_finds(rng: np.random.Generator) -> None:
    measure, goal = OneText(rng, last_differs=0.05), Goal(0.6, 0.7)
    chosen = least(measure, HEADS, goal)
    kept = measure.table(first_alone=False)
    allowed = kept.cost <= goal.cost
    holds = (kept.recall >= goal.recall) & allowed
    cheapest = np.where(holds, kept.cost, np.inf).min((1, 2))
    found = measure.one(chosen.pairs)
    held = holds.any((1, 2))
    assert 0 < held.sum() < HEADS, "some heads hold and some cannot"
    np.testing.assert_array_equal(found.cost[held], cheapest[held])
    np.testing.assert_array_equal(chosen.score, found.recall)
    assert (found.cost <= goal.cost).all()
    for step in (np.array([1, 0]), np.array([0, 1])):
        column, diagonal = np.searchsorted(COLUMNS, chosen.pairs.columns), np.searchsorted(DIAGONALS, chosen.pairs[1])
        for head in np.flatnonzero(~held):
            more = np.array([column[head], diagonal[head]]) + step
            assert (more >= allowed[head].shape).any() or not allowed[head][tuple(more)], "nothing more is affordable"


def test_least_measures_the_first_text_as_often_as_the_grid_is_wide_and_high(rng: np.random.Generator) -> None:
    measure = OneText(rng)
    least(measure, HEADS, Goal(0.6, 1.0))
    assert measure.calls <= len(COLUMNS) + len(DIAGONALS)


def test_what_holds_on_the_first_text_alone_grows_until_it_holds_on_all(rng: np.random.Generator) -> None:
    measure, goal = Simulated(rng), Goal(0.6, 1.0)
    chosen = least(measure, HEADS, goal)
    holds = measure.table(first_alone=False).recall >= goal.recall
    on_first = measure.table(first_alone=True)
    cheapest_on_first = np.where(on_first.recall >= goal.recall, on_first.cost, np.inf).min((1, 2))
    found = measure.one(chosen.pairs)
    assert holds.any((1, 2)).all() and (found.recall >= goal.recall).all()
    assert (found.cost > cheapest_on_first).any(), "a head has grown"


def entries_of_14b() -> list[list[tuple[int, int, float]]]:
    layers = json.loads((CONFIGS / "sparse_attention_config_14B.json").read_text(encoding="utf-8"))
    return [[tuple(entry[1:]) for entry in layer.values()] for layer in layers]


def base_of(columns: int, diagonals: int) -> tuple[int, int]:
    """Both sizes grow alike, and no two bases are equally far from square."""
    (base,) = (base for base in BASES if base[0] - base[1] == columns - diagonals)
    return base


def test_published_regenerates_the_1920_entries_of_the_14b_file() -> None:
    """From each one's base and score, which a layer with such heads would have shown."""
    count = 0
    for layer in entries_of_14b():
        bases = [base_of(columns, diagonals) for columns, diagonals, _ in layer]
        scores = np.array([score for *_, score in layer])

        def measure(
            *pairs: Pairs, first_alone: bool = False, bases: list[tuple[int, int]] = bases, scores: Floats = scores
        ) -> list[Kept]:
            read = [(130 if columns == 30 else columns, diagonals) for columns, diagonals in bases]
            kept = []
            for one in pairs:
                is_base = np.array([pair == base for pair, base in zip(zip(*one), read)])
                assert first_alone or is_base.all(), "the score is that of the base"
                recall = np.where(is_base, np.maximum(scores, 0.9) if first_alone else scores, 0.0)
                kept.append(Kept(recall, recall, recall))
            return kept

        chosen = published(measure, HEADS, Goal())
        assert list(zip(*chosen.pairs)) == [entry[:2] for entry in layer]
        np.testing.assert_array_equal(chosen.score, scores)
        count += len(layer)
    assert count == 1920


@pytest.mark.parametrize("recall, cost", [(0.0, 0.5), (1.1, 0.5), (0.9, 0.0), (float("nan"), 0.5)])
def test_goals_are_shares(recall: float, cost: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        Goal(recall, cost)
