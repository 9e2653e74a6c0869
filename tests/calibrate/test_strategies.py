"""Strategies against models of a layer's attention: brute force over the grid, and the published 14B file."""

from __future__ import annotations

import itertools
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
    output,
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
        recall = self._recall[texts].mean(0)
        return Kept(recall, self._last[texts].mean(0), self._cost, 1 - recall)

    def __call__(self, *pairs: Pairs, first_alone: bool = False, change: bool = False) -> list[Kept]:
        assert not change
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


class Changing:
    """Heads with a cost and a change of each pair of the grid, [H, columns, diagonals]."""

    def __init__(self, cost: Floats, change: Floats) -> None:
        self.table = cost, change

    @classmethod
    def of(cls, rng: np.random.Generator, heads: int) -> Changing:
        """That cost more, and change less, with more of either."""
        steps = rng.exponential(size=(2, heads, len(COLUMNS), len(DIAGONALS))) ** 3
        cost, gain = steps.cumsum(2).cumsum(3)
        return cls(cost / cost.max(), rng.exponential(size=(heads, 1, 1)) * (1 - gain / gain.max()))

    def __call__(self, *pairs: Pairs, first_alone: bool = False, change: bool = False) -> list[Kept]:
        assert change and not first_alone
        return [self.one(pair) for pair in pairs]

    def one(self, pairs: Pairs) -> Kept:
        columns, diagonals = np.searchsorted(COLUMNS, pairs.columns), np.searchsorted(DIAGONALS, pairs.diagonals)
        cost, change = (values[range(len(values)), columns, diagonals] for values in self.table)
        return Kept(1 - cost, cost, cost, change)


@pytest.mark.parametrize("cost", [0.05, 0.2, 0.6])
def test_output_finds_what_changes_least_of_all_choices(rng: np.random.Generator, cost: float) -> None:
    grid = list(itertools.product(COLUMNS, DIAGONALS))
    measure = Changing.of(rng, 3)
    kept = measure(*(Pairs(*np.tile(np.array([pair]).T, 3)) for pair in grid), change=True)
    costs, changes = (np.array([getattr(one, name) for one in kept]) for name in ("cost", "change"))
    choices = np.array(list(itertools.product(range(len(grid)), repeat=3)))
    allowed = np.ceil(costs * 1e4)[choices, range(3)].sum(1) <= 3 * cost * 1e4
    chosen = output(measure, 3, Goal(cost=cost))
    found = measure.one(chosen.pairs)
    assert 0 < allowed.sum() < len(choices)
    np.testing.assert_allclose(found.change.sum(), changes[choices, range(3)].sum(1)[allowed].min(), atol=1e-5)
    assert found.cost.mean() <= cost
    np.testing.assert_array_equal(chosen.score, found.recall)


def test_with_more_keys_output_never_changes_more(rng: np.random.Generator) -> None:
    measure, sums = Changing.of(rng, 12), []
    for cost in (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0):
        found = measure.one(output(measure, 12, Goal(cost=cost)).pairs)
        sums.append(found.change.sum())
        assert found.cost.mean() <= cost
    assert sums == sorted(sums, reverse=True) and sums[0] > sums[-1]


@pytest.mark.parametrize("scale", [0, 1e-7])
def test_a_head_that_changes_nothing_gets_the_smallest_pair(rng: np.random.Generator, scale: float) -> None:
    cost, change = Changing.of(rng, 4).table
    change[1] *= scale
    columns, diagonals = output(Changing(cost, change), 4, Goal(cost=1.0)).pairs
    assert (columns[1], diagonals[1]) == (COLUMNS[0], DIAGONALS[0])
    assert columns[0] > COLUMNS[0] and diagonals[0] > DIAGONALS[0]


def test_where_no_pairs_are_cheap_enough_all_heads_get_the_smallest() -> None:
    cost = np.full((3, len(COLUMNS), len(DIAGONALS)), 0.5)
    cost[0] = 0.01
    columns, diagonals = output(Changing(cost, 1 / np.indices(cost.shape).sum(0).clip(1)), 3, Goal(cost=0.1)).pairs
    assert set(columns) == {COLUMNS[0]} and set(diagonals) == {DIAGONALS[0]}


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
                kept.append(Kept(recall, recall, recall, recall))
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
