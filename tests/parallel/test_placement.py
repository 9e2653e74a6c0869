"""Heads on ranks: the busiest rank of every layer visits as few keys as any placement allows; text, refusals, names."""

from __future__ import annotations

import dataclasses
from itertools import permutations

import numpy as np
import pytest

from paddle_qwen1m.config import ModelConfig, SparseBudgets, published_budgets
from paddle_qwen1m.parallel.placement import Placement, even_parts
from paddle_qwen1m.planning import PUBLISHED


def shape(heads: int, kv_heads: int, layers: int) -> ModelConfig:
    """Of no published model."""
    return dataclasses.replace(
        PUBLISHED["14B"], num_heads=heads, num_kv_heads=kv_heads, num_layers=layers, intermediate_size=960
    )


def random_budgets(config: ModelConfig, rng: np.random.Generator) -> SparseBudgets:
    """As far apart as published ones, some equal."""
    sizes = rng.choice([1000, 3500, 500, 30, 100, 4096], (2, config.num_layers, config.num_heads)).astype(np.int32)
    return SparseBudgets(sizes[0] + rng.integers(0, 9, sizes[0].shape, np.int32), sizes[1] + 100)


def cheapest(costs: list[int], count: int) -> int:
    """The cost of the dearest of `count` equal parts, by trying all."""
    size = len(costs) // count
    return min(
        max(sum(order[first : first + size]) for first in range(0, len(costs), size)) for order in permutations(costs)
    )


@pytest.mark.parametrize(("numbers", "count"), [(4, 2), (6, 2), (6, 3), (8, 2), (8, 4), (8, 8), (5, 5), (6, 1)])
def test_parts_are_as_even_as_brute_force_finds_them(rng: np.random.Generator, numbers: int, count: int) -> None:
    for spread in (3, 100, 100_000) if numbers < 8 else (1000,):
        costs = rng.integers(1, spread, numbers).tolist()
        parts = even_parts(costs, count)
        assert sorted(number for part in parts for number in part) == list(range(numbers))
        assert {len(part) for part in parts} == {numbers // count}
        assert max(sum(costs[number] for number in part) for part in parts) == cheapest(costs, count)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "degree"), [(8, 4, 2), (12, 4, 4), (16, 8, 2), (16, 8, 4), (8, 2, 4), (12, 2, 4), (6, 1, 3)]
)
def test_no_placement_of_kv_heads_leaves_the_busiest_rank_less(
    rng: np.random.Generator, heads: int, kv_heads: int, degree: int
) -> None:
    """Layer by layer; where several ranks share a KV head, of its query heads on them."""
    config = shape(heads, kv_heads, 1)
    budgets = random_budgets(config, rng)
    costs = (budgets.vertical + budgets.slash)[0].reshape(kv_heads, -1)
    placement = Placement.balanced(config, degree, budgets)
    if degree <= kv_heads:
        least = cheapest(costs.sum(axis=1).tolist(), degree)
    else:
        least = max(cheapest(of_head.tolist(), degree // kv_heads) for of_head in costs)
    loads = [sum(int(costs.reshape(-1)[head]) for head in placement.query_heads(0, rank)) for rank in range(degree)]
    assert max(loads) == least
    assert placement.imbalance(budgets) == pytest.approx(least * degree / costs.sum())
    for rank in range(degree):
        groups = {head * kv_heads // heads for head in placement.query_heads(0, rank)}
        assert sorted(groups) == list(placement.kv_heads(0, rank)) and len(groups) == max(1, kv_heads // degree)


@pytest.mark.parametrize(
    ("name", "degree", "before", "after"),
    [
        ("7B", 2, 1.154, 1.056), ("7B", 4, 1.444, 1.444), ("7B", 8, 1.444, 1.444),
        ("14B", 2, 1.104, 1.007), ("14B", 4, 1.278, 1.107), ("14B", 8, 1.548, 1.548),
    ],
)  # fmt: skip
def test_published_budgets_are_as_uneven_as_docs_performance_says(
    name: str, degree: int, before: float, after: float
) -> None:
    """And no rank's sum over all layers is more than 1.4 % above the mean."""
    config = PUBLISHED[name]
    budgets = published_budgets(config)
    assert budgets is not None
    placement = Placement.balanced(config, degree, budgets)
    assert Placement.published(config, degree).imbalance(budgets) == pytest.approx(before, abs=5e-4)
    assert placement.imbalance(budgets) == pytest.approx(after, abs=5e-4)
    costs = (budgets.vertical + budgets.slash).astype(int)
    sums = [
        sum(int(costs[layer, list(placement.query_heads(layer, rank))].sum()) for layer in range(config.num_layers))
        for rank in range(degree)
    ]
    assert max(sums) <= 1.014 * np.mean(sums)


def test_without_budgets_and_on_one_rank_heads_stay_in_published_order(rng: np.random.Generator) -> None:
    config = PUBLISHED["7B"]
    assert Placement.balanced(config, 4, None) == Placement.published(config, 4)
    assert Placement.published(config, 4).text == ["0-6 7-13 14-20 21-27"] * 28
    alone = Placement.balanced(config, 1, random_budgets(config, rng))
    assert alone == Placement.published(config, 1)
    assert alone.kv_heads(3, 0) == (0, 1, 2, 3) and alone.query_heads(3, 0) == tuple(range(28))


@pytest.mark.parametrize(("kv_heads", "degree"), [(8, 4), (2, 8), (1, 4), (16, 2), (16, 4)])
def test_a_placement_comes_back_from_its_text(rng: np.random.Generator, kv_heads: int, degree: int) -> None:
    """And its digest is its own: another one of a single layer has another."""
    config = shape(16, kv_heads, 3)
    placement = Placement.balanced(config, degree, random_budgets(config, rng))
    assert Placement.from_text(config, degree, placement.text) == placement
    share = 16 // degree
    for layer in range(3):
        order = placement.order[layer]
        orders = list(placement.order)
        orders[layer] = order[share:] + order[:share]
        assert dataclasses.replace(placement, order=tuple(orders)).digest != placement.digest


def test_equal_budgets_make_every_rank_do_as_much(rng: np.random.Generator) -> None:
    config = shape(16, 16, 2)
    budgets = SparseBudgets.uniform(1000, 500, 2, 16)
    assert Placement.balanced(config, 4, budgets).imbalance(budgets) == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (["0-3 4-7"], r"placed for \(1, 8\) \(layers, heads\), the model has \(2, 8\)"),
        ([], r"placed for \(0, 0\)"),
        (["0-3 4-7", "0-3"], "layer 1: the heads of 2 ranks must be 2 words, got '0-3'"),
        (["0-3 4-7", "0-3 4-x"], 'layer 1: heads must be as in "0-4,15-19 5-14"'),
        (["0-3 4-7", "0-3 4,7"], 'layer 1: heads must be as in "0-4,15-19 5-14"'),
        (["0-3 4-7", "0-3 3-6"], "layer 1: every one of 8 query heads must be on one rank"),
        (["0-3 4-7", "0-2,4-4 3-3,5-7"], "layer 1: rank 0 of 2 must have 4 query heads of 2 of 4 KV heads, ascending"),
        (["0-3 4-7", "2-3,0-1 4-7"], "layer 1: rank 0 of 2 must have 4 query heads of 2 of 4 KV heads, ascending"),
    ],
)
def test_a_text_that_is_no_placement_of_the_model_is_refused(text: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement.from_text(shape(8, 4, 2), 2, text)
