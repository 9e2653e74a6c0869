"""Ranks open each other's mailboxes, all or none: threads over Paddle's store, cards that can and that cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from thread_ranks import ThreadRanks

from paddle_qwen1m import ops
from paddle_qwen1m.parallel import peers
from paddle_qwen1m.parallel.mailboxes import MAILBOXES, Mailboxes, open_mailboxes


class Cards:
    """Of ranks that are threads. A mailbox is named by its rank and lies 8 bytes behind the beginning of an allocation,
    which is found at 100 times who looks plus whose it is.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, degree: int) -> None:
        self.degree = degree
        self.makes_none: set[int] = set()
        self.names_none: set[int] = set()
        self.reaches_none: set[int] = set()
        self.ranks = ThreadRanks()
        monkeypatch.setattr(ops, "make_mailbox", self._make)
        monkeypatch.setattr(ops, "name_memory", self._name)
        monkeypatch.setattr(ops, "open_memory", self._open)

    def open_all(self) -> list[Mailboxes | None]:
        return self.ranks.run(self.degree, lambda store, rank: open_mailboxes(store, rank, self.degree))

    def _make(self, degree: int) -> int:
        assert degree == self.degree
        self._may("make_mailbox", self.makes_none)
        return 101 * self.ranks.rank + 8

    def _name(self, address: int) -> tuple[bytes, int]:
        rank = self.ranks.rank
        self._may("name_memory", self.names_none)
        assert address == 101 * rank + 8
        return bytes([rank, 0, 255]), 8

    def _open(self, name: bytes) -> int:
        self._may("open_memory", self.reaches_none)
        assert name == bytes([name[0], 0, 255])
        return 100 * self.ranks.rank + name[0]

    def _may(self, what: str, unable: set[int]) -> None:
        if self.ranks.rank in unable:
            raise OSError(f"{what}: CUDA error 217")


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_every_rank_has_all_mailboxes(monkeypatch: pytest.MonkeyPatch, degree: int) -> None:
    found = Cards(monkeypatch, degree).open_all()
    assert found == [Mailboxes([100 * rank + other + 8 for other in range(degree)], rank) for rank in range(degree)]


@pytest.mark.parametrize("which", ["makes_none", "names_none", "reaches_none"])
def test_where_one_rank_cannot_none_does(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    cards = Cards(monkeypatch, 3)
    getattr(cards, which).add(1)
    assert cards.open_all() == [None] * 3


def test_ranks_of_two_machines_have_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor does a machine that cannot be told from another."""
    cards = Cards(monkeypatch, 2)

    class BootId:
        def exists(self) -> bool:
            return True

        def read_text(self) -> str:
            return f"machine {cards.ranks.rank}\n".replace(" ", "-")

    monkeypatch.setattr(peers, "BOOT_ID", BootId())
    assert cards.open_all() == [None] * 2
    monkeypatch.setattr(peers, "BOOT_ID", tmp_path / "none")
    assert Cards(monkeypatch, 2).open_all() == [None] * 2


def test_switched_off_or_for_more_ranks_than_they_are_for_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Cards(monkeypatch, 9).open_all() == [None] * 9
    monkeypatch.setenv(MAILBOXES, "0")
    cards = Cards(monkeypatch, 2)
    cards.makes_none = cards.names_none = {0, 1}
    assert cards.open_all() == [None] * 2


def test_they_take_few_rows_of_a_hidden_state() -> None:
    boxes = Mailboxes([1, 2], 0)
    assert boxes.take(1, 3584) and boxes.take(64, 6144)
    assert not boxes.take(65, 8) and not boxes.take(1, 6152)
