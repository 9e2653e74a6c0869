"""What an engine does by where heads are placed: the budgets of a rank's heads, and the names of prefixes."""

from __future__ import annotations

import numpy as np
import pytest
from small_model import CONFIG

from paddle_qwen1m.config import SparseBudgets
from paddle_qwen1m.engine import Engine, Request, SamplingParams
from paddle_qwen1m.engine.runner import selectors
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.options import EngineOptions
from paddle_qwen1m.parallel.group import Group
from paddle_qwen1m.parallel.placement import Placement

BUDGETS = SparseBudgets(
    np.arange(8, dtype=np.int32).reshape(2, 4) + 40, np.arange(8, dtype=np.int32)[::-1].reshape(2, 4) + 110
)
CROSSED = Placement(2, CONFIG.num_kv_heads, ((2, 3, 0, 1), (0, 1, 2, 3)))


class RankOf(Group):
    def __init__(self, rank: int, degree: int) -> None:
        self.rank, self.degree = rank, degree


def rank(number: int, placement: Placement) -> Qwen2OneM:
    """The share of one of two ranks, which no other one joins."""
    return Qwen2OneM(CONFIG, "float32", RankOf(number, 2), placement)


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_chooses_keys_by_the_budgets_of_its_own_heads(number: int) -> None:
    for layer, selector in enumerate(selectors(rank(number, CROSSED), BUDGETS)):
        heads = list(CROSSED.query_heads(layer, number))
        np.testing.assert_array_equal(selector.budgets.vertical.numpy(), BUDGETS.vertical[layer, heads])
        np.testing.assert_array_equal(selector.budgets.slash.numpy(), BUDGETS.slash[layer, heads])


def test_prefixes_of_other_placements_have_other_names() -> None:
    request = Request("r", np.arange(9), SamplingParams(max_tokens=1, temperature=0.0))
    names = [
        Engine(rank(number, placement), EngineOptions())._name(request, None)
        for placement in (CROSSED, Placement.published(CONFIG, 2))
        for number in (0, 1)
    ]
    assert names[0] == names[1] != names[2] == names[3]
