"""Sparse budgets of the published models: properties 20 and 35."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import oracle
import pytest

from paddle_qwen1m.config import CONFIGS, SparseBudgets

BASES = [(1000, 6096), (3500, 100), (30, 800), (500, 700), (100, 800)]

HISTOGRAM_14B = {
    (1000, 6096): 1002,
    (3500, 100): 145,
    (30, 800): 128,
    (500, 700): 73,
    (100, 800): 34,
    (3048, 8144): 264,
    (5548, 2148): 19,
    (2148, 2848): 3,
    (5096, 10192): 113,
    (7596, 4196): 11,
    (4196, 4896): 2,
    (4126, 4896): 1,
    (9192, 14288): 65,
    (11692, 8292): 7,
    (8292, 8992): 2,
    (13244, 18340): 46,
    (15744, 12344): 5,
}


def published_budgets(model: str) -> list[tuple[str, int, int, float]]:
    """Every head of the shipped file: (pattern, vertical, slash, score)."""
    layers = json.loads((CONFIGS / f"sparse_attention_config_{model}.json").read_text())
    for layer in layers:
        assert list(layer) == [str(head) for head in range(len(layer))]
    return [tuple(entry) for layer in layers for entry in layer.values()]


@pytest.mark.parametrize("size, expected", [(30, 130), (29, 29), (31, 31), (100, 100), (130, 130), (22032, 22032)])
def test_p20_a_vertical_size_of_30_counts_as_130(size: int, expected: int) -> None:
    """Property 20: exactly 30 becomes 130; no other size changes, the slash size never."""
    assert oracle.effective_vertical_size(size) == expected
    budgets = SparseBudgets.from_json(
        [{"1": ["vertical_and_slash", 7, 100, 1.0], "0": ["vertical_and_slash", size, 130, 0.5]}]
    )
    assert budgets.vertical.tolist() == [[expected, 7]] and budgets.slash.tolist() == [[130, 100]]


@pytest.mark.parametrize("model, layers, heads", [("7B", 28, 28), ("14B", 48, 40)])
def test_p20_published_budgets_are_read_head_by_head(model: str, layers: int, heads: int) -> None:
    """Property 20: what the model uses is the published file, with 130 for 30."""
    budgets = SparseBudgets.from_file(CONFIGS / f"sparse_attention_config_{model}.json", layers, heads)
    published = np.array([entry[1:3] for entry in published_budgets(model)]).reshape(layers, heads, 2)
    expected = np.vectorize(oracle.effective_vertical_size)(published[..., 0])
    np.testing.assert_array_equal(budgets.vertical, expected)
    np.testing.assert_array_equal(budgets.slash, published[..., 1])


BUCKETS = [(1.00005, 0), (0.9, 0), (0.8999, 2048), (0.8, 2048), (0.7, 4096), (0.6, 8192), (0.5999, 12244), (0.0, 12244)]


@pytest.mark.parametrize("recall, increment", BUCKETS)
def test_p35_recall_buckets(recall: float, increment: int) -> None:
    """Property 35: the increment of each bucket of recall, at its borders."""
    assert oracle.refine_budget((500, 700), recall) == (500 + increment, 700 + increment)


def test_p35_the_bucket_rule_regenerates_all_14b_budgets() -> None:
    """Property 35: every one of the 1920 entries is one base pair plus its stored score's increment."""
    entries = published_budgets("14B")
    assert len(entries) == 48 * 40 and {entry[0] for entry in entries} == {"vertical_and_slash"}
    for _, vertical, slash, score in entries:
        origins = [base for base in BASES if oracle.refine_budget(base, score) == (vertical, slash)]
        assert len(origins) == 1
    assert Counter((vertical, slash) for _, vertical, slash, _ in entries) == HISTOGRAM_14B


def test_published_7b_budgets_have_the_documented_statistics() -> None:
    """Section 1.4: 784 entries, their means and extremes; 218 of them do not follow the single-round rule."""
    entries = published_budgets("7B")
    verticals, slashes = [e[1] for e in entries], [e[2] for e in entries]
    assert len(entries) == 28 * 28 and {entry[0] for entry in entries} == {"vertical_and_slash"}
    assert sum(verticals) / 784 == pytest.approx(3919.9, abs=0.05)
    assert sum(slashes) / 784 == pytest.approx(7650.1, abs=0.05)
    assert (min(verticals), min(slashes), max(verticals), max(slashes)) == (30, 100, 22032, 24528)
    single_round = [any(oracle.refine_budget(base, score) == (v, s) for base in BASES) for _, v, s, score in entries]
    assert single_round.count(False) == 218
