"""Which rank holds which heads, layer by layer: in published order, or so that all visit as many keys. No Paddle here.

Ranks wait for one another in every layer, so the busiest of a layer sets its time; a placement makes that as small as
it can be. Weights, budgets, scales of an int8 cache and the names of prefixes all go by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from paddle_qwen1m.parallel.split import Part, check_degree, head_degree

if TYPE_CHECKING:
    from paddle_qwen1m.config import ModelConfig, SparseBudgets

DIGEST_BYTES = 16
STEPS = 200_000
"""Of a search: ten times what 8 heads on 2 or 4 ranks can take."""


@dataclass(frozen=True)
class Placement:
    """The heads of a model on `degree` ranks. order: of each layer every query head once, rank after rank, as many on
    each; a rank's ascend. A rank has the KV heads of its query heads: with all of their groups or, where there are more
    ranks than KV heads, one that other ranks have too. ValueError for another order.

    row_shares: how many neighbouring ranks have the same heads, of which each attends for a share of a prefill's rows.
    """

    degree: int
    num_kv_heads: int
    order: tuple[tuple[int, ...], ...]
    row_shares: int = 1

    def __post_init__(self) -> None:
        heads = len(self.order[0])
        kv_heads = max(1, self.num_kv_heads // self.parts)
        for layer, order in enumerate(self.order):
            if sorted(order) != list(range(heads)):
                raise ValueError(f"layer {layer}: every one of {heads} query heads must be on one rank, got {order}")
            for rank in range(self.degree):
                own, groups = self.query_heads(layer, rank), self.kv_heads(layer, rank)
                if list(own) != sorted(own) or len(groups) != kv_heads:
                    raise ValueError(
                        f"layer {layer}: rank {rank} of {self.degree} must have {heads // self.parts} query heads of "
                        f"{kv_heads} of {self.num_kv_heads} KV heads, ascending, got {own}"
                    )

    @property
    def parts(self) -> int:
        """Of the heads; the ranks of each have the same."""
        return self.degree // self.row_shares

    @classmethod
    def published(cls, config: ModelConfig, degree: int) -> Placement:
        """The first heads on the first rank, and so on. ValueError for a degree that the model does not have."""
        check_degree(config, degree)
        orders = (tuple(range(config.num_heads)),) * config.num_layers
        return cls(degree, config.num_kv_heads, orders, degree // head_degree(config, degree))

    @classmethod
    def balanced(cls, config: ModelConfig, degree: int, budgets: SparseBudgets | None) -> Placement:
        """In every layer the busiest rank visits as few keys as it can, by `visited`; of placements that do, one that
        leaves the ranks' sums over all layers near each other. Without budgets the published order.

        Exact for up to 8 KV heads; of more, the best that is found in STEPS. The same for the same budgets.
        """
        if budgets is None or degree == 1:
            return cls.published(config, degree)
        check_degree(config, degree)
        count = head_degree(config, degree)
        group = config.num_heads // config.num_kv_heads
        shared = max(1, count // config.num_kv_heads)
        totals, orders = [0] * count, []
        for costs in visited(budgets).tolist():
            groups = [list(range(first, first + group)) for first in range(0, config.num_heads, group)]
            if shared == 1:
                kv_costs = [sum(costs[head] for head in heads) for heads in groups]
                parts = [[head for kv in kvs for head in groups[kv]] for kvs in even_parts(kv_costs, count)]
            else:
                parts = [
                    [heads[number] for number in numbers]
                    for heads in groups
                    for numbers in even_parts([costs[head] for head in heads], shared)
                ]
            loads = [sum(costs[head] for head in part) for part in parts]
            placed: list[list[int]] = [[] for _ in range(count)]
            idle = sorted(range(count), key=lambda place: (totals[place], place))
            for part, place in zip(sorted(range(count), key=lambda part: (-loads[part], parts[part])), idle):
                placed[place] = sorted(parts[part])
                totals[place] += loads[part]
            orders.append(tuple(head for heads in placed for head in heads))
        return cls(degree, config.num_kv_heads, tuple(orders), degree // count)

    @classmethod
    def from_text(cls, config: ModelConfig, degree: int, layers: Sequence[str]) -> Placement:
        """Of `text`. ValueError for what is none of this model and degree."""
        check_degree(config, degree)
        parts = head_degree(config, degree)
        orders = [_read_layer(layer, text, parts) for layer, text in enumerate(layers)]
        if len(orders) != config.num_layers or len(orders[0]) != config.num_heads:
            shape = len(orders), len(orders[0]) if orders else 0
            raise ValueError(
                f"heads are placed for {shape} (layers, heads), the model has {(config.num_layers, config.num_heads)}"
            )
        return cls(degree, config.num_kv_heads, tuple(orders), degree // parts)

    @cached_property
    def text(self) -> list[str]:
        """A line a layer, a word a part, of the query heads from one to another: "0-4,15-19 5-14"."""
        ranks = range(0, self.degree, self.row_shares)
        return [
            " ".join(
                ",".join(f"{begin}-{end - 1}" for begin, end in runs(self.query_heads(layer, rank))) for rank in ranks
            )
            for layer in range(len(self.order))
        ]

    @cached_property
    def digest(self) -> str:
        """The same for the same placement alone."""
        return hashlib.blake2b("\n".join(self.text).encode(), digest_size=DIGEST_BYTES).hexdigest()

    def query_heads(self, layer: int, rank: int) -> tuple[int, ...]:
        """Those of a rank, in the order in which it has them."""
        share, part = len(self.order[layer]) // self.parts, rank // self.row_shares
        return self.order[layer][part * share : (part + 1) * share]

    def row_share(self, rank: int) -> int:
        """Which share of a prefill's rows a rank attends for, among those that have the same heads."""
        return rank % self.row_shares

    def kv_heads(self, layer: int, rank: int) -> tuple[int, ...]:
        """Those of a rank, in the order in which it has them."""
        group = len(self.order[layer]) // self.num_kv_heads
        return tuple(dict.fromkeys(head // group for head in self.query_heads(layer, rank)))

    def layers_kv_heads(self, rank: int) -> list[tuple[int, ...]]:
        """Those of a rank in every layer."""
        return [self.kv_heads(layer, rank) for layer in range(len(self.order))]

    def query_part(self, layer: int, rank: int, axis: int, head_dim: int) -> Part:
        """What of a tensor with head_dim rows or columns a query head is a rank's."""
        return _part(axis, self.query_heads(layer, rank), head_dim)

    def kv_part(self, layer: int, rank: int, axis: int, head_dim: int) -> Part:
        """What of a tensor with head_dim rows or columns a KV head is a rank's."""
        return _part(axis, self.kv_heads(layer, rank), head_dim)

    def imbalance(self, budgets: SparseBudgets) -> float:
        """What the busiest rank of each layer visits, over the mean of all ranks, layers added up: 1 where all visit as
        much. By as much sparse attention takes longer than it would on even ranks.
        """
        costs = visited(budgets)
        loads = np.stack([costs[layer][list(order)] for layer, order in enumerate(self.order)])
        loads = loads.reshape(len(self.order), self.parts, -1).sum(axis=-1)
        return float(loads.max(axis=1).sum() / loads.mean(axis=1).sum())


def visited(budgets: SparseBudgets) -> np.ndarray:
    """Keys that a row of a long prompt visits, int64 [layers, heads]: the columns and diagonals of its budget."""
    return budgets.vertical.astype(np.int64) + budgets.slash


def even_parts(costs: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Numbers of `costs` in `count` parts of as many each, ascending, whose dearest is as cheap as it can be.

    Branch and bound over the costs, dearest first; parts that are alike so far are tried once. Ends after STEPS.
    """
    size, ordered = len(costs) // count, sorted(range(len(costs)), key=lambda number: (-costs[number], number))
    assert size * count == len(costs)
    least = max(-(-sum(costs) // count), costs[ordered[0]])
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    best: list[tuple[int, ...]] = []
    dearest, steps = sum(costs) + 1, 0

    def place(place_of: int) -> None:
        nonlocal best, dearest, steps
        if place_of == len(ordered):
            best, dearest = [tuple(sorted(part)) for part in parts], max(loads)
            return
        number, tried = ordered[place_of], set()
        for part in sorted(range(count), key=lambda part: loads[part]):
            alike = loads[part], len(parts[part])
            load = loads[part] + costs[number]
            if len(parts[part]) == size or alike in tried or load >= dearest:
                continue
            if dearest == least or (best and steps >= STEPS):
                return
            tried.add(alike)
            steps += 1
            parts[part].append(number)
            loads[part] = load
            place(place_of + 1)
            parts[part].pop()
            loads[part] -= costs[number]

    place(0)
    return best


def runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges [begin, end) of neighbours."""
    begin = end = None
    for number in numbers:
        if begin is None or number != end:
            if begin is not None and end is not None:
                yield begin, end
            begin = number
        end = number + 1
    if begin is not None and end is not None:
        yield begin, end


def _part(axis: int, heads: Sequence[int], head_dim: int) -> Part:
    return Part(axis, tuple((begin * head_dim, end * head_dim) for begin, end in runs(heads)))


def _read_layer(layer: int, text: str, parts: int) -> tuple[int, ...]:
    words = text.split()
    if len(words) != parts:
        raise ValueError(f"layer {layer}: the heads of {parts} ranks must be {parts} words, got {text!r}")
    try:
        ranges = [tuple(map(int, one.split("-"))) for word in words for one in word.split(",")]
        return tuple(head for begin, end in ranges for head in range(begin, end + 1))
    except ValueError:
        raise ValueError(f'layer {layer}: heads must be as in "0-4,15-19 5-14", got {text!r}') from None
