"""How a pair (columns, diagonals) is found for each head of a layer, given a way to measure pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Callable, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

RECALL, COST = 0.9, 0.25
COLUMNS = (130, 250, 500, 1000, 2000, 4000, 8000, 16000)
DIAGONALS = (100, 200, 400, 800, 1600, 3200, 6400, 12800)
"""The grid of `least`; it begins with what is visited in any case."""
BASES = ((30, 800), (100, 800), (500, 700), (3500, 100), (1000, 6096))
"""Columns and diagonals that the published budgets are made of."""
INCREMENTS = ((0.9, 0), (0.8, 2048), (0.7, 4096), (0.6, 8192), (0.0, 12244))
"""What both of a pair grow by, from which recall on (found in the 1,920 entries of the 14B's file)."""
LEAST_COST = 1e-6
"""A step that costs nothing more is worth this one's price."""
LEAST_CHANGE = 2.0**-18
"""What rounding to bfloat16 changes at most: `output` takes less for none."""
COST_UNIT = 1e-4
"""What `output` counts costs in, rounded up."""
RAISED, RAISED_TO = 30, 130
"""Columns of a file, and what whoever reads it makes of them: see SparseBudgets."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Pairs(NamedTuple):
    """Columns and diagonals of each head of a layer, [H] each, as they stand in a file."""

    columns: Ints
    diagonals: Ints

    @property
    def visited(self) -> Pairs:
        """As they are used."""
        return Pairs(np.where(self.columns == RAISED, RAISED_TO, self.columns), self.diagonals)


class Kept(NamedTuple):
    """What pairs keep of the attention of each head, [H] each.

    mean: the share exp(lse_sparse - lse_full), over all rows measured. last: over the last rows of the texts, where a
    question stands. cost: keys visited, as a share of all. change: what the missing keys change of the layer's output,
    the squared norm of the difference over that of the residual stream behind the attention; the mean of that over all
    rows measured and that over the last rows; NaN where it was not asked for.
    """

    mean: Floats
    last: Floats
    cost: Floats
    change: Floats

    @property
    def recall(self) -> Floats:
        """The lower of both."""
        return np.minimum(self.mean, self.last)


class Measure(Protocol):
    """Measures pairs, several in one reading of the texts; `first_alone`: on the first one, which takes less time, as
    it does without `change`.
    """

    def __call__(self, *pairs: Pairs, first_alone: bool = False, change: bool = False) -> list[Kept]: ...


@dataclass(frozen=True)
class Goal:
    """The share of the attention to keep, and the share of the keys that a head, or with `output` the mean of a layer's
    heads, may visit for it.
    """

    recall: float = RECALL
    cost: float = COST

    def __post_init__(self) -> None:
        for name in ("recall", "cost"):
            value = getattr(self, name)
            if not 0.0 < value <= 1.0:
                raise ValueError(f"--{name} must be above 0 and at most 1, got {value:g}")


class Chosen(NamedTuple):
    """Pairs, and the score that goes into the file, [H]."""

    pairs: Pairs
    score: Floats


Strategy = Callable[[Measure, int, Goal], Chosen]
"""Of how to measure, the number of heads and the goal."""


def least(measure: Measure, heads: int, goal: Goal) -> Chosen:
    """The cheapest pair of the grid that keeps the goal's recall at its cost, or what comes nearest on the way there.

    More columns or diagonals never keep less and never cost less, so that on the first text each head walks along the
    border between pairs that hold and pairs that do not, from all columns and the fewest diagonals on: at most
    len(COLUMNS) + len(DIAGONALS) measurements. What was found is measured on all texts, and grows where it fails there.
    """
    column = np.full(heads, len(COLUMNS) - 1)
    diagonal = np.zeros(heads, np.int64)
    seen: list[dict[tuple[int, int], tuple[float, float]]] = [{} for _ in range(heads)]
    walking = np.ones(heads, np.bool_)
    while walking.any():
        at = np.where(walking, [column, diagonal], 0)
        (kept,) = measure(_grid(*at), first_alone=True)
        for head in np.flatnonzero(walking):
            seen[head][int(column[head]), int(diagonal[head])] = float(kept.recall[head]), float(kept.cost[head])
        holds, too_much = kept.recall >= goal.recall, kept.cost > goal.cost
        column = column - (walking & (holds | too_much))
        diagonal = diagonal + (walking & ~holds)
        walking &= (column >= 0) & (diagonal < len(DIAGONALS))
    places = np.array([_best(found, goal) for found in seen], np.int64).T
    return _grown(measure, places, goal)


def published(measure: Measure, heads: int, goal: Goal) -> Chosen:
    """As in the published files: a pair of BASES, and an increment of both by its recall on all texts.

    Which of the five a head got is not published: here it is the first that keeps the goal's recall, else the one that
    keeps most, on the first text.
    """
    kept = np.stack([one.recall for one in measure(*(_same(base, heads) for base in BASES), first_alone=True)])
    holds = kept >= goal.recall
    base = np.where(holds.any(0), holds.argmax(0), kept.argmax(0))
    pairs = Pairs(*np.array(BASES, np.int64)[base].T)
    (found,) = measure(pairs.visited)
    return Chosen(refined(pairs, found.recall), found.recall)


def refined(bases: Pairs, score: Floats) -> Pairs:
    """Both sizes of each pair, grown by what its recall asks for."""
    by_recall = np.array([increment for _, increment in INCREMENTS])
    place = np.argmax(score[:, None] >= np.array([recall for recall, _ in INCREMENTS]), axis=1)
    return Pairs(bases.columns + by_recall[place], bases.diagonals + by_recall[place])


def output(measure: Measure, heads: int, goal: Goal) -> Chosen:
    """The pairs of the grid with the least sum of `change` of all that visit the goal's cost in the mean of the layer's
    heads; the smallest of all where none does. A head that changes little leaves its keys to others, and a layer that
    changes less than LEAST_CHANGE head by head takes no more, whatever the recall: the goal's is not asked for.
    """
    columns, diagonals = np.indices((len(COLUMNS), len(DIAGONALS))).reshape(2, -1)
    recall, cost, change = _affordable(measure, heads, goal.cost).reshape(3, -1, heads)
    best = _least_change(cost, np.where(change < LEAST_CHANGE, 0.0, change), goal.cost)
    return Chosen(_grid(columns[best], diagonals[best]), recall[best, np.arange(heads)])


STRATEGIES: dict[str, Strategy] = {"least": least, "published": published, "output": output}


def _same(pair: Sequence[int], heads: int) -> Pairs:
    return Pairs(*(np.full(heads, size, np.int64) for size in pair)).visited


def _grid(column: Ints, diagonal: Ints) -> Pairs:
    return Pairs(np.array(COLUMNS, np.int64)[column], np.array(DIAGONALS, np.int64)[diagonal])


def _affordable(measure: Measure, heads: int, mean_cost: float) -> Floats:
    """Recall, cost and change over the grid, [3, columns, diagonals, H]; infinite where a pair costs a head too much.

    More of either never costs less, so that each next diagonal of the grid is measured where both pairs before it cost
    no more than what the smallest pairs of the other heads leave.
    """
    kept = np.full((3, len(COLUMNS) + 1, len(DIAGONALS) + 1, heads), np.inf)
    cost = kept[1]
    cost[0], cost[:, 0] = 0.0, 0.0
    limits = np.full(heads, np.inf)
    for steps in range(len(COLUMNS) + len(DIAGONALS) - 1):
        places = [(at, steps - at) for at in range(len(COLUMNS)) if 0 <= steps - at < len(DIAGONALS)]
        worth = {(i, j): np.maximum(cost[i, j + 1], cost[i + 1, j]) <= limits for i, j in places}
        worth = {place: which for place, which in worth.items() if which.any()}
        # heads for which a pair costs too much are measured where that takes least
        pairs = [_grid(*(np.where(which, at, 0) for at in place)) for place, which in worth.items()]
        for ((i, j), which), one in zip(worth.items(), measure(*pairs, change=True) if pairs else []):
            kept[:, i + 1, j + 1] = np.where(which, (one.recall, one.cost, one.change), np.inf)
        limits = mean_cost * heads - cost[1, 1].sum() + cost[1, 1]
    return kept[:, 1:, 1:]


def _least_change(cost: Floats, change: Floats, mean_cost: float) -> Ints:
    """Of each head [H] a pair, given [pairs, H], where the first costs least: a knapsack, filled head by head. Of pairs
    that change as much the cheaper.
    """
    heads = np.arange(cost.shape[1])
    order = np.argsort(cost, axis=0, kind="stable")
    weights = np.ceil(np.minimum(cost[order, heads], len(heads) + 1) / COST_UNIT).astype(np.int64)
    room = int(mean_cost * len(heads) / COST_UNIT)
    filled, choices = np.zeros(room + 1), []
    for head in heads:
        before, filled, choice = filled, np.full(room + 1, np.inf), np.zeros(room + 1, np.int16)
        for place, weight in enumerate(weights[:, head]):
            sums = before[: max(0, room + 1 - weight)] + change[order[place, head], head]
            better = sums < filled[weight:]
            filled[weight:][better], choice[weight:][better] = sums[better], place
        choices.append(choice)
    chosen = np.zeros(len(heads), np.int64)
    for head in heads[::-1]:
        place = choices[head][room]
        chosen[head], room = order[place, head], max(0, room - weights[place, head])
    return chosen


def _best(found: dict[tuple[int, int], tuple[float, float]], goal: Goal) -> tuple[int, int]:
    """Of what a head was measured with."""
    allowed = {pair: kept for pair, kept in found.items() if kept[1] <= goal.cost}
    holding = {pair: kept[1] for pair, kept in allowed.items() if kept[0] >= goal.recall}
    if holding:
        return min(holding, key=holding.__getitem__)
    return max(allowed, key=lambda pair: (allowed[pair][0], -allowed[pair][1])) if allowed else (0, 0)


def _grown(measure: Measure, places: Ints, goal: Goal) -> Chosen:
    """Places on the grid, moved until they hold on all texts, as far as the goal's cost allows: each time to the next
    number of columns or of diagonals, whichever of the two gains more for what it costs more.
    """
    limits = np.array([[len(COLUMNS) - 1], [len(DIAGONALS) - 1]])
    (kept,) = measure(_grid(*places))
    growing = kept.recall < goal.recall
    while growing.any():
        steps = [places + way for way in (np.array([[1], [0]]), np.array([[0], [1]]))]
        # heads that have grown enough are measured where that takes least
        tried = measure(*(_grid(*np.where(growing, np.minimum(step, limits), 0)) for step in steps))
        worth = np.stack(
            [
                np.where(
                    (step <= limits).all(0) & (more.cost <= goal.cost),
                    (more.recall - kept.recall) / np.maximum(more.cost - kept.cost, LEAST_COST),
                    -np.inf,
                )
                for step, more in zip(steps, tried)
            ]
        )
        growing &= worth.max(0) > -np.inf
        columns_first = worth[0] >= worth[1]
        places = np.where(growing, np.where(columns_first, *steps), places)
        kept = _either(growing, _either(columns_first, *tried), kept)
        growing &= kept.recall < goal.recall
    return Chosen(_grid(*places), kept.recall)


def _either(which: npt.NDArray[np.bool_], one: Kept, other: Kept) -> Kept:
    """`one` of the heads for which it holds, `other` of the rest."""
    chosen: list[Floats] = [np.where(which, *both) for both in zip(one, other)]
    return Kept(*chosen)
