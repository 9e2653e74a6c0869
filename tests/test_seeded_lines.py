"""tools/seeded_lines.py: a layer visits the same of a piece whether it was sent ahead or not; that needs no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
import pytest
import seeded_lines
from seeded_lines import SeededLines
from small_model import BUDGETS

from paddle_qwen1m.attention.positions import Piece
from paddle_qwen1m.attention.selector import LayerBudgets, Selector


class LateCarrier:
    """Copies when it must: as the computation is about to use what was sent."""

    def __init__(self) -> None:
        self.received = 0

    def send(self, pinned: Sequence[paddle.Tensor], targets: Sequence[paddle.Tensor]) -> Any:
        return pinned, targets

    def receive(self, sent: Any) -> None:
        self.received += 1
        for source, target in zip(*sent):
            target.set_value(source)


def pieces_of(*ends: int) -> list[Piece]:
    return [Piece(row=0, rows=end - begin, begin=begin) for begin, end in zip([0, *ends], ends)]


@pytest.fixture
def selectors() -> list[Selector]:
    return [
        Selector(number, LayerBudgets(*(np.asarray(one[number]) for one in (BUDGETS.vertical, BUDGETS.slash))))
        for number in range(len(BUDGETS.vertical))
    ]


def test_lines_sent_ahead_are_those_of_their_piece(selectors: list[Selector]) -> None:
    """A warm-up before; then every layer asks for every piece, the last one only from the third on; and again."""
    carrier, prompt = LateCarrier(), pieces_of(256, 512, 700, 1024, 1300)
    ahead, plain = SeededLines(3, carrier), SeededLines(3, None)  # type: ignore[arg-type]
    for selector in selectors:
        ahead.of(selector, pieces_of(128)[0])
    ahead.prepare(prompt)
    assert carrier.received == 0
    for _ in range(2):
        given: dict[int, list[paddle.Tensor]] = {}
        for number, piece in enumerate(prompt):
            for selector in selectors[: None if number >= 2 else -1]:
                lines, expected = ahead.of(selector, piece), plain.of(selector, piece)
                assert all(np.array_equal(one, other) for one, other in zip(lines, expected))
                assert not any(one is other for one in lines for other in given.get(selector.layer, []))
                given[selector.layer] = lines
    assert carrier.received == 2 * (4 * (len(selectors) - 1) + 2)


def test_a_piece_that_is_asked_for_again_is_there(selectors: list[Selector]) -> None:
    """As that of one question after the other on a document; the one before it is brought anew."""
    lines, plain, (first, second) = SeededLines(3, None), SeededLines(3, None), pieces_of(256, 512)
    selector = selectors[0]
    once, again = lines.of(selector, second), lines.of(selector, second)
    assert all(one is other for one, other in zip(once, again))
    for piece in (first, second, second):
        for one, other in zip(lines.of(selector, piece), plain.of(selector, piece)):
            np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_pieces_that_choose_nothing_have_none(selectors: list[Selector]) -> None:
    lines = SeededLines(0, None)
    lines.of(selectors[0], pieces_of(128)[0])
    lines.prepare(pieces_of(256, 300, 600))
    assert {(begin, end) for _, begin, end in lines._pinned} == {(0, 128), (0, 256), (300, 600)}


def test_selectors_visit_them_within_the_context_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Selector.choose, seeded_lines.ops.select_critical
    with seeded_lines.seeded_selection():
        assert Selector.choose is not before[0] and seeded_lines.ops.select_critical is not before[1]
    assert (Selector.choose, seeded_lines.ops.select_critical) == before
