"""How a pair (columns, diagonals) is found for each head, given a way to measure pairs layer by layer."""

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
    """The share of the attention to keep, and the share of the keys that a head, or with `output` the mean of all heads
    of all layers, may visit for it.
    """

    recall: float = RECALL
    cost: float = COST

    def __post_init__(self) -> None:
        for name in ("recall", "cost"):
            value = getattr(self, name)
            if not 0.0 < value <= 1.0:
                raise ValueError(f"--{name} must be above 0 and at most 1, got {value:g}")


class Candidates(NamedTuple):
    """Of each head of a layer n pairs that it may get, as they stand in a file, the score that goes there with it, and
    what each keeps, [n, H] each; infinite where a pair was not measured.
    """

    pairs: Pairs
    score: Floats
    kept: Kept

    @classmethod
    def one(cls, pairs: Pairs, score: Floats, kept: Kept) -> Candidates:
        """A pair a head, [H]."""
        return cls(Pairs(*(sizes[None] for sizes in pairs)), score[None], Kept(*(values[None] for values in kept)))


class Strategy(NamedTuple):
    """candidates: of a layer, of how to measure, the number of heads and the goal. choose: of all layers, and the goal;
    which of them each head gets, [H] of each layer.
    """

    candidates: Callable[[Measure, int, Goal], Candidates]
    choose: Callable[[Sequence[Candidates], Goal], list[Ints]]


def the_only_ones(layers: Sequence[Candidates], _goal: Goal) -> list[Ints]:
    return [np.zeros(layer.score.shape[1], np.int64) for layer in layers]


def least(measure: Measure, heads: int, goal: Goal) -> Candidates:
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
    pairs = _grown(measure, places, goal)
    (kept,) = measure(pairs, change=True)
    return Candidates.one(pairs, kept.recall, kept)


def published(measure: Measure, heads: int, goal: Goal) -> Candidates:
    """As in the published files: a pair of BASES, and an increment of both by its recall on all texts.

    Which of the five a head got is not published: here it is the first that keeps the goal's recall, else the one that
    keeps most, on the first text.
    """
    kept = np.stack([one.recall for one in measure(*(_same(base, heads) for base in BASES), first_alone=True)])
    holds = kept >= goal.recall
    base = np.where(holds.any(0), holds.argmax(0), kept.argmax(0))
    pairs = Pairs(*np.array(BASES, np.int64)[base].T)
    (found,) = measure(pairs.visited)
    grown = refined(pairs, found.recall)
    return Candidates.one(grown, found.recall, *measure(grown.visited, change=True))


def refined(bases: Pairs, score: Floats) -> Pairs:
    """Both sizes of each pair, grown by what its recall asks for."""
    by_recall = np.array([increment for _, increment in INCREMENTS])
    place = np.argmax(score[:, None] >= np.array([recall for recall, _ in INCREMENTS]), axis=1)
    return Pairs(bases.columns + by_recall[place], bases.diagonals + by_recall[place])


def affordable(measure: Measure, heads: int, goal: Goal) -> Candidates:
    """The pairs of the grid, unless with fewer columns or diagonals a head alone costs what all of its layer may.

    More of either never costs less: each next diagonal of the grid is measured where both pairs before it are cheap.
    """
    kept = np.full((len(Kept._fields), len(COLUMNS) + 1, len(DIAGONALS) + 1, heads), np.inf)
    cost = kept[Kept._fields.index("cost")]
    cost[0], cost[:, 0] = 0.0, 0.0
    for steps in range(len(COLUMNS) + len(DIAGONALS) - 1):
        places = [(at, steps - at) for at in range(len(COLUMNS)) if 0 <= steps - at < len(DIAGONALS)]
        worth = {(i, j): np.maximum(cost[i, j + 1], cost[i + 1, j]) <= goal.cost * heads for i, j in places}
        worth = {place: which for place, which in worth.items() if which.any()}
        # heads for which a pair costs too much are measured where that takes least
        pairs = [_grid(*(np.where(which, at, 0) for at in place)) for place, which in worth.items()]
        for ((i, j), which), one in zip(worth.items(), measure(*pairs, change=True) if pairs else []):
            kept[:, i + 1, j + 1] = np.where(which, one, np.inf)
    found = Kept(*kept[:, 1:, 1:].reshape(len(kept), -1, heads))
    grid = np.indices((len(COLUMNS), len(DIAGONALS))).reshape(2, -1, 1)
    return Candidates(_grid(*np.broadcast_to(grid, (2, *found.mean.shape))), found.recall, found)


def least_change(layers: Sequence[Candidates], goal: Goal) -> list[Ints]:
    """With which the sum of `change` over all heads is small, where their mean cost is the goal's at most; the smallest
    pairs where it cannot be. A head that changes less than LEAST_CHANGE takes no more.

    From the cheapest pairs on, always the step of one head that gains most for what it costs more and still fits.
    """
    cost, change = (np.concatenate([getattr(layer.kept, name) for layer in layers], 1) for name in ("cost", "change"))
    change = np.where(change < LEAST_CHANGE, 0.0, change)
    heads = np.arange(cost.shape[1])
    chosen = cost.argmin(0)
    while True:
        more, gain = cost - cost[chosen, heads], change[chosen, heads] - change
        fits = (gain > 0) & (cost < np.inf) & (more <= goal.cost * len(heads) - cost[chosen, heads].sum())
        worth = np.divide(gain, np.maximum(more, LEAST_COST), out=np.zeros_like(gain), where=fits)
        pair, head = np.unravel_index(worth.argmax(), worth.shape)
        if not worth[pair, head]:
            return np.split(chosen, np.cumsum([layer.score.shape[1] for layer in layers])[:-1])
        chosen[head] = pair


STRATEGIES = {
    "least": Strategy(least, the_only_ones),
    "published": Strategy(published, the_only_ones),
    "output": Strategy(affordable, least_change),
}


def _same(pair: Sequence[int], heads: int) -> Pairs:
    return Pairs(*(np.full(heads, size, np.int64) for size in pair)).visited


def _grid(column: Ints, diagonal: Ints) -> Pairs:
    return Pairs(np.array(COLUMNS, np.int64)[column], np.array(DIAGONALS, np.int64)[diagonal])


def _best(found: dict[tuple[int, int], tuple[float, float]], goal: Goal) -> tuple[int, int]:
    """Of what a head was measured with."""
    allowed = {pair: kept for pair, kept in found.items() if kept[1] <= goal.cost}
    holding = {pair: kept[1] for pair, kept in allowed.items() if kept[0] >= goal.recall}
    if holding:
        return min(holding, key=holding.__getitem__)
    return max(allowed, key=lambda pair: (allowed[pair][0], -allowed[pair][1])) if allowed else (0, 0)


def _grown(measure: Measure, places: Ints, goal: Goal) -> Pairs:
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
    return _grid(*places)


def _either(which: npt.NDArray[np.bool_], one: Kept, other: Kept) -> Kept:
    """`one` of the heads for which it holds, `other` of the rest."""
    chosen: list[Floats] = [np.where(which, *both) for both in zip(one, other)]
    return Kept(*chosen)
