"""Strategies against models of a layer's attention: brute force over the grid, and the published 14B file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from paddle_qwen1m.calibrate.strategies import (
    BASES,
    COLUMNS,
    DIAGONALS,
    Candidates,
    Floats,
    Goal,
    Kept,
    Pairs,
    affordable,
    least,
    least_change,
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
        self.calls += not change
        return [self.one(pair, first_alone=first_alone) for pair in pairs]

    def one(self, pairs: Pairs, *, first_alone: bool = False) -> Kept:
        where = (
            np.arange(HEADS),
            np.searchsorted(COLUMNS, pairs.columns),
            np.searchsorted(DIAGONALS, pairs.diagonals),
        )
        assert np.array_equal(np.array(COLUMNS)[where[1]], pairs.columns)
        return Kept(*(values[where] for values in self.table(first_alone=first_alone)))


def the_one(candidates: Candidates) -> Pairs:
    """Of strategies that leave nothing to choose."""
    assert len(candidates.score) == 1
    return Pairs(*(sizes[0] for sizes in candidates.pairs))


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
    found = measure.one(the_one(chosen))
    held = holds.any((1, 2))
    assert 0 < held.sum() < HEADS, "some heads hold and some cannot"
    np.testing.assert_array_equal(found.cost[held], cheapest[held])
    np.testing.assert_array_equal(chosen.score[0], found.recall)
    np.testing.assert_array_equal(np.stack(chosen.kept)[:, 0], found)
    assert (found.cost <= goal.cost).all()
    for step in (np.array([1, 0]), np.array([0, 1])):
        column, diagonal = (np.searchsorted(*pair) for pair in zip((COLUMNS, DIAGONALS), the_one(chosen)))
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
    found = measure.one(the_one(chosen))
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

    def __len__(self) -> int:
        return len(self.table[0])


def output(layers: list[Changing], cost: float) -> list[Pairs]:
    """What the strategy gives each layer's heads; that it is what was measured is looked at."""
    goal = Goal(cost=cost)
    candidates = [affordable(layer, len(layer), goal) for layer in layers]
    found = []
    for layer, of_layer, which in zip(layers, candidates, least_change(candidates, goal)):
        places = which, np.arange(len(layer))
        found.append(Pairs(*(sizes[places] for sizes in of_layer.pairs)))
        kept = layer.one(found[-1])
        np.testing.assert_array_equal([values[places] for values in of_layer.kept], kept)
        np.testing.assert_array_equal(of_layer.score[places], kept.recall)
    return found


def together(layers: list[Changing], pairs: list[Pairs]) -> tuple[float, float]:
    """The mean cost, and the sum of the changes, of all heads."""
    kept = [layer.one(one) for layer, one in zip(layers, pairs)]
    return float(np.concatenate([one.cost for one in kept]).mean()), sum(float(one.change.sum()) for one in kept)


@pytest.mark.parametrize("cost", [0.02, 0.05, 0.2, 0.6])
def test_output_changes_little_more_than_the_least_there_is(rng: np.random.Generator, cost: float) -> None:
    """With a price on keys each head by itself finds its best pair, and no choice that costs as much in all is better
    than such a choice, by the price of what that lacks of the cost. Layers differ in size.
    """
    layers = [Changing.of(rng, heads) for heads in (30, 50, 40)]
    layers[1] = Changing(layers[1].table[0], layers[1].table[1] * 30)
    costs, changes = (np.concatenate([layer.table[which] for layer in layers]).reshape(120, -1) for which in (0, 1))
    least_of_all = max(
        (changes + price * costs).min(1).sum() - price * cost * 120 for price in np.geomspace(1e-4, 1e6, 400)
    )
    mean, change = together(layers, output(layers, cost))
    of_smallest = changes[:, 0].sum()
    assert mean <= cost
    assert least_of_all <= change <= least_of_all + 0.02 * (of_smallest - least_of_all)


def test_a_layer_that_changes_little_leaves_its_keys_to_others(rng: np.random.Generator) -> None:
    layers = [Changing.of(rng, 12), Changing.of(rng, 12)]
    layers[0] = Changing(layers[0].table[0], layers[0].table[1] * 1e-3)
    pairs = output(layers, 0.1)
    few, many = (float(layer.one(one).cost.mean()) for layer, one in zip(layers, pairs))
    assert few < 0.05 and many > 0.15


def test_with_more_keys_output_never_changes_more(rng: np.random.Generator) -> None:
    layers = [Changing.of(rng, 12), Changing.of(rng, 12)]
    found = [together(layers, output(layers, cost)) for cost in (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)]
    sums = [change for _, change in found]
    assert sums == sorted(sums, reverse=True) and sums[0] > sums[-1]


@pytest.mark.parametrize("scale", [0, 1e-7])
def test_a_head_that_changes_nothing_gets_the_smallest_pair(rng: np.random.Generator, scale: float) -> None:
    cost, change = Changing.of(rng, 4).table
    change[1] *= scale
    ((columns, diagonals),) = output([Changing(cost, change)], 1.0)
    assert (columns[1], diagonals[1]) == (COLUMNS[0], DIAGONALS[0])
    assert columns[0] > COLUMNS[0] and diagonals[0] > DIAGONALS[0]


def test_where_no_pairs_are_cheap_enough_all_heads_get_the_smallest() -> None:
    cost = np.full((3, len(COLUMNS), len(DIAGONALS)), 0.5)
    cost[0] = 0.01
    ((columns, diagonals),) = output([Changing(cost, 1 / np.indices(cost.shape).sum(0).clip(1))], 0.1)
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
            *pairs: Pairs, first_alone: bool = False, change: bool = False, bases: list[tuple[int, int]] = bases,
            scores: Floats = scores,
        ) -> list[Kept]:  # fmt: skip
            read = [(130 if columns == 30 else columns, diagonals) for columns, diagonals in bases]
            kept = []
            for one in pairs:
                is_base = np.array([pair == base for pair, base in zip(zip(*one), read)])
                assert first_alone or change or is_base.all(), "the score is that of the base"
                recall = np.where(is_base, np.maximum(scores, 0.9) if first_alone else scores, 0.0)
                kept.append(Kept(recall, recall, recall, recall))
            return kept

        chosen = published(measure, HEADS, Goal())
        assert list(zip(*the_one(chosen))) == [entry[:2] for entry in layer]
        np.testing.assert_array_equal(chosen.score[0], scores)
        count += len(layer)
    assert count == 1920


@pytest.mark.parametrize("recall, cost", [(0.0, 0.5), (1.1, 0.5), (0.9, 0.0), (float("nan"), 0.5)])
def test_goals_are_shares(recall: float, cost: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        Goal(recall, cost)
